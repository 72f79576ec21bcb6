"""Which layers of a model may count as alike: nothing about them, or about what they are called
with, says that they could treat memory differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_INDEX_NAMES = frozenset(("layer_idx", "layer_id", "layer_index", "layer_number"))
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def stacks(model: nn.Module, shortest: int) -> Iterator[list[tuple[str, nn.Module]]]:
    """Lists of layers of one class long enough to be worth it, outermost lists only."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f) for f in found):
            continue
        found.append(f"{name}.")
        if len(module) >= shortest and len({type(layer) for layer in module}) == 1:
            yield [(f"{name}.{at}", layer) for at, layer in enumerate(module)]


def structure(layer: nn.Module) -> tuple[Any, ...]:
    """All that may make one layer of a class behave differently from another."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        plain = sorted(
            (key, repr(value))
            for key, value in vars(module).items()
            if isinstance(value, _PLAIN) and key not in _INDEX_NAMES
        )
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        parts.append((name, type(module), tuple(plain), hooks))
        parts += [
            (key, described(value), _quantized(value))
            for key, value in (*module._parameters.items(), *module._buffers.items())
        ]
    return tuple(parts)


def _quantized(value: Any) -> tuple[Any, ...]:
    state = getattr(value, "quant_state", None)
    if state is None:
        return ()
    return (tuple(state.shape), state.dtype, state.blocksize, state.quant_type, state.nested)


def described(value: Any) -> Any:
    """Equal for values that layers cannot tell apart by their memory; None for anything unknown."""
    if isinstance(value, torch.Tensor):
        return (
            type(value),
            tuple(value.shape),
            value.stride(),
            value.storage_offset(),
            value.dtype,
            value.device,
            value.requires_grad,
        )
    if isinstance(value, dict):
        value = tuple(sorted(value.items()))
    if isinstance(value, tuple | list):
        parts = tuple(described(part) for part in value)
        return None if None in parts else (type(value), parts)
    return (type(value), value) if isinstance(value, _PLAIN) else None


def checkpointed(layer: nn.Module) -> bool:
    """Whether the layer drops its activations by itself (transformers >= 4.53)."""
    return bool(getattr(layer, "gradient_checkpointing", False))
