"""Standard output and standard error of the command line.

Results go to standard output; a failure to write them is an error. Progress and messages go to
standard error; a sweep goes on without them.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from typing import IO

from matrices.errors import UserError
from matrices.files.text import visible

# ASCII for the other characters of tables and lines, for outputs that cannot show them.
PLAIN = {
    "–": "-",
    "−": "-",
    "·": "-",
    "…": "...",
    "×": "x",
    "±": "+-",
    "↑": "^",
    "↓": "v",
    "\N{NO-BREAK SPACE}": " ",
}


class OutputLost(UserError):
    """Standard output cannot be written. `broken_pipe`: its reader has ended."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output cannot be written: {error.strerror or error}")
        self.broken_pipe = error.errno == errno.EPIPE


class Results(io.TextIOWrapper):
    """Standard output, without control characters; raises OutputLost."""

    def write(self, text: str) -> int:
        try:
            return super().write(visible(text))
        except OSError as error:
            raise OutputLost(error) from None

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputLost(error) from None


class Messages(io.TextIOWrapper):
    """Standard error; ignores failures to write."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            return


def prepare() -> None:
    """Replace `sys.stdout` and `sys.stderr` by the classes here. Raises UserError when standard
    output is closed."""
    codecs.register_error("plain", _plain)
    closed = {number for number in range(3) if not _is_open(number)}
    for number in sorted(closed):
        # Otherwise a file that is opened later would get its number and receive the output.
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    if 2 in closed or sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - as long as the process
    sys.stderr = Messages(_bytes(sys.stderr), sys.stderr.encoding, "plain", line_buffering=True)
    if 1 in closed or sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
        raise UserError("standard output is closed; send it to a file, or to /dev/null")
    live = sys.stdout.isatty()
    sys.stdout = Results(_bytes(sys.stdout), sys.stdout.encoding, "plain", line_buffering=live)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _bytes(stream: IO[str]) -> IO[bytes]:
    assert isinstance(stream, io.TextIOWrapper)
    stream.flush()
    found: IO[bytes] = stream.detach()
    return found


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replaces characters that the encoding of an output lacks; other escapes are JSON's."""
    assert isinstance(error, UnicodeEncodeError)
    missing = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter) or _escaped(letter) for letter in missing), error.end


def _escaped(letter: str) -> str:
    pairs = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{pairs[at]:02x}{pairs[at + 1]:02x}" for at in range(0, len(pairs), 2))
