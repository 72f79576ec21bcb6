"""The `tunebench` command, from start to end: stop signals, outputs, exit codes.

Imports little, so that the signal handlers are set soon after the interpreter has started.
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
# A run needs pipes to each process, and opens files of the libraries.
FEWEST_DESCRIPTORS, ENOUGH_DESCRIPTORS = 256, 4096


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    # The parent process may have blocked them, as Ray does; then Ctrl-C would never arrive.
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        # A signal that is ignored, as under nohup, stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    sys.unraisablehook = _unraisable
    code = _run()
    atexit._run_exitfuncs()
    # The interpreter takes time to end, and a signal would find no handler then.
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # it cannot be written any more
            stream.flush()
    os._exit(code)


def _leave(number: int, frame: FrameType | None) -> None:
    """Exit at once: nothing has begun yet, or everything is done."""
    with contextlib.suppress(OSError):  # nobody can read it
        os.write(2, f"{STOPPED}\n".encode())
    os._exit(128 + number)


def _unraisable(raised: sys.UnraisableHookArgs) -> None:
    """Handle a stop signal that came where python cannot raise it, as in a destructor."""
    number = getattr(raised.exc_value, "number", None)
    if type(raised.exc_value).__name__ == "Stopped" and isinstance(number, int):
        _leave(number, None)
    sys.__unraisablehook__(raised)


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
        # Python must not write the rest of its buffer at exit.
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
    """Raise UserError when this process lacks what every command needs."""
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
    """Raise the limit of open files. Raise UserError when it is too low for a run."""
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
