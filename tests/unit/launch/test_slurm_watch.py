"""The login node's watch: records that come, jobs that die, with a squeue that prints what it is
told."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from recording_display import RecordingDisplay

from harness.records.provenance import new_record
from harness.records.ranks import Placement
from harness.records.reading import read_record
from harness.records.record import Record
from harness.records.store import Store, record_key
from launch.engines import engine
from launch.engines.engine import EngineLoop, OrderedCell
from launch.engines.order import Order
from launch.engines.results_watch import PublishedRecords
from launch.engines.slurm.engine import SlurmEngine
from launch.engines.slurm.queue import Partition, SlurmNode
from launch.engines.slurm.submit import Array, JobResources
from launch.planning.plan import plan_jobs
from launch.processes.stop_signals import Signals
from matrices.cell import Cell

CPU = Partition("cpu", True, True, (SlurmNode("n1", 2, 0),), 10, 60)
Queue = Callable[..., None]


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """Says what the queue holds from now on; a code other than 0 is a squeue that fails."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(SlurmEngine, "poll_seconds", 0.0)
    for name in ("FILES_SECONDS", "SETTLE_SECONDS"):
        monkeypatch.setattr(engine, name, 0.0)
    program = tmp_path / "bin/squeue"

    def says(*lines: str, code: int = 0) -> None:
        (tmp_path / "queue").write_text("".join(f"{line}\n" for line in lines))
        program.write_text(f"#!/bin/sh\ncat {tmp_path / 'queue'}\nexit {code}\n")
        program.chmod(0o755)

    return says


@pytest.fixture
def watcher(tmp_path: Path) -> EngineLoop:
    store = Store(tmp_path / "results")
    store.prepare()
    [job] = plan_jobs([Cell(method="base")], {})
    cell_id = job.cell.cell_id
    display = RecordingDisplay()
    slurm = SlurmEngine(store.root, display, CPU, JobResources())
    slurm.tasks[cell_id] = (Array("tunebench-1", (cell_id,), (job.label,)), 0)
    order = Order(str(store.root), "")
    waiting = {cell_id: OrderedCell(job, {})}
    return EngineLoop(slurm, store, display, order, PublishedRecords(store), waiting=waiting)


def display_of(watcher: EngineLoop) -> RecordingDisplay:
    assert isinstance(watcher.display, RecordingDisplay)
    return watcher.display


def begin(watcher: EngineLoop) -> Path:
    """The working directory that a task on a node makes."""
    record = new_record(Cell(method="base"), ["true"])
    placed = record.model_copy(
        update={"placement": Placement(engine="slurm", job="5_0"), "reason": "still running"}
    )

    def first(place: Path, attempt: int) -> Record:
        return placed.model_copy(update={"attempt": attempt})

    return watcher.store.start(first, record_key(record.cell_id, record.stack_id))


def publish(watcher: EngineLoop, status: str) -> None:
    working = begin(watcher)
    record = read_record(working / "record.json")
    changes = {"status": status, "ended": record.started, "reason": "why"}
    watcher.store.publish(working, record.model_copy(update=changes))


@contextlib.contextmanager
def claimed(watcher: EngineLoop, working: Path) -> Iterator[None]:
    lock = watcher.store.claims / f"{working.name.split('.')[0]}.lock"
    held = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    yield
    os.close(held)


def test_a_cell_is_followed_from_the_queue_to_its_record(watcher: EngineLoop, queue: Queue) -> None:
    queue("tunebench-1|0|5_0|PENDING|Resources|")
    watcher.step()
    watcher.step()
    assert display_of(watcher).messages == ["slurm: 1 waiting (Resources)"], "said once"
    working = begin(watcher)
    queue("tunebench-1|0|5_0|RUNNING|None|n1")
    with claimed(watcher, working):
        watcher.step()
    assert display_of(watcher).started == ["base"]
    working.rename(working.parent.parent / "elsewhere")
    publish(watcher, "ok")
    watcher.step()
    assert display_of(watcher).finished == ["ok"]
    assert [entry.record.status for entry in watcher.entries.values()] == ["ok"]
    assert watcher.waiting == {}


def test_an_interrupted_attempt_is_waited_for_while_its_job_is_queued(
    watcher: EngineLoop, queue: Queue
) -> None:
    publish(watcher, "interrupted")
    queue("tunebench-1|0|5_0|PENDING|BeginTime|")
    watcher.step()
    assert watcher.waiting
    queue("tunebench-1|0|5_0|CANCELLED|None|n1")
    watcher.step()
    assert [entry.record.status for entry in watcher.entries.values()] == ["interrupted"]
    assert "SLURM job 5_0 ended as CANCELLED on n1" in display_of(watcher).messages[-1]


def test_what_a_dead_job_left_is_kept_with_slurms_word_for_its_end(
    watcher: EngineLoop, queue: Queue
) -> None:
    working = begin(watcher)
    queue("tunebench-1|0|5_0|NODE_FAIL|None|n1")
    with claimed(watcher, working):
        watcher.step()
    assert watcher.waiting, "somebody still measures it"
    watcher.step()
    [entry] = watcher.entries.values()
    assert entry.record.status == "interrupted"
    assert entry.record.reason == "the runner died; SLURM: NODE_FAIL on n1"
    assert entry.directory.name == working.name.split(".")[0]


def test_a_job_that_leaves_nothing_is_said_with_the_end_of_its_log(
    watcher: EngineLoop, queue: Queue
) -> None:
    folder = watcher.store.root / ".slurm" / "tunebench-1"
    folder.mkdir(parents=True)
    (folder / "5_0_log.err").write_text("first\nImportError: no torch here\n\n")
    queue("tunebench-1|N/A|5|FAILED|NonZeroExitCode|n1")
    watcher.step()
    assert watcher.waiting == {}
    assert watcher.entries == {}
    last = display_of(watcher).messages[-1]
    assert "ended as FAILED on n1 without a finished record" in last
    assert "(ImportError: no torch here)" in last


def test_a_job_the_queue_has_forgotten_is_gone(watcher: EngineLoop, queue: Queue) -> None:
    queue("tunebench-1|0|5_0|RUNNING|None|n1")
    watcher.step()
    queue()
    watcher.step()
    assert watcher.waiting == {}
    assert "ended as gone (last RUNNING) on n1" in display_of(watcher).messages[-1]


def test_a_queue_that_does_not_answer_ends_nothing(watcher: EngineLoop, queue: Queue) -> None:
    queue("slurm_load_jobs error: Unable to contact slurm controller", code=1)
    watcher.step()
    watcher.step()
    assert watcher.waiting
    assert len(display_of(watcher).messages) == 1
    assert "Unable to contact slurm controller; asking again" in display_of(watcher).messages[0]


def test_a_signal_ends_the_watch_and_names_what_is_left(watcher: EngineLoop, queue: Queue) -> None:
    queue("tunebench-1|0|5_0|RUNNING|None|n1")
    watcher.step()
    watcher.follow(Signals(received=[2], raising=False))
    assert watcher.waiting, "it goes on"
    assert "'scancel 5' cancels them" in display_of(watcher).messages[-1]
