"""`tunebench status`: what has become of every cell of a sweep, from files and SLURM's queue."""

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
from launch.display.tables import counted, seconds_taken
from launch.engines.results_watch import Published, Running, running
from launch.engines.slurm import submit
from launch.engines.slurm.queue import JobState, NoAnswer
from launch.planning.plan import labels
from matrices.cell import Cell
from reports.text import DASH, text_table

State = Literal["running", "waiting", "left behind", "not started", "done"]
ORDER: tuple[State, ...] = ("running", "waiting", "left behind", "not started", "done")


@dataclass(frozen=True)
class CellStatus:
    """Where one cell stands. `status` and `record` are of the attempt in force, whatever is under
    way now; `job` is the engine's name of its job, `waits_for` SLURM's reason."""

    cell_id: str
    label: str
    state: State
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
class Sweep:
    """What is known of a results directory, by cell_id; `note` says what could not be asked."""

    entries: dict[str, Entry] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    queued: dict[str, JobState] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    note: str | None = None


def look(results: Path) -> Sweep:
    """Everything a results directory and SLURM's queue tell now."""
    store = Store(results)
    sweep = Sweep()
    # First what runs: a cell that is published meanwhile is seen twice, and never not at all.
    for seen in running(store):
        known = sweep.running.get(seen.record.cell_id)
        if known is None or (known.held, known.record.attempt) < (seen.held, seen.record.attempt):
            sweep.running[seen.record.cell_id] = seen
    sweep.entries = in_force_by(Published(store).new(), lambda entry: entry.record.cell_id)
    arrays = submit.known_arrays(store)
    for array in arrays:
        sweep.names |= dict(zip(array.cells, array.labels, strict=True))
    unsettled = {cell for array in arrays for cell in array.cells}
    if unsettled:
        try:
            found = submit.queued(store, unsettled)
        except NoAnswer as error:
            sweep.note = f"SLURM does not tell what waits: {error}"
        else:
            sweep.queued = {cell: state for cell, (_, state) in found.items()}
    return sweep


def statuses(sweep: Sweep, cells: Sequence[Cell] = ()) -> list[CellStatus]:
    """Of the cells of a matrix in its order; without one, of all that the directory knows."""
    named = {cell.cell_id: cell for cell in cells}
    if not named:
        named = {cell_id: entry.record.cell for cell_id, entry in sweep.entries.items()}
        named |= {cell_id: seen.record.cell for cell_id, seen in sweep.running.items()}
    short = labels(list(named.values()))
    only_queued = [] if cells else [cell for cell in sweep.names if cell not in named]
    found = [_status(cell_id, short[cell_id], sweep) for cell_id in named]
    return found + [_status(cell_id, sweep.names[cell_id], sweep) for cell_id in only_queued]


def _status(cell_id: str, label: str, sweep: Sweep) -> CellStatus:
    entry, seen = sweep.entries.get(cell_id), sweep.running.get(cell_id)
    found = CellStatus(cell_id, label, "not started")
    if entry is not None:
        placed = entry.record.placement
        found = dataclasses.replace(
            found,
            state="done",
            status=entry.record.status,
            reason=entry.record.reason,
            record=str(entry.directory / "record.json"),
            seconds=seconds_taken(entry.record),
            hosts=tuple(placed.hosts),
            engine=placed.engine,
            job=placed.job,
        )
    queued = sweep.queued.get(cell_id)
    if seen is not None and seen.held:
        return _under_way(found, seen, "running")
    if queued is not None:
        state: State = "waiting" if queued.waiting else "running"
        hosts = (queued.nodes,) if queued.nodes else ()
        waits = queued.reason or ("" if queued.waiting else "starting")
        return dataclasses.replace(
            found, state=state, hosts=hosts, engine="slurm", job=queued.job, waits_for=waits
        )
    if seen is not None:
        return _under_way(found, seen, "left behind")
    return found


def _under_way(found: CellStatus, seen: Running, state: State) -> CellStatus:
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
    """Counts first, then what runs, waits, and how the rest ended."""
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
    """Where the ranks of a cell are, when they are not in one place."""
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
