"""What fits, as people read it. Every figure is predicted."""

from __future__ import annotations

from collections.abc import Sequence

from launch.display.predictions import footer
from launch.display.tables import aligned, verdict_text
from launch.fit.advice import Rung
from launch.fit.answer import Answer, Row
from launch.fit.search import fits, judged
from matrices.catalogue.gpus import Gpu
from matrices.cell import Cell
from reports.text import DASH, GIB, bytes_text, one_line, signed

# What most often helps where a category is the largest at the peak, whatever the length.
HELPS = {
    "weights": "qlora, or sharding over more GPUs",
    "quantized_weights": "sharding over more GPUs, or a smaller model",
    "gradients": "lora, or sharding over more GPUs",
    "optimizer_states": "lora, an 8-bit or paged optimizer, or sharding over more GPUs",
}


def answer_text(found: Answer) -> str:
    """The table, the ladder when nothing fits, and what the figures rest on."""
    question, gpu = found.question, found.question.gpu
    count = f"{question.count} x " if question.count > 1 else ""
    checkpointing = _checkpointing(found.rows[0].cell)
    head = (
        f"{question.model} on {count}{gpu.name}, sequences of {found.max_length} tokens, "
        f"{checkpointing}: predicted"
    )
    lengths = any(row.longest is not None for row in found.rows)
    headers = ["method", "4-bit", "spread", "largest batch x length"]
    headers += ["longest at batch 1"] if lengths else []
    headers += ["predicted peak / usable", "binds", "verdict"]
    table = aligned(headers, [_row(row, gpu, found.max_length, lengths) for row in found.rows])
    parts = [head, "", table]
    if found.ladder:
        parts += ["", _ladder(found.ladder)]
    parts += ["", footer(found.predictions)]
    price = price_text(gpu, question.count)
    return "\n".join([*parts, price] if price else parts)


def _checkpointing(cell: Cell) -> str:
    on = cell.train is not None and cell.train.gradient_checkpointing
    return f"gradient checkpointing {'on' if on else 'off'}"


def _row(row: Row, gpu: Gpu, length: int, lengths: bool) -> list[str]:
    quantization = row.cell.quantization
    four_bit = DASH
    if quantization is not None:
        four_bit = quantization.quant_type + ("+dq" if quantization.double_quant else "")
    batch = DASH
    if row.micro_batch is not None:
        batch = f"{row.micro_batch}{'+' if row.batch_capped else ''} x {length}"
    longest = DASH
    if row.longest is not None:
        longest = f"{row.longest:,}{' (the limit)' if row.length_capped else ''}"
    peak = row.shown.memory.peak_allocated_bytes
    both = f"{peak / GIB:.2f} / {gpu.capacity_bytes / GIB:.2f} GiB" if peak is not None else DASH
    binds = DASH
    if row.binds is not None:
        binds = " in ".join(word.replace("_", " ") for word in row.binds)
    cells = [row.cell.method, four_bit, row.cell.parallelism, batch]
    return [*cells, *([longest] if lengths else []), both, binds, _verdict(row, length)]


def _verdict(row: Row, length: int) -> str:
    if not row.possible:
        return f"{row.shown.status}: {one_line(row.shown.reason or '', 120)}"
    verdict = judged(row.shown)
    if row.micro_batch is None and fits(row.shown):
        return f"does not fit at {length} tokens; fits at {row.longest:,}"
    if verdict is not None and fits(row.shown):
        return verdict_text(verdict)
    everywhere = " at any length" if row.lengths_tried and row.longest is None else ""
    category, advice = _binding(row)
    told = f": {category.replace('_', ' ')}" if category else ""
    return f"does not fit{everywhere}{told}{advice}"


def _binding(row: Row) -> tuple[str, str]:
    """What is too large, and what to try. Where no length fits it is not the length's share."""
    held = row.shown.memory.by_category
    if row.lengths_tried and row.longest is None:
        held = {name: held[name] for name in held if name in HELPS} or held
    if not held:
        return "", ""
    category = max(held, key=lambda name: held[name])
    train = row.cell.train
    shorter = "shorter sequences"
    if train is not None and not train.gradient_checkpointing:
        shorter = "gradient checkpointing, or shorter sequences"
    return category, f"; try {HELPS.get(category, shorter)}"


def _ladder(rungs: Sequence[Rung]) -> str:
    first = next((rung for rung in rungs if rung.fits), None)
    rows = [_rung(rung, rung is first) for rung in rungs]
    table = aligned(("  rung", "predicted peak", "saves", "change"), rows)
    ending = (
        f"first fits at: {first.name}" if first else "no rung fits: a larger GPU, or more of them"
    )
    return f"nothing fits; each rung keeps the changes above it\n{table}\n  {ending}"


def _rung(rung: Rung, first: bool) -> tuple[str, str, str, str]:
    if rung.prediction is None:
        told = f"{rung.change}: {rung.why}" if rung.change else rung.why
        return f"  {rung.name}", DASH, DASH, one_line(told, 140)
    saving = DASH
    if rung.saving_bytes is not None:
        saving = f"{signed(rung.saving_bytes / GIB, 2)} GiB"
    mark = "  <- fits" if first else ("  (fits)" if rung.fits else "")
    peak = bytes_text(rung.prediction.memory.peak_allocated_bytes)
    return f"  {rung.name}", peak, saving, f"{rung.change}{mark}"


def price_text(gpu: Gpu, count: int) -> str:
    """What the GPUs cost by the hour, with the date of the price; empty without one."""
    if gpu.price_usd_per_hour is None:
        return ""
    total = gpu.price_usd_per_hour * count
    date = f" on {gpu.price_date}" if gpu.price_date else ""
    return f"price: {total:.2f} USD an hour for {count} x {gpu.name}{date}"
