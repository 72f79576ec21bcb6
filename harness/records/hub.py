"""The local cache of the hub: the commit of a revision, and the directory of its files.

Light on purpose (no torch, no network): it reads the cache that huggingface_hub writes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from harness.records.record import Record
from matrices.catalogue.models import PACKAGED_MODELS
from matrices.cell import Cell, Data, Model
from matrices.files.fingerprint import DATA_SUFFIXES, is_written_as_path

COMMIT = re.compile(r"[0-9a-f]{40}")
PACKAGED_DATA = "python-reference"
RepositoryKind = Literal["model", "dataset"]


def is_hub_model(model: Model) -> bool:
    """Whether a model comes from the hub: it is neither packaged nor local nor a bare config."""
    local = model.fingerprint is not None or is_written_as_path(model.name)
    return not (local or model.config or model.name in PACKAGED_MODELS)


def is_hub_data(data: Data) -> bool:
    """Whether data comes from the hub: it is neither packaged nor local."""
    local = is_written_as_path(data.source) or data.source.endswith(DATA_SUFFIXES)
    return not (local or data.fingerprint is not None or data.source == PACKAGED_DATA)


def known_commit(name: str, revision: str | None, kind: RepositoryKind = "model") -> str | None:
    """The commit of a revision in the local cache; None without a local copy."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    try:
        text = (_folder(name, kind) / "refs" / (revision or "main")).read_text().strip()
    except (OSError, ValueError):
        return None
    return text if COMMIT.fullmatch(text) else None


def snapshot(name: str, revision: str | None) -> Path | None:
    """The directory of a hub model's downloaded files; None without a local copy."""
    commit = known_commit(name, revision)
    directory = _folder(name, "model") / "snapshots" / (commit or "")
    return directory if commit and directory.is_dir() else None


def _folder(name: str, kind: RepositoryKind) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"


def _sources(cell: Cell) -> list[tuple[RepositoryKind, str, str | None]]:
    """What a cell reads from the hub: kind, name and revision."""
    found: list[tuple[RepositoryKind, str, str | None]] = []
    if is_hub_model(cell.model):
        found.append(("model", cell.model.name, cell.model.revision))
    if cell.data is not None and is_hub_data(cell.data):
        found.append(("dataset", cell.data.source, cell.data.revision))
    return found


def known_commits(cell: Cell) -> dict[str, dict[str, str]]:
    """The first provenance of a record: the commits of the cell's model and data in the local
    cache. Loading replaces them."""
    found: dict[str, dict[str, str]] = {}
    for kind, name, revision in _sources(cell):
        commit = known_commit(name, revision, kind)
        if commit is not None:
            found["model" if kind == "model" else "data"] = {"commit": commit}
    return found


def changed_since(record: Record) -> str:
    """Why a record is of another commit than its cell would read from the hub today, by the local
    cache; empty if it is not."""
    for kind, name, revision in _sources(record.cell):
        if revision is not None and COMMIT.fullmatch(revision):
            continue  # the cell itself says it
        read = record.provenance.model if kind == "model" else record.provenance.data
        today, then = known_commit(name, revision, kind), read.get("commit")
        if today is not None and then != today:
            was = f"commit {then[:12]}" if then else "an unknown commit"
            return f"it measured {was} of {name}, whose {revision or 'main'} is {today[:12]} now"
    return ""
