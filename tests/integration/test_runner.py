"""The runner against real processes and real signals, with a worker that imports nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from stand_in_worker import DEAF, FAILS, HANGS, OK, RAISES, SEGFAULTS, SPAWNS, WRONG

from harness.records.provenance import option
from harness.records.reading import read_record
from harness.records.record import Record

HERE = Path(__file__).parent
DEADLINE_SECONDS = 40.0
T = TypeVar("T")


def eventually(get: Callable[[], T | None], what: str) -> T:
    """The first value that is not none or false."""
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        if found := get():
            return found
        time.sleep(0.02)
    pytest.fail(f"no {what} in {DEADLINE_SECONDS:g} s")


class Run:
    """A runner process and what it printed."""

    def __init__(self, results: Path, arguments: list[str], **environment: str) -> None:
        self.results = results
        argv = [sys.executable, str(HERE / "run_stand_in.py"), str(results), *arguments]
        self.process = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ
            | {"PYTHONPATH": str(HERE), "TUNEBENCH_CACHE": str(results.parent / "cache")}
            | environment,
        )
        self.out = self.err = ""

    def wait(self) -> int:
        self.out, self.err = self.process.communicate(timeout=DEADLINE_SECONDS)
        return self.process.returncode

    def worker(self) -> int:
        """The pid of a worker of this results directory that waits to be stopped."""
        return int(eventually(lambda: self._read("worker.pid"), "worker"))

    def _read(self, name: str) -> str:
        return "".join(path.read_text() for path in self.results.glob(f".running/*/{name}"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(*arguments: object, **environment: str) -> Run:
        words = [str(word) for word in arguments]
        runs.append(Run(tmp_path / "results", words, **environment))
        return runs[-1]

    yield make
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


def records(run: Run) -> dict[tuple[int, int], Record]:
    """Published records by seed and attempt."""
    found = [read_record(path) for path in run.results.glob("*/record.json")]
    return {(record.cell.seed, record.attempt): record for record in found}


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def nothing_unpublished(run: Run) -> bool:
    return list((run.results / ".running").iterdir()) == []


def test_every_way_for_a_worker_to_end_is_recorded_and_the_sweep_goes_on(
    start: Callable[..., Run],
) -> None:
    run = start(FAILS, RAISES, SEGFAULTS, OK)
    assert run.wait() == 3
    found = {seed: record for (seed, _), record in records(run).items()}
    assert {seed: record.status for seed, record in found.items()} == {
        FAILS: "failed",
        RAISES: "failed",
        SEGFAULTS: "failed",
        OK: "ok",
    }
    assert found[FAILS].failure is not None
    assert found[FAILS].failure.type == "ValueError"
    assert found[RAISES].reason == (
        "the worker ended with exit code 1 and no finished record: "
        "ZeroDivisionError: a bug in the worker"
    )
    assert found[SEGFAULTS].reason == "killed by signal 11 (SIGSEGV)"
    assert found[OK].reason is None
    for record in found.values():
        assert record.speed.step_seconds == [0.25, 0.5]
        assert record.ended is not None
        assert record.phase == "forward"
    [log] = run.results.glob(f"{found[RAISES].cell_id[:12]}-*/log.txt")
    assert "Traceback" in log.read_text()
    assert "Traceback" not in run.err
    assert nothing_unpublished(run)


def test_the_recorded_command_is_called_where_the_record_is(start: Callable[..., Run]) -> None:
    run = start(OK)
    assert run.wait() == 0
    [path] = run.results.glob("*/record.json")
    command = read_record(path).command
    assert (path.parent / command[-2]).is_file()
    assert not (path.parent / command[-1]).exists()
    assert option(command, "--module") == "harness.worker"
    assert command[:2] == ["accelerate", "launch"]
    assert not any(part.startswith("/") for part in command)


def test_a_worker_killed_outright_is_failed_and_the_sweep_goes_on(
    start: Callable[..., Run],
) -> None:
    run = start(HANGS, OK)
    os.kill(run.worker(), signal.SIGKILL)
    assert run.wait() == 3
    found = records(run)
    assert found[HANGS, 1].status == "failed"
    assert found[HANGS, 1].reason == "killed by signal 9 (SIGKILL)"
    assert found[HANGS, 1].speed.step_seconds == [0.25, 0.5]
    assert found[OK, 1].status == "ok"


def test_a_runner_killed_outright_takes_its_worker_along_and_can_be_resumed(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    first = start(OK, HANGS)
    worker = first.worker()
    first.process.kill()
    first.wait()
    eventually(lambda: gone(worker), "end of the worker")
    assert set(records(first)) == {(OK, 1)}

    go = tmp_path / "go"
    go.touch()
    second = start(OK, HANGS, STAND_IN_GO=str(go))
    assert second.wait() == 0
    found = records(second)
    assert set(found) == {(OK, 1), (HANGS, 1), (HANGS, 2)}
    assert found[HANGS, 1].status == "interrupted"
    assert found[HANGS, 1].reason == "the runner died"
    assert found[HANGS, 1].speed.step_seconds == [0.25, 0.5]
    assert found[HANGS, 2].status == "ok"
    assert "was left by a runner that died" in second.err
    assert nothing_unpublished(second)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_lets_the_worker_write_its_record_and_stops_the_sweep(
    start: Callable[..., Run], number: int, code: int
) -> None:
    run = start(OK, HANGS, FAILS)
    worker = run.worker()
    # As a terminal, `timeout` and a closing window do it: to the runner's whole process group.
    os.killpg(run.process.pid, number)
    assert run.wait() == code
    assert gone(worker)
    found = records(run)
    assert set(found) == {(OK, 1), (HANGS, 1)}
    assert found[HANGS, 1].status == "interrupted"
    assert signal.Signals(number).name in (found[HANGS, 1].reason or "")
    assert found[HANGS, 1].speed.step_seconds == [0.25, 0.5]
    assert nothing_unpublished(run)
    assert "stopping: 1 cell is asked to write its record; a second Ctrl-C" in run.err


def test_cells_that_an_engine_orders_are_those_of_a_local_run(start: Callable[..., Run]) -> None:
    run = start("--ordered", FAILS, OK)
    assert run.wait() == 3
    assert {key: record.status for key, record in records(run).items()} == {
        (FAILS, 1): "failed",
        (OK, 1): "ok",
    }
    stopped = start("--ordered", OK, HANGS, DEAF)
    worker = stopped.worker()
    stopped.process.send_signal(signal.SIGINT)
    assert stopped.wait() == 130
    assert gone(worker)
    found = records(stopped)
    assert set(found) == {(FAILS, 1), (OK, 1), (HANGS, 1)}, "what was there is kept"
    assert found[HANGS, 1].status == "interrupted"
    assert nothing_unpublished(stopped)


def test_a_second_signal_kills_a_worker_that_does_not_listen(start: Callable[..., Run]) -> None:
    run = start(DEAF)
    worker = run.worker()
    run.process.send_signal(signal.SIGINT)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() in (130, 143)
    assert gone(worker)
    assert records(run)[DEAF, 1].status == "interrupted"


def test_a_cell_over_its_time_is_a_timeout_and_the_sweep_goes_on(start: Callable[..., Run]) -> None:
    run = start(HANGS, OK, "--limit", 1)
    assert run.wait() == 0
    found = records(run)
    assert found[HANGS, 1].status == "timeout"
    assert found[HANGS, 1].reason == "over its limit of 1 s"
    assert found[HANGS, 1].speed.step_seconds == [0.25, 0.5]
    assert found[OK, 1].status == "ok"
    again = start(HANGS, OK)
    assert again.wait() == 0
    assert set(records(again)) == {(HANGS, 1), (OK, 1)}, "a timeout is a result, and kept"


def test_what_a_worker_started_does_not_outlive_it(start: Callable[..., Run]) -> None:
    run = start(SPAWNS)
    worker = run.worker()
    child = int(eventually(lambda: run._read("child.pid"), "child"))
    os.kill(worker, signal.SIGKILL)
    run.wait()
    eventually(lambda: gone(child), "end of the worker's child")


def test_a_fork_server_that_dies_costs_one_cell(start: Callable[..., Run]) -> None:
    run = start(HANGS, OK)
    worker = run.worker()
    parent = psutil.Process(worker).parent()
    assert parent is not None
    assert parent.pid != run.process.pid
    parent.kill()
    assert run.wait() == 3
    assert gone(worker)
    found = records(run)
    assert found[HANGS, 1].status == "failed"
    assert found[OK, 1].status == "ok"


def test_finished_cells_are_kept_and_an_edited_matrix_runs_only_what_is_new(
    start: Callable[..., Run],
) -> None:
    first = start(OK, FAILS)
    first.wait()
    before = {path: path.read_bytes() for path in first.results.glob("*/record.json")}
    second = start(FAILS, OK, RAISES)
    assert second.wait() == 3
    assert set(records(second)) == {(OK, 1), (FAILS, 1), (FAILS, 2), (RAISES, 1)}
    assert {path: path.read_bytes() for path in before} == before


def test_nothing_to_run_starts_nothing(start: Callable[..., Run]) -> None:
    start(OK).wait()
    again = start(OK)
    assert again.wait() == 0
    assert "importing" not in again.err
    assert "ok" in again.out


def test_two_runners_share_the_work_and_both_see_all_of_it(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    first = start("--granted", HANGS, OK, STAND_IN_GO=str(go))
    first.worker()
    second = start("--granted", HANGS, OK, STAND_IN_GO=str(go))
    eventually(lambda: (OK, 1) in records(second), "cell measured by the second runner")
    assert len(list((first.results / ".running").iterdir())) == 1
    go.touch()
    assert (first.wait(), second.wait()) == (0, 0)
    assert set(records(first)) == {(HANGS, 1), (OK, 1)}
    assert sorted(first.out.splitlines()) == sorted(second.out.splitlines())
    assert len(first.out.splitlines()) == 2
    assert "waiting for what another runner is measuring" in second.err
    assert "measured by another runner" in first.err


def test_a_runner_takes_over_from_one_that_dies(start: Callable[..., Run], tmp_path: Path) -> None:
    go = tmp_path / "go"
    first = start("--granted", HANGS, STAND_IN_GO=str(go))
    worker = first.worker()
    second = start("--granted", HANGS, STAND_IN_GO=str(go))
    assert second.process.stderr is not None
    for line in second.process.stderr:
        if "waiting for what" in line:
            break
    first.process.kill()
    eventually(lambda: gone(worker), "end of the worker")
    go.touch()
    assert second.wait() == 0
    assert {key: record.status for key, record in records(second).items()} == {
        (HANGS, 1): "interrupted",
        (HANGS, 2): "ok",
    }


def test_preflight_problems_start_nothing_and_leave_nothing(start: Callable[..., Run]) -> None:
    run = start(OK, FAILS, "--model", "missing")
    assert run.wait() == 2
    assert "no such model: missing" in run.err
    assert not run.results.exists()


def test_a_problem_of_one_cell_leaves_the_others_to_run(start: Callable[..., Run]) -> None:
    run = start(OK, WRONG)
    assert run.wait() == 0
    found = records(run)
    assert {key: record.status for key, record in found.items()} == {
        (OK, 1): "ok",
        (WRONG, 1): "invalid",
    }
    assert found[WRONG, 1].reason == "seed: is not a seed"
    assert "1 of 2 cells left out as invalid: seed: is not a seed" in run.err
    assert run.err.count("is not a seed") == 1


def test_a_bug_in_preflight_is_a_traceback(start: Callable[..., Run]) -> None:
    run = start(OK, "--model", "broken")
    assert run.wait() == 1
    assert "RuntimeError: a bug in preflight" in run.err
    assert not run.results.exists()


def test_a_signal_during_preflight_stops_at_once(start: Callable[..., Run], tmp_path: Path) -> None:
    marker = tmp_path / "preflight.pid"
    run = start(OK, "--model", f"slow:{marker}")
    pid = int(eventually(lambda: marker.exists() and marker.read_text(), "preflight"))
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait() == 130
    eventually(lambda: gone(pid), "end of preflight")
    assert not run.results.exists()


def test_quiet_lines_carry_the_cell(start: Callable[..., Run]) -> None:
    run = start(OK, FAILS)
    run.wait()
    cell_id = records(run)[OK, 1].cell_id[:12]
    lines = [line for line in run.err.splitlines() if line.startswith(cell_id)]
    assert lines[0] == f"{cell_id} [1/2] base seed=0: starting, ETA sweep –"
    assert lines[-1].startswith(f"{cell_id} [1/2] base seed=0: ok, ")


def test_a_cell_predicted_to_run_out_of_memory_is_recorded_and_not_started(
    start: Callable[..., Run],
) -> None:
    first = start("--predicted-oom", HANGS, HANGS, OK)
    assert first.wait() == 3
    found = records(first)
    assert (found[HANGS, 1].status, found[HANGS, 1].reason) == ("skipped", "predicted OOM")
    assert found[HANGS, 1].speed.step_seconds == []
    assert found[OK, 1].status == "ok"
    again = start("--predicted-oom", HANGS, HANGS, OK)
    assert again.wait() == 3
    assert records(again) == found, "nothing new to say"
    later = start(HANGS, OK)
    os.kill(later.worker(), signal.SIGKILL)
    assert later.wait() == 3
    assert records(later)[HANGS, 2].status == "failed", "without the prediction it runs"


def fork_server(run: Run) -> psutil.Process:
    """The process that imports the stack, while it does."""

    def found() -> psutil.Process | None:
        for child in psutil.Process(run.process.pid).children():
            with contextlib.suppress(psutil.Error):  # one that has just ended
                if "forkserver" in " ".join(child.cmdline()):
                    return child
        return None

    return eventually(found, "fork server")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_runner_that_ends_during_the_imports_leaves_nothing(
    start: Callable[..., Run], number: int, code: int
) -> None:
    run = start(OK, STAND_IN_IMPORT_SECONDS="30")
    server = fork_server(run)
    time.sleep(0.2)
    run.process.send_signal(number)
    assert run.wait() == code
    assert "Traceback" not in run.err
    server.wait(timeout=2.0)
    assert not run.results.exists()


def test_a_fork_server_killed_during_the_imports_is_one_line(start: Callable[..., Run]) -> None:
    run = start(OK, STAND_IN_IMPORT_SECONDS="30")
    server = fork_server(run)
    time.sleep(0.2)
    server.kill()
    assert run.wait() == 2
    assert "Traceback" not in run.err
    assert "the process that imports the stack died" in run.err.splitlines()[-1]


def test_a_killed_preflight_is_one_line(start: Callable[..., Run], tmp_path: Path) -> None:
    marker = tmp_path / "preflight.pid"
    run = start(OK, "--model", f"slow:{marker}")
    os.kill(int(eventually(lambda: marker.exists() and marker.read_text(), "preflight")), 9)
    assert run.wait() == 2
    assert "the check of models, data and tasks was killed by signal 9" in run.err.splitlines()[-1]
