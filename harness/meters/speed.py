"""From step times and token counts to the speed part of a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness import device
from harness.meters import losses
from harness.meters.rates import TokenCount, quartiles, tflops_per_second, total
from harness.records.record import Record
from harness.records.speed import Steps, Tokens
from matrices.cell import Train

NO_PEAK_RATE = "no published peak rate is known for this device"
NO_CPU_ACCOUNTING = (
    "this system's count of busy processors does not include this process's own time"
)
TOO_SHORT = "every step was a warm-up step"
SHORTER_BATCHES = (
    "the timed batches were shorter than the full-length ones whose operations were counted"
)
NO_NORM = "the engine tells no gradient norm"


def warmup_steps(train: Train) -> int:
    """Steps left out of every timing."""
    chosen = train.timing_warmup_steps
    return train.warmup_steps if chosen is None else chosen


def fill_speed(record: Record, clock: Any) -> None:
    """Put the figures of a StepClock into `record`, complete or not.

    Rates are totals over totals (tokens of the timed steps / seconds of the timed steps), never
    means of per-step rates.
    """
    train = record.cell.train
    assert train is not None
    speed, warmup = record.speed, warmup_steps(train)
    speed.step_seconds, speed.warmup_steps = clock.seconds, warmup
    speed.meter_seconds = clock.meter_seconds
    _fill_steps(record, clock)
    timed = clock.seconds[warmup:]
    middle = quartiles(timed)
    if middle is None:
        record.missing["speed.tokens_per_second"] = TOO_SHORT
        return
    record.missing.pop("speed.tokens_per_second", None)
    speed.step_seconds_q1, speed.step_seconds_median, speed.step_seconds_q3 = middle
    counted = total(clock.counts[warmup:])
    seconds = sum(timed)
    speed.tokens = Tokens(all=counted.all, non_padding=counted.non_padding, loss=counted.loss)
    speed.tokens_per_second = Tokens(
        all=counted.all / seconds,
        non_padding=counted.non_padding / seconds,
        loss=counted.loss / seconds,
    )
    speed.samples_per_second = counted.samples / seconds
    speed.foreign_cpu_share = clock.foreign_cpu_share()
    if speed.foreign_cpu_share is None:
        record.missing["speed.foreign_cpu_share"] = NO_CPU_ACCOUNTING
    energy = clock.energy()
    speed.energy_joules = energy.joules
    if energy.reason:
        record.missing["speed.energy_joules"] = energy.reason
    _fill_flops(record, clock.counts[warmup:], seconds)


def _fill_steps(record: Record, clock: Any) -> None:
    """Fill in what each step consisted of, and its loss. A rank does not know the labels of the
    others: until all ranks are gathered, each has its own share of every loss."""
    counts: list[TokenCount] = clock.counts
    record.steps = Steps(
        micro_batches=[count.micro_batches for count in counts],
        samples=[count.samples for count in counts],
        tokens_all=[count.all for count in counts],
        tokens_non_padding=[count.non_padding for count in counts],
        tokens_loss=[count.loss for count in counts],
        epoch=[facts.epoch for facts in clock.facts],
        learning_rate=[facts.learning_rate for facts in clock.facts],
        gradient_norm=[facts.gradient_norm for facts in clock.facts],
        loss_divisor=clock.divisors,
        skipped_updates=[n for n, facts in enumerate(clock.facts, start=1) if facts.skipped],
    )
    if None in record.steps.gradient_norm:
        record.missing["steps.gradient_norm"] = NO_NORM
    if record.cell.ranks == 1:
        record_losses(record, clock.losses, [record.steps])
    else:
        record.quality.train_loss = clock.losses


def record_losses(record: Record, together: Sequence[float], ranks: Sequence[Steps]) -> None:
    """Record the losses over all ranks, None without labels, and their normalization;
    `record.steps` must hold the counts of all ranks."""
    record.quality.train_loss = losses.labelled_losses(together, record.steps.tokens_loss)
    record.verified.loss_normalization = losses.normalization(ranks)
    reason = losses.explain_missing_losses(record.quality.train_loss)
    if reason:
        record.missing["quality.train_loss"] = reason


def _fill_flops(record: Record, timed: Sequence[TokenCount], seconds: float) -> None:
    """FLOPs were counted on full-length steps; they hold for the timed steps only when each of
    these was full-length too."""
    train, data, speed = record.cell.train, record.cell.data, record.speed
    assert train is not None
    assert data is not None
    record.missing["speed.mfu"] = NO_PEAK_RATE
    if speed.flops_per_step is None:
        return
    whole = train.gradient_accumulation_steps
    full = train.micro_batch_size * whole * data.max_length
    if any((count.micro_batches, count.all) != (whole, full) for count in timed):
        record.missing["speed.tflops_per_second"] = SHORTER_BATCHES
        return
    record.missing.pop("speed.tflops_per_second", None)
    speed.tflops_per_second = tflops_per_second(speed.flops_per_step, len(timed), seconds)


def record_device_peak(record: Record) -> None:
    """Record the device peak of the timed steps. It is not the headline: its phase and its live
    tensors are unknown."""
    record.memory.timed_peak_bytes = device.peaks().allocated_bytes


def explain_missing(record: Record) -> None:
    """Record why the meters that do not exist here gave no figure."""
    if not device.has_cuda():
        record.missing["memory.timed_peak_bytes"] = device.NO_CUDA
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
