"""Gradient checkpointing: what a model is set to, and what its backward pass really does."""

from __future__ import annotations

from typing import Any

from torch import nn

from harness.models.mismatch import VerificationError, require_equal
from matrices.cell import Cell
from matrices.rules.parallelism import reentrant


def layers(model: nn.Module) -> dict[str, Any]:
    """The layers that transformers checkpoints one by one; none under an older transformers,
    whose models do that in their own loops."""
    try:
        from transformers.modeling_layers import GradientCheckpointingLayer
    except ImportError:
        return {}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
    }


def verify(model: nn.Module, cell: Cell) -> None:
    """Check a model whose training is about to begin: the trainer switches checkpointing on when it
    starts. Raises VerificationError when the cell asks for something else."""
    assert cell.train is not None
    wanted = cell.train.gradient_checkpointing
    found = {
        name: bool(module.gradient_checkpointing)
        for name, module in model.named_modules()
        if hasattr(module, "gradient_checkpointing")
    }
    require_equal(any(found.values()), wanted, "gradient_checkpointing")
    for name, layer in layers(model).items():
        require_equal(found[name], wanted, f"gradient_checkpointing of {name}")
        if wanted:
            options = layer._gradient_checkpointing_func.keywords
            require_equal(options.get("use_reentrant"), reentrant(cell), f"use_reentrant of {name}")


class Recomputation:
    """Records which layers compute again in the backward pass, until its hooks are removed. The
    observer sets `backward` while that pass runs."""

    def __init__(self, model: nn.Module) -> None:
        self.backward = False
        self.layers = layers(model)
        self.recomputed: set[str] = set()
        # On modules inside a layer: transformers checkpoints `forward` beneath the layer's hooks.
        self.hooks = [
            part.register_forward_pre_hook(self._hook(name))
            for name, layer in self.layers.items()
            for part in layer.modules()
            if part is not layer
        ]

    def _hook(self, name: str) -> Any:
        def note(*_: Any) -> None:
            if self.backward:
                self.recomputed.add(name)

        return note


def verify_recomputation(seen: Recomputation, cell: Cell) -> None:
    """Raises VerificationError when other layers computed again than the cell asks for: all of
    them with checkpointing, none without."""
    assert cell.train is not None
    wanted = set(seen.layers) if cell.train.gradient_checkpointing else set()
    if seen.recomputed != wanted:
        raise VerificationError(
            f"gradient_checkpointing: the cell says {cell.train.gradient_checkpointing}, and "
            f"{len(seen.recomputed)} of {len(seen.layers)} layers computed again in the backward "
            "pass"
        )
