"""Text from outside that is written to a file or a terminal."""

from __future__ import annotations

import re

# All but tab and newline; and halves of surrogate pairs, which no file can hold.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control characters as JSON escapes them (`\\u001b`): a terminal does not obey
    them, and within JSON nothing is lost."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
