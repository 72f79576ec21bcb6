"""The one error a user can cause, and how it reads."""

from __future__ import annotations

import re
from collections.abc import Iterable


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


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(word: str, known: Iterable[str], limit: int = 3) -> str:
    """`; did you mean 'a' or 'b'?`, or the empty string when nothing is near."""
    close = closest(word, known, limit)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def closest(word: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The names that are near to a word, nearest first.

    Near is what a slip of the finger makes: one letter in four or so, two neighbours exchanged
    counting as one, or a name of several words of which some were left out."""
    allowed = min(3, (len(word) + 1) // 4)
    parts = set(re.split("[-_. ]", word.lower()))
    found = []
    for name in dict.fromkeys(known):
        away = _slips(word.lower(), name.lower(), allowed)
        if away <= allowed:
            found.append((away, name))
        elif len(word) > 3 and parts < set(re.split("[-_. ]", name.lower())):
            found.append((allowed + 1, name))
    # Equally near ones stay in their order.
    return [name for _, name in sorted(found, key=lambda each: each[0])[:limit]]


def _slips(word: str, name: str, most: int) -> int:
    """Letters to add, drop, replace or exchange with their neighbour; above `most`, some number
    above it."""
    if abs(len(word) - len(name)) > most:
        return most + 1
    before: list[int] = []
    row = list(range(len(name) + 1))
    for i, letter in enumerate(word, 1):
        after = [i]
        for j, other in enumerate(name, 1):
            cost = min(row[j] + 1, after[j - 1] + 1, row[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == name[j - 2] and word[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            after.append(cost)
        if min(after) > most:
            return most + 1
        before, row = row, after
    return row[-1]
