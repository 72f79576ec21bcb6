"""`tunebench status`: the state of every cell of a sweep, from files and SLURM's queue."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness.ranks.progress_file import Progress
from harness.records.attempts import in_force_by
from harness.records.ranks import RankState
from harness.records.store import Entry, Store
from launch.display.schedule import clock, describe
from launch.display.tables import counted, duration_seconds
from launch.engines.results_watch import PublishedRecords, UnfinishedAttempt, unfinished_attempts
from launch.engines.slurm import submit
from launch.engines.slurm.queue import JobState, NoAnswer
from matrices.cell import Cell
from matrices.language.labels import labels
from reports.text import DASH, text_table

CellState = Literal["running", "waiting", "left behind", "not started", "done"]
ORDER: tuple[CellState, ...] = ("running", "waiting", "left behind", "not started", "done")


@dataclass(frozen=True)
class CellStatus:
    """The state of one cell. `status` and `record` are of the attempt in force, even while another
    attempt runs. `job` is the engine's name of its job, `waits_for` SLURM's reason."""

    cell_id: str
    label: str
    state: CellState
    status: str | None = None
    reason: str | None = None
    record: str | None = None
    seconds: float | None = None
    hosts: tuple[str, ...] = ()
    progress: Progress | None = None
    ranks: tuple[RankState, ...] = ()
    engine: str | None = None
    job: str | None = None
    waits_for: str = ""

    def as_json(self) -> dict[str, Any]:
        plain = dataclasses.asdict(dataclasses.replace(self, ranks=()))
        return plain | {"ranks": [rank.model_dump(mode="json") for rank in self.ranks]}


@dataclass
class ResultsState:
    """The entries, attempts and jobs of a results directory, by cell_id. `note` says why SLURM's
    queue is missing."""

    entries: dict[str, Entry] = field(default_factory=dict)
    running: dict[str, UnfinishedAttempt] = field(default_factory=dict)
    queued: dict[str, JobState] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    note: str | None = None


def read_state(results: Path) -> ResultsState:
    """Read a results directory and SLURM's queue."""
    store = Store(results)
    found = ResultsState()
    # Unfinished attempts first: a cell that is published meanwhile is read twice, and never missed.
    for one in unfinished_attempts(store):
        other = found.running.get(one.record.cell_id)
        if other is None or (other.held, other.record.attempt) < (one.held, one.record.attempt):
            found.running[one.record.cell_id] = one
    found.entries = in_force_by(PublishedRecords(store).new(), lambda entry: entry.record.cell_id)
    arrays = submit.known_arrays(store)
    for array in arrays:
        found.names |= dict(zip(array.cells, array.labels, strict=True))
    unsettled = {cell for array in arrays for cell in array.cells}
    if unsettled:
        try:
            queued = submit.queued(store, unsettled)
        except NoAnswer as error:
            found.note = f"SLURM does not tell what waits: {error}"
        else:
            found.queued = {cell: state for cell, (_, state) in queued.items()}
    return found


def statuses(known: ResultsState, cells: Sequence[Cell] = ()) -> list[CellStatus]:
    """The states of the cells of a matrix, in its order; without cells, of all in the directory."""
    named = {cell.cell_id: cell for cell in cells}
    if not named:
        named = {cell_id: entry.record.cell for cell_id, entry in known.entries.items()}
        named |= {cell_id: seen.record.cell for cell_id, seen in known.running.items()}
    short = labels(list(named.values()))
    only_queued = [] if cells else [cell for cell in known.names if cell not in named]
    found = [_status(cell_id, short[cell_id], known) for cell_id in named]
    return found + [_status(cell_id, known.names[cell_id], known) for cell_id in only_queued]


def _status(cell_id: str, label: str, known: ResultsState) -> CellStatus:
    entry, seen = known.entries.get(cell_id), known.running.get(cell_id)
    found = CellStatus(cell_id, label, "not started")
    if entry is not None:
        placed = entry.record.placement
        found = dataclasses.replace(
            found,
            state="done",
            status=entry.record.status,
            reason=entry.record.reason,
            record=str(entry.directory / "record.json"),
            seconds=duration_seconds(entry.record),
            hosts=tuple(placed.hosts),
            engine=placed.engine,
            job=placed.job,
        )
    queued = known.queued.get(cell_id)
    if seen is not None and seen.held:
        return _under_way(found, seen, "running")
    if queued is not None:
        state: CellState = "waiting" if queued.waiting else "running"
        hosts = (queued.nodes,) if queued.nodes else ()
        waits = queued.reason or ("" if queued.waiting else "starting")
        return dataclasses.replace(
            found, state=state, hosts=hosts, engine="slurm", job=queued.job, waits_for=waits
        )
    if seen is not None:
        return _under_way(found, seen, "left behind")
    return found


def _under_way(found: CellStatus, seen: UnfinishedAttempt, state: CellState) -> CellStatus:
    placed = seen.record.placement
    return dataclasses.replace(
        found,
        state=state,
        hosts=tuple(seen.hosts),
        progress=seen.progress,
        ranks=tuple(seen.ranks),
        engine=placed.engine,
        job=placed.job,
    )


def status_text(found: Sequence[CellStatus], results: Path) -> str:
    """Counts, then the running, waiting and other cells."""
    if not found:
        return f"no cells in {results}"
    states = [each.status or "done" if each.state == "done" else each.state for each in found]
    rows = [_row(each) for each in sorted(found, key=lambda each: ORDER.index(each.state))]
    left = any(each.state == "left behind" for each in found)
    note = "\nleft behind: its runner died; the next run of the cell keeps it as interrupted"
    head = f"{results}: {counted(states)}"
    headers = ("cell", "state", "where", "configuration", "")
    return "\n".join([head, "", *text_table([headers, *rows])]) + (note if left else "")


def _row(each: CellStatus) -> tuple[str, ...]:
    return (
        each.cell_id[:12],
        each.status or DASH if each.state == "done" else each.state,
        _where(each),
        each.label,
        _doing(each),
    )


def _where(each: CellStatus) -> str:
    hosts = ", ".join(each.hosts) or DASH
    return f"{hosts} ({each.engine} {each.job})" if each.job else hosts


def _doing(each: CellStatus) -> str:
    if each.state == "done":
        took = clock(each.seconds) if each.seconds is not None else ""
        return ", ".join(part for part in (each.reason, took) if part)
    parts = describe(each.progress) if each.progress is not None else []
    return ", ".join([*parts, *_ranks_apart(each.ranks), *filter(None, [each.waits_for])])


def _ranks_apart(ranks: Iterable[RankState]) -> list[str]:
    """The phases and steps of the ranks, when they differ."""
    places: dict[tuple[str | None, int | None], list[str]] = {}
    known = list(ranks)
    for rank in known:
        places.setdefault((rank.phase, rank.step), []).append(str(rank.rank))
    if len(known) < 2:
        return []
    if len(places) == 1:
        return [f"{len(known)} ranks"]
    return [
        f"rank {', '.join(numbers)} in {phase or DASH}" + (f" {step}" if step else "")
        for (phase, step), numbers in places.items()
    ]
