"""Records from disk, which of them are in force, and which base models they are judged against."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import hub, provenance
from harness.record import Record, read_record
from matrices.cell import Data, Model
from matrices.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

# An attempt that ended like this says nothing about the cell, so an earlier one stays in force.
INCONCLUSIVE = ("interrupted", "skipped")


@dataclass(frozen=True, eq=False)
class Result:
    """A record and the file it was read from."""

    record: Record
    path: Path

    @property
    def directory(self) -> Path:
        return self.path.parent

    @functools.cached_property
    def samples(self) -> pd.DataFrame | None:
        """Per-document results (`task, metric, doc_id, doc_hash, value, weight`), none without a
        file. Raises UserError naming a file that cannot be read."""
        if self.record.quality.samples_file is None:
            return None
        path = self.directory / self.record.quality.samples_file
        return _read_samples(path) if path.exists() else None


class Index(dict[tuple[str, str], Result]):
    """The results in force, by cell and by what of the stack it used."""

    @functools.cached_property
    def by_environment(self) -> dict[tuple[str, str], Result]:
        """The newest of each cell in each environment, whatever of it the cell used."""
        found: dict[tuple[str, str], Result] = {}
        for result in self.values():
            key = (result.record.cell_id, environment(result.record))
            if key not in found or _age(result) > _age(found[key]):
                found[key] = result
        return found


def environment(record: Record) -> str:
    return provenance.environment_id(record.stack, record.hardware)


def _read_samples(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        samples = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"not a readable table of samples: {error}", where=str(path)) from error
    if "weight" not in samples:
        samples = samples.assign(weight=1.0)
    lacking = {"task", "metric", "doc_id", "doc_hash", "value"} - set(samples)
    if lacking:
        raise UserError(f"samples lack the columns {sorted(lacking)}", where=str(path))
    return samples


def load_records(results: Path) -> list[Result]:
    """Every `record.json` under a results directory, sorted by path; names that start with a dot
    are work in progress and skipped.

    Raises UserError for a directory that is not there or holds no record, and naming the file for
    one that is broken or from a newer schema.
    """
    if not results.is_dir():
        raise UserError("no such results directory", where=str(results))
    found = sorted(results.rglob("record.json"))
    places = {path.parent for path in found} - {results}
    paths = [
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(results).parts)
        # A cell repeated by hand in the directory of its record.
        and places.isdisjoint(path.parent.parents)
    ]
    if not paths:
        raise UserError(
            "no record.json in this results directory; `tunebench run MATRIX` makes them",
            where=str(results),
        )
    return [Result(by_commit(read_record(path)), path) for path in paths]


def by_commit(record: Record) -> Record:
    """The record with the commits that it read from the hub beside the branches in its cell: what
    was measured of two commits of one branch differs in the setting `revision`."""
    cell, read = record.cell, record.provenance
    changes: dict[str, Any] = {}
    if hub.is_hub_model(cell.model):
        changes["model"] = _at(cell.model, read.model.get("commit"))
    if cell.data is not None and hub.is_hub_data(cell.data):
        changes["data"] = _at(cell.data, read.data.get("commit"))
    return record.model_copy(update={"cell": cell.model_copy(update=changes)})


def _at(section: Model | Data, commit: str | None) -> Model | Data:
    if commit is None or section.revision == commit:
        return section
    named = f"{section.revision or 'main'}@{commit[:12]}"
    return section.model_copy(update={"revision": named})


def index(results: Iterable[Result]) -> Index:
    """By cell and stack the result in force: the newest conclusive attempt, or the newest attempt
    when none is conclusive."""
    newest = Index()
    for result in results:
        key = (result.record.cell_id, provenance.recorded_stack_id(result.record))
        if key not in newest or _age(result) > _age(newest[key]):
            newest[key] = result
    return newest


def _age(result: Result) -> tuple[bool, str, int]:
    # Attempts made by an older tunebench have a count of their own.
    record = result.record
    return record.status not in INCONCLUSIVE, record.started, record.attempt


def bases(result: Result, newest: Index) -> dict[str, Result]:
    """The `untouched` and `quantized` results to judge this one against: of the same environment,
    scored."""
    found = {
        role: newest.by_environment.get((cell_id, environment(result.record)))
        for role, cell_id in result.record.base_cell_ids.items()
    }
    return {role: base for role, base in found.items() if base and base.record.status == "ok"}
