"""GPUs people fine-tune on: public figures, each with its source, and prices with their date."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from matrices.errors import UserError, nearest
from matrices.files import yaml_lines
from matrices.files.yaml_lines import Spot

CATALOGUE = Path(__file__).parent / "gpus.yaml"
ALIASES = "aliases"


class Gpu(BaseModel):
    """One kind of GPU. `memory_bytes` is what torch reports as `total_memory`; `context_bytes` is
    what the CUDA context and libraries take of it before the first tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory_bytes: int = Field(gt=0)
    context_bytes: int = Field(ge=0)
    bandwidth_bytes_per_second: float = Field(gt=0)
    bf16_flops_per_second: float = Field(gt=0, description="dense, fp32 accumulation")
    compute_capability: tuple[int, int]
    multiprocessors: int = Field(gt=0)
    price_usd_per_hour: float | None = Field(None, ge=0)
    price_date: str | None = None
    source: str = ""

    @model_validator(mode="after")
    def _context_fits(self) -> Gpu:
        if self.context_bytes >= self.memory_bytes:
            raise ValueError("context_bytes leaves nothing of memory_bytes")
        return self

    @property
    def capacity_bytes(self) -> int:
        """What is left for torch's allocator."""
        return self.memory_bytes - self.context_bytes


def gpus(extra: Path | None = None) -> dict[str, Gpu]:
    """The catalogue by name, with the entries of a user's YAML file over it: a new name needs
    every figure, a known one takes over what is not given. Raises UserError with file and line."""
    return dict(_catalogue(extra)[0])


def gpu(name: str, extra: Path | None = None) -> Gpu:
    """One GPU by name or alias; case, spaces and vendor words do not count (`NVIDIA RTX 4090`).
    Raises UserError with the nearest names when there is none."""
    known, aliases = _catalogue(extra)
    wanted = _plain_name(name)
    if wanted not in aliases:
        raise UserError(
            f"no GPU is called {name!r}{nearest(wanted, aliases)}; known are {', '.join(known)}, "
            "and your own from a file with their figures"
        )
    return known[aliases[wanted]]


def by_device_name(name: str, extra: Path | None = None) -> Gpu | None:
    """The GPU that the driver calls this (`NVIDIA A100-SXM4-80GB`); None for an unknown one. One
    device name may stand for several sizes (RTX 3060), so compare the memory."""
    known, aliases = _catalogue(extra)
    return known.get(aliases.get(_plain_name(name), ""))


def _plain_name(name: str) -> str:
    words = re.split(r"[\s_-]+", name.strip().lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "tesla"))


def _catalogue(extra: Path | None) -> tuple[dict[str, Gpu], dict[str, str]]:
    entries = dict(_shipped())
    if extra is not None:
        for name, spot in _entries(extra).items():
            figures = entries[name].value | spot.value if name in entries else spot.value
            entries[name] = Spot(figures, spot.where)
    known = {name: _gpu(name, entry) for name, entry in entries.items()}
    aliases: dict[str, str] = {}
    for name, entry in entries.items():
        aliases[_plain_name(name)] = name
        if ALIASES in entry.value:
            said = _texts(name, entry.value[ALIASES])
            aliases |= {_plain_name(alias): name for alias in said}
    return known, aliases


@cache
def _shipped() -> dict[str, Spot]:
    return _entries(CATALOGUE)


def _entries(path: Path) -> dict[str, Spot]:
    """Name to figures, each with its line; keys checked, values not yet."""
    top = yaml_lines.read(path)
    if not isinstance(top.value, dict):
        raise UserError(
            "GPUs are a mapping of names to figures, e.g. rtx-4090: {price_usd_per_hour: 0.4}",
            where=top.where,
        )
    accepted = [*Gpu.model_fields.keys() - {"name"}, ALIASES]
    for name, spot in top.value.items():
        if not isinstance(spot.value, dict):
            raise UserError(
                "is a mapping of figures, e.g. {price_usd_per_hour: 0.4}",
                key=name,
                where=spot.where,
            )
        for key, figure in spot.value.items():
            if key not in accepted:
                raise UserError(
                    f"unknown figure{nearest(key, accepted) or f'; known are {_list(accepted)}'}",
                    key=f"{name}.{key}",
                    where=figure.where,
                )
    return top.value


def _list(names: list[str]) -> str:
    return ", ".join(sorted(names))


def _gpu(name: str, entry: Spot) -> Gpu:
    figures: dict[str, Any] = {
        key: yaml_lines.plain(spot) for key, spot in entry.value.items() if key != ALIASES
    }
    try:
        return Gpu(name=name, **figures)
    except ValidationError as error:
        place = error.errors()[0]["loc"]
        key = str(place[0]) if place else "memory_bytes"
        message = _problem(key, figures)
        spot = entry.value.get(key, entry)
        raise UserError(message, key=f"{name}.{key}", where=spot.where) from error


def _problem(key: str, figures: dict[str, Any]) -> str:
    if key not in figures:
        return "is missing; a GPU that the catalogue does not have needs it"
    accepted = {
        "compute_capability": "a pair of whole numbers, e.g. [8, 9]",
        "price_date": "text, e.g. 2026-05-07",
        "source": "text",
    }.get(key)
    if accepted is None:
        whole = Gpu.model_fields[key].annotation is int
        accepted = f"a {'whole number' if whole else 'number'} above 0"
    if key == "memory_bytes":
        accepted += " and above context_bytes"
    return f"{figures[key]!r} is not {accepted}"


def _texts(name: str, spot: Spot) -> list[str]:
    value = yaml_lines.plain(spot)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError("is a list of names", key=f"{name}.{ALIASES}", where=spot.where)
    return value
