"""What a step computes and moves, op by op, and how soon a device could be done with it.

The floor is a roofline per op (Williams, Waterman and Patterson, CACM 52(4), 2009): the ops of one
stream follow each other, and none is done before its operations are (at the device's bf16 rate,
whatever the dtype) nor before its bytes are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harness.records.prediction import PredictedSpeed
from harness.simulate.libraries.attention import Kernel
from harness.simulate.step_time.op_cost import (
    NOTHING,
    Cost,
    cost,
    moved_bytes,
    moves_nothing,
    tensors_in,
)
from matrices.catalogue.gpus import Gpu

FLOOR_LEAVES_OUT = (
    "the step's floor leaves out kernel launches and gaps between kernels, communication, copies "
    "between host and device, data loading and the host's own work; it takes every operation at "
    "the bf16 rate, causal attention without its masked half, and no cache that keeps a result for "
    "the next op"
)


@dataclass(slots=True)
class Work:
    """Calls of one op on tensors of one size. `dtype` is that of its first tensor."""

    op: str
    dtype: str
    cost: Cost
    count: int = 0


class Traffic:
    """Adds up calls of ops. Only tensors on `device_type` move bytes."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._entries: dict[Any, Work] = {}

    def note(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Count one call. `func` is an OpOverload, `out` what it returned."""
        if moves_nothing(func):
            return
        key = (func, _signature(args), _signature(kwargs.items()) if kwargs else ())
        found = self._entries.get(key)
        if found is None:
            each = cost(func, args, kwargs, out, self._device_type)
            found = self._entries[key] = Work(str(func), _dtype(args, out), each)
        found.count += 1

    def note_kernel(self, kernel: Kernel) -> None:
        """Count one call of an attention kernel that is no op."""
        heads, width = kernel.tensors[0].shape[-2:]
        per_pair = 2 * kernel.products * heads * width
        moved = moved_bytes(kernel.tensors, self._device_type)
        found = Cost(per_pair * kernel.pairs, per_pair * kernel.needed_pairs, moved)
        key = ("flash_attn", kernel.products, found)
        dtype = _dtype(kernel.tensors, None)
        self._entries.setdefault(key, Work("flash_attn", dtype, found)).count += 1

    def clear(self) -> None:
        """Forget the counts, not the costs: for the steps before the one that is to count."""
        for work in self._entries.values():
            work.count = 0

    def works(self) -> list[Work]:
        """Every distinct call that was counted and costs something, equal ones together."""
        total: dict[tuple[str, str, Cost], int] = {}
        for work in self._entries.values():
            if work.count and work.cost != NOTHING:
                key = (work.op, work.dtype, work.cost)
                total[key] = total.get(key, 0) + work.count
        return [Work(op, dtype, each, count) for (op, dtype, each), count in total.items()]


def total_flops(works: Iterable[Work]) -> int:
    return sum(work.cost.flops * work.count for work in works)


def total_moved(works: Iterable[Work]) -> int:
    """Bytes."""
    return sum(work.cost.moved * work.count for work in works)


def floor_seconds(works: Iterable[Work], gpu: Gpu) -> float:
    """Seconds below which `gpu` cannot do this work op after op; see FLOOR_LEAVES_OUT."""
    rate, bandwidth = gpu.bf16_flops_per_second, gpu.bandwidth_bytes_per_second
    return sum(
        work.count * max(work.cost.least_flops / rate, work.cost.moved / bandwidth)
        for work in works
    )


def predicted_speed(works: Sequence[Work], gpu: Gpu | None) -> PredictedSpeed:
    """Of the counted step, without an expectation: that takes records. Without a GPU there are no
    published rates, and so no floor."""
    return PredictedSpeed(
        gpu=gpu.name if gpu is not None else None,
        flops_per_step=total_flops(works),
        bytes_per_step=total_moved(works),
        floor_seconds=floor_seconds(works, gpu) if gpu is not None else None,
        note="not calibrated" if gpu is not None else "not calibrated: no published rates",
    )


def _signature(values: Iterable[Any]) -> tuple[Any, ...]:
    """What the cost depends on, hashable: of a tensor its metadata, of anything else itself."""
    parts: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            parts += (value.shape, value.stride(), value.dtype, value.device.type)
        elif isinstance(value, list | tuple):
            parts.append(_signature(value))
        else:
            parts.append(value)
    return tuple(parts)


def _dtype(args: Any, out: Any) -> str:
    for tensor in tensors_in((args, out)):
        return str(tensor.dtype).removeprefix("torch.")
    return ""
