"""The error for a loaded object that differs from its cell."""

from __future__ import annotations

from typing import Any


class VerificationError(RuntimeError):
    """The loaded object is not what the cell asks for: figures would belong to another cell."""


def require_equal(found: Any, wanted: Any, what: str) -> None:
    """Raise VerificationError naming `what` when `found` is not `wanted`."""
    if found != wanted:
        raise VerificationError(f"{what}: the cell says {wanted!r}, loaded is {found!r}")
