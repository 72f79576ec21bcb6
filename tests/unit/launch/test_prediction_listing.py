"""How predictions read: never as measured, with what they rest on, and with where it ran out."""

from __future__ import annotations

from typing import Any

from harness.records.memory import LiveTensor
from harness.records.prediction import (
    PredictedMemory,
    PredictedOutOfMemory,
    PredictedSpeed,
    Prediction,
    RankMemory,
    Verdict,
)
from launch.display.predictions import explanation, footer, predictions_text
from launch.display.tables import plan_text, verdict_text
from launch.planning.plan import Job
from matrices.cell import Adapter, Cell, Data, Train

GIB = 2**30
CELL = Cell(method="lora", adapter=Adapter(), data=Data(), train=Train())
NAMES = {CELL.cell_id: "lora r16"}


def verdict(gpu: str, outcome: str, retries: int = 0) -> Verdict:
    oom = {
        "phase": "optimizer_step",
        "op": "aten::mm",
        "module": "model.layers.3",
        "requested_bytes": 2 * GIB,
        "allocated_bytes": 15 * GIB,
        "reserved_bytes": 16 * GIB,
    }
    return Verdict.model_validate(
        {
            "gpu": gpu,
            "capacity_bytes": 16 * GIB,
            "context_bytes": GIB,
            "outcome": outcome,
            "retries": retries,
            "oom": PredictedOutOfMemory.model_validate(oom) if outcome == "oom" else None,
        }
    )


def prediction(**changes: Any) -> Prediction:
    known: dict[str, Any] = {
        "cell_id": CELL.cell_id,
        "cell": CELL,
        "stack": {"torch": "2.13.0", "transformers": "5.23.0", "python": "3.11"},
        "status": "predicted",
        "engine": "fake-cuda",
        "device": "t4",
        "margin": 0.002,
        "memory": PredictedMemory(
            peak_allocated_bytes=12 * GIB,
            peak_reserved_bytes=13 * GIB,
            steady_allocated_bytes=8 * GIB,
            peak_phase="optimizer_step",
            by_phase={"backward": 11 * GIB, "load": 9 * GIB, "optimizer_step": 12 * GIB},
            by_category={"weights": 8 * GIB, "optimizer_states": 4 * GIB},
            top_tensors=[
                LiveTensor(
                    bytes=GIB,
                    category="weights",
                    op="aten::empty",
                    shape=[4, 8],
                    dtype="bfloat16",
                    module="",
                    phase="load",
                )
            ],
        ),
        "verdicts": [verdict("t4", "oom"), verdict("l4", "fits-after-retries", 1)],
        "speed": PredictedSpeed(gpu="t4", floor_seconds=0.5),
        "assumptions": ["no padding"],
        "modelled": ["DDP's buckets"],
    }
    return Prediction.model_validate(known | changes)


def test_verdicts_in_words() -> None:
    assert verdict_text(verdict("t4", "fits")) == "fits"
    assert verdict_text(verdict("t4", "fits-after-retries", 1)) == "fits, 1 retry"
    assert verdict_text(verdict("t4", "fits-after-retries", 2)) == "fits, 2 retries"
    assert verdict_text(verdict("t4", "oom")) == "OOM in optimizer step"


def test_the_table_and_what_it_rests_on() -> None:
    lines = predictions_text([prediction()], NAMES).splitlines()
    assert lines[0].split("  ")[0] == "cell"
    row = [word for word in lines[1].split("  ") if word]
    assert [word.strip() for word in row[1:]] == [
        "12.00 GiB", "13.00 GiB", "optimizer step", "8.00 GiB", "OOM in optimizer step",
        "fits, 1 retry", "500 ms", "lora r16",
    ]  # fmt: skip
    assert lines[3:] == [
        "1 predicted; every figure is predicted, none measured",
        "executed: transformers 5.23.0, torch 2.13.0 · on a simulated t4 (±0.2 %)",
        "assumptions: no padding",
    ]


def test_a_cell_without_a_prediction_keeps_its_row_and_its_reason() -> None:
    broken = prediction(status="failed", reason="no such internals", memory=PredictedMemory())
    text = predictions_text([broken], NAMES)
    assert "lora r16: failed, no such internals" in text
    assert text.splitlines()[-1] == "nothing was predicted"


def test_an_expected_time_has_its_interval_and_its_grounds() -> None:
    speed = PredictedSpeed(
        gpu="t4",
        floor_seconds=0.5,
        expected_seconds=1.0,
        expected_seconds_low=0.75,
        expected_seconds_high=1.5,
        note="calibrated by 3 steps",
    )
    text = predictions_text([prediction(speed=speed)], NAMES)
    assert "1.00 s [750 ms, 1.50 s]" in text
    assert "step time: calibrated by 3 steps" in text


def test_assumptions_of_some_cells_only_are_announced() -> None:
    other = prediction(assumptions=["no padding", "balanced routing"])
    assert "assumptions: no padding (more with --explain)" in footer([prediction(), other])
    assert "a simulated CPU" in footer([prediction(engine="fake-cpu", device=None)])


def test_a_cell_in_full() -> None:
    ranks = [
        RankMemory(
            rank=rank,
            peak_allocated_bytes=GIB,
            steady_allocated_bytes=GIB,
            peak_reserved_bytes=GIB,
            host_bytes=2 * GIB,
        )
        for rank in (0, 1)
    ]
    text = explanation(prediction(per_rank=ranks), "lora r16")
    lines = text.splitlines()
    assert lines[0] == f"{CELL.cell_id[:12]} lora r16"
    phases = [line.split("  ")[2] for line in lines[2:5]]
    assert phases == ["load", "backward", "optimizer step"], "in the order of a step"
    assert "  live at the training peak, in optimizer step" in lines
    assert "bfloat16[4, 8]" in text
    assert (
        "      at aten::mm in model.layers.3: asked for 2.00 GiB with 15.00 GiB allocated and "
        "16.00 GiB reserved" in lines
    )
    assert any(line.startswith("    1") and "2.00 GiB" in line for line in lines)
    assert "    - DDP's buckets" in lines
    failed = explanation(prediction(status="invalid", reason="because"), "lora r16")
    assert failed.splitlines()[1] == "  invalid: because"


def test_a_plan_with_and_without_predictions() -> None:
    base = Job(Cell(method="base"), "b", "base", "run", "why", 0, None)
    job = Job(CELL, "k", "lora r16", "run", "why", 0, None)
    assert "predicted" not in plan_text([base, job], 1)
    lines = plan_text([base, job], 1, {CELL.cell_id: prediction()}).splitlines()
    assert lines[0].split() == [
        "cell", "action", "predicted", "peak", "t4", "l4", "configuration", "why",
    ]  # fmt: skip
    assert lines[1].split()[1:] == ["run", "–", "–", "–", "base", "why"]
    assert "12.00 GiB" in lines[2]
    assert "OOM in optimizer step" in lines[2]
    failed = prediction(status="failed", reason="no", verdicts=[])
    told = plan_text([job], 1, {CELL.cell_id: failed}).splitlines()[1]
    assert told.split()[1:] == ["run", "failed", "lora", "r16", "why"]
    assert job.as_json(prediction())["prediction"]["verdicts"] == {
        "t4": "oom",
        "l4": "fits-after-retries",
    }
    assert job.as_json()["prediction"] is None
