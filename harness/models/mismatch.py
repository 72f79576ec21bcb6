"""What was loaded against what the cell asks for."""

from __future__ import annotations

from typing import Any


class VerificationError(RuntimeError):
    """What was loaded is not what the cell asks for: a figure would belong to another cell."""


def require_equal(found: Any, wanted: Any, what: str) -> None:
    if found != wanted:
        raise VerificationError(f"{what}: the cell says {wanted!r}, loaded is {found!r}")
