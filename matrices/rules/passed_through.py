"""What is passed through to TRL and PEFT, checked against the installed releases without importing
them: names, types of values, and values that are the default anyway."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from matrices.cell import Cell
from matrices.errors import UserError, nearest
from matrices.expand import Expansion
from matrices.language.settings import BARE, flow, show
from matrices.libraries.hints import hint
from matrices.libraries.installed_arguments import fields, version
from matrices.libraries.library_arguments import TABLES

# The class a mapping goes to, by section and setting of the mapping.
MAPPINGS = {
    ("train", "sft_config"): "SFTConfig",
    ("adapter", "lora_config"): "LoraConfig",
}
# Mappings that say nothing when they are empty; of others, being there is what they say.
EMPTY_IS_DEFAULT = ("accelerator_config", "liger_kernel_config", "lr_scheduler_kwargs")


def given(cell: Cell) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The class and the arguments of each mapping of the cell that holds any."""
    for (section, leaf), class_name in MAPPINGS.items():
        mapping = getattr(getattr(cell, section), leaf, None)
        if mapping:
            yield class_name, mapping


def mistakes(class_name: str, arguments: Mapping[str, Any]) -> list[UserError]:
    """Arguments that the installed class does not have, or not with such a value. Those that
    tunebench does not pass through are left to its rules."""
    known = fields(class_name)
    if known is None:
        return []
    key, table = TABLES[class_name]
    found = []
    for name, value in arguments.items():
        if name in table and table[name].kind != "passed":
            continue
        if name not in known:
            found.append(UserError(_unknown(class_name, name, value), key=key))
        elif not known[name].accepts(value):
            near = nearest(value, known[name].words()) if isinstance(value, str) else ""
            found.append(
                UserError(f"{name}: {show(value)} is not {known[name].described()}{near}", key=key)
            )
    return found


def _unknown(class_name: str, name: str, value: Any) -> str:
    known = fields(class_name) or {}
    if name in BARE:
        fix = f"; it is a setting: {BARE[name]}"
    elif elsewhere := hint(name, [flow(value)]):
        fix = f"; {elsewhere}"
    else:
        fix = nearest(name, known)
    return f"{class_name} of {version(class_name)} has no argument {name!r}{fix}"


def unclassified(class_name: str, arguments: Mapping[str, Any]) -> list[str]:
    """Arguments of a release that is newer than the tables of `library_arguments`."""
    return [name for name in arguments if name not in TABLES[class_name][1]]


def defaults(class_name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments whose value is the installed class's default."""
    known = fields(class_name) or {}
    return {
        name: value
        for name, value in arguments.items()
        if name in known
        and (known[name].is_default(value) or (value == {} and name in EMPTY_IS_DEFAULT))
    }


def merged(expansion: Expansion) -> Expansion:
    """The expansion without cells that differ from another one only by arguments at their default,
    and with a note about every such argument."""
    notes: dict[str, None] = {}
    bare = [_without_defaults(cell, notes) for cell in expansion.cells]
    if not notes:
        return expansion
    kept: dict[str, Cell] = {}
    for cell, short in zip(expansion.cells, bare, strict=True):
        kept.setdefault(short.cell_id, cell)
    if len(kept) < len(expansion.cells):
        count = len(expansion.cells) - len(kept)
        notes[f"left out as the same as another: {count} cell{'' if count == 1 else 's'}"] = None
    return dataclasses.replace(
        expansion, cells=tuple(kept.values()), notes=(*expansion.notes, *notes)
    )


def _without_defaults(cell: Cell, notes: dict[str, None]) -> Cell:
    for (section, leaf), class_name in MAPPINGS.items():
        part = getattr(cell, section)
        arguments = getattr(part, leaf, None)
        idle = defaults(class_name, arguments) if arguments else {}
        if not arguments or not idle:
            continue
        idle_text = ", ".join(f"{name}: {flow(value)}" for name, value in idle.items())
        notes[f"{section}.{leaf}: {idle_text} is the default of {version(class_name)} anyway"] = (
            None
        )
        left = {name: value for name, value in arguments.items() if name not in idle}
        cell = cell.model_copy(update={section: part.model_copy(update={leaf: left})})
    return cell
