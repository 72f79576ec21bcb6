"""Claims: how they are read, what agrees with them, and what a refutation says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.records.prediction import PredictedMemory, Prediction
from matrices.cell import Cell
from matrices.errors import UserError
from reports.claims.answers import answer, cells_for, more_cells_for
from reports.claims.language import Claim, figure_text, read_claims
from reports.claims.predicted import cases, dtypes_in, log_slope
from reports.claims.text import answers_markdown, answers_text

PEAK = "kind: predict, model: llama-2-7b, method: full, quantity: peak_gb"


def read(folder: Path, *entries: str) -> list[Claim]:
    file = folder / "claims.yaml"
    file.write_text("claims:\n" + "".join(f"  - {{{entry}}}\n" for entry in entries))
    return read_claims(file)


def predicted(cell: Cell, **changes: Any) -> Prediction:
    """7 billion parameters, all figures the same for every cell unless told."""
    told: dict[str, Any] = {
        "trainable_parameters": 16_777_216,
        "total_parameters": 6_755_192_832,
        "memory": PredictedMemory(
            peak_allocated_bytes=15 * 2**30,
            by_category={"optimizer_states": 134_217_728, "activations": 10**9},
            resident={"weights": 13_476_831_232, "adapters": 67_108_864},
        ),
    }
    told |= {"stack": {"torch": "2.13.0"}, "status": "predicted"} | changes
    return Prediction(cell_id=cell.cell_id, cell=cell, **told)


@pytest.mark.parametrize(
    ("written", "tolerance"),
    [("98.0", 0.05), ("98", 0.5), ("16777216", 0.5), ("8.39e6", 5000.0), ("0.0104", 0.00005)],
)
def test_half_of_the_last_digit_written(tmp_path: Path, written: str, tolerance: float) -> None:
    [claim] = read(tmp_path, f"id: a, {PEAK}, value: {written}")
    assert claim.tolerance == tolerance


def test_a_rounding_that_is_given_counts_instead(tmp_path: Path) -> None:
    [claim] = read(tmp_path, f"id: a, {PEAK}, value: 0.4, rounding: 0.02")
    assert claim.accepts(0.42)
    assert not claim.accepts(0.43)


def test_bounds(tmp_path: Path) -> None:
    most, least, both = read(
        tmp_path,
        f"id: a, {PEAK}, at_most: 6",
        f"id: b, {PEAK}, at_least: 6",
        f"id: c, {PEAK}, between: [1, 2]",
    )
    assert [claim.accepts(6.0) for claim in (most, least, both)] == [True, True, False]
    assert [claim.accepts(6.1) for claim in (most, least)] == [False, True]
    assert [claim.told() for claim in (most, least, both)] == [
        "at most 6 GB",
        "at least 6 GB",
        "1 to 2 GB",
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("id: a, kind: predicts, quantity: peak_gb, value: 1", "did you mean 'predict'"),
        ("id: a, kind: predict, quantity: peek_gb, value: 1", "did you mean 'peak_gb'"),
        (f"id: a, {PEAK}, valu: 1", "did you mean 'value'"),
        (f"id: a, {PEAK}", "this one none"),
        (f"id: a, {PEAK}, value: 1, at_most: 2", "value and at_most"),
        (f"id: a, {PEAK}, value: one", "value: .*number"),
        ("id: a, kind: predict, quantity: peak_gb, value: 1", "add model: NAME"),
        ("kind: predict, quantity: peak_gb, value: 1", "id: every claim has one"),
    ],
)
def test_mistakes_are_one_line_with_their_place(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, entry)
    assert "\n" not in str(caught.value)
    assert "claims.yaml:2" in str(caught.value)


def test_two_claims_of_one_id(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ids are unique"):
        read(tmp_path, f"id: a, {PEAK}, value: 1", f"id: a, {PEAK}, value: 2")


def test_price_is_hours_times_rate(tmp_path: Path) -> None:
    right, wrong = read(
        tmp_path,
        "id: a, kind: price, hours: 1.5, usd_per_hour: 3.00, quantity: usd, value: 4.50",
        "id: b, kind: price, hours: 1.5, usd_per_hour: 3.00, quantity: usd, value: 4.60",
    )
    assert answer(right, {}).verdict == "reproduced"
    refuted = answer(wrong, {})
    assert (refuted.verdict, refuted.value) == ("refuted", 4.5)


def test_the_peak_in_gib_is_said(tmp_path: Path) -> None:
    claims = read(tmp_path, f"id: a, {PEAK}, value: 15.0")
    known = {cell.cell_id: predicted(cell) for cell in cells_for(claims)}
    [told] = [answer(claim, known) for claim in claims]
    assert told.verdict == "refuted"
    assert told.value == 15 * 2**30 / 1e9
    assert any(note.startswith("holds if its GB are GiB: 15.00 GiB") for note in told.notes)


def test_states_by_the_dtypes_of_the_note(tmp_path: Path) -> None:
    """14 bytes for each of 6,738,415,616 parameters: 94.3 GB; 98.0 is 14 times 7 billion."""
    claims = read(
        tmp_path,
        "id: a, kind: predict, model: llama-2-7b, method: full, quantity: model_states_gb, "
        'value: 98.0, note: "bf16 weights, fp32 gradients, fp32 Adam; no activations"',
    )
    count = 6_738_415_616
    known = {
        cell.cell_id: predicted(cell, trainable_parameters=count, total_parameters=count)
        for cell in cells_for(claims)
    }
    told = answer(claims[0], known)
    assert told.verdict == "refuted"
    assert told.value == pytest.approx(94.337818624)
    assert any("exactly 7 billion parameters; the model has 6,738,415,616" in n for n in told.notes)


def test_lora_states_by_hand(tmp_path: Path) -> None:
    """Weights and adapters as held, gradients of the adapters in fp32, the states seen."""
    claims = read(
        tmp_path,
        "id: a, kind: predict, model: llama-2-7b, method: lora, rank: 16, "
        "target_modules: attention, quantity: model_states_gb, value: 14.2",
    )
    known = {cell.cell_id: predicted(cell) for cell in cells_for(claims)}
    held = 13_476_831_232 + 67_108_864 + 4 * 16_777_216 + 134_217_728
    assert answer(claims[0], known).value == held / 1e9


def test_a_name_that_matches_nothing_is_refuted_with_the_right_number(tmp_path: Path) -> None:
    claims = read(
        tmp_path,
        "id: a, kind: count, model: opt-125m, method: lora, rank: 16, "
        "target_modules: [q_proj, k_proj, v_proj, o_proj], quantity: trainable_parameters, "
        "value: 786432",
    )
    each, refusal = 294_912, "adapter.target_modules: 'o_proj' matches no linear layer"
    known = {
        cell.cell_id: predicted(cell, status="invalid", reason=refusal)
        for cell in cells_for(claims)
    }
    more = more_cells_for(claims, known)
    counts = {"('o_proj',)": None, "attention": 4 * each}
    for cell in more:
        assert cell.adapter is not None
        count = counts.get(str(cell.adapter.target_modules), each)
        known[cell.cell_id] = predicted(
            cell,
            status="predicted" if count else "invalid",
            trainable_parameters=count,
        )
    told = answer(claims[0], known)
    assert (told.verdict, told.value) == ("refuted", 884_736)
    assert [reading.value for reading in told.readings] == [884_736, 1_179_648]
    assert told.readings[0].assuming == "only q_proj, k_proj, v_proj: o_proj matches nothing"
    assert refusal in told.notes


def test_counts_go_with_the_rank(tmp_path: Path) -> None:
    """Simulated once, at rank 16; rank 4 has a quarter of it."""
    claims = read(
        tmp_path,
        "id: a, kind: count, model: llama-2-7b, method: lora, rank: 4, "
        "target_modules: attention, quantity: trainable_parameters, value: 4194304",
        "id: b, kind: count, model: llama-2-7b, method: lora, rank: 16, "
        "target_modules: attention, quantity: adapter_file_mb, value: 67.1",
    )
    [cell] = cells_for(claims)
    known = {cell.cell_id: predicted(cell)}
    count, file = (answer(claim, known) for claim in claims)
    assert (count.verdict, count.value) == ("reproduced", 4_194_304)
    assert (file.verdict, file.value) == ("reproduced", 16_777_216 * 4 / 1e6)


def test_what_cannot_be_simulated_is_not_testable(tmp_path: Path) -> None:
    claims = read(tmp_path, f"id: a, {PEAK}, value: 1")
    known = {
        cell.cell_id: predicted(cell, status="invalid", reason="no such model")
        for cell in cells_for(claims)
    }
    told = answer(claims[0], known)
    assert (told.verdict, told.reason) == ("not testable", "no such model")


def test_fp32_everything_is_what_is_predicted(tmp_path: Path) -> None:
    [claim] = read(tmp_path, f'id: a, {PEAK}, value: 132, note: "fp32 everything"')
    model = cases(claim)[0].cells[0].model
    assert (model.weight_dtype, model.compute_dtype) == ("fp32", "fp32")


def test_dtypes_in_a_note() -> None:
    assert dtypes_in("bf16 weights, fp32 gradients, fp32 Adam; no activations") == {
        "weights": "bf16",
        "gradients": "fp32",
        "adam": "fp32",
    }
    assert dtypes_in("about 20 GB") == {}


def test_the_exponent_of_a_power_law() -> None:
    assert log_slope([512, 1024, 4096], [3 * x**2 for x in (512, 1024, 4096)]) == pytest.approx(2)
    assert log_slope([1, 2, 4], [5.0, 10.0, 20.0]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("value", "unit", "tolerance", "text"),
    [
        (16777216, "parameters", None, "16,777,216"),
        (0.0104, "share", 0.00005, "1.04 %"),
        (94.337, "GB", 0.05, "94.3 GB"),
        (-0.1461, "share", None, "−14.61 %"),
        (28.0, "GB", 0.5, "28 GB"),
    ],
)
def test_figures_as_text(value: float, unit: str, tolerance: float | None, text: str) -> None:
    assert figure_text(value, unit, tolerance) == text


def test_the_listing_says_what_was_predicted_and_what_is_missing(tmp_path: Path) -> None:
    claims = read(
        tmp_path,
        f"id: a, {PEAK}, value: 15.0",
        "id: b, kind: measure, quantity: checkpointing_slowdown, value: 0.2",
    )
    known = {cell.cell_id: predicted(cell) for cell in cells_for(claims)}
    answers = [answer(claim, known) for claim in claims]
    text = answers_text(answers, {"torch": "2.13.0"})
    assert "16.11 GB (predicted)" in text
    assert "nothing of it was measured on a GPU. Executed: torch 2.13.0." in text
    assert "needs: a cell with gradient_checkpointing and the same without" in text
    assert "2 claims: 1 refuted, 1 not testable." in text
    markdown = answers_markdown(answers, {"torch": "2.13.0"})
    assert "| `a` | llama-2-7b full peak 15.0 GB | refuted | 16.11 GB (predicted) |" in markdown
