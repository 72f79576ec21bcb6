"""What fits, in plain text. Every figure is predicted."""

from __future__ import annotations

from collections.abc import Sequence

from launch.display.predictions import footer
from launch.display.tables import verdict_text
from launch.fit.fit import FitResult, FitRow
from launch.fit.memory_savings import MemorySaving
from launch.fit.search import first_verdict, fits
from matrices.catalogue.gpus import Gpu
from matrices.cell import Cell
from reports.text import DASH, GIB, bytes_text, one_line, signed, text_table

# What usually helps when a category is the largest at the peak, at any length.
HELPS = {
    "weights": "qlora, or sharding over more GPUs",
    "quantized_weights": "sharding over more GPUs, or a smaller model",
    "gradients": "lora, or sharding over more GPUs",
    "optimizer_states": "lora, an 8-bit or paged optimizer, or sharding over more GPUs",
}


def fit_text(found: FitResult) -> str:
    """The table, what each change saves when nothing fits, and what the figures depend on."""
    request, gpu = found.request, found.request.gpu
    count = f"{request.count} x " if request.count > 1 else ""
    checkpointing = _checkpointing(found.rows[0].cell)
    head = (
        f"{request.model} on {count}{gpu.name}, sequences of {found.max_length} tokens, "
        f"{checkpointing}: predicted"
    )
    lengths = any(row.longest is not None for row in found.rows)
    headers = ["method", "4-bit", "spread", "largest batch x length"]
    headers += ["longest at batch 1"] if lengths else []
    headers += ["predicted peak / usable", "binds", "verdict"]
    rows = [_row(row, gpu, found.max_length, lengths) for row in found.rows]
    parts = [head, "", *text_table([headers, *rows])]
    if found.savings:
        parts += ["", *_savings(found.savings)]
    parts += ["", footer(found.predictions)]
    price = price_text(gpu, request.count)
    return "\n".join([*parts, price] if price else parts)


def _checkpointing(cell: Cell) -> str:
    on = cell.train is not None and cell.train.gradient_checkpointing
    return f"gradient checkpointing {'on' if on else 'off'}"


def _row(row: FitRow, gpu: Gpu, length: int, lengths: bool) -> list[str]:
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


def _verdict(row: FitRow, length: int) -> str:
    if not row.possible:
        return f"{row.shown.status}: {one_line(row.shown.reason or '', 120)}"
    verdict = first_verdict(row.shown)
    if row.micro_batch is None and fits(row.shown):
        return f"does not fit at {length} tokens; fits at {row.longest:,}"
    if verdict is not None and fits(row.shown):
        return verdict_text(verdict)
    everywhere = " at any length" if row.lengths_tried and row.longest is None else ""
    category, advice = _binding(row)
    binding = f": {category.replace('_', ' ')}" if category else ""
    return f"does not fit{everywhere}{binding}{advice}"


def _binding(row: FitRow) -> tuple[str, str]:
    """The category that is too large, and what to try. When no length fits, only categories that do
    not depend on the length count."""
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


def _savings(savings: Sequence[MemorySaving]) -> list[str]:
    first = next((saving for saving in savings if saving.fits), None)
    rows = [_saving(saving, saving is first) for saving in savings]
    ending = (
        f"first fits at: {first.name}" if first else "no rung fits: a larger GPU, or more of them"
    )
    return [
        "nothing fits; each rung keeps the changes above it",
        *text_table([("rung", "predicted peak", "saves", "change"), *rows], indent="  "),
        f"  {ending}",
    ]


def _saving(saving: MemorySaving, first: bool) -> tuple[str, str, str, str]:
    if saving.prediction is None:
        reason = f"{saving.change}: {saving.why}" if saving.change else saving.why
        return saving.name, DASH, DASH, one_line(reason, 140)
    difference = DASH
    if saving.saving_bytes is not None:
        difference = f"{signed(saving.saving_bytes / GIB, 2)} GiB"
    mark = "  <- fits" if first else ("  (fits)" if saving.fits else "")
    peak = bytes_text(saving.prediction.memory.peak_allocated_bytes)
    return saving.name, peak, difference, f"{saving.change}{mark}"


def price_text(gpu: Gpu, count: int) -> str:
    """The price of the GPUs by the hour, with its date; empty without a price."""
    if gpu.price_usd_per_hour is None:
        return ""
    total = gpu.price_usd_per_hour * count
    date = f" on {gpu.price_date}" if gpu.price_date else ""
    return f"price: {total:.2f} USD an hour for {count} x {gpu.name}{date}"
