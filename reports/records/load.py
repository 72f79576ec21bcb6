"""Records from disk, which of them are in force, and which base models they are judged against."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.evaluation.score_precision import WITHOUT_ARGUMENT, softmax_dtype
from harness.records import hub, provenance
from harness.records.attempts import in_force_by
from harness.records.reading import read_valid, record_files, set_aside
from harness.records.record import Record
from matrices.cell import Data, Model
from matrices.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Result:
    """A record and the file it was read from."""

    record: Record
    path: Path

    @property
    def directory(self) -> Path:
        return self.path.parent

    @functools.cached_property
    def stack_id(self) -> str:
        """What its cell used of the stack, by what the record holds."""
        return provenance.recorded_stack_id(self.record)

    @functools.cached_property
    def environment_id(self) -> str:
        """What all cells of one environment share."""
        return provenance.environment_id(self.record.stack, self.record.hardware)

    @functools.cached_property
    def configuration_id(self) -> str:
        """The identity of its cell without the seed."""
        return self.record.cell.model_copy(update={"seed": 0}).cell_id

    def read_samples(self) -> pd.DataFrame | None:
        """Per-document results (`task, metric, doc_id, doc_hash, value, weight`); none without a
        file, and with a warning when the file cannot be read."""
        if self.record.quality.samples_file is None:
            return None
        path = self.directory / self.record.quality.samples_file
        if not path.exists():
            return None
        try:
            return _read_samples(path)
        except UserError as error:
            set_aside(error)
            return None


class Index(dict[tuple[str, str, str], Result]):
    """The results in force, by cell, by what of the stack it used, and for a base model by the
    precision of its scores (see `index`)."""

    @functools.cached_property
    def by_environment(self) -> dict[tuple[str, str, str], Result]:
        """The one in force of each cell in each environment, whatever of it the cell used."""
        return in_force_by(
            self.values(), lambda r: (r.record.cell_id, r.environment_id, _precision(r.record))
        )


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
    try:
        return samples.astype({"value": float, "weight": float})
    except (TypeError, ValueError) as error:
        raise UserError(f"samples are not numbers: {error}", where=str(path)) from error


def load_records(results: Path) -> list[Result]:
    """Every `record.json` under a results directory, sorted by path; names that start with a dot
    are work in progress and skipped. What is no sound record is set aside.

    Raises UserError for a directory that is not there or holds no sound record.
    """
    if not results.is_dir():
        raise UserError("no such results directory", where=str(results))
    paths = list(record_files(results))
    read = [(read_valid(path), path) for path in paths]
    found = [Result(by_commit(record), path) for record, path in read if record is not None]
    if not found:
        raise UserError(
            f"none of its {len(paths)} record.json can be read"
            if paths
            else "no record.json in this results directory; `tunebench run MATRIX` makes them",
            where=str(results),
        )
    return found


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
    """By cell and stack the result in force (`harness.records.attempts`). Of a base model one for
    each precision of log-likelihoods, so that older cells keep a base to be judged against when it
    has been scored anew for later ones."""

    def key(result: Result) -> tuple[str, str, str]:
        return result.record.cell_id, result.stack_id, _precision(result.record)

    return Index(in_force_by(results, key))


def _precision(record: Record) -> str:
    """Of the log-likelihoods of a base model; empty for other cells and without scores."""
    return (softmax_dtype(record) or "") if record.cell.method == "base" else ""


def bases(result: Result, newest: Index) -> dict[str, Result]:
    """The `untouched` and `quantized` results to judge this one against: of the same environment,
    scored, in the same precision where there is one (another is refused when it comes to a
    difference)."""
    record, known, where = result.record, newest.by_environment, result.environment_id
    precisions = (softmax_dtype(record) or "", *WITHOUT_ARGUMENT.values(), "")
    found = {}
    for role, cell_id in record.base_cell_ids.items():
        there = [known.get((cell_id, where, precision)) for precision in precisions]
        scored = [base for base in there if base is not None and base.record.status == "ok"]
        if scored:
            found[role] = scored[0]
    return found
