"""Who is to blame when the ranks of a cell do not end well, told from what they left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from harness.meters.gpu_processes import Occupant
from harness.ranks.launch_environment import RankPosition
from harness.ranks.state_files import state_path
from harness.records.provenance import new_record
from harness.records.ranks import Failure, Placement, RankState
from harness.records.record import Record
from harness.records.speed import Speed
from launch.cells import stalled_ranks, watch
from launch.cells.finish import contamination, finish_record
from launch.cells.stalled_ranks import RankProgress, positions_text
from launch.cells.watch import CellExit, Limits, RankFailure, RankProcesses, limits_for
from launch.processes.workers import Ranks
from matrices.cell import Cell

TWO = tuple(RankPosition(local_rank=rank, local_ranks=2) for rank in range(2))


class Gone:
    """A process that has ended, or not."""

    def __init__(self, exitcode: int | None, pid: int = 2**22 + 1) -> None:
        self.exitcode, self.pid, self.sentinel = exitcode, pid, -1

    def join(self) -> None: ...


def write(working: Path, *states: RankState) -> None:
    for state in states:
        path = state_path(working, state.rank)
        path.parent.mkdir(exist_ok=True)
        path.write_text(state.model_dump_json())


def begun(working: Path, **changes: Any) -> Record:
    record = new_record(Cell(method="base"), []).model_copy(update=changes)
    (working / "record.json").write_text(record.to_json())
    return record


def test_only_cells_on_several_devices_have_a_limit_that_nobody_asked_for() -> None:
    assert limits_for(1, 60.0, None) == Limits(60.0, 14400.0, of_evaluation=False)
    assert limits_for(1, None, 5.0) == Limits(None, 5.0, of_evaluation=True)
    assert limits_for(2, None, None) == Limits(None, 1800.0, of_evaluation=False)
    assert limits_for(2, None, 5.0) == Limits(None, 5.0, of_evaluation=True)


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        (
            [
                RankProgress(0, "train", 2, waits_in="all_reduce"),
                RankProgress(1, "train", 2, frozen=True),
            ],
            "rank 1 stopped in train of step 3 (process frozen); "
            "rank 0 waited in all_reduce in train of step 3",
        ),
        (
            [RankProgress(r, "train", 4, part="backward") for r in (0, 2)]
            + [RankProgress(1, "train", 3, part="optimizer step")],
            "rank 1 lagged behind in optimizer step of step 4; "
            "ranks 0, 2 waited in backward of step 5",
        ),
        (
            [RankProgress(0, "load", None), RankProgress(1, "load", None, silent_seconds=42.4)],
            "rank 1 stopped in load (no sign of life for 42 s); rank 0 waited in load",
        ),
        (
            [RankProgress(r, "memory_steps", None, waits_in="barrier") for r in range(10)],
            "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more stood in barrier in memory steps",
        ),
        (
            [RankProgress(0, "train", 0), RankProgress(1, "load", None)],
            "rank 1 lagged behind in load; rank 0 waited in train of step 1",
        ),
        ([], ""),
    ],
)
def test_where_ranks_stand_in_words(positions: list[RankProgress], text: str) -> None:
    assert positions_text(positions) == text


def test_a_stack_tells_the_collective_and_the_part_of_the_step(tmp_path: Path) -> None:
    # As faulthandler writes it, and as py-spy does.
    dumped = tmp_path / "stack.txt"
    dumped.write_text(
        "Current thread 0x00007f (most recent call first):\n"
        '  File "/x/torch/distributed/distributed_c10d.py", line 2838 in all_reduce\n'
        '  File "/x/torch/distributed/c10d_logger.py", line 83 in wrapper\n'
        '  File "/x/torch/autograd/graph.py", line 979 in _engine_run_backward\n'
    )
    assert stalled_ranks._collective(dumped) == "all_reduce"
    assert stalled_ranks._part(dumped) == "backward"
    dumped.write_text(
        "    wrapper (torch/distributed/c10d_logger.py:83)\n"
        "    barrier (torch/distributed/distributed_c10d.py:4159)\n"
        "    step (torch/optim/adamw.py:12)\n"
    )
    assert stalled_ranks._collective(dumped) == "barrier"
    assert stalled_ranks._part(dumped) == "optimizer step"
    assert stalled_ranks._collective(tmp_path / "none") is None


def test_only_processes_with_a_handler_are_asked_for_their_stacks() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        assert not stalled_ranks._catches(os.getpid(), signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
        assert stalled_ranks._catches(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def failing(rank: int, message: str, **more: Any) -> RankState:
    failure = Failure(type="RuntimeError", message=message, phase="train")
    changes = {"status": "failed", "reason": f"train: {message}", "failure": failure} | more
    return RankState(rank=rank, world_size=2, phase="train", **changes)


@pytest.mark.parametrize(
    "consequence",
    [
        "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.2]:5123",
        "[../gloo/transport/tcp/pair.cc:535] Connection reset by peer",
        "NCCL Error 6: remote process exited or there was a network error",
        "Connection was likely closed. Did the remote server shutdown or crash?",
        "writev [127.0.0.1]:4711: Broken pipe",
        "Timed out waiting 1800000ms for recv operation to complete",
    ],
)
def test_who_lost_the_connection_is_not_to_blame_however_quick(
    tmp_path: Path, consequence: str
) -> None:
    begun(tmp_path, status="failed", ended="2026-01-01T00:00:00.000+00:00")
    write(tmp_path, failing(0, consequence), failing(1, "index out of range"))
    outcome = CellExit(
        1, exit_codes={0: 1, 1: 1}, failed=(RankFailure(0, 10.0), RankFailure(1, 11.0))
    )
    record = finish_record(tmp_path, outcome)
    assert (record.status, record.reason) == ("failed", "rank 1: train: index out of range")
    assert record.failure is not None
    assert record.failure.message == "index out of range"


def test_of_two_failures_the_first_counts(tmp_path: Path) -> None:
    begun(tmp_path)
    write(tmp_path, failing(0, "b"), failing(1, "a", status="oom"))
    outcome = CellExit(
        1, exit_codes={0: 1, 1: 1}, failed=(RankFailure(0, 12.0), RankFailure(1, 11.5))
    )
    assert finish_record(tmp_path, outcome).status == "oom"


def test_an_abort_after_all_is_done_is_not_hidden(tmp_path: Path) -> None:
    begun(tmp_path, status="ok", ended="2026-01-01T00:00:00.000+00:00")
    write(tmp_path, *(RankState(rank=rank, status="ok", phase="gather") for rank in range(2)))
    outcome = CellExit(0, exit_codes={0: 0, 1: -6}, failed=(RankFailure(1, 1.0, -6),))
    record = finish_record(tmp_path, outcome)
    assert record.status == "failed"
    assert record.reason == "rank 1 was killed by signal 6 (SIGABRT) after it had finished"


def test_a_rank_that_the_kernel_killed_for_memory_is_an_oom(tmp_path: Path) -> None:
    begun(tmp_path)
    write(tmp_path, RankState(rank=0, phase="train"), RankState(rank=1, phase="load"))
    failed = (RankFailure(1, 1.0, -9),)
    outcome = CellExit(-15, memory_kills=1, exit_codes={0: -15, 1: -9}, failed=failed)
    record = finish_record(tmp_path, outcome)
    assert (record.status, record.phase) == ("oom", "load")
    assert record.reason == "the kernel killed rank 1: the machine's memory ran out"


def test_a_timeout_stays_one_though_ranks_then_lose_each_other(tmp_path: Path) -> None:
    begun(tmp_path, status="failed", ended="2026-01-01T00:00:00.000+00:00")
    last_states = {1: RankState(rank=1, phase="train", step=3)}
    write(tmp_path, failing(0, "Connection closed by peer"), RankState(rank=1, step=9))
    outcome = CellExit(
        1,
        "timeout",
        90.0,
        exit_codes={0: 1, 1: -9},
        positions="rank 1 lagged",
        last_states=last_states,
    )
    record = finish_record(tmp_path, outcome)
    assert (record.status, record.reason) == ("timeout", "over its limit of 90 s: rank 1 lagged")
    assert record.failure is None
    assert record.ranks[1].step == 3, "as it stood, not where it went before it was killed"


def polled(watched: RankProcesses) -> CellExit:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if (outcome := watched.poll([])) is not None:
            return outcome
    raise AssertionError("no outcome")


def test_a_rank_on_another_machine_that_falls_silent_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STATE_SECONDS", "PEER_GRACE_SECONDS", "PEER_KILL_SECONDS"):
        monkeypatch.setattr(watch, name, 0.0)
    monkeypatch.setattr(watch, "LOST_SECONDS", 0.2)
    here = Gone(None)

    def kill(process: Gone) -> None:
        process.exitcode = -9

    monkeypatch.setattr(watch, "kill_group", kill)
    monkeypatch.setattr(watch, "terminate_worker", lambda process: None)
    write(tmp_path, RankState(rank=0), RankState(rank=1, host="node2", beat=1.0, phase="train"))
    begun(tmp_path)
    place = RankPosition(0, 1, 0, 2, "10.0.0.1", 1)
    outcome = polled(RankProcesses([here], tmp_path, Limits(), Ranks((place,))))
    record = finish_record(tmp_path, outcome)
    assert record.status == "failed"
    assert (record.reason or "").startswith("rank 1 on node2 has shown no sign of life for ")


def test_killed_processes_have_to_give_the_gpu_back_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [Occupant("GPU-a", "A100", 4321, "python", 2**30)]
    asked: list[list[str]] = []

    def occupants(gpus: list[str]) -> list[Occupant]:
        asked.append(gpus)
        return list(held)

    monkeypatch.setattr(watch, "occupants", occupants)
    monkeypatch.setattr(watch, "kill_group", lambda process: None)
    monkeypatch.setattr(RankProcesses, "pids", lambda self: {4321})
    write(tmp_path, *(RankState(rank=rank, device="GPU-a") for rank in range(2)))
    watched = RankProcesses([Gone(-9), Gone(-9)], tmp_path, Limits(), Ranks(TWO))
    watched.kill()
    assert watched.poll([]) is None
    assert asked == [["GPU-a"]]
    held.clear()
    assert watched.poll([]) is not None


@pytest.mark.parametrize(
    ("share", "exclusive", "doubts"),
    [(0.31, True, 1), (0.25, True, 0), (None, True, 0), (0.9, False, 0)],
)
def test_times_on_a_cpu_that_others_used_too_are_in_doubt(
    share: float | None, exclusive: bool, doubts: int
) -> None:
    record = new_record(Cell(method="base"), []).model_copy(
        update={
            "speed": Speed(foreign_cpu_share=share),
            "placement": Placement(engine="local", exclusive=exclusive),
        }
    )
    record.hardware.accelerator = None
    found = contamination(record)
    assert len(found) == doubts
    if found:
        assert found[0] == "other processes used 31% of the processors during the timed steps"
