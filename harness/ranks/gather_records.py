"""One record out of the records of all ranks."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from harness.meters import rates
from harness.meters.speed import SHORTER_BATCHES, record_losses, warmup_steps
from harness.records.memory import Memory, PhaseMemory
from harness.records.part import PHASES
from harness.records.record import Record
from harness.records.speed import Steps, Tokens

SEVERAL_RANKS = "each rank counts the others as foreign: no figure stands for the machine"


def gather(record: Record, others: Sequence[Record]) -> None:
    """Add the other ranks' measurements to rank 0's.

    Memory stays per rank and the highest one is the headline. Tokens, samples, operations and
    energy are summed, once. A step lasts as long as on its slowest rank. The loss is the mean over
    ranks: each one's is its own tokens' share, times the number of ranks.
    """
    records = [record, *others]
    record.ranks = [state for each in records for state in each.ranks]
    _gather_memory(record.memory, [each.memory for each in records])
    _gather_losses(record, records)
    _gather_speed(record, records)
    record.verified.substitutions = list(
        dict.fromkeys(said for each in records for said in each.verified.substitutions)
    )


def _gather_losses(record: Record, records: Sequence[Record]) -> None:
    shares = zip(*(each.quality.train_loss for each in records), strict=True)
    # A rank without labels has a share of 0.0.
    together = [statistics.fmean(part or 0.0 for part in parts) for parts in shares]
    rank_steps = [each.steps for each in records]
    record.steps = _gather_steps(rank_steps)
    record_losses(record, together, rank_steps)


def _gather_steps(rank_steps: Sequence[Steps]) -> Steps:
    counted = ("micro_batches", "samples", "tokens_all", "tokens_non_padding", "tokens_loss")
    sums = {
        name: [
            sum(step) for step in zip(*(getattr(each, name) for each in rank_steps), strict=True)
        ]
        for name in counted
    }
    skipped = {step for each in rank_steps for step in each.skipped_updates}
    return rank_steps[0].model_copy(update=sums | {"skipped_updates": sorted(skipped)})


def _gather_memory(into: Memory, each_rank: Sequence[Memory]) -> None:
    phases = {
        phase: [reading for each in each_rank for reading in each.phases.get(phase, [])]
        for phase in PHASES
    }
    highest = max(each_rank, key=lambda each: each.peak_bytes or 0)
    into.phases = {phase: readings for phase, readings in phases.items() if readings}
    into.headline, into.peak_bytes = highest.headline, highest.peak_bytes
    into.peak_phase = highest.peak_phase
    into.ledger_peak_bytes = highest.ledger_peak_bytes
    into.ledger_peak_phase = highest.ledger_peak_phase
    into.timed_peak_bytes = _highest(each.timed_peak_bytes for each in each_rank)
    into.by_category, into.top_tensors = highest.by_category, highest.top_tensors
    into.resident = highest.resident
    into.host_peak_rss_bytes = _highest(each.host_peak_rss_bytes for each in each_rank)


def _highest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _sum(values: Iterable[float | None]) -> float | None:
    """None when one of the values is None."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def _gather_speed(record: Record, records: Sequence[Record]) -> None:
    speed, each_rank = record.speed, [each.speed for each in records]
    assert record.cell.train is not None
    speed.step_seconds = [max(t) for t in zip(*(e.step_seconds for e in each_rank), strict=True)]
    timed = speed.step_seconds[warmup_steps(record.cell.train) :]
    middle = rates.quartiles(timed)
    if middle is None:
        return
    speed.step_seconds_q1, speed.step_seconds_median, speed.step_seconds_q3 = middle
    seconds = sum(timed)
    speed.tokens = _sum_tokens([each.tokens for each in each_rank])
    if speed.tokens is not None:
        per_second = {name: value / seconds for name, value in speed.tokens.model_dump().items()}
        speed.tokens_per_second = Tokens(**per_second)
    speed.samples_per_second = sum(record.steps.samples[-len(timed) :]) / seconds
    _gather_flops(record, records, len(timed), seconds)
    speed.energy_joules = _sum(each.energy_joules for each in each_rank)
    speed.foreign_cpu_share = None
    record.missing["speed.foreign_cpu_share"] = SEVERAL_RANKS


def _sum_tokens(counted: Sequence[Tokens | None]) -> Tokens | None:
    if None in counted:
        return None
    each = [tokens.model_dump() for tokens in counted if tokens is not None]
    return Tokens(**{name: sum(tokens[name] for tokens in each) for name in each[0]})


def _gather_flops(record: Record, records: Sequence[Record], steps: int, seconds: float) -> None:
    operations = _sum(each.speed.flops_per_step for each in records)
    record.speed.flops_per_step = None if operations is None else int(operations)
    # A rank has said why there is no rate if its batches were shorter than the counted ones.
    for each in records:
        if operations is None or each.speed.tflops_per_second is None:
            record.speed.tflops_per_second = None
            if SHORTER_BATCHES in each.missing.values():
                record.missing["speed.tflops_per_second"] = SHORTER_BATCHES
            return
    rate = rates.tflops_per_second(int(operations or 0), steps, seconds)
    record.speed.tflops_per_second = rate


def peaks_by_rank(readings: Sequence[PhaseMemory]) -> list[int]:
    """The peak of each rank in one phase, bytes: torch's counter where there is one, else the
    ledger's; ranks without either are left out."""
    peaks = (
        each.ledger_peak_bytes if each.allocated_peak_bytes is None else each.allocated_peak_bytes
        for each in readings
    )
    return [peak for peak in peaks if peak is not None]
