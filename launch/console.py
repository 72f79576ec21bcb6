"""What every command does with its standard output, standard error and stop signals."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import typer

from matrices.errors import UserError
from matrices.text import visible


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def print_error(error: UserError) -> None:
    print(f"tunebench: error: {visible(' '.join(str(error).split()))}", file=sys.stderr)


def print_note(text: str) -> None:
    print(f"tunebench: note: {visible(text)}", file=sys.stderr)


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """For work that leaves nothing half done: Ctrl-C and SIGTERM end the command at once, with the
    exit code a shell expects, and whatever the block started is ended by its own clean-up."""
    from launch.stopping import Stopped, stop_signals

    try:
        with stop_signals():
            yield
    except Stopped as stopped:
        print("tunebench: stopped", file=sys.stderr)
        raise typer.Exit(128 + stopped.number) from None
