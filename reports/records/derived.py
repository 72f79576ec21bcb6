"""Figures read from one record that are not simply a field of it."""

from __future__ import annotations

from collections.abc import Iterable

from harness.evaluation.score_precision import softmax_dtype
from harness.records.memory import PhaseMemory
from harness.records.part import TRAINING_PHASES
from harness.records.record import Record
from matrices.cell import Cell

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


def rank_peaks(record: Record) -> list[int]:
    """Each rank's peak over the training phases, by the headline meter; empty when a rank has
    none."""
    field = HEADLINE_FIELD.get(record.memory.headline or "")
    found: list[int | None] = []
    for phase in TRAINING_PHASES:
        for rank, part in enumerate(record.memory.phases.get(phase, [])):
            found += [None] * (rank + 1 - len(found))
            figure = getattr(part, field) if field else None
            if figure is not None:
                found[rank] = max(figure, found[rank] or 0)
    known = [figure for figure in found if figure is not None]
    return known if len(known) == len(found) else []


def smallest_rank_peak(record: Record) -> int | None:
    """Training peak of the rank that needs least; the headline is that of the one that needs
    most."""
    return min(rank_peaks(record), default=None)


def rank_imbalance(record: Record) -> float | None:
    """max / min - 1 of the ranks' training peaks; none on fewer than two ranks."""
    peaks = rank_peaks(record)
    if len(peaks) < 2 or min(peaks) == 0:
        return None
    return max(peaks) / min(peaks) - 1


def parameter_bytes(record: Record) -> int | None:
    """Bytes of parameters on the rank that holds most of them."""
    return max(
        (r.parameter_bytes for r in record.ranks if r.parameter_bytes is not None), default=None
    )


def parameter_share(record: Record) -> float | None:
    """The largest share of the model's parameters, by number, that a rank holds."""
    return max(
        (r.parameter_share for r in record.ranks if r.parameter_share is not None), default=None
    )


def expected_share(cell: Cell) -> float:
    """The share of the parameters that a rank is to hold: all, unless they are divided."""
    return 1 / cell.devices if cell.strategy.shards_parameters else 1.0


def communication_bytes(record: Record) -> int | None:
    """Bytes a rank puts through collectives in one optimizer step, the largest of all ranks."""
    found = [r.communication for r in record.ranks if r.communication is not None]
    return max((sum(each.bytes.values()) for each in found), default=None)


def global_batch(cell: Cell) -> int | None:
    """Samples of one optimizer step over all devices; none for a cell that trains nothing."""
    if cell.train is None:
        return None
    return cell.train.micro_batch_size * cell.train.gradient_accumulation_steps * cell.ranks


def timed_seconds(record: Record) -> list[float]:
    """The step times every speed figure is made of: all but the warm-up."""
    return record.speed.step_seconds[record.speed.warmup_steps :]


def precision_text(record: Record) -> str:
    """`float32 of bfloat16 logits`: how the log-likelihoods were taken; empty without scores."""
    taken, recipe = softmax_dtype(record), record.quality.recipe
    if taken is None or recipe is None or recipe.logits_dtype in (None, taken):
        return taken or ""
    return f"{taken} of {recipe.logits_dtype} logits"


def quality_keys(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Every (task, metric) that any record has, in order of first appearance."""
    seen: dict[tuple[str, str], None] = {}
    for record in records:
        for task, score in record.quality.tasks.items():
            seen |= dict.fromkeys((task, metric) for metric in score.metrics)
    return list(seen)
