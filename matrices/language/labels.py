"""Short names for the cells of a sweep: the settings in which they differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from matrices.cell import SECTIONS, TOP_LEVEL, Cell, Section, devices_text, label

LONGEST = 60
# Values are cut to so many characters, as far as it needs; then the label is.
VALUE_LIMITS = (40, 24, 16, 12)
ID_DIGITS = 12
Flat = dict[str, Any]
ABSENT = object()
# Shown without the name of the setting.
NAMES = {"model.name", "model.config", "data.source"}
PATHS = {*NAMES, "evaluate.include_path"}
# Shown as one word each.
QUANTIZATION = ("quantization.quant_type", "quantization.double_quant")
PARALLELISM = ("parallelism", "devices", "nodes")
# These settings are tried first, in this order.
FIRST = (
    "method",
    *QUANTIZATION,
    "adapter.rank",
    "adapter.target_modules",
    *PARALLELISM,
    "model.name",
    "data.source",
    "adapter.alpha",
)
LAST = "seed"
DECLARED = tuple(f"{name}.{leaf}" for name, part in SECTIONS.items() for leaf in part.model_fields)


def labels(cells: Sequence[Cell]) -> dict[str, str]:
    """Cell id to label. No two cells have the same one.

    Base cells, which a run adds for the others, are compared with each other only."""
    found: dict[str, str] = {}
    for base in (True, False):
        group = {cell.cell_id: cell for cell in cells if (cell.method == "base") == base}
        found |= _of_group(group)
    count = Counter(found.values())
    return {
        cell_id: text if count[text] == 1 else _cut(text, f" {cell_id[:ID_DIGITS]}")
        for cell_id, text in found.items()
    }


def _of_group(cells: Mapping[str, Cell]) -> dict[str, str]:
    known: dict[int, tuple[Section, Flat]] = {}
    flats = [_flat(cell, known) for cell in cells.values()]
    distinguishing = _distinguishing(flats)
    names = {
        key: tails(list(dict.fromkeys(path for flat in flats if (path := _at(flat, key)))))
        for key in PATHS & set(distinguishing)
    }
    found = {}
    for (cell_id, cell), flat in zip(cells.items(), flats, strict=True):
        shown = {key: value for key in distinguishing if (value := _at(flat, key)) is not ABSENT}
        for key in shown.keys() & names.keys():
            shown[key] = names[key].get(shown[key])
        found[cell_id] = _label(cell_id, cell, shown) if distinguishing else label(cell)
    return found


def _flat(cell: Cell, known: dict[int, tuple[Section, Flat]]) -> dict[str, Flat]:
    """A cell's settings by section; "" are those that stand in none. The cells of a sweep share
    their sections, so each of those is flattened once."""
    found = {"": _flattened({name: getattr(cell, name) for name in TOP_LEVEL})}
    for name in SECTIONS:
        section = getattr(cell, name)
        if section is None:
            continue
        if id(section) not in known:
            leaves = type(section).model_fields
            flat = {f"{name}.{leaf}": getattr(section, leaf) for leaf in leaves}
            known[id(section)] = section, _flattened(flat)
        found[name] = known[id(section)][1]
    return found


def _flattened(flat: Flat) -> Flat:
    """The settings that a label may show. Entries of mappings are settings of their own, and alpha
    counts as alpha / rank, so that it is no news beside the rank."""
    found: Flat = {}
    for key, value in flat.items():
        if key.endswith(".fingerprint"):
            continue
        if isinstance(value, dict):
            found |= {f"{key}.{name}": each for name, each in value.items()}
        elif key == "adapter.alpha":
            found[key] = 2.0 if value is None else value / flat["adapter.rank"]
        else:
            found[key] = value
    return found


def _at(flat: Mapping[str, Flat], key: str) -> Any:
    section = key.partition(".")[0]
    return flat.get(section if section in SECTIONS else "", {}).get(key, ABSENT)


def _distinguishing(flats: Sequence[Mapping[str, Flat]]) -> list[str]:
    """Settings that together tell all cells apart: in their order, each that tells cells apart
    which those before it do not. One that follows from others (a method's learning rate) is left
    out."""
    distinct = {id(part): part for flat in flats for part in flat.values()}
    present = {key for part in distinct.values() for key in part}
    order = {key: place for place, key in enumerate((*FIRST, *DECLARED))}
    keys = sorted(present - {LAST}, key=lambda key: (order.get(key, len(order)), key))
    classes, parts, found = [0] * len(flats), 1, []
    for key in [*keys, LAST]:
        numbers: dict[tuple[int, str], int] = {}
        refined = [
            numbers.setdefault((old, repr(_at(flat, key))), len(numbers))
            for old, flat in zip(classes, flats, strict=True)
        ]
        if len(numbers) > parts:
            classes, parts = refined, len(numbers)
            found.append(key)
        if parts == len(flats):
            break
    return found


def _label(cell_id: str, cell: Cell, shown: Flat) -> str:
    for limit in VALUE_LIMITS:
        text = " ".join(_words(cell, dict(shown), limit)) or cell.method
        if len(text) <= LONGEST:
            return text
    return _cut(text, f" {cell_id[:ID_DIGITS]}")


def _words(cell: Cell, shown: Flat, limit: int) -> list[str]:
    """Method, quantization, rank, targets and devices as words, the others as `name=value`."""
    words = ["base"] if cell.method == "base" else []
    if shown.pop("method", None) is not None and not words:
        words.append(cell.method)
    quantization = cell.quantization
    named = [shown.pop(key, None) is not None for key in QUANTIZATION]
    if quantization is not None and (any(named) or cell.method == "base"):
        words.append(quantization.quant_type + ("+dq" if quantization.double_quant else ""))
    if "adapter.rank" in shown:
        words.append(f"r{shown.pop('adapter.rank')}")
    if "adapter.target_modules" in shown:
        words.append(_text(shown.pop("adapter.target_modules"), limit))
    parallel = [shown.pop(key, None) is not None for key in PARALLELISM]
    if any(parallel):
        words.append(cell.parallelism)
        if cell.devices > 1:
            words.append(devices_text(cell))
    if "adapter.alpha" in shown and cell.adapter is not None:
        shown["adapter.alpha"] = cell.adapter.alpha or 2 * cell.adapter.rank
    for key, value in shown.items():
        text = _text(value, limit)
        words.append(text if key in NAMES else f"{key.rpartition('.')[2]}={text}")
    return words


def _text(value: Any, limit: int) -> str:
    """A value on one line, its middle left out where it is long."""
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, float):
        text = f"{value:g}"
    elif isinstance(value, tuple | list) and all(isinstance(each, str) for each in value):
        text = ",".join(value)
    elif value is None:
        text = "–"
    else:
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}…{text[len(text) - (limit - limit // 2 - 1) :]}"


def tails(paths: Sequence[str]) -> dict[str, str]:
    """Each path or hub id by its last part, with as many before it as tell it from the others."""
    split = {path: PurePath(path).parts for path in paths}
    sharing = Counter(parts[-n:] for parts in split.values() for n in range(1, len(parts) + 1))
    found = {}
    for path, parts in split.items():
        tail = parts
        for count in range(1, len(parts) + 1):
            tail = parts[-count:]
            if sharing[tail] == 1:
                break
        # A root alone would make it an absolute path again.
        found[path] = "/".join(part for part in tail if part != "/")
    return found


def _cut(text: str, ending: str) -> str:
    room = LONGEST - len(ending)
    return (text if len(text) <= room else f"{text[: room - 1]}…") + ending
