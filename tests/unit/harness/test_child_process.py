"""Processes that are started here: how they end, what they say, and that they do not outlive us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.system import child_process
from harness.system.child_process import describe_exit, fork, fork_to_answer, python_module, run


def die() -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def fails() -> int:
    raise ValueError("a mistake")


@pytest.mark.parametrize(
    ("work", "code"), [(lambda: 0, 0), (lambda: 7, 7), (fails, 1), (lambda: len(die()), -9)]
)
def test_a_fork_ends_with_what_its_work_gives(
    work: Callable[[], int], code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    _, status = os.waitpid(fork(work), 0)
    assert os.waitstatus_to_exitcode(status) == code
    assert ("ValueError: a mistake" in capfd.readouterr().err) == (work is fails)


# More than fits into a pipe at once.
@pytest.mark.parametrize(
    ("work", "answer"), [(lambda: "é" * 10**5, "é" * 10**5), (die, ""), (lambda: str(fails()), "")]
)
def test_a_fork_answers_or_says_nothing(work: Callable[[], str], answer: str) -> None:
    child, reading = fork_to_answer(work)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == answer
    os.waitpid(child, 0)


def test_a_module_of_the_users_is_not_taken_for_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "platform.py").write_text("print('mine')")
    monkeypatch.chdir(tmp_path)
    done = run(python_module("platform"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() != "mine"


def test_a_command_that_takes_too_long_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run(["sleep", "60"], seconds=0.2)


STARTS = {
    "start": "child_process.start(['sleep', '60'], 1, 2).pid",
    "fork": "child_process.fork(lambda: time.sleep(60))",
    "fork_to_answer": "child_process.fork_to_answer(lambda: time.sleep(60))[0]",
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", STARTS)
def test_nothing_outlives_a_killed_parent(name: str, frozen: bool, repository: Path) -> None:
    code = (
        "import os, time\nfrom harness.system import child_process\n"
        f"print({STARTS[name]}, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=repository, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    if frozen:
        while _state(child) != "S":  # it sleeps: it has asked the kernel
            time.sleep(0.01)
        os.kill(child, signal.SIGSTOP)
    parent.kill()
    parent.communicate(timeout=10)
    until = time.monotonic() + 10.0
    while _state(child) != "Z":
        assert time.monotonic() < until, "it lives"
        time.sleep(0.01)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def test_killing_a_group_that_is_gone_is_no_error() -> None:
    process = child_process.start(["true"], subprocess.DEVNULL, subprocess.DEVNULL)
    process.wait()
    child_process.kill_group(process.pid)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (-9, "was killed by signal 9 (SIGKILL)"),
        (-40, "was killed by signal 40"),
        (3, "ended with exit code 3 before its answer"),
    ],
)
def test_how_a_process_ended(code: int, text: str) -> None:
    assert describe_exit(code) == text
