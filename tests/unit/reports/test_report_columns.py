"""The declared columns, on one record whose figures are known."""

from __future__ import annotations

import pytest
import synthetic_results as made

from harness.records.memory import Memory, PhaseMemory
from harness.records.record import Record
from harness.records.speed import Speed, Tokens
from matrices.cell import SECTIONS
from reports.records.columns import COLUMNS

BY_NAME = {column.name: column for column in COLUMNS}


def _record() -> Record:
    cell = made.trained("qlora", 3, rank=8, target_modules=("q_proj", "v_proj"), double_quant=True)
    found = made.record(cell)
    found.memory = Memory(
        headline="cuda_allocated",
        peak_bytes=400,
        peak_phase="backward",
        phases={
            "load": [PhaseMemory(allocated_peak_bytes=90), PhaseMemory(allocated_peak_bytes=70)],
            "backward": [
                PhaseMemory(allocated_peak_bytes=400, reserved_peak_bytes=512),
                PhaseMemory(allocated_peak_bytes=200, reserved_peak_bytes=300),
            ],
        },
        by_category={"weights": 300},
    )
    found.speed = Speed(
        step_seconds=[9.0, 1.0, 2.0],
        warmup_steps=1,
        tokens_per_second=Tokens(all=30, non_padding=20, loss=10),
    )
    return found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "qlora"),
        ("seed", 3),
        ("adapter.rank", 8),
        ("adapter.alpha", None),
        ("adapter.target_modules", '["q_proj", "v_proj"]'),
        ("quantization.double_quant", True),
        ("adapter.lora_config", "{}"),
        ("memory.peak_bytes", 400),
        ("memory.load.peak_bytes", 90),
        ("memory.backward.reserved_peak_bytes", 512),
        ("memory.forward.peak_bytes", None),
        ("memory.rank_imbalance", 400 / 200 - 1),
        ("memory.weights.at_peak_bytes", 300),
        ("memory.adapters.at_peak_bytes", 0),
        ("memory.adapters.resident_bytes", None),
        ("speed.timed_steps", 2),
        ("speed.tokens_per_second_all", 30),
        ("speed.tokens_per_second_non_padding", 20),
        ("speed.energy_joules", None),
        ("version.torch", "2.13.0"),
        ("version.trl", None),
        ("requested_bytes", None),
    ],
)
def test_value(name: str, value: object) -> None:
    assert BY_NAME[name].value(_record()) == value


def test_every_setting_has_a_column_and_no_name_is_used_twice() -> None:
    settings = {f"{s}.{leaf}" for s, model in SECTIONS.items() for leaf in model.model_fields}
    assert settings <= set(BY_NAME)
    assert len(BY_NAME) == len(COLUMNS)


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_units_are_in_the_names_and_all_is_described(column: object) -> None:
    declared = BY_NAME[column.name]  # type: ignore[attr-defined]
    assert declared.description
    for unit in ("bytes", "seconds"):
        if declared.unit == unit:
            assert unit in declared.name.split(".")[-1]


def test_a_section_that_is_not_there_gives_none() -> None:
    full = made.record(made.trained("full"))
    assert BY_NAME["adapter.rank"].value(full) is None
    assert BY_NAME["quantization.quant_type"].value(full) is None
    assert BY_NAME["memory.rank_imbalance"].value(full) is None
