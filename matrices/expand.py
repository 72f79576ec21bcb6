"""From a matrix to its cells: a pure function, no files read, nothing changed in place.

A combination is one value for every setting: defaults, then the preset, then constants, then one
value of each axis. In the order they are written (the last axis changes fastest):

1. the product of the axes makes combinations; those an `exclude` matches are dropped;
2. each `include` adds combinations: what it names is fixed, the axes it does not name take all
   their values; `exclude` drops from these too, but if it drops all of them, that is an error;
3. settings that mean nothing for the combination are dropped or put to their default (`collapse`);
4. equal cells merge, the first stays.

`exclude` compares with the combination before step 3: with `exclude: [{method: full, rank: 64}]`
and ranks 8 and 64, full fine-tuning stays, as the cell that rank 8 collapses to.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from matrices.catalogue.models import config_name
from matrices.cell import (
    SECTIONS,
    TOP_LEVEL,
    Cell,
    Data,
    joined_json,
    section_json,
    top_level_json,
)
from matrices.errors import UserError
from matrices.files.data_format import COLUMN_SETTINGS, format_named
from matrices.language.presets import PRESETS
from matrices.language.settings import DEFAULTS, PRESET, show, validate
from matrices.load import MAX_COMBINATIONS, Matrix, MatrixEntry
from matrices.parallelism import STRATEGIES

# Sections that mean nothing for a method.
UNUSED: dict[str, tuple[str, ...]] = {
    "base": ("quantization", "adapter", "data", "train"),
    "full": ("quantization", "adapter"),
    "lora": ("quantization",),
    "qlora": (),
}
# lm-eval's recipe: without tasks none of it means anything.
RECIPE = tuple(
    f"evaluate.{leaf}"
    for leaf in ("include_path", "limit", "num_fewshot", "batch_size", "apply_chat_template")
)

# By section, the places of the settings that are mappings.
MAPPED = {
    section: [
        at
        for at, field in enumerate(model.model_fields.values())
        if "dict" in str(field.annotation)
    ]
    for section, model in SECTIONS.items()
}
COLUMN_KEYS = {f"data.{leaf}" for leaves in COLUMN_SETTINGS.values() for leaf in leaves}
GLOBAL_BATCH = "train.global_batch_size"

Combination = dict[str, Any]


@dataclass(frozen=True)
class Expansion:
    """`combinations` counts what is left after exclude and include, before anything collapses;
    `cells` are what is left after, each with its own cell_id."""

    cells: tuple[Cell, ...]
    combinations: int
    notes: tuple[str, ...]


def expand(matrix: Matrix) -> Expansion:
    """All cells of a matrix. Raises UserError (with file and line) when an include and an exclude
    contradict each other, nothing is left, or there are more than a million combinations."""
    _check_size(matrix)
    builder = _CellBuilder(matrix)
    with _no_collection():
        kept = _build(matrix, builder)
    if not builder.cells:
        raise UserError(
            "every combination is excluded, so nothing is left to run; remove an entry",
            key="exclude",
            where=matrix.locate("exclude"),
        )
    idle = (*_unmatched(matrix, builder), *_idle_axes(matrix, builder.methods))
    notes = (*matrix.notes, *builder.notes, *idle)
    return Expansion(tuple(builder.cells.values()), kept, notes)


def _build(matrix: Matrix, builder: _CellBuilder) -> int:
    """Add every combination; how many are left after exclude."""
    kept = 0
    for combination in _combinations(matrix, None):
        if not builder.excluded(combination):
            kept += 1
            builder.add(combination)
    return kept + sum(_include(matrix, builder, entry) for entry in matrix.include)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without python's search for cycles, of which cells have none: it would look at each cell
    again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_size(matrix: Matrix) -> None:
    """Count the combinations before one is made."""
    lengths = {key: len(values) for key, values in matrix.axes.items()}
    size = math.prod(lengths.values())
    for entry in matrix.include:
        size += math.prod(n for key, n in lengths.items() if key not in entry.settings)
    if size <= MAX_COMBINATIONS:
        return
    longest = max(lengths, key=lambda key: lengths[key])
    raise UserError(
        f"the axes make {size:,} combinations, the longest of {lengths[longest]:,} values "
        f"({longest}); at most {MAX_COMBINATIONS:,} are expanded",
        key="axes",
        where=matrix.locate("axes"),
    )


def _combinations(matrix: Matrix, entry: MatrixEntry | None) -> Iterator[Combination]:
    """The product of the axes; for an include, of those it does not name, with its own values."""
    fixed = dict(entry.settings) if entry else {}
    axes = {key: values for key, values in matrix.axes.items() if key not in fixed}
    bases: dict[Any, Combination] = {}
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True)) | fixed
        preset = chosen.get(PRESET, matrix.constants.get(PRESET))
        if preset not in bases:
            bases[preset] = DEFAULTS | _preset(preset) | dict(matrix.constants) | {PRESET: preset}
        combination = _named(bases[preset] | chosen, matrix, chosen)
        _name_format(combination, matrix, chosen)
        _check_batch(matrix, entry, chosen, combination)
        yield combination


def _named(combination: Combination, matrix: Matrix, chosen: Combination) -> Combination:
    """A config without a name is called after its file."""
    config = combination["model.config"]
    if config is not None and not {"model.name"} & (chosen.keys() | matrix.constants.keys()):
        combination["model.name"] = config_name(Path(config))
    return combination


def _name_format(combination: Combination, matrix: Matrix, chosen: Combination) -> None:
    """A column that is named under its default name is not seen in a cell; where another format's
    columns would be taken in its place, its format is put down."""
    written = COLUMN_KEYS & (chosen.keys() | matrix.constants.keys())
    columns = matrix.columns.get(combination["data.source"])
    if not written or not columns:
        return
    leaves = {key.partition(".")[2] for key in written}
    settings = ("source", "format", *(key.partition(".")[2] for key in COLUMN_KEYS))
    data = Data(**{leaf: combination[f"data.{leaf}"] for leaf in settings})
    combination["data.format"] = format_named(data, leaves, columns) or data.format


def _check_batch(
    matrix: Matrix, entry: MatrixEntry | None, chosen: Combination, combination: Combination
) -> None:
    """Refuse a global batch size beside a number of accumulation steps that somebody wrote."""
    steps = "train.gradient_accumulation_steps"
    if combination[GLOBAL_BATCH] is None or not {steps} & (chosen.keys() | matrix.constants.keys()):
        return
    places = {
        key: entry.where if entry and key in entry.settings else matrix.locate(key)
        for key in (steps, GLOBAL_BATCH)
    }
    raise UserError(
        f"sets gradient_accumulation_steps, which is {combination[steps]} at {places[steps]}; give "
        "one of the two",
        key=GLOBAL_BATCH,
        where=places[GLOBAL_BATCH],
    )


def _preset(name: str | None) -> Combination:
    if name is None:
        return {}
    return {key: validate(key, value, f"preset {name}") for key, value in PRESETS[name].items()}


def _include(matrix: Matrix, builder: _CellBuilder, entry: MatrixEntry) -> int:
    """Add an include's combinations; returns how many exclude leaves of them."""
    before, kept = len(builder.cells), 0
    culprit = None
    for combination in _combinations(matrix, entry):
        excluded_by = builder.excluded(combination)
        if excluded_by:
            culprit = excluded_by
            continue
        kept += 1
        builder.add(combination)
    if culprit and not kept:
        raise UserError(
            f"contradicts the exclude at {culprit.where}, which drops everything it adds; "
            "remove one of them",
            key="include",
            where=entry.where,
        )
    if len(builder.cells) == before:
        builder.notes.append(f"{entry.where}: include adds no cell that is not there already")
    return kept


