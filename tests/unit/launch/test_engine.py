"""The loop that every engine shares, with orders that run in this process."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from recording_display import RecordingDisplay

from harness.records.provenance import new_record
from harness.records.ranks import Placement
from harness.records.reading import read_record
from harness.records.record import Record
from harness.records.store import Store, record_key
from launch.cells.runner import RunResult
from launch.engines import engine as loop
from launch.engines import remote_plan
from launch.engines.debug import DebugEngine, MachineDied
from launch.engines.engine import RESTARTS, EngineLoop, OrderState, run_on
from launch.engines.order import Order, Report
from launch.engines.results_watch import PublishedRecords
from launch.planning.plan import Sweep, plan_jobs
from launch.processes.stop_signals import Signals
from matrices.cell import Cell
from matrices.errors import UserError

Run = Callable[[Order], Report]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_SECONDS", "FILES_SECONDS", "SETTLE_SECONDS", "CANCEL_AGAIN_SECONDS"):
        monkeypatch.setattr(loop, name, 0.0)
    # Models, data and tasks are preflight's, which has tests of its own.
    monkeypatch.setattr(remote_plan, "check", lambda jobs, new, display, sweep: list(jobs))


def begin(order: Order, job: str | None = None) -> Path:
    """The working directory that a machine makes for the cell of an order."""
    record = new_record(Cell.model_validate_json(order.cell), ["true"])
    record.placement = Placement(engine="local", job=job)

    def first(place: Path, attempt: int) -> Record:
        return record.model_copy(update={"attempt": attempt})

    store = Store(Path(order.results))
    store.prepare()
    return store.start(first, record_key(record.cell_id, record.stack_id))


def publish(order: Order, status: str = "ok", job: str | None = None) -> Report:
    """What a machine leaves and answers after it has measured the cell of an order."""
    working = begin(order, job)
    record = read_record(working / "record.json")
    changes = {"status": status, "ended": record.started, "reason": "why"}
    entry = Store(Path(order.results)).publish(working, record.model_copy(update=changes))
    return Report(record.cell_id, "here", status, directory=str(entry.directory))


@contextlib.contextmanager
def claimed(working: Path) -> Iterator[None]:
    with Store(working.parent.parent).claim(working.name.split(".")[0]) as held:
        assert held
        yield


def cells(count: int) -> list[Cell]:
    return [Cell(method="base", seed=seed) for seed in range(count)]


def seed_of(order: Order) -> int:
    return Cell.model_validate_json(order.cell).seed


def ran(
    results: Path, run: Run | DebugEngine, count: int = 3, display: RecordingDisplay | None = None
) -> RunResult:
    engine = run if isinstance(run, DebugEngine) else DebugEngine(run)
    sweep = Sweep(cells(count), results, score_base=False)
    return run_on(engine, sweep, Order(str(results), ""), display or RecordingDisplay())


def statuses(finished: RunResult) -> list[str]:
    return [entry.record.status for entry in finished.entries.values()]


def test_every_cell_is_ordered_once_and_what_is_measured_is_kept(tmp_path: Path) -> None:
    orders: list[Order] = []
    display = RecordingDisplay()

    def run(order: Order) -> Report:
        orders.append(order)
        return publish(order)

    first = ran(tmp_path, run, 2, display)
    assert (statuses(first), display.finished, display.messages) == (["ok", "ok"], ["ok", "ok"], [])
    assert [seed_of(order) for order in orders] == [0, 1]
    again = ran(tmp_path, run, 3)
    assert statuses(again) == ["ok"] * 3
    assert [seed_of(order) for order in orders] == [0, 1, 2]
    assert {job.action for job in again.jobs} == {"keep", "run"}


def test_a_cell_starts_again_when_its_machine_dies_and_its_order_knows_what_was_there(
    tmp_path: Path,
) -> None:
    tries: list[Order] = []
    display = RecordingDisplay()

    def run(order: Order) -> Report:
        tries.append(order)
        if len(tries) <= RESTARTS:
            raise MachineDied("its node died")
        return publish(order)

    finished = ran(tmp_path, run, 1, display)
    assert (statuses(finished), len(tries)) == (["ok"], RESTARTS + 1)
    assert [text.split(": ")[1] for text in display.messages] == [
        "its node died; it starts again"
    ] * RESTARTS


def test_a_cell_whose_machine_dies_too_often_is_given_up_and_what_it_left_is_kept(
    tmp_path: Path,
) -> None:
    display = RecordingDisplay()
    tries = []

    def run(order: Order) -> Report:
        tries.append(order)
        if len(tries) > RESTARTS:
            begin(order)
        raise MachineDied("its node died")

    finished = ran(tmp_path, run, 1, display)
    [entry] = finished.entries.values()
    assert entry.record.status == "interrupted"
    assert entry.record.reason == "the runner died; debug: its node died"
    assert display.messages[-1].endswith("its node died; the same command runs it again")
    assert list((tmp_path / ".running").iterdir()) == []


def test_an_order_that_leaves_nothing_is_said_and_not_waited_for(tmp_path: Path) -> None:
    display = RecordingDisplay()
    finished = ran(tmp_path, lambda order: Report("", "here", directory="gone"), 1, display)
    assert finished.entries == {}
    assert "it left no finished record; the same command runs it again" in display.messages[-1]


def test_a_machine_that_cannot_write_stops_the_others_and_is_the_users_error(
    tmp_path: Path,
) -> None:
    tries = []

    def run(order: Order) -> Report:
        tries.append(seed_of(order))
        if seed_of(order) == 1:
            raise UserError("node n1: cannot write results here")
        return publish(order)

    with pytest.raises(UserError, match="node n1: cannot write"):
        ran(tmp_path, run)
    assert tries == [0, 1], "the third was cancelled"
    assert len(list(tmp_path.glob("*/record.json"))) == 1


def test_the_first_signal_keeps_the_record_of_what_runs_and_begins_no_other(
    tmp_path: Path,
) -> None:
    display = RecordingDisplay()

    def run(order: Order) -> Report:
        os.kill(os.getpid(), signal.SIGTERM)
        return publish(order, "interrupted")

    finished = ran(tmp_path, run, 3, display)
    assert finished.stopped_by == signal.SIGTERM
    assert statuses(finished) == ["interrupted"]
    assert sum(text.startswith("stopping: ") for text in display.messages) == 1


def test_a_signal_that_only_the_order_has_seen_stops_the_run(tmp_path: Path) -> None:
    tries = []

    def run(order: Order) -> Report:
        tries.append(order)
        return Report("", "here", stopped_by=signal.SIGINT)

    finished = ran(tmp_path, run)
    assert (finished.stopped_by, finished.entries, len(tries)) == (signal.SIGINT, {}, 1)


class Deaf(DebugEngine):
    """Begins the cells and does nothing more until it has been asked `asked` times to stop."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self.left = asked
        self.during_cancel: Callable[[], None] = lambda: None
        self.held = contextlib.ExitStack()

    def poll(self) -> Mapping[str, OrderState]:
        for cell, order in self.orders.items():
            if self.states[cell].phase == "waiting":
                self.states[cell] = OrderState("running", "7")
                self.held.enter_context(claimed(begin(order, "7")))
        return self.states

    def cancel(self, cells: Sequence[str]) -> str:
        self.left -= 1
        self.during_cancel()
        if self.left == 0:
            self.held.close()
            for cell in cells:
                publish(self.orders[cell], "interrupted", "7")
                self.states[cell] = OrderState("ended", "7")
        return ""


