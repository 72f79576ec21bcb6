"""The simulating process: `python -m harness.simulate REQUEST.json`.

There is one process for all cells of a request. It imports the stack once and forks a child for
each cell.
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
from harness.system.child_process import describe_exit, kill_group, python_module, start
from matrices.files.cache import cache_directory

ROOT = Path(__file__).resolve().parents[2]
# The project's own packages come first, so that those of another stack cannot replace them.
OWN_PACKAGES = ("matrices", "harness")
LOG_BYTES = 65536


class Simulation:
    """One request and its answers. `ended` is set when the process ended before it had answered
    every cell; it says how."""

    def __init__(self, request: Request, overlay: Sequence[Path], module: str) -> None:
        self.request = request
        self.overlay = overlay
        self.module = module
        self.ended: str | None = None

    def answers(self) -> Iterator[tuple[int, Prediction]]:
        """The index of a cell in the request and its prediction, one by one.

        The process is killed when the generator ends, also by an exception or Ctrl-C.
        """
        with (
            tempfile.TemporaryDirectory(prefix="tunebench-") as scratch,
            tempfile.TemporaryFile(buffering=0) as output,
        ):
            process = self._start(Path(scratch), output)
            answered = 0
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    answer = _answer(line, len(self.request.cells))
                    if answer is None:
                        # What a library prints: of interest only if the process fails.
                        output.write(line)
                        continue
                    answered += 1
                    yield answer
                code = process.wait()
            finally:
                kill_group(process.pid)
                process.wait()
            if answered < len(self.request.cells):
                self.ended = f"the simulating process {describe_exit(code)}{_last_line(output)}"

    def _start(self, scratch: Path, output: IO[bytes]) -> subprocess.Popen[bytes]:
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
            stderr=output,
            environment={"PYTHONPATH": os.pathsep.join(path)},
        )


def _answer(line: bytes, cells: int) -> tuple[int, Prediction] | None:
    """The answer on a line; None for a line that is not one."""
    try:
        plain: Any = json.loads(line)
        index, prediction = (
            plain["index"],
            Prediction.model_validate_json(json.dumps(plain["prediction"])),
        )
    except (ValueError, TypeError, KeyError, ValidationError):
        return None
    return (index, prediction) if isinstance(index, int) and 0 <= index < cells else None


def _last_line(output: IO[bytes]) -> str:
    """The last line of the output, and the file that keeps all of it."""
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - LOG_BYTES))
    text = output.read().decode(errors="replace")
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
