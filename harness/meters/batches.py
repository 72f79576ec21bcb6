"""The token counts of each micro batch, taken when it is collated and attached to it.

Batches are prefetched (by accelerate's loader, by the Trainer for a whole accumulation window, by
the loader's workers), so a count must travel with its batch.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import send_to_device

from harness.meters import rates
from harness.meters.rates import TokenCount


class CountedBatch(dict[str, Any]):
    """A batch with its count. Loader workers, pinning and moving to a device keep the count."""

    count: TokenCount | None = None

    def to(self, device: Any, **kwargs: Any) -> CountedBatch:
        """The batch on `device`, as accelerate would move a plain dict."""
        moved = CountedBatch(send_to_device(dict(self), device, **kwargs))
        moved.count = self.count
        return moved


class CountingCollator:
    """A collator that also counts the tokens of its batches. It counts before a batch goes to the
    device, so that no count costs a synchronization."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> CountedBatch:
        batch = CountedBatch(self._collator(examples))
        batch.count = _as_integers(count_tokens(batch, len(examples)))
        return batch


def count_of(inputs: dict[str, Any]) -> Any:
    """The count of a batch. A batch that a loader rebuilt (one that dispatches from one process) is
    counted here; its figures may still be on the device."""
    count = getattr(inputs, "count", None)
    return count_tokens(inputs, len(inputs["input_ids"])) if count is None else count


def total(counts: list[Any]) -> TokenCount:
    """The sum of counts that `count_of` returned; it reads those that are still on the device."""
    return rates.total([_as_integers(count) for count in counts])


def count_tokens(batch: dict[str, Any], samples: int) -> tuple[Any, ...]:
    """Tokens of one micro batch, in the order of `TokenCount`. The first label of a row predicts
    nothing: labels are shifted."""
    everything = batch["input_ids"].numel()
    mask: torch.Tensor | None = batch.get("attention_mask")
    labelled = (batch["labels"][..., 1:] != -100).sum()
    return everything, everything if mask is None else mask.sum(), labelled, samples, 1


def _as_integers(count: Any) -> TokenCount:
    return TokenCount(*(int(figure) for figure in count))
