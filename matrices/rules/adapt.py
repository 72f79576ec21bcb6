"""A cell on several devices, with the settings that the way of spreading it needs."""

from __future__ import annotations

from typing import Any

from matrices.cell import Cell, Parallelism
from matrices.rules.machine import Machine
from matrices.rules.parallelism import (
    adafactor_needs_matrices,
    ddp_marks_parameters_once,
    fsdp2_needs_torch_optimizer,
    kbit_preparation_is_kept,
    offload_replaces_optimizer,
    quant_storage,
)

IMAGINED = Machine(has_gpu=True)
OPTIMIZER_RULES = (
    fsdp2_needs_torch_optimizer,
    adafactor_needs_matrices,
    offload_replaces_optimizer,
)


def spread_over(cell: Cell, way: Parallelism, count: int) -> Cell:
    """The cell on `count` devices, changed where the rules would refuse it otherwise: how 4-bit
    weights are stored and prepared, reentrant checkpointing, an optimizer that can step there."""
    changed = cell.model_copy(update={"parallelism": way, "devices": count})
    if changed.quantization is not None and changed.strategy.shards:
        if changed.strategy.shards_parameters:
            changed = _with(changed, "quantization", quant_storage=quant_storage(changed))
        if kbit_preparation_is_kept(changed, IMAGINED):
            changed = _with(changed, "quantization", kbit_preparation=False)
    if changed.train is None:
        return changed
    if ddp_marks_parameters_once(changed, IMAGINED):
        changed = _with(changed, "train", use_reentrant=False)
    if any(rule(changed, IMAGINED) for rule in OPTIMIZER_RULES):
        changed = _with(changed, "train", optimizer="adamw_torch")
    return changed


def _with(cell: Cell, section: str, **settings: Any) -> Cell:
    part = getattr(cell, section).model_copy(update=settings)
    return cell.model_copy(update={section: part})
