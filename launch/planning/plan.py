"""Which cells a run would start, keep, retry or refuse, and why. Starts and writes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from harness.evaluation.score_precision import SOFTMAX_DTYPE, softmax_dtype
from harness.ranks.launch_command import threads_per_process
from harness.records import hub, provenance
from harness.records.attempts import in_force
from harness.records.part import Status
from harness.records.prediction import Prediction
from harness.records.record import Record
from harness.records.store import Entry, record_key
from matrices.cell import Cell, base_cells
from matrices.errors import UserError, nearest
from matrices.language.labels import labels
from matrices.rules.machine import Machine
from matrices.rules.verdicts import refusals

Action = Literal["run", "retry", "keep", "invalid"]

# A run repeats these. The others are results, unless --retry names them.
RETRIED: frozenset[Status] = frozenset({"failed", "interrupted", "skipped", "invalid"})


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A request: the cells of a matrix, the statuses to repeat, and the results directory. `locate`
    gives the place of a setting in the matrix."""

    cells: Sequence[Cell]
    results: Path
    retry: frozenset[Status] = RETRIED
    score_base: bool = True
    locate: Callable[[str], str] | None = None

    def located(self, error: UserError) -> UserError:
        """The error with the place of its key, where it has none yet."""
        if self.locate is None or error.where is not None or error.key is None:
            return error
        return UserError(error.message, key=error.key, where=self.locate(error.key))


@dataclasses.dataclass(frozen=True)
class Job:
    """One cell of a run and the action for it.

    `known_attempt` is the number of the last attempt when the plan was made (0: none): a later one
    is another runner's. `implied` marks a base cell that the matrix does not name, but other cells
    are compared with it. `reported` says that the user has read `why`, for all cells that share it.
    """

    cell: Cell
    key: str
    label: str
    action: Action
    why: str
    known_attempt: int
    entry: Entry | None
    implied: bool = False
    reported: bool = False

    @property
    def will_run(self) -> bool:
        return self.action in ("run", "retry")

    def as_json(self, prediction: Prediction | None = None) -> dict[str, Any]:
        """For machines, with a short form of the prediction."""
        return {
            "cell_id": self.cell.cell_id,
            "key": self.key,
            "label": self.label,
            "action": self.action,
            "why": self.why,
            "record": str(self.entry.directory) if self.entry else None,
            "prediction": in_short(prediction) if prediction else None,
            "cell": self.cell.model_dump(mode="json"),
        }


def in_short(prediction: Prediction) -> dict[str, Any]:
    """The part of a prediction that a plan shows; `tunebench predict --json` has all of it."""
    memory = prediction.memory
    return {
        "status": prediction.status,
        "reason": prediction.reason,
        "engine": prediction.engine,
        "device": prediction.device,
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "peak_phase": memory.peak_phase,
        "quantized_share": prediction.quantized_share,
        "verdicts": {verdict.gpu: verdict.outcome for verdict in prediction.verdicts},
    }


def this_machine() -> Machine:
    """What the rules need to know of this machine and this environment."""
    stack, hardware = provenance.stack(), provenance.hardware()
    gpus = provenance.nvml().gpus if provenance.uses_gpu_here() else ()
    return Machine(
        has_gpu=bool(gpus),
        compute_capability=float("{}.{}".format(*gpus[0].compute_capability)) if gpus else None,
        packages=stack.packages,
        devices=len(gpus) or hardware.cpu_count,
    )


def retried_statuses(option: str | None) -> frozenset[Status]:
    """The statuses to run again, given `--retry oom,timeout`. Raises UserError on another word."""
    named = [word.strip() for word in (option or "").split(",") if word.strip()]
    known = [status for status in get_args(Status) if status != "predicted"]
    for word in named:
        if word not in known:
            raise UserError(
                f"--retry {word}: no such status; there are {', '.join(known)}"
                + nearest(word, known)
            )
    return RETRIED | frozenset(status for status in known if status in named)


