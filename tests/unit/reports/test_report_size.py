"""The work of a report grows with the number of its records, not with its square."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import synthetic_results

from matrices.cell import Cell, base_cells
from reports.output.render import render
from reports.records.load import Result
from reports.tables.build import build_all


def cells(count: int) -> list[Cell]:
    """Full, lora and qlora at ever more learning rates; full at every second one only."""
    found = []
    for step in itertools.count(1):
        methods = ("full", "lora", "qlora") if step % 2 else ("lora", "qlora")
        for method in methods:
            cell = synthetic_results.trained(method, learning_rate=step * 1e-5)
            found += [cell.model_copy(update={"seed": seed}) for seed in (0, 1)]
        if len(found) >= count:
            return found[:count]
    raise AssertionError


def results(count: int) -> list[Result]:
    """So many records without samples; those of one method have the same figures."""
    templates = {
        method: synthetic_results.record(synthetic_results.trained(method))
        for method in ("full", "lora", "qlora")
    }
    for template in templates.values():
        template.quality.samples_file = None
    bases = {base.cell_id: base for cell in cells(6) for base in base_cells(cell).values()}
    records = [synthetic_results.record(base) for base in bases.values()]
    for record in records:
        record.quality.samples_file = None
    records += [
        templates[cell.method].model_copy(update={"cell": cell, "cell_id": cell.cell_id})
        for cell in cells(count)
    ]
    return [Result(record, Path(f"results/{record.cell_id}/record.json")) for record in records]


def write(records: list[Result]) -> str:
    return "".join(
        render(table, format, Path("report"))
        for table in build_all(records)
        for format in ("md", "csv")
    )


def calls(records: list[Result]) -> int:
    """How many functions are called to build and write the tables: the same on any machine."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        text = write(records)
    finally:
        sys.setprofile(None)
    assert f"{len(records) - 2} runs" in text
    return count


def test_ten_times_the_records_take_about_ten_times_the_work() -> None:
    few, many = results(50), results(500)
    calls(few)  # what is imported and compiled once
    assert calls(many) < 20 * calls(few)  # quadratic: 100 times, cubic: 1,000


def test_the_tables_of_a_thousand_records(benchmark: Any) -> None:
    text = benchmark.pedantic(write, (results(1000),), rounds=1)
    assert "1000 runs" in text or "1,000 runs" in text
