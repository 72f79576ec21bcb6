"""python -m on_another_system SYSTEM COMMANDS: command lines of tunebench as on another system.

What macOS and Windows lack of Linux is taken away from this process before tunebench is imported:
modules, functions, signals, /proc. Prints the exit code and the output of each command line as a
line of JSON, and ends as `tunebench matrices` does. It cannot show what those systems have instead.
"""

from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import platform
import signal
import sys
from multiprocessing import context
from typing import Any

# Their own adaptations to a system are not under test: imported as what this system is.
LIBRARIES = (
    "asyncio filelock huggingface_hub multiprocessing.forkserver numpy pandas plotly.graph_objects "
    "psutil pyarrow.parquet pydantic pynvml rich.console scipy.special scipy.stats subprocess "
    "typer typer.testing urllib.request uuid yaml"
)
LINUX_ONLY = {"os": ("pidfd_open", "sched_getaffinity", "sched_setaffinity")}
POSIX_ONLY = {
    "os": ("fork", "getpgid", "geteuid", "getuid", "killpg", "register_at_fork", "setsid", "uname"),
    "signal": ("SIGHUP", "SIGKILL", "SIGPIPE", "SIGSTOP", "SIGUSR1", "SIGUSR2", "pthread_sigmask"),
    "faulthandler": ("register",),
    "multiprocessing.context": ("ForkContext", "ForkProcess", "ForkServerContext"),
}
POSIX_MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty")
SYSTEMS = {"macOS": ("darwin", "Darwin"), "Windows": ("win32", "Windows")}


def become(system: str) -> None:
    for name in LIBRARIES.split():
        importlib.import_module(name)
    gone = [LINUX_ONLY]
    if system == "Windows":
        gone.append(POSIX_ONLY)
        for name in POSIX_MODULES:
            sys.modules[name] = None  # type: ignore[assignment]
        numbers = [s for s in signal.Signals if s.name not in POSIX_ONLY["signal"]]
        signal.Signals = numbers  # type: ignore[assignment,misc]
    for table in gone:
        for module, names in table.items():
            for name in names:
                delattr(importlib.import_module(module), name)
    assert system != "Windows" or not hasattr(context, "ForkServerContext")
    builtins.open = io.open = without_proc(io.open)
    sys.platform, platform.system = SYSTEMS[system][0], lambda: SYSTEMS[system][1]


def without_proc(real: Any) -> Any:
    def opened(file: Any, *arguments: Any, **more: Any) -> Any:
        who = sys._getframe(1).f_code.co_filename
        if str(file).startswith(("/proc/", "/sys/")) and "psutil" not in who:
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return real(file, *arguments, **more)

    return opened


def main() -> None:
    become(sys.argv[1])
    from typer.testing import CliRunner

    from launch.cli import app
    from launch.entry import main as tunebench

    for line in json.loads(sys.argv[2]):
        done = CliRunner().invoke(app, line)
        what = repr(done.exception) if done.exception is not None else ""
        print(json.dumps([done.exit_code, done.output, what]))
    sys.argv = ["tunebench", "matrices"]
    tunebench()


if __name__ == "__main__":
    assert os.name == "posix"
    main()
