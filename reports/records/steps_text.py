"""What the steps of records were made of, and what became of their rows, for a reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from harness.records.record import Record
from reports.text import count_text

# More kinds of steps are not shown one by one.
MOST_KINDS = 4
# More different preparations are summed up.
MOST_PREPARATIONS = 3


def preparation_text(record: Record) -> str:
    """What became of the rows: "12 rows read, 6 kept; 6 of 12 lose their completion at 64 tokens
    and are dropped". Empty where it was not counted."""
    counted = record.preparation
    if counted is None:
        return ""
    read = counted.rows_read
    rows = f"{count_text(read)} rows read"
    if counted.rows_kept is not None:
        rows += f", {count_text(counted.rows_kept)} kept"
    parts = [rows]
    if counted.rows_truncated:
        parts.append(f"{counted.rows_truncated} of {read} truncated{_at(record)}")
    cut_off, dropped = counted.rows_cut_off or 0, counted.rows_dropped or 0
    packed = record.cell.data is not None and record.cell.data.packing
    if cut_off:
        end = "stay without a loss" if packed else "are dropped"
        parts.append(f"{cut_off} of {read} lose {_labels_text(record)}{_at(record)} and {end}")
    if dropped and packed:
        parts.append(f"{dropped} of {read} dropped: they are empty")
    elif dropped > cut_off:
        parts.append(f"{dropped - cut_off} of {read} dropped: they have no token with a label")
    return "; ".join(parts)


def data_text(records: Sequence[Record]) -> str:
    """What the preparation cut and dropped, if anything."""
    texts = {preparation_text(r): None for r in records if _lost_rows(r)}
    if not texts:
        return ""
    if len(texts) > MOST_PREPARATIONS:
        dropped = max((r.preparation.rows_dropped or 0) for r in records if r.preparation)
        return f"Rows are truncated or dropped in some cells, up to {dropped} dropped; see show."
    return f"Data: {'; or '.join(texts)}."


def _lost_rows(record: Record) -> bool:
    made = record.preparation
    return made is not None and any((made.rows_truncated, made.rows_dropped, made.rows_cut_off))


def loss_text(records: Sequence[Record]) -> str:
    """Where a training loss is not the mean over predicted tokens, or there is none."""
    parts = []
    notes = {r.verified.loss_normalization: None for r in records if r.verified.loss_normalization}
    if notes:
        some = sum(bool(r.verified.loss_normalization) for r in records)
        trained = sum(bool(r.quality.train_loss) for r in records)
        rows = "all runs" if some == trained else f"{some} of {trained} runs, not to be compared"
        parts.append(f"Training loss of {rows}: {'; or '.join(map(str, notes))}.")
    terms = sorted({term for record in records for term in record.verified.loss_terms})
    if terms:
        parts.append(f"Training losses hold also: {', '.join(terms)}.")
    return " ".join(parts)


def _at(record: Record) -> str:
    return f" at {record.cell.data.max_length} tokens" if record.cell.data is not None else ""


def _labels_text(record: Record) -> str:
    only = record.cell.data is not None and record.cell.data.completion_only_loss
    return "their completion" if only else "all of their labels"


def data_facts(record: Record) -> dict[str, str]:
    counted = record.preparation
    if counted is None:
        return {}
    cut = (
        f"{count_text(counted.tokens_read)} before cutting, "
        if counted.tokens_read not in (None, counted.tokens)
        else ""
    )
    return {
        "rows": preparation_text(record),
        "tokens": f"{cut}{count_text(counted.tokens)} in {count_text(counted.sequences)} sequences,"
        f" {count_text(counted.loss_tokens)} of them predicted",
    }


def step_facts(record: Record) -> dict[str, str]:
    """Micro batches and samples of the steps, epochs, learning rate and gradient norm."""
    steps = record.steps
    if not steps.micro_batches:
        return {}
    kinds = Counter(zip(steps.micro_batches, steps.samples, strict=True)).most_common()
    texts = [
        f"{count} of {_number(batches, 'micro batch')} and {_number(samples, 'sample')}"
        for (batches, samples), count in kinds[:MOST_KINDS]
    ]
    if len(kinds) > MOST_KINDS:
        texts.append(f"{sum(count for _, count in kinds[MOST_KINDS:])} of other sizes")
    return {
        "steps": f"{len(steps.micro_batches)}: {', '.join(texts)}",
        "epochs": f"{steps.epoch[-1]:.4g}" if steps.epoch else "",
        "learning rate": _curve_text(steps.learning_rate),
        "gradient norm": _curve_text(steps.gradient_norm),
        "no update": _skipped_text(steps.skipped_updates),
    }


def loss_facts(record: Record) -> dict[str, str]:
    """The curve, and what the loss is where it is not the plain mean."""
    losses = record.quality.train_loss
    known = [loss for loss in losses if loss is not None]
    if not losses:
        return {}
    curve = f"{known[0]:.4f} → {known[-1]:.4f} in {len(losses)} steps" if known else ""
    without = len(losses) - len(known)
    if without:
        curve += f"{'; ' if curve else ''}{_number(without, 'step')} without a label"
    return {
        "training loss": curve,
        "is": record.verified.loss_normalization or "",
        "holds also": ", ".join(record.verified.loss_terms),
    }


def _number(count: int, of: str) -> str:
    plural = "es" if of.endswith("ch") else "s"
    return f"{count} {of}{plural if count != 1 else ''}"


def _curve_text(figures: Sequence[float | None]) -> str:
    """The first, the highest and the last."""
    known = [figure for figure in figures if figure is not None]
    if not known:
        return ""
    return f"{known[0]:.4g} → {known[-1]:.4g}, highest {max(known):.4g}"


def _skipped_text(steps: Sequence[int]) -> str:
    if not steps:
        return ""
    numbers = ", ".join(map(str, steps[:MOST_KINDS])) + (", ..." if len(steps) > MOST_KINDS else "")
    return f"{_number(len(steps), 'step')} changed no weight, as gradients overflowed: {numbers}"
