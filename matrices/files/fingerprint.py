"""Local models and data: which values are paths, and hashes of what is there.

With its content hash in the cell, a cell's identity is what was read, not where it lies.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from matrices.errors import UserError
from matrices.files.file_hash import file_sha256, sampled_sha256

FINGERPRINTED = ("model.name", "model.config", "data.source")
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
# More readers than this only wait for the disk.
READERS = 4
# `organization/name`; the hub's rules are stricter, so every hub id of today has this form.
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_written_as_path(value: str) -> bool:
    """`./x`, `../x`, `/x`, `~/x`: a path and never a hub id."""
    return value.startswith(("./", "../", "/", "~")) or value in (".", "..")


def refuse_hub_id_of_directory(value: str, key: str, where: str | None = None) -> None:
    """Raise UserError when `value` has the form of a hub id and names something in the current
    directory: transformers and datasets would take that without a word."""
    if not is_written_as_path(value) and Path(value).exists():
        raise UserError(_two_meanings(value, Path(value).absolute()), key=key, where=where)


def _two_meanings(value: str, path: Path) -> str:
    return (
        f"{value!r} can be a hub id and is also there as {path}; write ./{value} for the local "
        "one, or start in another directory for the hub's"
    )


def local_path(key: str, value: Any, base: Path, where: str) -> Path | None:
    """The absolute path behind a model, data or task path; None for a packaged name or hub id.

    A value is a path if it can be nothing else (`./x`, `../x`, `/x`, `~/x`, data ending in .json
    and the like), or if something is there and it does not look like a hub id. Raises UserError
    when it can be nothing else and nothing is there, or the wrong thing is there, and when a hub
    id names something that is there."""
    if value is None or key not in (*FINGERPRINTED, "evaluate.include_path"):
        return None
    path = Path(os.path.abspath(base / Path(value).expanduser()))
    only_path = is_written_as_path(value) or key in ("evaluate.include_path", "model.config")
    if key == "data.source":
        only_path = only_path or value.endswith(DATA_SUFFIXES)
    problem = None
    if not path.exists():
        if not only_path:
            return None
        problem = "does not exist"
    elif not only_path and HUB_ID.fullmatch(value):
        raise UserError(_two_meanings(value, path), key=key, where=where)
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

    Names starting with a dot are left out of a directory (version control and caches, not
    content). Links to files are followed, as in a hub snapshot; links to directories are not.
    Raises UserError when something cannot be read or a directory holds no files.
    """
    return _content_hash(path, file_sha256)


def is_unchanged(path: Path, expected: str) -> bool:
    """Whether what is at `path` has this fingerprint, also one of the time when only parts of
    large files were hashed. Raises UserError as `fingerprint` does."""
    return fingerprint(path) == expected or _content_hash(path, sampled_sha256) == expected


def _content_hash(path: Path, hash_file: Callable[[Path], str]) -> str:
    try:
        return _directory_hash(path, hash_file) if path.is_dir() else hash_file(path)
    except OSError as error:
        raise UserError(f"cannot be read: {error.filename}: {error.strerror}") from error


def _directory_hash(directory: Path, hash_file: Callable[[Path], str]) -> str:
    digest = hashlib.sha256()
    files = sorted(_files(directory), key=lambda file: file.relative_to(directory).as_posix())
    if not files:
        raise UserError(f"{directory} holds no files")
    with ThreadPoolExecutor(READERS) as readers:
        hashes = list(readers.map(hash_file, files))
    for file, found in zip(files, hashes, strict=True):
        # A zero byte cannot be in a file name, so no two listings read the same.
        digest.update(f"{file.relative_to(directory).as_posix()}\0{found}\n".encode())
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
