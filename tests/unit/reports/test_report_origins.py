"""Rows of one table that ran on different machines, drivers or settings are marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.records.reading import read_record
from harness.records.record import Record
from reports.records.load import Result, load_records
from reports.tables.build import build

QUICKSTART = Path(__file__).resolve().parents[2] / "data/quickstart"


def changed(results: list[Result], change: Any) -> list[Result]:
    """The results with the first trained record made elsewhere."""
    first = next(r for r in results if r.record.cell.method == "full")
    other = Result(change(read_record(first.path)), first.path)
    return [other if result is first else result for result in results]


def with_hardware(**values: Any) -> Any:
    def change(record: Record) -> Record:
        return record.model_copy(update={"hardware": record.hardware.model_copy(update=values)})

    return change


def with_environment(**values: str) -> Any:
    def change(record: Record) -> Record:
        told = {**record.provenance.environment, **values}
        provenance = record.provenance.model_copy(update={"environment": told})
        return record.model_copy(update={"provenance": provenance})

    return change


def with_package(name: str, version: str) -> Any:
    def change(record: Record) -> Record:
        packages = record.stack.packages | {name: version}
        stack = record.stack.model_copy(update={"packages": packages})
        return record.model_copy(update={"stack": stack})

    return change


def on_host(name: str) -> Any:
    def change(record: Record) -> Record:
        placed = record.placement.model_copy(update={"hosts": [name]})
        return record.model_copy(update={"placement": placed})

    return change


def test_rows_of_one_machine_are_not_marked() -> None:
    [table] = build(load_records(QUICKSTART), "methods")
    assert "ran_on" not in {column.name for column in table.columns}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_hardware(driver="550.1"), "driver 550.1"),
        (with_hardware(host_memory_bytes=2**36), "memory 64.00 GiB"),
        (with_environment(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"), "expandable"),
        (with_package("pandas", "9.9"), "pandas 9.9"),
        (with_package("deepspeed", "0.19"), "deepspeed 0.19"),
        (on_host("n7"), "host n7"),
    ],
)
def test_a_row_that_ran_elsewhere_is_marked(change: Any, said: str) -> None:
    [table] = build(changed(load_records(QUICKSTART), change), "methods")
    [marks] = [column.values for column in table.columns if column.name == "ran_on"]
    methods = [row.group.cell.method for row in table.rows]
    apart = marks[methods.index("full")]
    marked = [method for mark, method in zip(marks, methods, strict=True) if mark == apart]
    assert marked == ["full"]
    [sentence] = [line for line in table.caption if "Not all rows ran on the same" in line]
    assert f"{apart}: " in sentence
    assert said in sentence.split(f"{apart}: ")[1].split(";")[0]


@pytest.mark.parametrize(
    "change", [with_hardware(cpu_count=64), with_hardware(cpu="a Z80"), with_package("torch", "3")]
)
def test_what_makes_another_identity_is_marked_or_apart(change: Any) -> None:
    tables = build(changed(load_records(QUICKSTART), change), "methods")
    assert len(tables) == 2 or any(c.name == "ran_on" for c in tables[0].columns)
