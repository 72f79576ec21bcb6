"""The collectives of one rank in one optimizer step, counted at torch's dispatcher."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from harness.meters.memory.ledger import wraps_tensors
from harness.records.ranks import Communication

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
# Collectives without tensors of the model.
WITHOUT_DATA = ("barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")


class Collectives(TorchDispatchMode):
    """Counts collectives and their bytes: those of the inputs or of the outputs, whichever are
    more, so that a gather and a scatter of the same tensor count the same. The messages of a ring
    or tree algorithm are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()

    @property
    def communication(self) -> Communication:
        return Communication(calls=dict(self.calls), bytes=dict(self.bytes))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if wraps_tensors(types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func.namespace in NAMESPACES:
            self._count(func, args, out)
        return out

    def _count(self, func: Any, args: Any, out: Any) -> None:
        name = func._schema.name.rpartition("::")[2]
        if name in WITHOUT_DATA:
            return
        # Inputs and outputs of one call; an in-place collective has the same tensors in both.
        parts = [_bytes(part) for part in (*args, out)]
        self.calls[name] += 1
        self.bytes[name] += max(parts, default=0)


def _bytes(part: Any) -> int:
    tensors = {id(each): each for each in tree_iter(part) if isinstance(each, torch.Tensor)}
    return sum(each.numel() * each.element_size() for each in tensors.values())
