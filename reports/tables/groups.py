"""Which results stand together: seeds of one configuration, tables of one model and stack, and the
baseline a row may be compared with."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from matrices.cell import SECTIONS, TOP_LEVEL, Cell, Parallelism, flatten, label
from matrices.language.labels import labels
from reports.records.load import Index, Result

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

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """See `settings`."""
        return settings(self.cell)

    @functools.cached_property
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


def differing(ours: Group, theirs: Group) -> list[str]:
    """Names of the settings that both have, with different values. A section that only one of them
    has (adapter of lora against full) is part of the method, which then differs anyway."""
    other = theirs.settings
    return [name for name, value in ours.settings.items() if name in other and other[name] != value]


def hashable(value: Any) -> Any:
    """The value of a setting as a key: equal keys for equal values."""
    if isinstance(value, dict):
        return frozenset((name, hashable(each)) for name, each in value.items())
    return (list, *map(hashable, value)) if isinstance(value, list) else value


def group(results: Sequence[Result]) -> list[Group]:
    """Results that differ in nothing but the seed, together; order of first appearance."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        found.setdefault((result.configuration_id, result.stack_id), []).append(result)
    return [
        Group(tuple(sorted(members, key=lambda result: result.record.cell.seed)))
        for members in found.values()
    ]


def sorted_groups(newest: Index) -> list[Group]:
    """The groups of the results in force, in the order of a table."""
    return sorted(group(list(newest.values())), key=sort_key)


def section_key(result: Result) -> tuple[str, ...]:
    """What one table may hold: one model in one environment and on one number of devices. What
    else differs between the machines of its rows is marked (`reports.tables.machines`)."""
    model = result.record.cell.model
    return (
        model.fingerprint or model.name,
        model.revision or "",
        result.environment_id,
        str(result.record.hardware.accelerator_count),
    )


def sort_key(item: Group) -> tuple[Any, ...]:
    """Full, lora, qlora; then by the settings in their declared order, numbers as numbers."""
    methods = ("base", "full", "lora", "qlora")
    targets = ("qv", "attention", "mlp", "all-linear")
    flat = dict(item.settings)
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
    for name, wanted in spec.items():
        section, _, leaf = name.rpartition(".")
        part = getattr(cell, section) if section else cell
        if part is None or not _equal(getattr(part, leaf), wanted):
            return False
    return True


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


def baseline_arguments(groups: Sequence[Group], first: int) -> list[str]:
    """For the `first` groups, the settings that tell each from all others, as `--baseline` takes
    them."""
    flats = [flatten(item.cell) for item in groups]
    differ = [
        name
        for name in SETTINGS
        if name != "seed" and len({repr(flat.get(name)) for flat in flats}) > 1
    ]
    return [
        ",".join(f"{name}={_yaml(flat[name])}" for name in differ if name in flat) or item.name
        for item, flat in zip(groups[:first], flats, strict=False)
    ]


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(value) + "]"
    return value if isinstance(value, str) else json.dumps(value)
