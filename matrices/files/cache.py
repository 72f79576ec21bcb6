"""The cache directory: what tunebench makes once and can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`TUNEBENCH_CACHE`, else `$XDG_CACHE_HOME/tunebench`, else `~/.cache/tunebench`."""
    if chosen := os.environ.get("TUNEBENCH_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tunebench"
