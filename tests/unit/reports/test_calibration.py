"""Errors of predictions by family, against figures worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from synthetic_results import trained

from harness.records.provenance import new_record
from harness.records.record import Record, RecordedPrediction
from matrices.cell import Cell, Model
from matrices.errors import UserError
from reports.predictions.errors import (
    calibration_text,
    errors_frame,
    families,
    model_family,
    percent,
)
from reports.records.load import Result


def record(method: str = "lora", seed: int = 0, error: float | None = 0.01, **told: Any) -> Result:
    """One whose prediction was off by `error`; `told` are further fields of its prediction."""
    cell = trained(method, seed)
    prediction = RecordedPrediction(error=error, margin=0.02, **told)
    made: Record = new_record(cell, []).model_copy(
        update={"prediction": prediction, "status": "ok"}
    )
    return Result(made, Path(f"{method}-{seed}/record.json"))


def test_median_and_worst_by_family() -> None:
    off = {0: 0.01, 1: -0.05, 2: 0.02, 3: 0.03}
    results = [record(seed=seed, error=error) for seed, error in off.items()]
    results.append(record("full", error=0.0, expected_seconds_error=-0.25))
    found = {family.method: family for family in families(results)}
    lora = found["lora"]
    # Of -0.05, 0.01, 0.02, 0.03: the median is 0.015, the farthest from zero -0.05; the margin
    # of 0.02 holds 0.01 and 0.02.
    assert (lora.memory.n, lora.memory.worst, lora.within_margin) == (4, -0.05, 2)
    assert lora.memory.median == pytest.approx(0.015)
    assert (lora.model, lora.optimizer, lora.device) == ("smollm2", "adamw_torch", "CPU")
    assert lora.step_time.n == 0
    assert found["full"].step_time.median == -0.25
    everything = found["all"]
    assert (everything.memory.n, everything.memory.worst) == (5, -0.05)
    assert everything.memory.median == pytest.approx(0.01)


def test_one_family_is_not_summed_up_again() -> None:
    assert [family.method for family in families([record()])] == ["lora"]


def test_superseded_attempts_and_unknown_errors_do_not_count() -> None:
    old = record(error=0.5)
    newer = record(error=0.01)
    newer.record.attempt = 2
    nothing = Result(new_record(trained("full"), []), Path("x/record.json"))
    frame = errors_frame([old, newer, nothing, record(seed=9, error=None)])
    assert frame["memory"].tolist() == [0.01]


def test_no_prediction_anywhere_is_one_line() -> None:
    with pytest.raises(UserError, match="no record here carries a prediction"):
        families([Result(new_record(trained("full"), []), Path("x/record.json"))])


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("smollm2-135m", "smollm2"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral"),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5"),
        ("/models/opt-125m/", "opt"),
        ("gpt2", "gpt2"),
        ("microsoft/phi-2", "phi-2"),
    ],
)
def test_families_of_models(name: str, family: str) -> None:
    assert model_family(Cell(model=Model(name=name))) == family
    path = Cell(model=Model(config=f"/x/{name.rstrip('/').rpartition('/')[2]}/config.json"))
    assert model_family(path) == family


def test_the_table_has_the_largest_errors_first_and_all_last() -> None:
    text = calibration_text(families([record(error=0.01), record("full", error=-0.04)]))
    rows = [line.split()[1] for line in text.splitlines()[1:4]]
    assert rows == ["full", "lora", "all"]
    assert "−4 %" in text


def test_small_errors_are_told_from_none() -> None:
    assert percent(0.0) == "exact"
    assert percent(-0.0312) == "−3.12 %"
    assert percent(0.0042) == "+0.42 %"
    assert percent(2e-7) == "+2.0e-05 %"
    assert percent(-2e-7) == "−2.0e-05 %"
    assert percent(None) == "–"
