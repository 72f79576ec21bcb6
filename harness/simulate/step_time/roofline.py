"""FLOPs and bytes moved of a training step, op by op, and a lower bound of its time (the floor).

The floor is a roofline per op (Williams, Waterman and Patterson, CACM 52(4), 2009): ops of one
stream run one after another, and each takes at least its FLOPs over the device's peak bf16 rate
(whatever the dtype) and at least its bytes over the device's memory bandwidth.
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
        """Set all counts to 0."""
        for work in self._entries.values():
            work.count = 0

    def works(self) -> list[Work]:
        """All counted calls that cost something, equal ones together."""
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
    """Least seconds that `gpu` needs for this work, op after op; see FLOOR_LEAVES_OUT."""
    rate, bandwidth = gpu.bf16_flops_per_second, gpu.bandwidth_bytes_per_second
    return sum(
        work.count * max(work.cost.least_flops / rate, work.cost.moved / bandwidth)
        for work in works
    )


def predicted_speed(works: Sequence[Work], gpu: Gpu | None) -> PredictedSpeed:
    """Speed of the counted step, not calibrated by records. Without a GPU there are no published
    rates, so `floor_seconds` is None."""
    return PredictedSpeed(
        gpu=gpu.name if gpu is not None else None,
        flops_per_step=total_flops(works),
        bytes_per_step=total_moved(works),
        floor_seconds=floor_seconds(works, gpu) if gpu is not None else None,
        note="not calibrated" if gpu is not None else "not calibrated: no published rates",
    )


def _signature(values: Iterable[Any]) -> tuple[Any, ...]:
    """Hashable key of arguments: of a tensor its metadata, of anything else the value."""
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
