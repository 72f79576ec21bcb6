"""Claims that take a run, against the records of the README's table and against made-up ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from reports.claims.language import Answer, Claim
from reports.claims.measured import measured
from reports.records.load import Result, load_records


@pytest.fixture(scope="module")
def quickstart(repository: Path) -> list[Result]:
    return load_records(repository / "tests" / "data" / "quickstart")


def ask(quantity: str, results: list[Result] | None, **bound: object) -> Answer:
    claim = Claim.model_validate({"id": "a", "kind": "measure", "quantity": quantity} | bound)
    return measured(claim, results)


def test_without_results_it_says_what_is_needed() -> None:
    told = ask("qlora_slowdown_versus_lora", None, between=(0.2, 0.3))
    assert told.verdict == "not testable"
    assert told.needs == "a lora and a qlora cell that are otherwise the same"


def test_bits_saved_by_nesting_by_hand(quickstart: list[Result]) -> None:
    """From the two records' own bytes: what the constants shrink by, over two parameters a byte."""
    held = {
        result.record.cell.quantization.double_quant: result.record.memory.resident
        for result in quickstart
        if result.record.cell.method == "qlora"
        and result.record.cell.quantization is not None
        and result.record.cell.quantization.quant_type == "nf4"
    }
    saved = held[False]["quantization_state"] - held[True]["quantization_state"]
    bits = 8 * saved / (2 * held[True]["quantized_weights"])
    told = ask("double_quant_saving_bits_per_parameter", quickstart, value=0.4, tolerance=0.05)
    assert told.verdict == "reproduced"
    assert told.value == pytest.approx(bits)
    assert any("0.373 bits" in note for note in told.notes)


def test_the_quarter_holds_for_no_whole_model(quickstart: list[Result]) -> None:
    """4.5 of 16 bits a parameter without nesting is 71.9 %; embeddings and norms stay as they
    are."""
    told = ask("base_weights_reduction", quickstart, value=0.75, tolerance=0.005)
    assert told.verdict == "refuted"
    assert told.value is not None
    assert told.value < 0.5
    assert "of the layers stored in 4 bits alone, against 16 bits: 71.9 % or 74.1 %" in told.notes


def test_a_single_pair_of_runs_decides_nothing(quickstart: list[Result]) -> None:
    told = ask("double_quant_slowdown", quickstart, at_least=0.0)
    assert told.verdict == "not testable"
    assert told.reason == "inconclusive: one pair of runs says nothing about others"
    assert told.value is not None


def test_cells_that_are_not_there(quickstart: list[Result]) -> None:
    told = ask("checkpointing_memory_saving", quickstart, value=0.4)
    assert told.verdict == "not testable"
    assert told.reason == "no two such cells in these results"


def test_slowdown_and_speed_agree(quickstart: list[Result]) -> None:
    """One minus the ratio of steps per second, pair by pair."""
    speed = ask("qlora_over_lora_steps_per_second", quickstart, value=0.72, tolerance=0.005)
    slower = ask("qlora_slowdown_versus_lora", quickstart, between=(0.2, 0.3))
    assert [1 - reading.value for reading in speed.readings] == pytest.approx(
        [reading.value for reading in slower.readings]
    )
    assert len(speed.readings) == 3


def test_what_no_record_holds(quickstart: list[Result]) -> None:
    told = ask("merged_minus_requantized_quality_points", quickstart, at_least=0.0)
    assert told.verdict == "not testable"
    assert told.needs is not None
