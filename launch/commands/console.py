"""Matrices, standard output, standard error and stop signals, for all commands."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from matrices.errors import SetAside, UserError
from matrices.files.text import visible

if TYPE_CHECKING:
    from matrices.load import Matrix

# Exit code of a command that could not do all of its work.
EXIT_INCOMPLETE = 3
# A command that prints nothing for longer looks stuck.
SILENT_SECONDS = 1.0


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def print_error(error: UserError) -> None:
    print(f"tunebench: error: {visible(' '.join(str(error).split()))}", file=sys.stderr)


def print_note(text: str) -> None:
    print(f"tunebench: note: {visible(text)}", file=sys.stderr)


def show_set_aside() -> None:
    """Print each file that a command passes over as a note, once."""
    warnings.simplefilter("always", SetAside)
    before = warnings.showwarning
    shown: set[str] = set()  # python's own registry is emptied by every change of its filters

    def show(message: Warning | str, category: type[Warning], *about: Any, **more: Any) -> None:
        if not issubclass(category, SetAside):
            before(message, category, *about, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            print_note(str(message))

    warnings.showwarning = show


def load_matrix(
    source: str | Path, overrides: Sequence[str] = (), seeds: int | None = None
) -> Matrix:
    """`matrices.load.load`, with a note when it takes long: the first time, local models and data
    are read whole for their hashes."""
    from matrices.load import load

    text = "reading local models and data whole for their hashes, which are then remembered"
    timer = threading.Timer(SILENT_SECONDS, print_note, [text])
    timer.daemon = True
    timer.start()
    try:
        return load(source, overrides, seeds)
    finally:
        timer.cancel()


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """For work that can be stopped at any point: Ctrl-C and SIGTERM end the command at once with
    the exit code that a shell expects. The block cleans up what it started."""
    from launch.processes.stop_signals import Stopped, stop_signals

    try:
        with stop_signals():
            yield
    except Stopped as stopped:
        print("tunebench: stopped", file=sys.stderr)
        raise typer.Exit(128 + stopped.number) from None
