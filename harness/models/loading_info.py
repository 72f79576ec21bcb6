"""Whether every weight of a loaded model came out of its checkpoint.

transformers fills what a checkpoint lacks with random numbers and says so in its loading info.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.models import checkpoint
from harness.models.safetensors_header import Tensor
from harness.records import hub
from matrices.cell import Model
from matrices.errors import UserError, first_line

# How many names a message shows.
SHOWN_NAMES = 3
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
UNEXPECTED = "unexpected_checkpoint_keys"


class WeightsError(RuntimeError):
    """Weights of the model differ from its checkpoint: figures would be of another model."""


def from_pretrained(name: str, **keywords: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, and a check of what it reports.

    Raises WeightsError when a weight is missing in the checkpoint (tied ones and those that the
    architecture declares optional are not) or has another shape there, or when transformers has
    put an adapter on the model.
    """
    from transformers import AutoModelForCausalLM

    # Different shapes are refused below, with all their names.
    model, info = AutoModelForCausalLM.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, **keywords
    )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise WeightsError(
            f"{name} holds an adapter beside the weights (adapter_config.json), which transformers "
            "has put on the model; move it to a directory of its own"
        )
    raise_on(describe_problems(info))
    raise_on(describe_problems({"mismatched_keys": _other_shapes_in_4bit(model)}))
    setattr(model, UNEXPECTED, patterns(info["unexpected_keys"]))
    return model


def unexpected_weights(model: Any) -> dict[str, int]:
    """Tensors of the checkpoint that the loaded model does not have, as `patterns`."""
    return dict(getattr(model, UNEXPECTED, {}))


def raise_on(said: str) -> None:
    if said:
        raise WeightsError(said)


def describe_problems(info: Mapping[str, Any]) -> str:
    """The problems in transformers' loading info, in one line; empty when every weight was read."""
    missing = sorted(info.get("missing_keys", ()))
    mismatched = sorted(info.get("mismatched_keys", ()))
    problems = []
    if missing:
        problems.append(
            f"{_tensors(missing, 'of the model')} not in the checkpoint and would be random: "
            f"{_names(missing)}{_renamed(missing, info.get('unexpected_keys', ()))}"
        )
    if mismatched:
        name, found, wanted = mismatched[0]
        problems.append(
            f"{_tensors(mismatched)} of another shape in the checkpoint: {name} is "
            f"{_shape(found)} and the model's {_shape(wanted)}"
        )
    problems += [str(error).splitlines()[0] for error in info.get("error_msgs", ())]
    return "; ".join(problems)


def _tensors(some: Sequence[Any], of: str = "") -> str:
    noun, verb = ("tensor", "is") if len(some) == 1 else ("tensors", "are")
    return " ".join(word for word in (str(len(some)), noun, of, verb) if word)


def _names(some: Sequence[str]) -> str:
    return ", ".join(some[:SHOWN_NAMES]) + (", ..." if len(some) > SHOWN_NAMES else "")


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _renamed(missing: Sequence[str], unexpected: Iterable[str]) -> str:
    """A hint when the checkpoint has the missing tensors under another prefix; else empty."""
    by_ending: dict[str, str] = {}
    for name in missing:
        for ending in _endings(name):
            by_ending.setdefault(ending, name)
    renamed: Counter[tuple[str, str]] = Counter()
    for found in sorted(unexpected):
        for ending in _endings(found):
            if wanted := by_ending.get(ending):
                renamed[found.removesuffix(ending), wanted.removesuffix(ending)] += 1
                break
    if not renamed:
        return ""
    (found, wanted), count = renamed.most_common(1)[0]
    return f"; {count} are there under {found!r} instead of {wanted!r}: rename them"


def _endings(name: str) -> list[str]:
    """The name, and what is left of it without its first parts, down to two parts."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(max(1, len(parts) - 1))]


def patterns(names: Iterable[str]) -> dict[str, int]:
    """Names with * for numbers, and how many names each pattern stands for."""
    return dict(sorted(Counter(NUMBER.sub("*", name) for name in names).items()))


def _other_shapes_in_4bit(model: Any) -> list[tuple[str, Any, Any]]:
    """4-bit weights of another shape than their layer: transformers does not compare these."""
    found = []
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and hasattr(module, "in_features"):
            wanted = (module.out_features, module.in_features)
            if tuple(state.shape) != wanted:
                found.append((f"{name}.weight", tuple(state.shape), wanted))
    return found


def load_adapter(base: Any, directory: Path) -> Any:
    """`base` with the adapter saved in `directory`. Raises PEFT's warning as an error when weights
    of the adapter are missing: PEFT would keep initial ones."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Found missing adapter keys")
        return PeftModel.from_pretrained(base, directory)


def check(chosen: Model, skeleton: Any) -> None:
    """Compare every name and shape in the model's files with `skeleton`, the model on meta.

    Raises UserError with what loading would find missing. Files that are not here yet are not
    compared, nor weights stored in few bits: their layers are made while they are read.
    """
    directory = checkpoint.directory_of(chosen)
    if directory is None:
        return
    found = checkpoint.read(directory, complete=not hub.is_hub_model(chosen))
    if not found.files or "quantization_config" in found.config:
        return
    said = compare(skeleton, found.tensors or _torch_tensors(found.files))
    if said:
        raise UserError(f"{directory} and its config.json do not match: {said}", key="model.name")


def _torch_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    import torch

    held: dict[str, Tensor] = {}
    for file in files:
        try:
            state = torch.load(file, map_location="meta", weights_only=True)
            held |= {name: Tensor(str(t.dtype), tuple(t.shape)) for name, t in state.items()}
        except Exception as error:
            # torch says that a file is damaged, or not one of weights alone, in many types.
            raise UserError(
                f"{file} cannot be read: {first_line(error)}", key="model.name"
            ) from error
    return held


def compare(skeleton: Any, tensors: Mapping[str, Tensor]) -> str:
    """What `describe_problems` would say if `skeleton` (a model on meta) were loaded from a
    checkpoint with `tensors`. transformers itself loads meta tensors of these shapes."""
    import torch

    # Any dtype will do: only names and shapes are compared.
    empty = {
        name: torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")
        for name, tensor in tensors.items()
    }
    try:
        _, info = type(skeleton).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=empty,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map={"": "meta"},
            dtype=torch.bfloat16,
        )
    except RuntimeError as error:
        # Tensors that are merged while they are read (experts) have different shapes.
        return _missing_parts(skeleton, tensors) or str(error).splitlines()[0]
    return describe_problems(info)


def _missing_parts(skeleton: Any, tensors: Mapping[str, Tensor]) -> str:
    """The parts of merged tensors that the checkpoint lacks."""
    from transformers.core_model_loading import revert_weight_conversion

    whole = revert_weight_conversion(skeleton, skeleton.state_dict())
    return describe_problems({"missing_keys": whole.keys() - tensors.keys()})
