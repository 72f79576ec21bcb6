"""accelerate profiles: reading one, and what a cell fills in for its `$names`.

A profile is the YAML that `accelerate launch --config_file` takes. Where it names a DeepSpeed file,
that file's content takes the name's place, so that a cell's identity is what was read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template
from typing import Any

from matrices.cell import Cell
from matrices.errors import UserError, nearest
from matrices.files import yaml_lines
from matrices.files.yaml_lines import Spot

DEEPSPEED_FILE = "deepspeed_config_file"
PLACEHOLDERS = {
    "devices": "devices of the cell, over all of its machines",
    "nodes": "machines of the cell",
    "mixed_precision": "no, bf16 or fp16, as the trainer is told",
    "bf16": "true or false, the same for DeepSpeed",
    "fp16": "true or false, the same for DeepSpeed",
    "micro_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "train_batch_size": "samples of one optimizer step, over all devices",
    "max_grad_norm": "train.max_grad_norm",
    "gpu": "whether the cell trains on GPUs",
    "use_cpu": "whether it does not",
}
_ALONE = re.compile(r"\$(?:(\w+)|\{(\w+)\})\Z")


def profile_at(base: Path, named: Spot) -> dict[str, Any]:
    """The profile whose path a matrix gives, relative to `base`. Raises UserError."""
    if not isinstance(named.value, str):
        raise UserError(
            "is the path of a YAML file for accelerate launch, e.g. profile: ./mine.yaml",
            key="profile",
            where=named.where,
        )
    path = base / Path(named.value).expanduser()
    if path.is_file():
        return read_profile(path)
    raise UserError(
        f"{named.value!r} ({path.absolute()}) is not a file; name a YAML file for accelerate "
        "launch, e.g. a copy of what `tunebench profiles fsdp` prints",
        key="profile",
        where=named.where,
    )


def read_profile(path: Path) -> dict[str, Any]:
    """A profile's content, with that of the DeepSpeed file it names.

    Raises UserError, with file and line, for what is no YAML mapping, and for unknown `$names`.
    """
    top = _mapping(path, "an accelerate profile, e.g. distributed_type: MULTI_GPU")
    _check_names(top)
    found: dict[str, Any] = yaml_lines.plain(top)
    section = top.value.get("deepspeed_config")
    named = section.value.get(DEEPSPEED_FILE) if section and type(section.value) is dict else None
    if named is not None and isinstance(named.value, str):
        found["deepspeed_config"][DEEPSPEED_FILE] = _read_deepspeed(path.parent, named)
    return found


def _read_deepspeed(base: Path, named: Spot) -> dict[str, Any]:
    path = base / Path(named.value).expanduser()
    if not path.is_file():
        raise UserError(
            f"{named.value!r} ({path.absolute()}) is not a file; it is looked for beside the "
            "profile",
            key=DEEPSPEED_FILE,
            where=named.where,
        )
    top = _mapping(path, "a DeepSpeed configuration")
    _check_names(top)
    content: dict[str, Any] = yaml_lines.plain(top)
    return content


def _mapping(path: Path, what: str) -> Spot:
    top = yaml_lines.read(path)
    if not isinstance(top.value, dict) or not top.value:
        raise UserError(f"is not a mapping of keys, so not {what}", where=top.where)
    return top


def _check_names(spot: Spot) -> None:
    for text, where in _texts(spot):
        for match in Template.pattern.finditer(text):
            name = match["named"] or match["braced"]
            if match["invalid"] is not None:
                raise UserError(f"a lone $ in {text!r}; write $$ for a dollar sign", where=where)
            if name is not None and name not in PLACEHOLDERS:
                raise UserError(
                    f"${name} is nothing a cell can fill in{nearest(name, PLACEHOLDERS)}; there "
                    f"are {', '.join('$' + each for each in PLACEHOLDERS)}",
                    where=where,
                )


def _texts(spot: Spot) -> Iterator[tuple[str, str]]:
    if isinstance(spot.value, str):
        yield spot.value, spot.where
    elif isinstance(spot.value, dict):
        for child in spot.value.values():
            yield from _texts(child)
    elif isinstance(spot.value, list):
        for child in spot.value:
            yield from _texts(child)


def values(cell: Cell, gpu: bool) -> dict[str, Any]:
    """What stands for each `$name`; `gpu` is whether the cell trains on GPUs. Raises ValueError
    for a cell that does not train."""
    train = cell.train
    if train is None:
        raise ValueError(f"a {cell.method} cell does not train")
    precision = mixed_precision(cell)
    return {
        "devices": cell.devices,
        "nodes": cell.nodes,
        "mixed_precision": precision,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "micro_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "train_batch_size": train.micro_batch_size * train.gradient_accumulation_steps * cell.ranks,
        "max_grad_norm": train.max_grad_norm,
        "gpu": gpu,
        "use_cpu": not gpu,
    }


def mixed_precision(cell: Cell) -> str:
    """`no`, `bf16` or `fp16`: accelerate's word for the autocast that the worker asks for."""
    if cell.train is None or not cell.train.autocast or cell.model.compute_dtype == "fp32":
        return "no"
    return cell.model.compute_dtype


def rendered(content: Any, filled: Mapping[str, Any]) -> Any:
    """The content with its `$names` filled in: a name alone gives the value itself, among other
    text its words."""
    if isinstance(content, dict):
        return {key: rendered(value, filled) for key, value in content.items()}
    if isinstance(content, list):
        return [rendered(value, filled) for value in content]
    if not isinstance(content, str):
        return content
    alone = _ALONE.match(content)
    if alone:
        return filled[alone[1] or alone[2]]
    return Template(content).substitute(filled)
