"""The accelerate profile of a cell.

The shipped profiles are files in `launch/profiles`, one per parallelism; a matrix can name another.
The profile is rendered with the cell's values into the cell's directory, where the recorded command
finds it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from harness.ranks.launch_command import DEEPSPEED, PROFILE, SINGLE_PROCESS
from harness.records import provenance
from harness.system.files import write_atomically
from matrices.accelerate_profiles import DEEPSPEED_FILE, read_profile, rendered, values
from matrices.cell import Cell
from matrices.errors import UserError, nearest

SHIPPED = Path(__file__).resolve().parents[1] / "profiles"


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with tunebench."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def text(name: str) -> str:
    """The text of a shipped profile, or of a DeepSpeed file (`zero2.json`). Raises UserError for an
    unknown name."""
    known = [*shipped_profiles(), *sorted(path.name for path in SHIPPED.glob("*.json"))]
    if name not in known:
        raise UserError(
            f"no profile is called {name!r}{nearest(name, known)}; shipped are {', '.join(known)}"
        )
    return (SHIPPED / (name if name.endswith(".json") else f"{name}.yaml")).read_text()


def summary(name: str) -> str:
    """What a shipped profile does: the first sentence of its comment."""
    lines = text(name).splitlines()
    words = " ".join(line.lstrip("# ") for line in lines[: lines.index("#")])
    return words.split(". ")[0].rstrip(".")


def content(cell: Cell) -> dict[str, Any]:
    """The template of a cell's profile: its own, else the shipped one of its parallelism."""
    return dict(cell.profile) or read_profile(SHIPPED / f"{cell.parallelism}.yaml")


def write(cell: Cell, directory: Path, gpu: bool | None = None) -> None:
    """Render the profile of a cell into a directory: `profile.yaml`, and `deepspeed.json` if it
    names one. Writes nothing for a cell in one process without a GPU. `gpu`: whether it trains on
    GPUs.  [default: as on this machine]
    """
    gpu = provenance.uses_gpu_here() if gpu is None else gpu
    if not cell.is_distributed:
        if gpu:
            write_atomically(directory / PROFILE, SINGLE_PROCESS.read_text())
        return
    filled: dict[str, Any] = rendered(content(cell), values(cell, gpu))
    section = filled.get("deepspeed_config")
    if isinstance(section, dict) and isinstance(section.get(DEEPSPEED_FILE), dict):
        configuration = section[DEEPSPEED_FILE]
        section[DEEPSPEED_FILE] = DEEPSPEED
        write_atomically(directory / DEEPSPEED, json.dumps(configuration, indent=2) + "\n")
    origin = "the matrix's own profile" if cell.profile else f"the profile {cell.parallelism}"
    written = yaml.safe_dump(filled, sort_keys=False, default_flow_style=False)
    write_atomically(
        directory / PROFILE, f"# Made from {origin} for the cell beside it.\n{written}"
    )
