"""The time of a report grows with the number of its records, not with its square."""

from __future__ import annotations

import itertools
import time
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


def cpu_seconds(records: list[Result]) -> float:
    began = time.process_time()
    assert f"{len(records) - 2} runs" in write(records)
    return time.process_time() - began


def test_ten_times_the_records_take_about_ten_times_as_long(benchmark: Any) -> None:
    few, many = results(100), results(1000)
    cpu_seconds(few)  # what is imported and compiled once
    seconds = cpu_seconds(few)
    slope = benchmark.pedantic(cpu_seconds, (many,), rounds=1) / seconds
    benchmark.extra_info["CPU seconds of 1,000 records over those of 100"] = slope
    assert slope < 30  # quadratic: 100, cubic: 1000
