"""The simulating process: `python -m harness.simulate`, with a request on each line of its input.

It imports the stack once and forks a child for each cell.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Self

from pydantic import ValidationError

from harness.records.prediction import Prediction, Request
from harness.system.child_process import describe_exit, kill_group, python_module, start
from matrices.files.cache import cache_directory

ROOT = Path(__file__).resolve().parents[2]
# The project's own packages come first, so that those of another stack cannot replace them.
OWN_PACKAGES = ("matrices", "harness")
LOG_BYTES = 65536


class Simulator:
    """The simulating process of one stack: `module` with the packages of `overlay` first. It starts
    at the first request, answers further ones, and is killed when the context ends, also by an
    exception or Ctrl-C."""

    def __init__(self, module: str, overlay: Sequence[Path]) -> None:
        self.module = module
        self.overlay = overlay
        # How the process ended before it had answered every cell of the last request.
        self.ended: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    @property
    def started(self) -> bool:
        return self._process is not None

    def answers(self, request: Request) -> Iterator[tuple[int, Prediction]]:
        """The index of a cell in the request and its prediction, one by one."""
        if self._process is None:
            self._start()
        process, left = self._process, len(request.cells)
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        self.ended = None
        with suppress(BrokenPipeError):
            process.stdin.write(request.model_dump_json().encode() + b"\n")
            process.stdin.flush()
        while left and (line := process.stdout.readline()):
            answer = _answer(line, len(request.cells))
            if answer is None:
                # What a library prints: of interest only if the process fails.
                self._output.write(line)
                continue
            left -= 1
            yield answer
        if left:
            how = describe_exit(process.wait())
            self.ended = f"the simulating process {how}{_last_line(self._output)}"
            self._open.close()

    def _start(self) -> None:
        with ExitStack() as opened:
            scratch = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="tunebench-")))
            self._output = opened.enter_context(tempfile.TemporaryFile(buffering=0))
            for name in OWN_PACKAGES:
                (scratch / name).symlink_to(ROOT / name, target_is_directory=True)
            inherited = os.environ.get("PYTHONPATH", "")
            path = [str(scratch), *map(str, self.overlay), *([inherited] if inherited else [])]
            self._process = start(
                python_module(self.module),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._output,
                environment={"PYTHONPATH": os.pathsep.join(path)},
            )
            opened.callback(self._end, self._process)
            self._open = opened.pop_all()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        kill_group(process.pid)
        process.wait()
        for stream in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        self._process = None


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
