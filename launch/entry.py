"""The `tunebench` command from its first moment to its last: stop signals, outputs, exit codes.

Imports little, so that a signal finds a handler soon after the interpreter has started.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from launch.processes.stop_signals import STOP_SIGNALS

if TYPE_CHECKING:
    from collections.abc import Callable

STOPPED = "tunebench: stopped"
EXIT_USER = 2
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, which Windows does not have
# What a run needs at most: pipes to each process, files of the libraries that are imported.
FEWEST_DESCRIPTORS, ENOUGH_DESCRIPTORS = 256, 4096


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    # Whoever started this may have them blocked, as Ray has: then Ctrl-C would never arrive.
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        # A signal that is ignored, as nohup has it, stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    sys.unraisablehook = _unraisable
    code = _run()
    atexit._run_exitfuncs()
    # Taking the interpreter down lasts, and a signal would find no handler any more.
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # stopped while it could not be written any more
            stream.flush()
    os._exit(code)


def _leave(number: int, frame: FrameType | None) -> None:
    """Nothing has begun yet, or all is done: there is nothing to put in order."""
    _say(f"{STOPPED}\n")
    os._exit(128 + number)


def _say(text: str) -> None:
    try:
        os.write(2, text.encode())
    except OSError:
        return  # nobody is there to read it


def _unraisable(told: sys.UnraisableHookArgs) -> None:
    """A stop signal that came while python could not raise it, as in a destructor, is not lost."""
    number = getattr(told.exc_value, "number", None)
    if type(told.exc_value).__name__ == "Stopped" and isinstance(number, int):
        _leave(number, None)
    sys.__unraisablehook__(told)


def _run() -> int:
    from launch.commands.console import print_error
    from launch.output import OutputLost, prepare
    from launch.processes.stop_signals import Stopped, stop_signals
    from matrices.errors import UserError

    try:
        prepare()
        _check_process()
        from launch.cli import app

        with stop_signals():
            code = _exit_code(app)
        sys.stdout.flush()
    except Stopped as stopped:
        print(STOPPED, file=sys.stderr)
        return 128 + stopped.number
    except OutputLost as lost:
        # What is left in its buffer must not be tried again.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
        if lost.broken_pipe:
            return EXIT_BROKEN_PIPE
        print_error(lost)
        return EXIT_USER
    except UserError as error:
        print_error(error)
        return EXIT_USER
    return code


def _exit_code(app: Callable[[], object]) -> int:
    try:
        app()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    return 0


def _check_process() -> None:
    """Raise UserError when this process cannot do the least that any command needs."""
    from matrices.errors import UserError

    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError(
            "the working directory does not exist any more; change to one that does"
        ) from error
    if sys.platform != "win32":
        _allow_enough_files()
    elif not sys.flags.utf8_mode:
        raise UserError("text files are read in another encoding than UTF-8; set PYTHONUTF8=1")


def _allow_enough_files() -> None:
    """Raise UserError when this process may not open as many files as a run needs."""
    import resource

    from matrices.errors import UserError

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = ENOUGH_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < min(allowed, ENOUGH_DESCRIPTORS):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(allowed, ENOUGH_DESCRIPTORS), hard))
    if allowed < FEWEST_DESCRIPTORS:
        raise UserError(
            f"a process may open only {allowed} files here and tunebench needs up to "
            f"{FEWEST_DESCRIPTORS}; raise the limit with 'ulimit -n'"
        )


if __name__ == "__main__":
    main()
