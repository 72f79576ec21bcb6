"""From what a step must at least take to how long it will: the efficiency of past, measured steps.

A step takes longer than its floor by a factor that is much the same for alike cells on one device.
Past records give that factor; its geometric mean and its spread give the expected time of a new
cell and an interval for it. Without records there is no expectation, and nothing is made up.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from harness.records.prediction import PredictedSpeed, Prediction
from harness.records.record import Record
from harness.records.stack import Hardware
from matrices.cell import Cell
from reports.statistics.intervals import next_value_interval

NOT_CALIBRATED = "not calibrated: no measured step of this device to go by"
# Of one family (method and layout); with fewer of them, all families together.
ENOUGH = 3
STEPS = "distinct steps"


class Step(NamedTuple):
    """A measured step. `floor_seconds` is what was predicted for that device, None when nothing
    was; `flops` are those that ran."""

    family: str
    flops: int
    floor_seconds: float | None
    seconds: float


class Expected(NamedTuple):
    """Seconds of one step, and the interval that holds a new cell's with 95 %; n counts distinct
    past steps. `seconds` is None without any, the interval below two."""

    seconds: float | None
    low: float | None
    high: float | None
    n: int
    note: str


def family(cell: Cell) -> str:
    """What has to be alike for one efficiency to serve both cells."""
    layout = "" if cell.devices == 1 else f" {cell.parallelism} x{cell.devices}"
    return cell.method + layout


def device_name(hardware: Hardware) -> str:
    """The accelerator, or the processor with how many of it there are."""
    return hardware.accelerator or f"{hardware.cpu} x{hardware.cpu_count}"


def past_steps(
    records: Iterable[Record], names: Collection[str], floor_device: str | None = None
) -> list[Step]:
    """Measured steps on a device that calls itself one of `names` (see `device_name`).

    Only those as long as the predicted ones: a record whose timed batches were shorter than the
    full-length ones has no rate. Floors count when they were predicted for `floor_device`.
    """
    found = []
    for record in records:
        speed, prediction = record.speed, record.prediction
        if record.status != "ok" or device_name(record.hardware) not in names:
            continue
        if speed.flops_per_step and speed.tflops_per_second and speed.step_seconds_median:
            same = floor_device and prediction and prediction.device == floor_device
            floor = prediction.floor_seconds if prediction and same else None
            seconds = speed.step_seconds_median
            found.append(Step(family(record.cell), speed.flops_per_step, floor, seconds))
    return found


def expected(speed: PredictedSpeed, cell: Cell, past: Sequence[Step]) -> Expected:
    """Seconds of a step of `cell`, from the steps of its family, or from all when these are few.

    With a floor it is the floor over the mean efficiency. Where the device has no published rates
    (a CPU), or most of its records no floor, it is the operations over their mean rate instead.
    """
    floors = [_Sized(s.family, s.floor_seconds, s.seconds) for s in past if s.floor_seconds]
    flops = [_Sized(s.family, float(s.flops), s.seconds) for s in past]
    if speed.floor_seconds and len(_distinct(floors)) >= min(ENOUGH, len(_distinct(flops))):
        found = _scaled(speed.floor_seconds, "efficiency", cell, floors)
    elif speed.flops_per_step:
        found = _scaled(float(speed.flops_per_step), "operations per second", cell, flops)
    else:
        found = None
    return found or Expected(None, None, None, 0, NOT_CALIBRATED)


def with_expectation(prediction: Prediction, past: Sequence[Step]) -> Prediction:
    """The prediction with the expected seconds of its step."""
    found = expected(prediction.speed, prediction.cell, past)
    speed = prediction.speed.model_copy(
        update={
            "expected_seconds": found.seconds,
            "expected_seconds_low": found.low,
            "expected_seconds_high": found.high,
            "calibration_records": found.n,
            "note": found.note,
        }
    )
    return prediction.model_copy(update={"speed": speed})


class _Sized(NamedTuple):
    """A step and how large it was, in floor seconds or in operations."""

    family: str
    size: float
    seconds: float


def _scaled(size: float, rate: str, cell: Cell, past: Sequence[_Sized]) -> Expected | None:
    """`size` in the unit of the past steps' sizes, over the rate they were done at."""
    own = [step for step in past if step.family == family(cell)]
    enough = len(_distinct(own)) >= ENOUGH
    logs = _distinct(own if enough else past)
    if not logs:
        return None
    interval = next_value_interval(logs, STEPS)
    kind = f"measured {family(cell)} step" if enough else "measured step"
    counted = f"{interval.n} {kind}s" if interval.n > 1 else f"one {kind}, which tells no interval"
    return Expected(
        size * math.exp(interval.value),
        None if interval.low is None else size * math.exp(interval.low),
        None if interval.high is None else size * math.exp(interval.high),
        interval.n,
        f"calibrated by the {rate} of {counted}",
    )


def _distinct(past: Sequence[_Sized]) -> list[float]:
    """log(seconds / size) of every distinct step, repeats averaged: another seed of the same step
    repeats it and says nothing of how far other cells are off."""
    logs: dict[tuple[str, float], list[float]] = {}
    for step in past:
        logs.setdefault(step[:2], []).append(math.log(step.seconds / step.size))
    return [math.fsum(each) / len(each) for each in logs.values()]
