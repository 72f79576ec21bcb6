"""The cache directory: what tunebench makes once and can make again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from matrices.errors import UserError


def cache_directory() -> Path:
    """`TUNEBENCH_CACHE`, else `$XDG_CACHE_HOME/tunebench`, else `~/.cache/tunebench`."""
    if chosen := os.environ.get("TUNEBENCH_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tunebench"


@contextlib.contextmanager
def cache_errors(
    directory: Path, key: str | None = None, where: str | None = None
) -> Iterator[None]:
    """Turn what the disk refuses in the block into one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache directory {directory} cannot be written ({error.strerror}); set "
            "TUNEBENCH_CACHE to one that can",
            key=key,
            where=where,
        ) from error
