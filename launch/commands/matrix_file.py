"""A matrix as a command reads it, with a word when local files take long to hash."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from launch.commands.console import print_note
from matrices.load import Matrix
from matrices.load import load as read

# A command that says nothing for longer looks stuck.
SILENT_SECONDS = 1.0


def load(source: str | Path, overrides: Sequence[str] = (), seeds: int | None = None) -> Matrix:
    """As `matrices.load.load`. Weights of tens of gigabytes are read whole the first time."""
    said = "reading local models and data whole for their hashes, which are then remembered"
    waiting = threading.Timer(SILENT_SECONDS, print_note, [said])
    waiting.daemon = True
    waiting.start()
    try:
        return read(source, overrides, seeds)
    finally:
        waiting.cancel()