def driver(engine: DebugEngine, results: Path, count: int) -> EngineLoop:
    store = Store(results)
    store.prepare()
    found = EngineLoop(
        engine, store, RecordingDisplay(), Order(str(results), ""), PublishedRecords(store)
    )
    found.submit(plan_jobs(cells(count), {}, score_base=False))
    return found


def messages(found: EngineLoop) -> list[str]:
    assert isinstance(found.display, RecordingDisplay)
    return found.display.messages


def test_cells_that_go_on_are_asked_again_until_they_have_stopped(tmp_path: Path) -> None:
    found = driver(Deaf(asked=3), tmp_path, 2)
    found.step()
    found.follow(Signals(received=[signal.SIGINT], raising=False))
    assert [entry.record.status for entry in found.entries.values()] == ["interrupted"] * 2
    asked = "stopping: 2 cells are asked to write their records; a second Ctrl-C leaves at once"
    assert messages(found)[0] == asked, "said before they have stopped, once"
    assert messages(found).count(asked) == 1


def test_the_second_signal_leaves_at_once(tmp_path: Path) -> None:
    engine = Deaf(asked=1_000_000)
    found = driver(engine, tmp_path, 1)
    signals = Signals(received=[signal.SIGINT], raising=False)
    engine.during_cancel = lambda: signals.received.append(signal.SIGINT)
    with engine.held:
        found.follow(signals)
    assert (len(found.waiting), found.entries) == (1, {})
    assert engine.left == 999_999, "asked once"


def test_a_cell_that_never_stops_is_left_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(loop, "REPORT_SECONDS", 0.05)
    engine = Deaf(asked=1_000_000)
    found = driver(engine, tmp_path, 1)
    with engine.held:
        found.follow(Signals(received=[signal.SIGINT], raising=False))
    assert engine.left < 999_999
    assert messages(found)[-1].startswith("1 cell is left without an answer")


def test_a_cancelled_order_is_waited_for_while_its_process_goes_on(tmp_path: Path) -> None:
    engine = Deaf(asked=1_000_000)
    found = driver(engine, tmp_path, 1)
    [cell] = found.waiting
    with engine.held:
        found.step()
        engine.states[cell] = OrderState("cancelled", "7")
        found.step()
        found.step()
        assert cell in found.waiting
    found.step()
    assert found.waiting == {}


def test_the_record_of_another_runner_answers_an_order_that_waits(tmp_path: Path) -> None:
    engine = Deaf(asked=1)
    found = driver(engine, tmp_path, 1)
    publish(engine.orders[next(iter(found.waiting))])
    engine.poll_seconds = 1e9
    found.step()
    assert found.waiting == {}
    assert [entry.record.status for entry in found.entries.values()] == ["ok"]
