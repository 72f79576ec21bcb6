"""Standard output and standard error of the command line, whatever they are connected to.

Results go to standard output, and what cannot be written there is an error. Progress and messages
go to standard error, and a sweep goes on without them.
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

# What tables and lines hold beside ASCII, for outputs that cannot show it.
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
    """Standard output cannot be written. `broken_pipe`: whoever read it has gone."""

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
    """Standard error; what cannot be written is left out."""

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
    """Have `sys.stdout` and `sys.stderr` written to as this module says. Raises UserError when
    standard output is closed."""
    codecs.register_error("plain", _plain)
    closed = {number for number in range(3) if not _is_open(number)}
    for number in sorted(closed):
        # A file opened later would get its number, and be written to as if it were the terminal.
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
    """What stands for letters that the encoding of an output lacks; escapes are JSON's."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter) or _escaped(letter) for letter in lacking), error.end


def _escaped(letter: str) -> str:
    pairs = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{pairs[at]:02x}{pairs[at + 1]:02x}" for at in range(0, len(pairs), 2))
