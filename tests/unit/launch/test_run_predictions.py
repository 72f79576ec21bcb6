"""What is predicted for a run, and what a record says of it afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from harness.records import provenance
from harness.records.memory import Memory
from harness.records.prediction import (
    PredictedMemory,
    PredictedOutOfMemory,
    PredictedSpeed,
    Prediction,
    Verdict,
)
from harness.records.provenance import new_record
from harness.records.record import Record, RecordedPrediction
from harness.records.speed import Speed
from harness.records.stack import Hardware
from launch.display.progress import PlainDisplay
from launch.predict import run_predictions
from launch.predict.predict import PredictionOptions
from launch.predict.run_predictions import (
    options_for_this_machine,
    out_of_memory,
    predict_run,
    relative,
    with_prediction,
    with_step_times,
)
from matrices.cell import Adapter, Cell, Data, Train

GIB = 2**30


def lora(seed: int = 0) -> Cell:
    return Cell(method="lora", adapter=Adapter(), data=Data(), train=Train(), seed=seed)


def prediction(cell: Cell, **changes: Any) -> Prediction:
    known: dict[str, Any] = {
        "cell_id": cell.cell_id,
        "cell": cell,
        "stack": {"torch": "2.13.0"},
        "status": "predicted",
        "engine": "fake-cpu",
        "margin": 0.01,
        "memory": PredictedMemory(
            peak_allocated_bytes=110,
            steady_allocated_bytes=50,
            peak_phase="forward",
            by_phase={"forward": 110},
        ),
        "speed": PredictedSpeed(floor_seconds=0.5, expected_seconds=1.0),
    }
    return Prediction.model_validate(known | changes)


def measured(cell: Cell, peak: int | None = 100, headline: str = "ledger") -> Record:
    memory = Memory.model_validate({"headline": headline if peak else None, "peak_bytes": peak})
    changes = {"memory": memory, "speed": Speed(step_seconds_median=1.25)}
    return new_record(cell, []).model_copy(update=changes)


def verdict(outcome: str) -> Verdict:
    oom = PredictedOutOfMemory(
        phase="optimizer_step",
        op="aten.sqrt",
        module="",
        requested_bytes=1,
        allocated_bytes=1,
        reserved_bytes=1,
    )
    return Verdict.model_validate(
        {
            "gpu": "t4",
            "capacity_bytes": 14 * GIB,
            "context_bytes": GIB,
            "outcome": outcome,
            "oom": oom if outcome == "oom" else None,
        }
    )


def test_a_record_carries_its_prediction_and_the_error() -> None:
    found = with_prediction(measured(lora()), prediction(lora()))
    told = found.prediction
    assert told is not None
    # 110 predicted, 100 measured; 1.0 s expected, 1.25 s measured.
    assert told.error == pytest.approx(0.10)
    assert told.expected_seconds_error == pytest.approx(-0.20)
    assert (told.engine, told.margin, told.stack) == ("fake-cpu", 0.01, {"torch": "2.13.0"})
    assert told.by_phase == {"forward": 110}
    assert "prediction" not in found.missing
    assert Record.model_validate_json(found.to_json()) == found


def test_errors_are_only_between_like_and_like() -> None:
    other = with_prediction(measured(lora(), headline="cuda_allocated"), prediction(lora()))
    assert other.prediction is not None
    assert other.prediction.error is None
    assert other.missing["prediction.error"] == (
        "fake-cpu does not predict what cuda_allocated counts"
    )
    on_gpu = prediction(lora(), engine="fake-cuda")
    alike = with_prediction(measured(lora(), headline="cuda_allocated"), on_gpu)
    assert alike.prediction is not None
    assert alike.prediction.error == pytest.approx(0.10)
    unmeasured = with_prediction(measured(lora(), None), prediction(lora()))
    assert unmeasured.prediction is not None
    assert unmeasured.missing["prediction.error"] == "no peak was measured"


def test_without_a_prediction_the_record_says_why() -> None:
    failed = prediction(lora(), status="failed", reason="no such internals")
    found = with_prediction(measured(lora()), failed)
    assert found.prediction is None
    assert found.missing["prediction"] == "failed: no such internals"
    assert with_prediction(measured(lora()), None).missing["prediction"] == (
        "not predicted before the run"
    )
    base = measured(Cell(method="base"))
    assert with_prediction(base, None) == base, "a base model is not predicted at all"


def test_a_gpus_verdict_names_the_figures() -> None:
    found = prediction(lora(), engine="fake-cuda", verdicts=[verdict("oom")])
    found.memory.peak_allocated_bytes = 20 * GIB
    assert out_of_memory(found) == (
        "predicted to run out of memory on t4 in optimizer step at aten.sqrt: peak 20.00 GiB of "
        "14.00 GiB"
    )
    for outcome in ("fits", "fits-after-retries"):
        assert out_of_memory(prediction(lora(), verdicts=[verdict(outcome)]), 0) == ""


def test_without_a_gpu_it_is_host_memory_that_runs_out() -> None:
    assert out_of_memory(prediction(lora()), available_bytes=110) == ""
    said = out_of_memory(prediction(lora()), available_bytes=109)
    assert said == (
        "predicted to run out of host memory (there is no GPU): peak 110 B of tensors and 109 B "
        "is free"
    )
    unknown = prediction(lora(), status="failed", memory=PredictedMemory())
    assert out_of_memory(unknown, available_bytes=0) == ""
    on_gpu = prediction(lora(), engine="fake-cuda")
    assert out_of_memory(on_gpu, available_bytes=0) == "", "no verdict, no host's business"


def test_only_what_is_trained_is_predicted_and_only_with_skip_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Cell] = []

    def predict(
        cells: Sequence[Cell], options: PredictionOptions, show: object
    ) -> list[Prediction]:
        asked.extend(cells)
        return [prediction(cell, verdicts=[verdict("oom")]) for cell in cells]

    monkeypatch.setattr(run_predictions, "predict", predict)
    cells = [Cell(method="base"), lora(), lora(1)]
    found = predict_run(cells, PlainDisplay())
    assert asked == cells[1:]
    assert set(found.predictions) == {cell.cell_id for cell in cells[1:]}
    assert found.skipped == {}
    assert set(predict_run(cells, PlainDisplay(), skip=True).skipped) == set(found.predictions)
    asked.clear()
    assert predict_run(cells[:1], PlainDisplay()).predictions == {}
    assert asked == []


def past_step(accelerator: str | None, floor_device: str | None) -> Record:
    """A thousand operations in two seconds, a second more than the floor."""
    found = measured(lora())
    hardware = found.hardware.model_copy(update={"accelerator": accelerator})
    speed = Speed(flops_per_step=1000, tflops_per_second=5e-10, step_seconds_median=2.0)
    told = RecordedPrediction(device=floor_device, floor_seconds=1.0)
    changes = {"hardware": hardware, "speed": speed, "prediction": told, "status": "ok"}
    return found.model_copy(update=changes)


def test_a_step_is_expected_to_take_what_past_ones_of_the_device_took() -> None:
    asked = prediction(
        lora(), device="t4", speed=PredictedSpeed(floor_seconds=3.0, flops_per_step=3000)
    )
    [on_gpu] = with_step_times([asked], [past_step("Tesla T4", "t4"), past_step("NVIDIA L4", "l4")])
    # Twice the floor of 3 s.
    assert on_gpu.speed.expected_seconds == pytest.approx(6.0)
    assert on_gpu.speed.calibration_records == 1
    assert (
        with_step_times([asked], [past_step("NVIDIA L4", "l4")])[0].speed.expected_seconds is None
    )
    here = prediction(lora(), speed=PredictedSpeed(flops_per_step=500))
    [on_cpu] = with_step_times([here], [past_step(None, None), past_step("Tesla T4", "t4")])
    # 500 operations a second.
    assert on_cpu.speed.expected_seconds == pytest.approx(1.0)
    failed = prediction(lora(), status="failed", reason="no")
    assert with_step_times([failed], [past_step("Tesla T4", "t4")]) == [failed]


def machine(monkeypatch: pytest.MonkeyPatch, gpus: list[provenance.NvmlGpu], torch: str) -> None:
    first = gpus[0] if gpus else None
    hardware = Hardware(
        cpu="c",
        cpu_count=2,
        host_memory_bytes=GIB,
        accelerator=first.name if first else None,
    )
    stack = provenance.stack().model_copy(update={"packages": {"torch": torch}})
    monkeypatch.setattr(provenance, "hardware", lambda: hardware)
    monkeypatch.setattr(provenance, "stack", lambda: stack)
    monkeypatch.setattr(provenance, "nvml", lambda: provenance.Nvml(tuple(gpus), None))


def test_this_machine_is_what_is_predicted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    t4 = provenance.NvmlGpu("Tesla T4", "u", 15 * GIB, (7, 5), "d")
    machine(monkeypatch, [], "2.13.0+cpu")
    assert options_for_this_machine() == PredictionOptions(engine="fake-cpu")
    machine(monkeypatch, [t4], "2.13.0+cpu")
    assert options_for_this_machine().engine == "fake-cpu", "a build for the CPU trains on the CPU"
    machine(monkeypatch, [t4], "2.13.0")
    here = options_for_this_machine()
    assert here.gpu is not None
    assert (here.gpu.name, here.engine, here.judge) == ("t4", None, (here.gpu,))
    slice_ = t4._replace(memory_bytes=7 * GIB)
    machine(monkeypatch, [slice_], "2.13.0")
    half = options_for_this_machine().gpu
    assert half is not None
    assert half.memory_bytes == 7 * GIB
    machine(monkeypatch, [t4._replace(name="Unheard Of 9000")], "2.13.0")
    assert options_for_this_machine() == PredictionOptions(), (
        "a GPU nobody has described: no verdict"
    )


def test_relative() -> None:
    assert relative(90, 100) == pytest.approx(-0.1)
    assert relative(None, 100) is None
    assert relative(1, None) is None
    assert relative(1, 0) is None
