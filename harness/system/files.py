"""Write files atomically: a reader sees a complete file or none."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from matrices.files.text import visible

TEMPORARY_PREFIX = ".part-"


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader sees the old content or the new, never a part.

    The temporary file is in the same directory, so the replacement is one rename, and is on disk
    before it. Control characters are written as escapes. Raises OSError, and then leaves nothing
    behind.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY_PREFIX)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(visible(text))
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes it private; results are read by colleagues.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _umask() -> int:
    # The only way to read it is to set it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to disk: without it a power failure may undo a rename.

    Windows cannot open directories; there it does nothing."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
