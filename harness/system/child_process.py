"""Starting another process: a command, or a fork of this one. None outlives this one (see
`harness.system.parent_death`). Workers are forked from a server: `launch.processes.server`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from harness.system.parent_death import end_with_parent, preexec_end_with_parent


def python_module(module: str, *arguments: str) -> list[str]:
    """The argv of `python -m`, which does not look in the current directory first: a `harness.py`
    or `pip.py` of the user's is not imported."""
    return [sys.executable, "-P", "-m", module, *arguments]


def run(
    argv: Sequence[str], seconds: float | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; gives its exit code and what it wrote, as text.

    Raises OSError when it cannot be started, and subprocess.TimeoutExpired after `seconds`, when
    it has been killed.
    """
    return subprocess.run(  # noqa: S603 - a fixed argv, no shell
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env=environment,
        preexec_fn=preexec_end_with_parent(),
    )


def start(
    argv: Sequence[str],
    stdout: int | IO[bytes],
    stderr: int | IO[bytes],
    environment: Mapping[str, str] | None = None,
    kept_open: Sequence[int] = (),
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a command as the leader of a session of its own: what is sent to the group of this
    process, as Ctrl-C is, does not reach it.

    `environment` is what differs from this process's own, `kept_open` are descriptors that it
    keeps. Call it in the main thread. Raises OSError when it cannot be started.
    """
    return subprocess.Popen(  # noqa: S603 - a fixed argv, no shell
        argv,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        pass_fds=kept_open,
        preexec_fn=preexec_end_with_parent(),
        env=os.environ | dict(environment or {}),
    )


def fork(work: Callable[[], int]) -> int:
    """Run `work` in a fork of this process; gives its pid. The exit code is what `work` returns, 1
    after an exception, which is printed. Call it in the main thread."""
    _flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            end_with_parent(parent)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            exit_now(code)
    return child


def fork_to_answer(work: Callable[[], str]) -> tuple[int, int]:
    """Run `work` in a fork of this process; gives its pid, and a descriptor to read what `work`
    returned from, to the end. That is nothing when it did not return."""
    reading, writing = os.pipe()

    def answer() -> int:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(work())
        return 0

    try:
        return fork(answer), reading
    finally:
        os.close(writing)


def exit_now(code: int) -> None:
    """End this process without finalizing the interpreter: with a process group of torch, that
    sometimes aborts ("terminate called without an active exception") after all work is done.
    """
    _flush()
    os._exit(code)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def kill_group(leader: int) -> None:
    """SIGKILL to a process and its group, if there is such a group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def signal_text(number: int) -> str:
    """`signal 9 (SIGKILL)`; the real-time signals have no name."""
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def describe_exit(code: int) -> str:
    """How a process ended that should have answered; `code` is negative for a signal."""
    if code < 0:
        return f"was killed by {signal_text(-code)}"
    return f"ended with exit code {code} before its answer"
