"""Which results stand together: seeds of one configuration, tables of one model and stack, and the
baseline a row may be compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from harness.records import provenance
from harness.records.record import Record
from matrices.cell import SECTIONS, TOP_LEVEL, Cell, Parallelism, flatten, label
from matrices.language.labels import labels
from reports.records.load import Result, environment

SETTINGS = list(TOP_LEVEL) + [
    f"{name}.{leaf}" for name, section in SECTIONS.items() for leaf in section.model_fields
]


PARALLELISM = get_args(Parallelism)


@dataclass(frozen=True, eq=False)
class Group:
    """Results of one configuration on one stack that differ in the seed only."""

    results: tuple[Result, ...]

    @property
    def cell(self) -> Cell:
        return self.results[0].record.cell

    @property
    def measured(self) -> list[Result]:
        """The runs whose figures count: those that ended ok."""
        return [result for result in self.results if result.record.status == "ok"]

    @property
    def name(self) -> str:
        """What it is called alone; among others see `names`."""
        return label(self.cell)


def settings(cell: Cell) -> dict[str, Any]:
    """Settings by which configurations are compared, the seed left out.

    Alpha counts as alpha / rank, the scale LoRA multiplies by, so rank alone can differ; a local
    path counts by its content where there is a fingerprint.
    """
    flat = {name: value for name, value in flatten(cell).items() if name != "seed"}
    if cell.adapter is not None:
        alpha = flat.pop("adapter.alpha")
        flat["adapter.alpha_per_rank"] = 2.0 if alpha is None else alpha / cell.adapter.rank
    for path, fingerprint in (
        ("model.name", "model.fingerprint"),
        ("model.config", "model.fingerprint"),
        ("data.source", "data.fingerprint"),
    ):
        if flat.get(fingerprint):
            flat.pop(path)
    return flat


def differing(ours: Cell, theirs: Cell) -> list[str]:
    """Names of the settings both have and do not share. A section only one of them has (adapter
    of lora against full) is part of the method, which differs then anyway."""
    mine, other = settings(ours), settings(theirs)
    return [name for name, value in mine.items() if name in other and other[name] != value]


def group(results: Sequence[Result]) -> list[Group]:
    """Results that differ in nothing but the seed, together; order of first appearance."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        record = result.record
        unseeded = record.cell.model_copy(update={"seed": 0}).cell_id
        key = (unseeded, provenance.recorded_stack_id(record))
        found.setdefault(key, []).append(result)
    return [
        Group(tuple(sorted(members, key=lambda result: result.record.cell.seed)))
        for members in found.values()
    ]


def section_key(record: Record) -> tuple[str, ...]:
    """What one table may hold: one model in one environment and on one number of devices. What
    else differs between the machines of its rows is marked (`reports.tables.machines`)."""
    model = record.cell.model
    return (
        model.fingerprint or model.name,
        model.revision or "",
        environment(record),
        str(record.hardware.accelerator_count),
    )


def sort_key(item: Group) -> tuple[Any, ...]:
    """Full, lora, qlora; then by the settings in their declared order, numbers as numbers."""
    methods = ("base", "full", "lora", "qlora")
    targets = ("qv", "attention", "mlp", "all-linear")
    flat = settings(item.cell)
    target = flat.pop("adapter.target_modules", "")
    flat["parallelism"] = PARALLELISM.index(item.cell.parallelism)
    # Quantization before rank: variants of one storage stay together.
    quantization = [str(flat.pop(name)) for name in list(flat) if name.startswith("quantization.")]
    place = targets.index(target) if target in targets else len(targets)
    rank = flat.pop("adapter.rank", 0)
    rest = [
        (0, value, "") if isinstance(value, int | float) else (1, 0, json.dumps(value))
        for value in flat.values()
    ]
    return methods.index(item.cell.method), quantization, rank, place, str(target), rest


def matches(cell: Cell, spec: Mapping[str, Any]) -> bool:
    """Whether a cell has these settings with these values."""
    flat = flatten(cell)
    return all(name in flat and _equal(flat[name], value) for name, value in spec.items())


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(value, tuple):
        return list(value) == (wanted if isinstance(wanted, list) else [wanted])
    # YAML 1.1 reads 2e-4 as a string.
    if isinstance(value, float) and not isinstance(wanted, bool):
        try:
            return value == float(wanted)
        except (TypeError, ValueError):
            return False
    return type(value) is type(wanted) and bool(value == wanted)


def names(groups: Sequence[Group]) -> list[str]:
    """What each group is called among the others: what tells it from them, the seed left out."""
    cells = [item.cell.model_copy(update={"seed": 0}) for item in groups]
    found = labels(cells)
    return [found[cell.cell_id] for cell in cells]


def describe(item: Group, among: Sequence[Group]) -> str:
    """The settings that tell a group from the others, as `--baseline` takes them."""
    flat = flatten(item.cell)
    telling = [
        name
        for name in SETTINGS
        if name != "seed"
        and name in flat
        and len({repr(flatten(other.cell).get(name)) for other in among}) > 1
    ]
    values = {name: flat[name] for name in telling}
    return ",".join(f"{name}={_yaml(value)}" for name, value in values.items()) or item.name


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(value) + "]"
    return value if isinstance(value, str) else json.dumps(value)
