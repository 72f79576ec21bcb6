"""Predictions for the cells of a run, and their fields in the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from harness.records import provenance
from harness.records.prediction import Prediction, PredictionEngine
from harness.records.record import Record, RecordedPrediction
from launch.display.progress import Display
from launch.predict.gpu_choice import gpu_of_this_machine
from launch.predict.predict import PredictionOptions, predict
from matrices.catalogue import gpus
from matrices.catalogue.gpus import Gpu
from matrices.cell import Cell
from matrices.errors import UserError
from reports.predictions.step_time import Step, device_name, past_steps, with_expectation
from reports.text import bytes_text

# The meter that measures what a prediction engine predicts.
COUNTED_BY: dict[PredictionEngine, str] = {"fake-cuda": "cuda_allocated", "fake-cpu": "ledger"}


@dataclass(frozen=True)
class RunPredictions:
    """Predictions, and the reasons why cells do not start, by cell id."""

    predictions: Mapping[str, Prediction] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


def options_for_this_machine(gpu: Gpu | None = None) -> PredictionOptions:
    """Options to predict for this machine: for its GPU or, without one, for its CPU, where the
    ledger measures what a fake CPU holds."""
    gpu = gpu or gpu_of_this_machine()
    return PredictionOptions(
        gpu=gpu,
        judge=(gpu,) if gpu else (),
        engine=None if provenance.uses_gpu_here() or gpu else "fake-cpu",
    )


def predict_run(
    cells: Sequence[Cell],
    display: Display,
    skip: bool = False,
    options: PredictionOptions | None = None,
    past: Sequence[Record] = (),
) -> RunPredictions:
    """Predict the trained cells. The records `past` calibrate the time of a step. With `skip`, also
    give the cells that would run out of memory on this machine."""
    trained = [cell for cell in cells if cell.method != "base"]
    if not trained:
        return RunPredictions()
    found = with_step_times(predict(trained, options or options_for_this_machine(), display), past)
    by_id = {prediction.cell_id: prediction for prediction in found}
    reasons = {cell_id: out_of_memory(one) for cell_id, one in by_id.items()} if skip else {}
    return RunPredictions(by_id, {cell_id: reason for cell_id, reason in reasons.items() if reason})


def with_step_times(predictions: Sequence[Prediction], past: Sequence[Record]) -> list[Prediction]:
    """The predictions with the step times that records of the same device give."""
    steps: dict[str | None, list[Step]] = {}
    for device in {prediction.device for prediction in predictions}:
        names = {
            name
            for name in (device_name(record.hardware) for record in past)
            if _is_called(name, device)
        }
        steps[device] = past_steps(past, names, device)
    return [
        with_expectation(one, steps[one.device]) if one.status == "predicted" else one
        for one in predictions
    ]


def _is_called(name: str, device: str | None) -> bool:
    """Whether `name` is the device of a prediction; None is the CPU of this machine."""
    if device is None:
        return name == device_name(provenance.hardware())
    try:
        return gpus.gpu(name).name == device
    except UserError:
        return False


def out_of_memory(prediction: Prediction, available_bytes: int | None = None) -> str:
    """Why a cell is predicted to run out of memory here; empty when it is not predicted to.

    On a CPU the predicted peak is compared with the host memory that is free now (bytes). Libraries
    and the process itself need more, so a cell that passes may still fail.
    """
    for verdict in prediction.verdicts:
        if verdict.outcome == "oom":
            place = ""
            if verdict.oom is not None:
                place = f" in {verdict.oom.phase.replace('_', ' ')} at {verdict.oom.op}"
            return (
                f"predicted to run out of memory on {verdict.gpu}{place}: peak "
                f"{bytes_text(prediction.memory.peak_allocated_bytes)} of "
                f"{bytes_text(verdict.capacity_bytes)}"
            )
    peak = prediction.memory.peak_allocated_bytes
    if prediction.engine != "fake-cpu" or prediction.verdicts or peak is None:
        return ""
    free = psutil.virtual_memory().available if available_bytes is None else available_bytes
    if peak <= free:
        return ""
    return (
        f"predicted to run out of host memory (there is no GPU): peak {bytes_text(peak)} of "
        f"tensors and {bytes_text(free)} is free"
    )


def with_prediction(record: Record, prediction: Prediction | None) -> Record:
    """The record with its prediction and the prediction's error, or with the reason why it has
    none."""
    if record.cell.method == "base":
        return record
    if prediction is None:
        return _missing(record, "prediction", "not predicted before the run")
    if prediction.status != "predicted":
        return _missing(record, "prediction", f"{prediction.status}: {prediction.reason}")
    memory, speed = prediction.memory, prediction.speed
    recorded = RecordedPrediction(
        peak_allocated_bytes=memory.peak_allocated_bytes,
        peak_reserved_bytes=memory.peak_reserved_bytes,
        steady_allocated_bytes=memory.steady_allocated_bytes,
        peak_phase=memory.peak_phase,
        by_phase=memory.by_phase,
        engine=prediction.engine,
        device=prediction.device,
        margin=prediction.margin,
        stack=prediction.stack,
        floor_seconds=speed.floor_seconds,
        expected_seconds=speed.expected_seconds,
        expected_seconds_error=relative(speed.expected_seconds, record.speed.step_seconds_median),
    )
    found = record.model_copy(update={"prediction": recorded})
    measured, meter = record.memory.peak_bytes, record.memory.headline
    if measured is None:
        return _missing(found, "prediction.error", "no peak was measured")
    if prediction.engine is None or COUNTED_BY[prediction.engine] != meter:
        return _missing(
            found, "prediction.error", f"{prediction.engine} does not predict what {meter} counts"
        )
    recorded.error = relative(memory.peak_allocated_bytes, measured)
    return found


def relative(predicted: float | None, measured: float | None) -> float | None:
    """predicted / measured - 1."""
    return predicted / measured - 1 if predicted is not None and measured else None


def _missing(record: Record, name: str, reason: str) -> Record:
    return record.model_copy(update={"missing": {**record.missing, name: reason}})
