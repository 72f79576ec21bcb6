"""Figures read from one record that are not simply a field of it."""

from __future__ import annotations

from collections.abc import Iterable

from harness.record import PhaseMemory, Record

HEADLINE_FIELD = {"ledger": "ledger_peak_bytes", "cuda_allocated": "allocated_peak_bytes"}
METERS = {
    "ledger": "peak live tensor bytes by the ledger; no GPU was used",
    "cuda_allocated": "torch.cuda peak allocated bytes, the largest of all ranks",
}


def _ranks(record: Record, phase: str, field: str) -> list[int]:
    ranks: list[PhaseMemory] = record.memory.phases.get(phase, [])  # type: ignore[call-overload]
    figures = [getattr(rank, field) for rank in ranks]
    return [figure for figure in figures if figure is not None]


def phase_peak_bytes(record: Record, phase: str, field: str | None = None) -> int | None:
    """Peak of one phase, the largest of all ranks, by `field` or else by the headline meter."""
    field = field or HEADLINE_FIELD.get(record.memory.headline or "")
    return max(_ranks(record, phase, field), default=None) if field else None


def rank_imbalance(record: Record) -> float | None:
    """max / mean - 1 over ranks, at the headline peak's phase; none on fewer than two ranks."""
    field = HEADLINE_FIELD.get(record.memory.headline or "")
    if record.memory.peak_phase is None or field is None:
        return None
    ranks = _ranks(record, record.memory.peak_phase, field)
    total = sum(ranks)
    if len(ranks) < 2 or total == 0:
        return None
    return max(ranks) * len(ranks) / total - 1


def timed_seconds(record: Record) -> list[float]:
    """The step times every speed figure is made of: all but the warm-up."""
    return record.speed.step_seconds[record.speed.warmup_steps :]


def quality_keys(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Every (task, metric) that any record has, in order of first appearance."""
    seen: dict[tuple[str, str], None] = {}
    for record in records:
        for task, score in record.quality.tasks.items():
            seen |= dict.fromkeys((task, metric) for metric in score.metrics)
    return list(seen)
