"""The progress of a cell, `progress.json`: its first rank writes it, displays read it.

The state and heartbeat of each rank are in other files, which go into the record:
`harness.ranks.state_files`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from harness.system.files import write_atomically

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """Step `step` of `steps` of a phase, with the last loss and the rate of non-padding tokens;
    outside training a `message`."""

    phase: str = "starting"
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    message: str = ""

    def write(self, working: Path) -> None:
        """Replace the file, with the time of writing (`updated`, seconds since the epoch) in it."""
        content = asdict(self) | {"updated": time.time()}
        write_atomically(working / PROGRESS, json.dumps(content))


def read_progress(working: Path) -> Progress:
    """The last written progress; the default when there is none. Keys of a later tunebench are
    ignored."""
    try:
        plain: dict[str, Any] = json.loads((working / PROGRESS).read_text())
    except (FileNotFoundError, ValueError):  # not yet there, or the disk is full
        return Progress()
    known = {field.name for field in fields(Progress)}
    return Progress(**{name: value for name, value in plain.items() if name in known})
