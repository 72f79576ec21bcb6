"""What every command does with its standard output, standard error and stop signals."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import typer

from matrices.errors import SetAside, UserError
from matrices.files.text import visible


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def print_error(error: UserError) -> None:
    print(f"tunebench: error: {visible(' '.join(str(error).split()))}", file=sys.stderr)


def print_note(text: str) -> None:
    print(f"tunebench: note: {visible(text)}", file=sys.stderr)


def show_set_aside() -> None:
    """From here on, show each file that a command passes over as a note, once."""
    warnings.simplefilter("always", SetAside)
    before = warnings.showwarning
    told: set[str] = set()  # python's own registry is emptied by every change of its filters

    def shown(message: Warning | str, category: type[Warning], *about: Any, **more: Any) -> None:
        if not issubclass(category, SetAside):
            before(message, category, *about, **more)
        elif str(message) not in told:
            told.add(str(message))
            print_note(str(message))

    warnings.showwarning = shown


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """For work that leaves nothing half done: Ctrl-C and SIGTERM end the command at once, with the
    exit code a shell expects, and whatever the block started is ended by its own clean-up."""
    from launch.processes.stop_signals import Stopped, stop_signals

    try:
        with stop_signals():
            yield
    except Stopped as stopped:
        print("tunebench: stopped", file=sys.stderr)
        raise typer.Exit(128 + stopped.number) from None
