"""The simulating process: `python -m harness.simulate REQUEST.json`, started, read and stopped.

One process for all cells of a request: it imports the stack once and forks a child for each cell.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from harness.records.prediction import Prediction, Request
from harness.system.child_process import how_it_ended, kill_group, python_module, start
from matrices.files.cache import cache_directory

ROOT = Path(__file__).resolve().parents[2]
# The project's own packages: found first, so that no other stack's can stand in for them.
OWN_PACKAGES = ("matrices", "harness")
LOG_BYTES = 65536


class Simulation:
    """One request and its answers. `ended` is none while all is well; when the process died before
    it had answered every cell, it says how."""

    def __init__(self, request: Request, overlay: Sequence[Path], module: str) -> None:
        self.request = request
        self.overlay = overlay
        self.module = module
        self.ended: str | None = None

    def answers(self) -> Iterator[tuple[int, Prediction]]:
        """Index of a cell in the request and its prediction, as each comes.

        Whatever leaves this generator (the last answer, an exception, Ctrl-C) leaves no process
        behind.
        """
        with (
            tempfile.TemporaryDirectory(prefix="tunebench-") as scratch,
            tempfile.TemporaryFile(buffering=0) as said,
        ):
            process = self._start(Path(scratch), said)
            answered = 0
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    answer = _answer(line, len(self.request.cells))
                    if answer is None:
                        # A library's greeting: of interest only if things go wrong.
                        said.write(line)
                        continue
                    answered += 1
                    yield answer
                code = process.wait()
            finally:
                kill_group(process.pid)
                process.wait()
            if answered < len(self.request.cells):
                self.ended = f"the simulating process {how_it_ended(code)}{_last_words(said)}"

    def _start(self, scratch: Path, said: IO[bytes]) -> subprocess.Popen[bytes]:
        request = scratch / "request.json"
        request.write_text(self.request.model_dump_json())
        own = scratch / "packages"
        own.mkdir()
        for name in OWN_PACKAGES:
            (own / name).symlink_to(ROOT / name, target_is_directory=True)
        inherited = os.environ.get("PYTHONPATH", "")
        path = [str(own), *map(str, self.overlay), *([inherited] if inherited else [])]
        return start(
            python_module(self.module, str(request)),
            stdout=subprocess.PIPE,
            stderr=said,
            environment={"PYTHONPATH": os.pathsep.join(path)},
        )


def _answer(line: bytes, cells: int) -> tuple[int, Prediction] | None:
    """A line of the protocol; none for anything else."""
    try:
        plain: Any = json.loads(line)
        index, prediction = (
            plain["index"],
            Prediction.model_validate_json(json.dumps(plain["prediction"])),
        )
    except (ValueError, TypeError, KeyError, ValidationError):
        return None
    return (index, prediction) if isinstance(index, int) and 0 <= index < cells else None


def _last_words(said: IO[bytes]) -> str:
    """The last line of what it said, and where all of it is kept."""
    said.seek(0, os.SEEK_END)
    said.seek(max(0, said.tell() - LOG_BYTES))
    text = said.read().decode(errors="replace")
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    if not last:
        return ""
    kept = cache_directory() / "logs" / "simulate.txt"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(text)
    except OSError:
        return f": {last}"
    return f": {last} (all it said: {kept})"
