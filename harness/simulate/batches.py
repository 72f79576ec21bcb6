"""Batches: the collator runs on real tensors because it reads values; the model gets fake ones."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from harness.simulate.memory.ledger import SimulatedLedger


class FakeBatches:
    """Wraps a trainer's collator: returns fake tensors of the sizes it gives, and sets the ledger's
    `packed_rows`."""

    def __init__(self, collator: Any, ledger: SimulatedLedger) -> None:
        self._collator = collator
        self._ledger = ledger

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        with _disable_current_modes():
            batch = dict(self._collator(examples))
            self._ledger.packed_rows = _has_packed_rows(batch)
        fakes: dict[int, torch.Tensor] = {}
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                if id(value) not in fakes:
                    fakes[id(value)] = torch.empty(value.shape, dtype=value.dtype)
                batch[name] = fakes[id(value)]
        return batch


def _has_packed_rows(batch: dict[str, Any]) -> bool:
    """Whether positions start anew within a row."""
    positions = batch.get("position_ids")
    return positions is not None and bool((positions[:, 1:] == 0).any())
