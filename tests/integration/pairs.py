"""Users combine settings: a covering array of all pairs of values, run as one sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

from covering_array import Array, Row, covering_array
from tiny_families import FUSED

from harness.records.reading import read_record
from harness.records.record import Record
from matrices.cell import SECTIONS, TOP_LEVEL, Cell, flatten
from matrices.expand import UNUSED, collapse, expand
from matrices.language.settings import DEFAULTS
from matrices.load import load
from matrices.rules.machine import Machine
from matrices.rules.verdicts import refusals

HERE = Machine(has_gpu=False, compute_capability=None, packages={"deepspeed": ""}, devices=2)
Settings = dict[str, Any]
# A factor's values, by the names that rows are made of, and the settings each stands for.
Factors = Mapping[str, Mapping[str, Settings]]


def each(key: str, *values: object) -> dict[str, Settings]:
    return {str(value): {key: value} for value in values}


def dtypes(weights: str, compute: str, autocast: bool = True) -> Settings:
    return {
        "model.weight_dtype": weights,
        "model.compute_dtype": compute,
        "train.autocast": autocast,
    }


def packed(strategy: str) -> Settings:
    return {"data.packing": True, "data.packing_strategy": strategy}


TEXT: Settings = {}
COMPLETIONS: Settings = {"data.source": "pairs.jsonl", "data.completion_only_loss": True}
PACKING = {"wrapped": packed("wrapped"), "none": {"data.packing": False}, "bfd": packed("bfd")}
DTYPES = {
    "bf16": dtypes("bf16", "bf16"),
    "fp32": dtypes("fp32", "fp32"),
    "bf16 in fp32": dtypes("bf16", "fp32"),
    "fp32 in bf16": dtypes("fp32", "bf16"),
    "bf16 without autocast": dtypes("bf16", "bf16", autocast=False),
    "fp16 in fp32": dtypes("fp16", "fp32"),
}
ATTENTION = each("model.attn_implementation", "sdpa", "eager")
OF_ADAPTERS = {"rank", "dropout", "targets"}
OF_4_BIT = {"quant_type", "double_quant", "quant_storage", "kbit_preparation"}


def active(row: Row) -> set[str]:
    """The factors that mean something in a row."""
    idle = set()
    if row["method"] == "full":
        idle |= OF_ADAPTERS
    if row["method"] != "qlora":
        idle |= OF_4_BIT
    if row["checkpointing"] == "False":
        idle |= {"use_reentrant"}
    return set(row) - idle


def settings(factors: Factors, row: Row) -> Settings:
    found: Settings = {}
    for name, value in row.items():
        found |= factors[name][value]
    return found


def cell(chosen: Settings) -> Cell:
    flat = collapse(DEFAULTS | chosen)
    parts = {
        name: model(
            **{leaf: flat[f"{name}.{leaf}"] for leaf in model.model_fields if leaf != "fingerprint"}
        )
        for name, model in SECTIONS.items()
        if name not in UNUSED[flat["method"]]
    }
    return Cell(**{name: flat[name] for name in TOP_LEVEL}, **parts)


def array(factors: Factors) -> Array:
    @cache
    def allowed(items: tuple[tuple[str, str], ...]) -> bool:
        row = dict(items)
        if row.get("family") in FUSED and row["targets"] == "all-linear":
            return row["method"] == "full"
        return not refusals(cell(settings(factors, row)), HERE)

    return covering_array(
        {name: tuple(values) for name, values in factors.items()},
        lambda row: allowed(tuple(row.items())),
        active,
    )


BASE: Settings = {
    "model.name": "tiny-llama",
    "data.max_length": 32,
    "data.max_samples": 24,
    "train.steps": 2,
    "train.warmup_steps": 1,
    "train.micro_batch_size": 1,
    "evaluate.tasks": [],
    "evaluate.sample_prompts": [],
}


class Swept(NamedTuple):
    """`cells` are of the array's rows, and of one row for each pair that is impossible."""

    array: Array
    cells: list[Cell]
    refused: list[Cell]
    records: dict[str, Record]

    def others_than(self, status: str, cells: list[Cell]) -> dict[str, str]:
        """What became of the cells that ended in another way, by what they ask for."""
        found = {}
        for wanted in cells:
            record = self.records[wanted.cell_id]
            if record.status != status:
                asked = {k: v for k, v in flatten(wanted).items() if v != DEFAULTS.get(k)}
                found[str(asked)] = f"{record.status}: {record.reason}"
        return found


def first(factors: Factors, pair: Row) -> Row:
    """A row with a pair of values and, of every other factor, the plainest."""
    method = "qlora" if pair.keys() & OF_4_BIT else "lora"
    return {name: next(iter(values)) for name, values in factors.items()} | {
        "method": method,
        **pair,
    }


def sweep(tunebench: Any, directory: Path, factors: Factors) -> Swept:
    """Every row of the factors' array as a cell of one sweep, without predictions or scores."""
    found = array(factors)
    rows = [*found.rows, *(first(factors, pair) for pair in found.impossible)]
    questions = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}."} for i in range(24)]
    (directory / "pairs.jsonl").write_text("\n".join(map(json.dumps, questions)))
    content = {"name": "pairs", "score_base": False} | BASE
    content["include"] = [settings(factors, row) for row in rows]
    (directory / "pairs.yaml").write_text(json.dumps(content))
    ran = tunebench(
        *("run", "pairs.yaml", "--no-predict", "--side-by-side"), cwd=directory, timeout=1700
    )
    assert ran.code in (0, 3), ran.err[-3000:]
    records = [read_record(path) for path in directory.glob("results/pairs/*/record.json")]
    # The first is the combination that the rows are included beside.
    cells = expand(load(directory / "pairs.yaml")).cells[1:]
    assert len(cells) == len(rows)
    count = len(found.rows)
    by_id = {record.cell_id: record for record in records}
    return Swept(found, list(cells[:count]), list(cells[count:]), by_id)


def impossible(swept: Swept) -> set[tuple[str, ...]]:
    return {tuple(word for item in row.items() for word in item) for row in swept.array.impossible}


def each_pair_is_in_a_row_unless_refused(factors: Factors) -> None:
    rows, refused = array(factors)
    for names in map(set, combinations(factors, 2)):
        for values in product(*(factors[name] for name in names)):
            pair = dict(zip(names, values, strict=True))
            held = any(row.items() >= pair.items() and names <= active(row) for row in rows)
            means = names <= active(first(factors, pair) | {"checkpointing": "True"} | pair)
            assert [held, pair in refused].count(True) == means, pair
