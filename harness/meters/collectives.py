"""What the ranks of a cell send each other in one optimizer step, seen at torch's dispatcher."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from harness.meters.memory.ledger import wraps_tensors
from harness.records.record import Communication

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
# They carry no data of the model.
SILENT = ("barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")


class Collectives(TorchDispatchMode):
    """Counts collectives and their bytes: what goes in or what comes out, whichever is more, so
    that a gather and a scatter of the same tensor weigh the same. Not what a ring or a tree of
    ranks makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()

    @property
    def seen(self) -> Communication:
        return Communication(calls=dict(self.calls), bytes=dict(self.bytes))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if wraps_tensors(types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func.namespace in NAMESPACES:
            self._note(func, args, out)
        return out

    def _note(self, func: Any, args: Any, out: Any) -> None:
        name = func._schema.name.rpartition("::")[2]
        if name in SILENT:
            return
        # The lists of one call: tensors in, tensors out; in-place ones are both.
        parts = [_bytes(part) for part in (*args, out)]
        self.calls[name] += 1
        self.bytes[name] += max(parts, default=0)


def _bytes(part: Any) -> int:
    tensors = {id(each): each for each in tree_iter(part) if isinstance(each, torch.Tensor)}
    return sum(each.numel() * each.element_size() for each in tensors.values())