def plan_jobs(
    cells: Sequence[Cell],
    present: Mapping[str, Entry],
    retry: frozenset[Status] = RETRIED,
    score_base: bool = True,
    machine: Machine | None = None,
    cores: Callable[[Cell], int | None] = lambda cell: None,
    counts: Callable[[Record, int], bool] | None = None,
) -> list[Job]:
    """A job for every cell on this machine and stack: base cells first, then the matrix's order.

    `present` are the records in force. A record counts for its cell when `counts` says so, given
    the threads of each process.  [default: it has the software and hardware of here and now]
    `machine` is the one that the rules are about.  [default: this one] `cores` gives the cores of a
    cell; none means all.
    """
    machine = machine or this_machine()
    counts = counts or made_here
    measured: dict[str, list[Entry]] = {}
    for entry in present.values():
        measured.setdefault(entry.record.cell_id, []).append(entry)
    reasons = {cell.cell_id: _refusal(cell, machine) for cell in cells}
    bases = _bases(cell for cell in cells if not reasons[cell.cell_id]) if score_base else []
    everything = list({cell.cell_id: cell for cell in (*bases, *cells)}.values())
    names = labels(everything)
    jobs = []
    for cell in everything:
        cell_id = cell.cell_id
        refused = reasons[cell_id] if cell_id in reasons else _refusal(cell, machine)
        threads = threads_per_process(cell, cores(cell))
        key = key_of(cell, threads)
        entries = measured.get(cell_id, [])
        found = in_force(e for e in entries if counts(e.record, threads))
        action, why = decide(found.record if found else None, refused, retry)
        known = max((e.record.attempt for e in entries if _key(e.record) == key), default=0)
        implied = cell_id not in reasons
        jobs.append(Job(cell, key, names[cell_id], action, why, known, found, implied))
    return _with_new_base_scores(jobs)


def key_of(cell: Cell, threads: int) -> str:
    """The key of a cell on this machine and stack, with `threads` threads in each process."""
    stack, hardware = provenance.stack(), provenance.hardware()
    return record_key(cell.cell_id, provenance.stack_id(cell, stack, hardware, threads))


def made_here(record: Record, threads: int) -> bool:
    """Whether a record's software and hardware are what its cell would use here now."""
    return provenance.same_stack(record, provenance.stack(), provenance.hardware(), threads)


def _key(record: Record) -> str:
    return record_key(record.cell_id, record.stack_id)


def _bases(cells: Iterable[Cell]) -> Iterator[Cell]:
    for cell in cells:
        if cell.method == "base":
            yield cell
        else:
            yield from base_cells(cell).values()


def _refusal(cell: Cell, machine: Machine) -> str:
    return "; ".join(f"{refused.rule}: {refused.reason}" for refused in refusals(cell, machine))


def decide(record: Record | None, refused: str, retry: frozenset[Status]) -> tuple[Action, str]:
    """The action for a cell, given its last record here and why this machine refuses it."""
    changed = hub.changed_since(record) if record is not None else ""
    # A result counts even if the rules refuse the cell now.
    if record is not None and record.status not in retry and (refused or not changed):
        since = f"{record.status} since {(record.ended or record.started)[:16]}Z"
        return "keep", f"{since}, but {changed}" if changed else since
    if refused:
        return "invalid", refused
    if record is None:
        return "run", "not measured on this stack"
    reason = f" ({changed or record.reason})" if changed or record.reason else ""
    return "retry", f"attempt {record.attempt} was {record.status}{reason}"


def _with_new_base_scores(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, with base models scored again when their log-likelihoods have another dtype and a
    cell that will run is compared with them. Trained cells are never repeated for their scores: a
    report compares them with base scores of the same dtype."""
    older = {job.cell.cell_id for job in jobs if _is_older(job)}
    if not older:
        return list(jobs)
    needed = {
        base.cell_id for job in jobs if job.will_run for base in base_cells(job.cell).values()
    }
    return [_again(job) if job.cell.cell_id in older & needed else job for job in jobs]


def _is_older(job: Job) -> bool:
    if job.action != "keep" or job.cell.method != "base" or job.entry is None:
        return False
    return softmax_dtype(job.entry.record) not in (None, SOFTMAX_DTYPE)


def _again(job: Job) -> Job:
    assert job.entry is not None
    before = softmax_dtype(job.entry.record)
    why = f"log-likelihoods in {before}; cells are scored in {SOFTMAX_DTYPE} now"
    return dataclasses.replace(job, action="retry", why=why)
