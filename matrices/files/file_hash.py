"""sha256 of whole files. A large file that has not changed is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from matrices.errors import UserError
from matrices.files.cache import cache_directory

MIB = 2**20
# Reading less than this costs no more than looking it up.
REMEMBERED_FROM_BYTES = 4 * MIB
# File systems round the times of a change. A file that changed this shortly ago may change once
# more without a new time.
SETTLED_SECONDS = 2.0


def file_sha256(path: Path) -> str:
    """sha256, hex, of a file's whole content.

    The hash of a large file is remembered in the cache directory, with the file's path, size,
    mtime, ctime and inode. Raises OSError when the file cannot be read, UserError when it changes
    meanwhile.
    """
    began = time.time()
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        if before.st_size < REMEMBERED_FROM_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        key = _key(path, before)
        remembered = _recall(key)
        if remembered is not None:
            return remembered
        found = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    if _key(path, after) != key:
        raise UserError(f"{path} changed while it was read; start again when it is complete")
    if began - max(before.st_mtime, before.st_ctime) > SETTLED_SECONDS:
        _remember(key, found)
    return found


def _key(path: Path, state: os.stat_result) -> str:
    """What has to be the same for a hash to hold. An edit that sets the old mtime again has a new
    ctime."""
    facts = [os.path.realpath(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    return json.dumps([*facts, state.st_ino])


def _entry(key: str) -> Path:
    path: str = json.loads(key)[0]
    name = hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()
    return cache_directory() / "hashes" / name


def _recall(key: str) -> str | None:
    try:
        text = _entry(key).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    found = text.partition("\n")[0]
    # An entry for another state of the file, cut off or damaged is not equal.
    return found if text == _text(key, found) else None


def _text(key: str, digest: str) -> str:
    return f"{digest}\n{key}\n{hashlib.sha256(f'{digest}{key}'.encode()).hexdigest()}\n"


def _remember(key: str, digest: str) -> None:
    """Replace the entry of this file by one rename. Without a cache that can be written, the file
    is read again each time."""
    entry = _entry(key)
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=entry.parent, prefix=".part-")
        with os.fdopen(descriptor, "w") as file:
            file.write(_text(key, digest))
        os.replace(temporary, entry)


def sampled_sha256(path: Path, whole_limit: int = 64 * MIB, blocks: int = 64) -> str:
    """The hash of early records: of a file above `whole_limit` only its size and evenly spaced
    blocks of 1 MiB count. Such records can still be run again."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= whole_limit:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for block in range(blocks):
            file.seek((size - MIB) * block // (blocks - 1))
            digest.update(file.read(MIB))
        return digest.hexdigest()
