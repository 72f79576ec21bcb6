"""Cells of several processes: real processes and signals, with ranks that import nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from stand_in_ranks import (
    ALL_WELL,
    DIES_WITHOUT_A_WORD,
    GIB,
    LOST_CONNECTION_FIRST,
    OOM_ON_ONE,
    STAYS,
    WAITS,
)
from test_runner import Run, eventually, gone, nothing_unpublished, records

from harness.records.provenance import option
from harness.records.ranks import RankState
from harness.records.record import Record

TWO = ("--ranks", 2)
OK_SEED = 0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(*arguments: object, results: str = "results", **environment: str) -> Run:
        words = [str(word) for word in arguments]
        runs.append(Run(tmp_path / results, words, **environment))
        return runs[-1]

    yield make
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


def states(run: Run) -> dict[int, RankState]:
    found = [
        RankState.model_validate_json(path.read_text())
        for path in run.results.glob(".running/*/ranks/rank-*.json")
        if "record" not in path.name
    ]
    return {state.rank: state for state in found}


def pids(run: Run, count: int = 2) -> dict[int, int]:
    """The processes of the ranks, once all of them train."""

    def training() -> dict[int, int] | None:
        found = states(run)
        ready = len(found) == count and all(state.step == 3 for state in found.values())
        return {rank: state.pid or 0 for rank, state in found.items()} if ready else None

    return eventually(training, "ranks")


def only(run: Run) -> Record:
    [record] = records(run).values()
    return record


def test_ranks_are_places_of_one_launch_and_all_are_in_the_record(
    start: Callable[..., Run],
) -> None:
    run = start(*TWO, ALL_WELL)
    assert run.wait() == 0, run.err
    record = only(run)
    assert record.status == "ok"
    assert [(state.rank, state.exit_code, state.status) for state in record.ranks] == [
        (0, 0, "ok"),
        (1, 0, "ok"),
    ]
    assert [state.tokens and state.tokens.all for state in record.ranks] == [10.0, 11.0]
    assert len({state.pid for state in record.ranks}) == 2
    [directory] = [path.parent for path in run.results.glob("*/record.json")]
    said = [(directory / name).read_text() for name in ("log.txt", "ranks/rank-1.log")]
    assert [text.splitlines()[0].split(" with ")[0] for text in said] == [
        "rank 0 of 2",
        "rank 1 of 2",
    ]
    # They are started with the profile of their own directory, which the record lies beside.
    assert (directory / "profile.yaml").is_file()
    assert "profile.yaml" in record.command
    assert "/.running/" in said[0].splitlines()[1]
    threads = record.command[record.command.index("--num_cpu_threads_per_process") + 1]
    assert said[0].splitlines()[0].endswith(f"with {threads} threads")
    assert record.placement.engine == "local"
    assert record.placement.hosts == [socket.gethostname()]
    assert record.placement.devices == ["cpu:0", "cpu:1"]
    assert record.placement.exclusive is True
    assert nothing_unpublished(run)


def test_a_rank_that_runs_out_of_memory_gives_the_record_its_status(
    start: Callable[..., Run],
) -> None:
    run = start(*TWO, OOM_ON_ONE, ALL_WELL)
    rank_0 = eventually(lambda: states(run).get(0), "rank 0").pid
    assert run.wait() == 0, run.err
    found = records(run)
    record = found[OOM_ON_ONE, 1]
    assert (record.status, record.reason) == ("oom", "rank 1: backward: no memory")
    assert record.failure is not None
    assert (record.failure.phase, record.failure.requested_bytes) == ("backward", 3 * GIB)
    assert record.phase == "backward"
    assert record.ranks[1].exit_code == 1
    # Rank 0 waited for it, and had to be told to stop.
    assert record.ranks[0].status == "interrupted"
    assert [each.ledger_peak_bytes for each in record.memory.phases["forward"]] == [GIB, 2 * GIB]
    assert record.memory.peak_bytes == 2 * GIB
    assert gone(rank_0 or 0)
    assert found[ALL_WELL, 1].status == "ok"


def test_the_rank_that_failed_is_blamed_not_the_one_that_lost_the_connection_to_it(
    start: Callable[..., Run],
) -> None:
    run = start(*TWO, LOST_CONNECTION_FIRST)
    assert run.wait() == 3
    record = only(run)
    assert (record.status, record.reason) == ("failed", "rank 1: train: no")
    assert record.failure is not None
    assert record.failure.type == "ValueError"
    assert "Connection closed by peer" in (record.ranks[0].reason or "")


def test_a_rank_that_dies_without_a_word_is_named_with_the_end_of_its_log(
    start: Callable[..., Run],
) -> None:
    run = start(*TWO, DIES_WITHOUT_A_WORD)
    assert run.wait() == 3
    record = only(run)
    assert record.status == "failed"
    assert record.reason == (
        "rank 1 ended with exit code 1 and no finished record: what rank 1 said last"
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_outright_ends_the_cell_and_not_the_sweep(
    start: Callable[..., Run], victim: int, tmp_path: Path
) -> None:
    run = start(*TWO, WAITS, ALL_WELL)
    workers = pids(run)
    os.kill(workers[victim], signal.SIGKILL)
    assert run.wait() == 3
    record = records(run)[WAITS, 1]
    assert record.status == "failed"
    assert record.reason == f"rank {victim} was killed by signal 9 (SIGKILL)"
    assert record.ranks[victim].exit_code == -signal.SIGKILL
    assert records(run)[ALL_WELL, 1].status == "ok"
    assert all(gone(pid) for pid in workers.values())


def test_a_frozen_rank_is_found_named_and_killed_with_every_stack_kept(
    start: Callable[..., Run],
) -> None:
    run = start(*TWO, "--phase-limit", 3, WAITS, ALL_WELL)
    workers = pids(run)
    os.kill(workers[1], signal.SIGSTOP)
    assert run.wait() == 0, run.err
    record = records(run)[WAITS, 1]
    assert (record.status, record.failure) == ("timeout", None)
    assert record.reason == (
        "no progress for 3 s: rank 1 stopped in train of step 4 (process frozen); "
        "rank 0 waited in train of step 4"
    )
    [directory] = [
        path.parent
        for path in run.results.glob("*/record.json")
        if path.parent.name.startswith(record.cell_id[:12])
    ]
    for state in record.ranks:
        assert state.exit_code == -signal.SIGKILL
        stack = (directory / (state.stack_file or "none")).read_text()
        # It writes its state down, and waits.
        assert re.search(r'stand_in_\w+\.py", line \d+ in (_wait_for|_keep)', stack), stack
    assert all(gone(pid) for pid in workers.values())
    assert records(run)[ALL_WELL, 1].status == "ok"


def test_no_rank_outlives_a_runner_that_is_killed_not_even_a_frozen_one(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    run = start(*TWO, WAITS)
    workers = pids(run)
    family = [each.pid for each in psutil.Process(run.process.pid).children(recursive=True)]
    assert set(workers.values()) < set(family)
    os.kill(workers[1], signal.SIGSTOP)
    run.process.kill()
    run.process.wait()
    eventually(lambda: all(gone(pid) for pid in family), "end of all that the runner started")
    go = tmp_path / "go"
    go.touch()
    again = start(*TWO, WAITS, STAND_IN_GO=str(go))
    assert again.wait() == 0
    found = records(again)
    assert {key: record.status for key, record in found.items()} == {
        (WAITS, 1): "interrupted",
        (WAITS, 2): "ok",
    }
    assert [state.phase for state in found[WAITS, 1].ranks] == ["train", "train"]


def test_a_signal_lets_every_rank_finish_what_it_writes(start: Callable[..., Run]) -> None:
    run = start(*TWO, WAITS, ALL_WELL)
    workers = pids(run)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait() == 130
    record = only(run)
    assert (record.status, record.reason) == ("interrupted", "the runner was stopped by SIGINT")
    assert [state.status for state in record.ranks] == ["interrupted", "interrupted"]
    assert all(gone(pid) for pid in workers.values())


def test_a_rank_that_stays_when_rank_0_has_ended_is_no_success(
    start: Callable[..., Run],
) -> None:
    run = start(*TWO, STAYS)
    worker = eventually(lambda: states(run).get(1), "rank 1").pid
    assert run.wait() == 3
    assert only(run).reason == "rank 1 did not end within 15 s of rank 0"
    assert gone(worker or 0)


def test_a_port_in_use_is_one_line_before_anything_starts(start: Callable[..., Run]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = start(*TWO, "--port", port, ALL_WELL)
        assert run.wait() == 2
    assert run.err.count("\n") == 1
    assert f"port {port} cannot be had (Address already in use)" in run.err
    assert not run.results.exists()


def cells_in_progress(*runs: Run) -> int:
    return sum(len(list(run.results.glob(".running/*/worker.pid"))) for run in runs)


def test_cells_run_side_by_side_on_devices_of_their_own(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    hangs, other, go = 2, 22, tmp_path / "go"  # two seeds with which the stand-in waits
    run = start("--side-by-side", hangs, other, OK_SEED, STAND_IN_GO=str(go))
    eventually(lambda: cells_in_progress(run) == 2, "two cells at once")
    assert records(run) == {}, "the third waits for a device"
    go.touch()
    assert run.wait() == 0, run.err
    found = {seed: record for (seed, _), record in records(run).items()}
    assert {seed: record.status for seed, record in found.items()} == {
        hangs: "ok",
        other: "ok",
        OK_SEED: "ok",
    }
    assert {tuple(found[seed].placement.devices) for seed in (hangs, other)} == {
        ("cpu:0",),
        ("cpu:1",),
    }
    assert found[hangs].placement.exclusive is False
    assert found[hangs].provenance.environment["OMP_NUM_THREADS"] == "1"
    threads = found[hangs].command.index("--num_cpu_threads_per_process") + 1
    assert found[hangs].command[threads] == "1"


def test_both_cells_side_by_side_are_stopped_by_one_signal(start: Callable[..., Run]) -> None:
    run = start("--side-by-side", 2, 22, OK_SEED)
    eventually(lambda: cells_in_progress(run) == 2, "two cells at once")
    workers = [int(path.read_text()) for path in run.results.glob(".running/*/worker.pid")]
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 143
    assert {key: record.status for key, record in records(run).items()} == {
        (2, 1): "interrupted",
        (22, 1): "interrupted",
    }
    assert all(gone(pid) for pid in workers)


def test_two_runners_on_one_machine_never_share_a_device(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    first = start("--side-by-side", 2, STAND_IN_GO=str(go))
    eventually(lambda: cells_in_progress(first) == 1, "first cell")
    second = start("--side-by-side", 2, 22, results="others", STAND_IN_GO=str(go))
    eventually(lambda: cells_in_progress(second) == 1, "cell on the second device")
    third = start(OK_SEED, results="exclusive", STAND_IN_GO=str(go))
    assert third.process.stderr is not None
    for line in third.process.stderr:
        if "waiting for devices that another runner on this machine uses" in line:
            break
    assert cells_in_progress(first, second) == 2
    assert records(third) == {}
    go.touch()
    assert (first.wait(), second.wait(), third.wait()) == (0, 0, 0)
    assert records(first)[2, 1].placement.devices != records(second)[2, 1].placement.devices
    assert only(third).placement.exclusive is True


def test_two_runners_take_turns(start: Callable[..., Run], tmp_path: Path) -> None:
    go = tmp_path / "go"
    first = start(2, 22, STAND_IN_GO=str(go))
    eventually(lambda: cells_in_progress(first) == 1, "first cell")
    second = start(2, results="others", STAND_IN_GO=str(tmp_path / "never"))
    assert second.process.stderr is not None
    for line in second.process.stderr:
        if "waiting for devices" in line:
            break
    go.touch()
    # The first runner has another cell to run, and the second one's turn has come.
    eventually(lambda: cells_in_progress(second) == 1, "cell of the second runner")
    assert set(records(first)) == {(2, 1)}
    second.process.send_signal(signal.SIGTERM)
    assert (second.wait(), first.wait()) == (143, 0)
    assert set(records(first)) == {(2, 1), (22, 1)}


def test_a_dead_runners_devices_are_free_again(start: Callable[..., Run], tmp_path: Path) -> None:
    first = start(2)
    worker = first.worker()
    second = start(OK_SEED, results="others")
    assert second.process.stderr is not None
    for line in second.process.stderr:
        if "waiting for devices" in line:
            break
    first.process.kill()
    first.process.wait()
    assert second.wait() == 0
    eventually(lambda: gone(worker), "end of the worker")


ACROSS = ("--ranks", 2, "--meet", "one-start")


def test_ranks_on_another_machine_are_in_the_record_of_the_first(
    start: Callable[..., Run],
) -> None:
    second = start(*ACROSS, "--follow", ALL_WELL)
    first = start(*ACROSS, ALL_WELL)
    assert (first.wait(), second.wait()) == (0, 0), first.err + second.err
    record = only(first)
    assert record.status == "ok"
    assert [(state.rank, state.status, state.exit_code) for state in record.ranks] == [
        (0, "ok", 0),
        (1, "ok", 0),
    ]
    assert option(record.command, "--num_machines") == "2"
    assert option(record.command, "--machine_rank") == "0"
    assert option(record.command, "--main_process_ip") == "127.0.0.1"
    assert option(record.command, "--main_process_port") == "29511"


def test_a_rank_killed_on_another_machine_ends_the_cell_everywhere(
    start: Callable[..., Run],
) -> None:
    first = start(*ACROSS, WAITS)
    second = start(*ACROSS, "--follow", WAITS)
    workers = pids(first)
    os.kill(workers[1], signal.SIGKILL)
    assert (first.wait(), second.wait()) == (3, 1)
    record = only(first)
    host = socket.gethostname()
    assert record.reason == f"rank 1: killed by signal 9 (SIGKILL) on {host}"
    assert record.ranks[1].exit_code == -signal.SIGKILL
    assert all(gone(pid) for pid in workers.values())


def test_a_machine_that_follows_ends_with_the_first(start: Callable[..., Run]) -> None:
    first = start(*ACROSS, WAITS)
    second = start(*ACROSS, "--follow", WAITS)
    workers = pids(first)
    first.process.send_signal(signal.SIGTERM)
    assert (first.wait(), second.wait()) == (143, 1)
    assert only(first).status == "interrupted"
    assert all(gone(pid) for pid in workers.values())


def test_a_machine_that_follows_and_is_stopped_takes_its_ranks_along(
    start: Callable[..., Run],
) -> None:
    first = start(*ACROSS, WAITS)
    second = start(*ACROSS, "--follow", WAITS)
    workers = pids(first)
    second.process.send_signal(signal.SIGTERM)
    assert second.wait() == 1
    assert gone(workers[1])
    assert first.wait() == 3
    assert only(first).reason == "rank 1: SIGTERM"
    assert gone(workers[0])
