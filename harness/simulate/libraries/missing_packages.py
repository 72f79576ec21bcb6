"""Stand-ins for packages that cannot be imported together with another software stack.

Older packages in front of the installed ones (launch.predict.overlays) may not be compatible with
all of them. Trainers need `datasets` for its types only, so it gets a stand-in; TRL that cannot be
imported is hidden, and transformers' own Trainer runs.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Iterable
from typing import Any

PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "peft",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
)


class Rows:
    """A dataset in memory."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self._columns = columns
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {name: values[at] for name, values in self._columns.items()}

    def select(self, places: Iterable[int]) -> Rows:
        """The rows at these places, in their order."""
        chosen = list(places)
        return Rows({name: [values[at] for at in chosen] for name, values in self._columns.items()})


class _Dataset:
    @staticmethod
    def from_dict(columns: dict[str, list[Any]]) -> Rows:
        return Rows(columns)


class _Anything:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass


class _Datasets(types.ModuleType):
    """Any other name is an empty class, good for isinstance and annotations."""

    Dataset = _Dataset
    __version__: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (_Anything,), {})
        setattr(self, name, made)
        return made


class _DatasetsFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stand-in under the name, and under that of every submodule."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] != "datasets":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _Datasets(spec.name)
        module.__version__ = importlib.metadata.version("datasets")
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def replace_missing() -> list[str]:
    """Import `datasets` and TRL, or replace them; returns a note for each that was replaced."""
    notes = []
    problem = _problem("datasets")
    if problem is not None:
        sys.meta_path.insert(0, _DatasetsFinder())
        importlib.import_module("datasets")
        notes.append(f"datasets cannot be imported beside this stack ({problem}): rows from memory")
    problem = _problem("trl")
    if problem is not None:
        _forget("trl")
        sys.modules["trl"] = None  # type: ignore[assignment]
        notes.append(
            f"trl cannot be imported beside this stack ({problem}): transformers' Trainer ran "
            "instead of SFTTrainer"
        )
    return notes


def _problem(name: str) -> str | None:
    try:
        importlib.import_module(name)
        if name == "trl":
            importlib.import_module("trl.trainer.sft_trainer")
    except Exception as error:
        # Anything can go wrong when packages of different ages meet.
        _forget(name)
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def _forget(name: str) -> None:
    for loaded in [key for key in sys.modules if key == name or key.startswith(name + ".")]:
        del sys.modules[loaded]


def versions() -> dict[str, str]:
    """Versions of the packages that were imported, by their `__version__`."""
    found = {"python": ".".join(str(part) for part in sys.version_info[:3])}
    for name in PACKAGES:
        module = sys.modules.get(name)
        said = getattr(module, "__version__", None)
        if isinstance(said, str):
            found[name] = said
    return found
