"""Predictions under the measured versions against published A100 measurements, to the byte where
that is possible. `tests/data/published_measurements.yaml` says where the figures come from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import published
import pytest
import yaml

from harness.records.prediction import Prediction
from launch.display.progress import PlainDisplay
from launch.predict.overlays import overlay
from launch.predict.predict import PredictionOptions, predict

DATA = Path(__file__).parents[1] / "data" / "published_measurements"
ALL_ROWS = published.read(DATA.with_suffix(".csv"))
TOLD = yaml.safe_load(DATA.with_suffix(".yaml").read_text())
VOCABULARY = {name: entry["size"] for name, entry in TOLD["vocabulary"].items()}
STACK = (
    "transformers==4.48.1,peft==0.13.2,accelerate==1.0.1,trl==0.13.0,tokenizers==0.21.4,"
    "huggingface_hub==0.36.0,bitsandbytes==0.43.3"
)
# Relative errors allowed.
SINGLE, SEVERAL, STEADY = 1e-4, 1e-3, 1e-3
# torch hands out a block of 9 MiB whole for a cuBLAS workspace of 8.125 MiB. Row 071 was measured
# with both workspaces in such blocks and is predicted with none: 2 x 917,504 bytes, of 17.5 GB at
# the peak and of 0.8 GB between steps.
PEAK_OF = {"fms-a100_80gb-24bdadb-071": 1.1e-4}
STEADY_OF = {"fms-a100_80gb-24bdadb-071": 2.3e-3}


def chosen(rows: list[published.Measurement]) -> list[published.Measurement]:
    """What the gate predicts: every row of one GPU, and of two GPUs, whose simulations take four
    times as long, the first batch size of each method. TUNEBENCH_ALL_ROWS=1 predicts all of them,
    as `tests/benchmarks/accuracy.py` does."""
    if os.environ.get("TUNEBENCH_ALL_ROWS"):
        return rows
    seen: set[tuple[str, str]] = set()
    kept = []
    for row in rows:
        kind = (row.model_id, row.columns["scenario"])
        if row.devices == 1 or kind not in seen:
            kept.append(row)
        if row.devices > 1:
            seen.add(kind)
    return kept


ROWS = chosen(ALL_ROWS)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Compared:
    row: published.Measurement
    prediction: Prediction

    def error(self, figure: str) -> float:
        """Predicted over measured, less one."""
        measured = getattr(self.row, figure)
        return float((getattr(self.prediction.memory, figure) - measured) / measured)


@pytest.fixture(scope="module")
def predicted() -> dict[str, Compared]:
    """All rows in one request, under the measured stack, which pip installs into a cache."""
    display = PlainDisplay()
    found = predict(
        published.cells(ROWS, VOCABULARY),
        PredictionOptions(overlay=overlay(STACK, display.message), fresh=True),
        display,
    )
    return {row.row_id: Compared(row, made) for row, made in zip(ROWS, found, strict=True)}


def each_row() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row_id", [row.row_id for row in ROWS])


@each_row()
def test_the_peak(row_id: str, predicted: dict[str, Compared]) -> None:
    found = predicted[row_id]
    assert found.prediction.status == "predicted", found.prediction.reason
    tolerance = PEAK_OF.get(row_id, SINGLE) if found.row.devices == 1 else SEVERAL
    assert abs(found.error("peak_allocated_bytes")) < tolerance


@each_row()
def test_the_steady_state(row_id: str, predicted: dict[str, Compared]) -> None:
    found = predicted[row_id]
    assert abs(found.error("steady_allocated_bytes")) < STEADY_OF.get(row_id, STEADY)


def test_mistral_is_exact(predicted: dict[str, Compared]) -> None:
    """Full fine-tuning, LoRA and QLoRA, on one GPU and under FSDP1 on two: to the byte."""
    mistral = [found for found in predicted.values() if found.row.model_id.startswith("mistralai")]
    assert len(mistral) == sum(row.model_id.startswith("mistralai") for row in ROWS) >= 12
    for found in mistral:
        assert found.error("peak_allocated_bytes") == 0, found.row.row_id
        assert found.error("steady_allocated_bytes") == 0, found.row.row_id


def test_the_versions_that_were_measured_were_executed(predicted: dict[str, Compared]) -> None:
    for found in predicted.values():
        for package in ("transformers", "trl", "peft", "bitsandbytes"):
            assert found.prediction.stack[package] == found.row.columns[package]


def test_the_trained_parameters_are_the_published_ones(predicted: dict[str, Compared]) -> None:
    told = [found for found in predicted.values() if found.row.columns["trainable_params"]]
    assert len(told) >= 14
    for found in told:
        published_count = int(float(found.row.columns["trainable_params"]))
        assert found.prediction.trainable_parameters == published_count
