"""Local models and data: which values are paths, and hashes of what is there.

With its content hash in the cell, a cell's identity is what was read, not where it lies.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

from matrices.errors import UserError

MIB = 2**20
WHOLE_LIMIT_BYTES = 64 * MIB
BLOCKS = 64
BLOCK_BYTES = MIB

FINGERPRINTED = ("model.name", "model.config", "data.source")
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def local_path(key: str, value: Any, base: Path, where: str) -> Path | None:
    """The absolute path behind a model, data or task path; None for a packaged name or hub id.

    A value is a path if something is there, or if it can be nothing else (`./x`, `../x`, `/x`,
    `~/x`, data ending in .json and the like). Raises UserError when it can be nothing else and
    nothing is there, or the wrong thing is."""
    if value is None or key not in (*FINGERPRINTED, "evaluate.include_path"):
        return None
    path = Path(os.path.abspath(base / Path(value).expanduser()))
    only_path = value.startswith(("./", "../", "/", "~")) or key in (
        "evaluate.include_path",
        "model.config",
    )
    if key == "data.source":
        only_path = only_path or value.endswith(DATA_SUFFIXES)
    problem = None
    if not path.exists():
        if not only_path:
            return None
        problem = "does not exist"
    elif key == "data.source":
        if not path.is_file() or path.suffix not in DATA_SUFFIXES:
            problem = f"is not a file ending in {', '.join(DATA_SUFFIXES)}"
    elif key == "model.config":
        if not path.is_file():
            problem = "is not a file; name the config.json in it"
    elif not path.is_dir():
        problem = "is not a directory"
        if path.suffix == ".json":
            problem += "; a config.json alone goes under model: {config: ...}"
    if problem:
        shown = f"{value!r}" if value == str(path) else f"{value!r} ({path})"
        raise UserError(f"{shown} {problem}; correct the path", key=key, where=where)
    return path


def fingerprint(path: Path) -> str:
    """sha256, hex, of a file's content, or of a directory's sorted (relative name, file hash).

    Files above 64 MiB are sampled: their size and 64 evenly spaced blocks of 1 MiB, the first and
    the last among them, so weights of any size cost 64 MiB of reading. Names starting with a dot
    are left out of a directory (version control and caches, not content). Links to files are
    followed, as in a hub snapshot; links to directories are not. Raises UserError when something
    cannot be read or a directory holds no files.
    """
    try:
        return _directory_hash(path) if path.is_dir() else _file_hash(path)
    except OSError as error:
        raise UserError(f"cannot be read: {error.filename}: {error.strerror}") from error


def _directory_hash(directory: Path) -> str:
    digest = hashlib.sha256()
    files = sorted(_files(directory), key=lambda file: file.relative_to(directory).as_posix())
    if not files:
        raise UserError(f"{directory} holds no files")
    for file in files:
        # A zero byte cannot be in a file name, so no two listings read the same.
        digest.update(f"{file.relative_to(directory).as_posix()}\0{_file_hash(file)}\n".encode())
    return digest.hexdigest()


def _files(directory: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for root, directories, names in os.walk(directory, onerror=refuse):
        directories[:] = [name for name in directories if not name.startswith(".")]
        paths = [Path(root, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if stat.S_ISREG(path.stat().st_mode)]
    return found


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE_LIMIT_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for block in range(BLOCKS):
            file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
        return digest.hexdigest()
