"""The keys of a matrix that are no settings, checked: its name, question, flags and limits."""

from __future__ import annotations

import re
from pathlib import Path

from matrices.errors import UserError
from matrices.files import yaml_lines
from matrices.files.yaml_lines import Spot
from matrices.language.settings import show


def name(spot: Spot | None, path: Path) -> str:
    # It becomes a directory name.
    name = path.stem if spot is None else yaml_lines.plain(spot)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(
            f"{show(name)} is not made of letters, digits, '.', '_' and '-'; write for example "
            "name: my-sweep",
            key="name",
            where=spot.where if spot else str(path),
        )
    return name


def text(spot: Spot | None) -> str:
    if spot is None:
        return ""
    if not isinstance(spot.value, str):
        raise UserError(
            f"{show(yaml_lines.plain(spot))} is not text; put it in quotes",
            key="question",
            where=spot.where,
        )
    return spot.value


def flag(spot: Spot | None) -> bool:
    if spot is None:
        return True
    if not isinstance(spot.value, bool):
        raise UserError(
            f"{show(yaml_lines.plain(spot))} is not true or false",
            key="score_base",
            where=spot.where,
        )
    return spot.value


def seconds(key: str, spot: Spot | None) -> float | None:
    if spot is None or spot.value is None:
        return None
    number = spot.value
    if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0:
        raise UserError(
            f"{show(yaml_lines.plain(spot))} is not a number of seconds above 0; write for example "
            f"{key}: 3600",
            key=key,
            where=spot.where,
        )
    return float(number)