class _Part(NamedTuple):
    """A section of cells, as it is shared by all that have it."""

    number: int
    built: Any
    json: str


class _CellBuilder:
    """Collects distinct cells. Combinations collapse as plain dicts; each distinct section is
    validated and written as JSON once, each distinct cell built once."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.cells: dict[bytes, Cell] = {}
        self.notes: list[str] = []
        self.methods: set[str] = set()
        self.matched: set[int] = set()
        self.seen: set[tuple[Any, ...]] = set()
        self.parts: dict[str, dict[tuple[Any, ...], _Part]] = {name: {} for name in SECTIONS}
        self.leaves = {
            section: tuple(f"{section}.{leaf}" for leaf in model.model_fields)
            for section, model in SECTIONS.items()
        }
        self.pick = {section: itemgetter(*names) for section, names in self.leaves.items()}
        self.used = {
            method: tuple(name for name in SECTIONS if name not in unused)
            for method, unused in UNUSED.items()
        }
        self.given: dict[str, set[str]] = {}

    def excluded(self, combination: Combination) -> MatrixEntry | None:
        """The first exclude that matches; every one that does counts as used."""
        found = None
        for index, entry in enumerate(self.matrix.exclude):
            if all(combination[key] == value for key, value in entry.settings.items()):
                self.matched.add(index)
                found = found or entry
        return found

    def add(self, combination: Combination) -> None:
        method = combination["method"]
        self.methods.add(method)
        collapsed = collapse(combination)
        model_path = collapsed["model.config"] or collapsed["model.name"]
        fingerprints = self.matrix.fingerprints
        collapsed["model.fingerprint"] = fingerprints.get(model_path)
        collapsed["data.fingerprint"] = fingerprints.get(collapsed["data.source"])
        parts = {name: self.part(name, collapsed) for name in self.used[method]}
        top = [collapsed[name] for name in TOP_LEVEL]
        identity = (*map(_hashable, top), *[part.number for part in parts.values()])
        if identity in self.seen:
            return
        self.seen.add(identity)
        written = [top_level_json(name, value) for name, value in zip(TOP_LEVEL, top, strict=True)]
        written += [part.json for part in parts.values()]
        digest = sha256(joined_json(written).encode()).digest()
        if digest not in self.cells:
            built = {name: part.built for name, part in parts.items()}
            cell = Cell(**dict(zip(TOP_LEVEL, top, strict=True)), **built)
            # One set for all: a million cells are to fit.
            shared = self.given.setdefault(method, cell.model_fields_set)
            object.__setattr__(cell, "__pydantic_fields_set__", shared)
            self.cells[digest] = cell

    def part(self, section: str, collapsed: Combination) -> _Part:
        values = self.pick[section](collapsed)
        key = values
        for at in MAPPED[section]:
            key = (*key[:at], _hashable(key[at]), *key[at + 1 :])
        part = self.parts[section].get(key)
        if part is None:
            names = SECTIONS[section].model_fields
            built = SECTIONS[section](**dict(zip(names, values, strict=True)))
            part = _Part(len(self.parts[section]), built, section_json(section, built))
            self.parts[section][key] = part
        return part


def _hashable(value: Any) -> Any:
    # Mappings cannot be hashed; within one expansion the object stands for its content.
    return id(value) if type(value) is dict else value


def collapse(combination: Mapping[str, Any]) -> Combination:
    """The combination with everything that means nothing for it at its default, and everything
    that can be written in two ways written in one. Unused sections are left to the caller."""
    found = dict(combination)

    def default(*keys: str) -> None:
        for key in keys:
            found[key] = DEFAULTS[key]

    if found["method"] == "base":
        # Nothing is trained, and without quantization nothing is scored under autocast.
        default("seed", "parallelism", "devices", "nodes", "model.compute_dtype")
    if not STRATEGIES[found["parallelism"]].is_distributed:
        # accelerate starts one process, which it has nothing to tell.
        default("profile")
    if found["adapter.alpha"] is None:
        found["adapter.alpha"] = 2 * found["adapter.rank"]
    targets = found["adapter.target_modules"]
    if not isinstance(targets, str):
        # PEFT takes the names as a set.
        found["adapter.target_modules"] = tuple(sorted(set(targets)))
    if found["model.compute_dtype"] == "fp32":
        default("train.autocast")
    elif not found["train.autocast"] and found["method"] in ("full", "lora"):
        # Only 4-bit layers use it otherwise.
        default("model.compute_dtype")
    _accumulate(found)
    if found["train.timing_warmup_steps"] == found["train.warmup_steps"]:
        default("train.timing_warmup_steps")
    if not found["train.gradient_checkpointing"]:
        default("train.use_reentrant")
    if not found["data.packing"]:
        default("data.packing_strategy")
    if not found["evaluate.tasks"]:
        default(*RECIPE)
    return found


def _accumulate(found: Combination) -> None:
    """Have the accumulation steps make the global batch size. Where none do, it stays, and a rule
    refuses the cell."""
    ranks = found["devices"] if STRATEGIES[found["parallelism"]].is_distributed else 1
    together = found["train.micro_batch_size"] * ranks
    if found[GLOBAL_BATCH] is not None and found[GLOBAL_BATCH] % together == 0:
        found["train.gradient_accumulation_steps"] = found[GLOBAL_BATCH] // together
        found[GLOBAL_BATCH] = None


def _unmatched(matrix: Matrix, builder: _CellBuilder) -> Iterator[str]:
    for index, entry in enumerate(matrix.exclude):
        if index not in builder.matched:
            shown = ", ".join(f"{key}: {show(value)}" for key, value in entry.settings.items())
            yield f"{entry.where}: exclude matches no combination ({shown})"


def _idle_axes(matrix: Matrix, methods: set[str]) -> Iterator[str]:
    """Axes of sections that none of the methods has."""
    for key in matrix.axes:
        section = key.partition(".")[0]
        if all(section in UNUSED[method] for method in methods):
            used = ", ".join(sorted(methods))
            yield f"{matrix.locate(key)}: the axis {key} changes nothing for method {used}"
