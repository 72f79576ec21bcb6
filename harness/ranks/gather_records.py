"""One record out of the records of all ranks."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from harness.meters import rates as clock
from harness.meters.speed import SHORTER, keep_losses, warmup_steps
from harness.records.record import PHASES, Memory, PhaseMemory, Record, Steps, Tokens

SEVERAL_RANKS = "each rank counts the others as foreign: no figure stands for the machine"


def gather(record: Record, others: Sequence[Record]) -> None:
    """Add the other ranks' measurements to rank 0's.

    Memory stays per rank and the highest one is the headline. Tokens, samples, operations and
    energy are summed, once. A step lasts as long as on its slowest rank. The loss is the mean over
    ranks: each one's is its own tokens' share, times the number of ranks.
    """
    everybody = [record, *others]
    record.ranks = [state for each in everybody for state in each.ranks]
    _memory(record.memory, [each.memory for each in everybody])
    _losses(record, everybody)
    _speed(record, everybody)
    record.verified.substitutions = list(
        dict.fromkeys(said for each in everybody for said in each.verified.substitutions)
    )


def _losses(record: Record, everybody: Sequence[Record]) -> None:
    shares = zip(*(each.quality.train_loss for each in everybody), strict=True)
    # A rank's own share is known, be it 0.0 of no label.
    together = [statistics.fmean(part or 0.0 for part in parts) for parts in shares]
    by_rank = [each.steps for each in everybody]
    record.steps = _steps(by_rank)
    keep_losses(record, together, by_rank)


def _steps(by_rank: Sequence[Steps]) -> Steps:
    counted = ("micro_batches", "samples", "tokens_all", "tokens_non_padding", "tokens_loss")
    sums = {
        name: [sum(step) for step in zip(*(getattr(each, name) for each in by_rank), strict=True)]
        for name in counted
    }
    skipped = {step for each in by_rank for step in each.skipped_updates}
    return by_rank[0].model_copy(update=sums | {"skipped_updates": sorted(skipped)})


def _memory(into: Memory, all_of_them: Sequence[Memory]) -> None:
    phases = {
        phase: [reading for each in all_of_them for reading in each.phases.get(phase, [])]
        for phase in PHASES
    }
    highest = max(all_of_them, key=lambda each: each.peak_bytes or 0)
    into.phases = {phase: readings for phase, readings in phases.items() if readings}
    into.headline, into.peak_bytes = highest.headline, highest.peak_bytes
    into.peak_phase = highest.peak_phase
    into.ledger_peak_bytes = highest.ledger_peak_bytes
    into.ledger_peak_phase = highest.ledger_peak_phase
    into.timed_peak_bytes = _highest(each.timed_peak_bytes for each in all_of_them)
    into.by_category, into.top_tensors = highest.by_category, highest.top_tensors
    into.resident = highest.resident
    into.host_peak_rss_bytes = _highest(each.host_peak_rss_bytes for each in all_of_them)


def _highest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _sum(values: Iterable[float | None]) -> float | None:
    """None as soon as one is not known."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def _speed(record: Record, everybody: Sequence[Record]) -> None:
    speed, all_of_them = record.speed, [each.speed for each in everybody]
    assert record.cell.train is not None
    speed.step_seconds = [max(t) for t in zip(*(e.step_seconds for e in all_of_them), strict=True)]
    timed = speed.step_seconds[warmup_steps(record.cell.train) :]
    middle = clock.quartiles(timed)
    if middle is None:
        return
    speed.step_seconds_q1, speed.step_seconds_median, speed.step_seconds_q3 = middle
    seconds = sum(timed)
    speed.tokens = _tokens([each.tokens for each in all_of_them])
    if speed.tokens is not None:
        rates = {name: value / seconds for name, value in speed.tokens.model_dump().items()}
        speed.tokens_per_second = Tokens(**rates)
    speed.samples_per_second = sum(record.steps.samples[-len(timed) :]) / seconds
    _operations(record, everybody, len(timed), seconds)
    speed.energy_joules = _sum(each.energy_joules for each in all_of_them)
    speed.foreign_cpu_share = None
    record.missing["speed.foreign_cpu_share"] = SEVERAL_RANKS


def _tokens(counted: Sequence[Tokens | None]) -> Tokens | None:
    if None in counted:
        return None
    each = [tokens.model_dump() for tokens in counted if tokens is not None]
    return Tokens(**{name: sum(tokens[name] for tokens in each) for name in each[0]})


def _operations(record: Record, everybody: Sequence[Record], steps: int, seconds: float) -> None:
    operations = _sum(each.speed.flops_per_step for each in everybody)
    record.speed.flops_per_step = None if operations is None else int(operations)
    # A rank has said why there is no rate if its batches were shorter than the counted ones.
    for each in everybody:
        if operations is None or each.speed.tflops_per_second is None:
            record.speed.tflops_per_second = None
            if SHORTER in each.missing.values():
                record.missing["speed.tflops_per_second"] = SHORTER
            return
    rate = clock.tflops_per_second(int(operations or 0), steps, seconds)
    record.speed.tflops_per_second = rate


def by_rank(readings: Sequence[PhaseMemory]) -> list[int]:
    """The peak of each rank in one phase, bytes: torch's counter where there is one, else the
    ledger's; ranks without either are left out."""
    peaks = (
        each.ledger_peak_bytes if each.allocated_peak_bytes is None else each.allocated_peak_bytes
        for each in readings
    )
    return [peak for peak in peaks if peak is not None]
