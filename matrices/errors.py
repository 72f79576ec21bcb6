"""The one error a user can cause, and how it reads."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something the user wrote or named is wrong; shown as one line, exit code 2.

    `key` is the dotted setting it is about (`train.steps`), `where` the `file:line` if known.
    Code that knows the setting but not the file raises with `key` alone; the command line asks
    the matrix where that key stands and fills `where` in.
    """

    def __init__(self, message: str, *, key: str | None = None, where: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.key = key
        self.where = where

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)

    def __reduce__(self) -> tuple[object, ...]:
        # Travels between processes with its key and place.
        return (_rebuild, (self.message, self.key, self.where))


def _rebuild(message: str, key: str | None, where: str | None) -> UserError:
    return UserError(message, key=key, where=where)


class SetAside(UserWarning):
    """A file in a results directory that is passed over while the rest goes on; the message is one
    line. The command line shows it as a note."""


def nearest(word: str, known: Iterable[str], limit: int = 3) -> str:
    """`; did you mean 'a' or 'b'?`, or the empty string when nothing is near."""
    close = get_close_matches(word, list(known), n=limit, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
