"""From step times and token counts to the speed part of a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness import device
from harness.meters import clock
from harness.meters.clock import Count
from harness.record import Record, Tokens
from matrices.cell import Train

NO_PEAK_RATE = "no published peak rate is known for this device"
NO_ACCOUNT = "this system's count of busy processors does not include this process's own time"
TOO_SHORT = "every step was a warm-up step"


def warmup_steps(train: Train) -> int:
    """Steps left out of every timing."""
    chosen = train.timing_warmup_steps
    return train.warmup_steps if chosen is None else chosen


def tokens_so_far(counts: Sequence[Count], train: Train, step: int) -> int:
    """Non-padding tokens of optimizer step `step`, counted from 1."""
    return clock.counts_per_step(counts, train.gradient_accumulation_steps)[step - 1].non_padding


def fill(record: Record, steps: Any, counts: Sequence[Count]) -> None:
    """Put what a StepClock and the collator saw into `record`, complete or not.

    Rates are totals over totals (tokens of the timed steps / seconds of the timed steps), never
    means of per-step rates.
    """
    train = record.cell.train
    assert train is not None
    speed, warmup = record.speed, warmup_steps(train)
    speed.step_seconds, speed.warmup_steps = steps.seconds, warmup
    speed.meter_seconds = steps.meter_seconds
    record.quality.train_loss = steps.losses
    timed = steps.seconds[warmup:]
    middle = clock.quartiles(timed)
    if middle is None:
        record.missing["speed.tokens_per_second"] = TOO_SHORT
        return
    record.missing.pop("speed.tokens_per_second", None)
    speed.step_seconds_q1, speed.step_seconds_median, speed.step_seconds_q3 = middle
    per_step = clock.counts_per_step(counts, train.gradient_accumulation_steps)
    counted = clock.total(per_step[warmup : len(steps.seconds)])
    seconds = sum(timed)
    speed.tokens = Tokens(all=counted.all, non_padding=counted.non_padding, loss=counted.loss)
    speed.tokens_per_second = Tokens(
        all=counted.all / seconds,
        non_padding=counted.non_padding / seconds,
        loss=counted.loss / seconds,
    )
    speed.samples_per_second = counted.samples / seconds
    speed.foreign_cpu_share = steps.foreign_cpu_share()
    if speed.foreign_cpu_share is None:
        record.missing["speed.foreign_cpu_share"] = NO_ACCOUNT
    energy = steps.energy()
    speed.energy_joules = energy.joules
    if energy.reason:
        record.missing["speed.energy_joules"] = energy.reason
    _operations(record, counted, len(timed), seconds)


def _operations(record: Record, counted: Count, steps: int, seconds: float) -> None:
    """Operations were counted on full-length steps; they stand for the timed ones only when those
    were as long."""
    train, data, speed = record.cell.train, record.cell.data, record.speed
    assert train is not None
    assert data is not None
    record.missing["speed.mfu"] = NO_PEAK_RATE
    if speed.flops_per_step is None:
        return
    full = train.micro_batch_size * train.gradient_accumulation_steps * data.max_length
    if counted.all != full * steps:
        record.missing["speed.tflops_per_second"] = (
            "the timed batches were shorter than the full-length ones whose operations were counted"
        )
        return
    speed.tflops_per_second = clock.tflops_per_second(speed.flops_per_step, steps, seconds)


def note_device_peak(record: Record) -> None:
    """The timed steps' own device peak, when it is higher than that of the memory steps."""
    seen = device.peaks().allocated_bytes
    if seen is not None and record.memory.peak_bytes is not None:
        record.memory.peak_bytes = max(record.memory.peak_bytes, seen)


def explain_missing(record: Record) -> None:
    """Say why the meters that do not exist here gave nothing."""
    if not device.has_cuda():
        for name in ("allocated_peak_bytes", "reserved_peak_bytes"):
            record.missing[f"memory.phases.{name}"] = device.NO_CUDA
        for name in ("process_bytes", "device_bytes"):
            record.missing[f"memory.phases.{name}"] = device.NO_NVML
    for phase in ("load", "evaluation"):
        record.missing[f"memory.phases.{phase}.ledger_peak_bytes"] = (
            "the ledger runs in untimed steps only; loading and evaluation are timed"
        )
    if not device.host_peak_is_resettable():
        record.missing["memory.phases.host_peak_rss_bytes"] = (
            "this system cannot reset the peak: each figure covers the process's whole life"
        )
