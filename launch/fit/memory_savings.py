"""What to change in a cell that runs out of memory, in the usual order, and what each change saves.

The changes add up: each cell is the one before it with one more change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from harness.records.prediction import Prediction
from launch.fit.search import first_verdict, fits
from launch.predict.predict import Predict
from matrices.cell import Cell, Parallelism, label
from matrices.rules.adapt import spread_over

FEWER_TARGETS = {"all-linear": "attention", "attention": "qv", "mlp": "qv"}
LEAST_RANK = 4
LEAST_LENGTH = 128
SMALL_STATES = "paged_adamw_8bit"

# Gives the changed cell and the change in words, or the reason why there is no change.
Change = Callable[[Cell], tuple[Cell, str] | str]


@dataclass(frozen=True)
class MemorySaving:
    """A change in words, and the prediction of the changed cell. Without a prediction the change
    is not possible, and `why` says so. `saving_bytes` is the difference to the last cell before it
    that has a prediction."""

    name: str
    change: str
    prediction: Prediction | None = None
    saving_bytes: int | None = None
    why: str = ""

    @property
    def fits(self) -> bool:
        return self.prediction is not None and fits(self.prediction)

    def as_json(self) -> dict[str, Any]:
        prediction = self.prediction
        verdict = first_verdict(prediction) if prediction else None
        return {
            "rung": self.name,
            "change": self.change,
            "why_not": self.why or None,
            "peak_allocated_bytes": prediction.memory.peak_allocated_bytes if prediction else None,
            "saving_bytes": self.saving_bytes,
            "outcome": verdict.outcome if verdict else None,
            "fits": self.fits,
            "cell": prediction.cell.model_dump(mode="json") if prediction else None,
        }


def memory_savings(start: Cell, qlora: Cell, count: int, predict: Predict) -> list[MemorySaving]:
    """Predict every change to a cell that does not fit. `qlora` is the same cell on a 4-bit base,
    `count` is the number of GPUs."""
    changes = list(_cells(start, qlora, count))
    cells = {cell.cell_id: cell for _, cell, _, _ in changes if cell is not None}
    found = {one.cell_id: one for one in predict(list(cells.values()))}
    savings: list[MemorySaving] = []
    before: int | None = None
    for name, cell, change, why in changes:
        if cell is None:
            savings.append(MemorySaving(name, change, why=why))
            continue
        prediction = found[cell.cell_id]
        peak = prediction.memory.peak_allocated_bytes
        if prediction.status != "predicted" or peak is None:
            reason = prediction.reason or prediction.status
            savings.append(MemorySaving(name, change, why=reason))
            continue
        saving = before - peak if before is not None else None
        savings.append(MemorySaving(name, change, prediction, saving))
        before = peak
    return savings


def _cells(start: Cell, qlora: Cell, count: int) -> Iterator[tuple[str, Cell | None, str, str]]:
    """The name, the changed cell (None for no change), the change in words, and why there is
    none."""
    parallelism: Parallelism = "ddp" if count > 1 else "single"
    current = spread_over(start, parallelism, count)
    yield "as asked", current, label(current), ""
    changes: dict[str, Change] = {
        "qlora": lambda cell: _quantize(cell, spread_over(qlora, parallelism, count)),
        "smaller micro batch": _halve_batch,
        "shorter sequences": _shorten,
        "gradient checkpointing": _checkpoint,
        "lower rank": _lower_rank,
        "fewer target modules": _fewer_targets,
        "8-bit or paged optimizer": _small_states,
        "shard": lambda cell: _shard(cell, max(2, count)),
        "offload": lambda cell: _offload(cell, max(2, count)),
    }
    for name, apply in changes.items():
        changed = apply(current)
        if isinstance(changed, str):
            yield name, None, "", changed
            continue
        current, change = changed
        yield name, current, change, ""


def _train(cell: Cell, **changes: Any) -> Cell:
    assert cell.train is not None
    return cell.model_copy(update={"train": cell.train.model_copy(update=changes)})


def _adapter(cell: Cell, **changes: Any) -> Cell:
    assert cell.adapter is not None
    return cell.model_copy(update={"adapter": cell.adapter.model_copy(update=changes)})


def _quantize(cell: Cell, qlora: Cell) -> tuple[Cell, str] | str:
    if cell.method == "qlora":
        return "it is qlora already"
    return qlora, f"qlora instead of {cell.method}"


def _halve_batch(cell: Cell) -> tuple[Cell, str] | str:
    assert cell.train is not None
    batch, accumulation = cell.train.micro_batch_size, cell.train.gradient_accumulation_steps
    if batch == 1:
        return "the micro batch is 1 already"
    # An even batch keeps the number of sequences in a step; an odd one gets a few more.
    half = batch // 2
    steps = -(-batch * accumulation // half)
    changed = _train(cell, micro_batch_size=half, gradient_accumulation_steps=steps)
    return changed, f"micro batch {batch} -> {half}, accumulation {accumulation} -> {steps}"


def _shorten(cell: Cell) -> tuple[Cell, str] | str:
    assert cell.data is not None
    length = cell.data.max_length
    half = max(LEAST_LENGTH, length // 2)
    if half >= length:
        return f"sequences are {length} tokens already"
    data = cell.data.model_copy(update={"max_length": half})
    return cell.model_copy(update={"data": data}), f"max_length {length} -> {half}"


def _checkpoint(cell: Cell) -> tuple[Cell, str] | str:
    assert cell.train is not None
    if cell.train.gradient_checkpointing:
        return "it is on already"
    return _train(cell, gradient_checkpointing=True), "gradient_checkpointing on"


def _lower_rank(cell: Cell) -> tuple[Cell, str] | str:
    if cell.adapter is None or cell.adapter.rank <= LEAST_RANK:
        return "there is no rank to lower"
    rank = cell.adapter.rank
    half = max(LEAST_RANK, rank // 2)
    return _adapter(cell, rank=half, alpha=2 * half), f"rank {rank} -> {half}"


def _fewer_targets(cell: Cell) -> tuple[Cell, str] | str:
    targets = cell.adapter.target_modules if cell.adapter is not None else None
    fewer = FEWER_TARGETS.get(targets) if isinstance(targets, str) else None
    if fewer is None:
        return "there are no fewer to name"
    return _adapter(cell, target_modules=fewer), f"target_modules {targets} -> {fewer}"


def _small_states(cell: Cell) -> tuple[Cell, str] | str:
    assert cell.train is not None
    optimizer = cell.train.optimizer
    if "8bit" in optimizer or optimizer.startswith("paged") or optimizer in ("sgd", "adafactor"):
        return f"{optimizer} keeps little already"
    return _train(cell, optimizer=SMALL_STATES), f"optimizer {optimizer} -> {SMALL_STATES}"


def _shard(cell: Cell, count: int) -> tuple[Cell, str] | str:
    changed = spread_over(cell, "fsdp", count)
    return changed, f"fsdp over {count} GPUs{_optimizer_too(cell, changed)}"


def _offload(cell: Cell, count: int) -> tuple[Cell, str] | str:
    changed = spread_over(cell, "zero3-offload", count)
    also = _optimizer_too(cell, changed)
    return changed, f"zero3-offload over {count} GPUs, states in host memory{also}"


def _optimizer_too(before: Cell, after: Cell) -> str:
    assert before.train is not None
    assert after.train is not None
    was, now = before.train.optimizer, after.train.optimizer
    return f", optimizer {was} -> {now}" if was != now else ""
