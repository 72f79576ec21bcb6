"""A model of DistributedDataParallel: its C++ reducer needs memory that fake tensors do not have.

DDP adds to a rank's memory the flat buckets that its reducer copies gradients into
(torch/csrc/distributed/c10d/reducer.cpp, `initialize_buckets`). They are allocated here at
construction, divided by torch's own function, and live as long as the wrapper.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

# torch's defaults: a small first bucket, so that communication starts early, then `bucket_cap_mb`.
FIRST_BUCKET_BYTES = 2**20
BUCKET_BYTES = 25 * 2**20
NOTE_BUCKETS = (
    "ddp: one device is simulated, and the reducer's buckets are added to it: as many bytes as the "
    "trainable parameters' gradients (accelerate leaves gradient_as_bucket_view off)"
)
NOTE_BUCKET_VIEWS = (
    "ddp: one device is simulated; gradients are views into the reducer's buckets and take no "
    "more than on one device"
)


class ModelledDDP(nn.Module):
    """In place of DistributedDataParallel: the module and its gradient buckets."""

    def __init__(
        self, module: nn.Module, gradient_as_bucket_view: bool = False, **options: Any
    ) -> None:
        # What else accelerate passes (device_ids, broadcast_buffers, ...) changes no memory here.
        super().__init__()
        self.module = module
        self.require_backward_grad_sync = True
        cap = options.get("bucket_cap_mb")
        trained = [each for each in module.parameters() if each.requires_grad]
        limits = [FIRST_BUCKET_BYTES, BUCKET_BYTES if cap is None else int(cap * 2**20)]
        # Gradients become views of the buckets, which replaces them rather than adding to them.
        self.buckets = [] if gradient_as_bucket_view else _buckets(trained, limits)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        yield


def _buckets(parameters: list[nn.Parameter], limits: list[int]) -> list[torch.Tensor]:
    """One flat tensor per bucket, in the order gradients arrive: from the last layer to the
    first."""
    backwards = parameters[::-1]
    if not backwards:
        return []
    divide = torch.distributed._compute_bucket_assignment_by_size
    indices, _ = divide([torch.empty_like(each, device="meta") for each in backwards], limits)
    return [
        torch.empty(
            sum(backwards[at].numel() for at in bucket),
            dtype=backwards[bucket[0]].dtype,
            device=backwards[bucket[0]].device,
        )
        for bucket in indices
    ]


@contextlib.contextmanager
def buckets(modelled: list[str]) -> Iterator[None]:
    """Patch accelerate to wrap in ModelledDDP; each wrapper adds its note to `modelled`."""

    class Wrapper(ModelledDDP):
        def __init__(self, module: nn.Module, *args: Any, **options: Any) -> None:
            super().__init__(module, **options)
            modelled.append(
                NOTE_BUCKET_VIEWS if options.get("gradient_as_bucket_view") else NOTE_BUCKETS
            )

    with patch.object(torch.nn.parallel, "DistributedDataParallel", Wrapper):
        yield
