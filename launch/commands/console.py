"""Matrices, standard output and standard error, for all commands."""

from __future__ import annotations

import json
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matrices.errors import SetAside, UserError
from matrices.files.text import visible

if TYPE_CHECKING:
    from matrices.load import Matrix

# Exit code of a command that could not do all its work.
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
    """Print a note, once, for each file that a command skips."""
    warnings.simplefilter("always", SetAside)
    before = warnings.showwarning
    shown: set[str] = set()  # every change of python's filters empties its own registry

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
    """`matrices.load.load`, with a note when it takes long: the first time, it hashes local models
    and data."""
    from matrices.load import load

    text = "reading local models and data whole for their hashes, which are then remembered"
    timer = threading.Timer(SILENT_SECONDS, print_note, [text])
    timer.daemon = True
    timer.start()
    try:
        return load(source, overrides, seeds)
    finally:
        timer.cancel()
