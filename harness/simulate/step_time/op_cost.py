"""FLOPs and bytes moved of one op: a function of shapes, strides, dtypes and arguments.

FLOPs are by torch's own formulas, which the harness also uses on real tensors. Bytes are device
memory traffic of one unfused kernel per op: each op reads its tensors once and writes its results
once, a view moves nothing, an embedding table is read by the row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_iter

from harness.meters.steps import flop_formulas


class Cost(NamedTuple):
    """One call of an op. `flops` as torch's formulas and the records count them; `least_flops`
    without the half of causal attention a kernel may skip; `moved` is bytes of device memory read
    and written."""

    flops: int = 0
    least_flops: int = 0
    moved: int = 0


NOTHING = Cost()
GEMM_4BIT = "bitsandbytes::gemm_4bit"


def cost(func: Any, args: Any, kwargs: dict[str, Any], out: Any, device_type: str) -> Cost:
    """Cost of one call of `func`, an OpOverload; `out` is what it returned. Only tensors on
    `device_type` move bytes."""
    if moves_nothing(func):
        return NOTHING
    flops = _flops(func, args, kwargs, out)
    return Cost(
        flops,
        math.ceil(flops * _unmasked_share(func, args, kwargs)) if flops else 0,
        _moved(func, args, kwargs, out, device_type),
    )


# Ops without a kernel, or whose kernel moves no data of this device's memory.
_FREE_NAMES = frozenset(
    ("_unsafe_view", "detach_", "lift_fresh", "lift", "set_", "resize_", "record_stream")
)
_FREE_PREFIXES = ("empty", "new_empty")
# Communication has rates of its own, which the floor leaves out.
_FREE_NAMESPACES = frozenset(
    (
        "c10d",
        "c10d_functional",
        "_c10d_functional",
        "_c10d_functional_autograd",
        "prim",
        "profiler",
    )
)


@functools.cache
def moves_nothing(func: Any) -> bool:
    """Whether calls of this op cost nothing: views, allocations, queries of a tensor,
    communication."""
    name = _name(func)
    if func.namespace in _FREE_NAMESPACES or func.is_view or name in _FREE_NAMES:
        return True
    if name.startswith(_FREE_PREFIXES):
        return True
    schema = func._schema
    returns_tensor = any("Tensor" in str(value.type) for value in schema.returns)
    return not returns_tensor and not any(_is_written(arg) for arg in schema.arguments)


# Written without being read.
_OVERWRITE = frozenset(
    (
        "copy_",
        "fill_",
        "zero_",
        "uniform_",
        "normal_",
        "bernoulli_",
        "random_",
        "exponential_",
        "_foreach_copy_",
        "_foreach_zero_",
    )
)
# Arguments of which only the shape is used.
_UNREAD = {"nll_loss_backward": ("self",), "split_with_sizes_copy": ("all_gather_output",)}
# Arguments of which only as many elements are read or written as another argument (or the result)
# has.
_BY_ROW = {
    "embedding": ("weight", "out"),
    "index": ("self", "out"),
    "index_select": ("self", "out"),
    "gather": ("self", "out"),
    "index_put_": ("self", "values"),
    "_index_put_impl_": ("self", "values"),
    "index_add_": ("self", "source"),
    "index_copy_": ("self", "source"),
    "scatter_": ("self", "index"),
    "scatter_add_": ("self", "index"),
    "nll_loss_forward": ("self", "target"),
}
# Arguments that the schema marks as written but the kernel only reads. (The fused optimizers write
# gradients if they also unscale them.)
_ONLY_READ = {
    "_fused_adam_": ("grads",),
    "_fused_adamw_": ("grads",),
    "_fused_sgd_": ("grads",),
    "optimizer_update_32bit": ("g",),
    "optimizer_update_8bit_blockwise": ("g", "qmap1", "qmap2"),
}


def _moved(func: Any, args: Any, kwargs: dict[str, Any], out: Any, device_type: str) -> int:
    name = _name(func)
    unread = _UNREAD.get(name, ())
    if name.endswith("_like") or name.startswith("new_"):
        unread = ("self",)
    only_read = () if kwargs.get("grad_scale") is not None else _ONLY_READ.get(name, ())
    by_row, pointer = _BY_ROW.get(name, ("", ""))
    given = dict(_named(func, args, kwargs))
    moved = 0
    for argument in func._schema.arguments:
        value = given.get(argument.name)
        if value is None or argument.name in unread:
            continue
        size = moved_bytes(value, device_type)
        if argument.name == by_row:
            other = out if pointer == "out" else given.get(pointer)
            size = min(size, _elements(other) * value.element_size())
        if _is_written(argument) and argument.name not in only_read:
            moved += size if _overwrites(name, argument) else 2 * size
        else:
            moved += size
    if func._schema.name == GEMM_4BIT:
        # For more than a few rows the weight is dequantized first: written once and read once.
        moved += 2 * math.prod(args[2]) * args[0].element_size()
    return moved + sum(moved_bytes(value, device_type) for value in _made(func, out))


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _overwrites(name: str, argument: Any) -> bool:
    return name in _OVERWRITE or argument.is_out or argument.name == "out"


def _made(func: Any, out: Any) -> list[Any]:
    """Results of the op that are not arguments it returns."""
    returns = func._schema.returns
    values = out if len(returns) > 1 else (out,)
    return [
        value
        for value, declared in zip(values, returns, strict=False)
        if declared.alias_info is None
    ]


def moved_bytes(value: Any, device_type: str) -> int:
    """Of every tensor in `value`, the distinct elements: an expanded dimension is one row."""
    return sum(
        math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step or n < 2)
        * tensor.element_size()
        for tensor in tensors_in(value)
        if tensor.device.type == device_type
    )


def _elements(value: Any) -> int:
    return sum(tensor.numel() for tensor in tensors_in(value))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_iter(value) if isinstance(leaf, torch.Tensor))


@functools.cache
def _name(func: Any) -> str:
    """`aten::mm.default` is `mm`."""
    name: str = func._schema.name.split("::")[-1]
    return name


def _named(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        yield argument.name, value
    yield from kwargs.items()


@functools.cache
def _formulas() -> dict[Any, Any]:
    return flop_formulas()


_PRODUCTS = frozenset(
    (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
)


def _flops(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    formula = _formulas().get(func.overloadpacket)
    if formula is not None:
        if func.overloadpacket in _PRODUCTS:
            # `addmm.dtype` has its output's dtype among them, which the formulas do not expect.
            args = tuple(takewhile(lambda value: isinstance(value, torch.Tensor), args))
            kwargs = {}
        return int(formula(*args, **kwargs, out_val=out))
    if func._schema.name == GEMM_4BIT:
        left, _, shape = args[:3]
        return int(2 * left.numel() // left.shape[-1] * math.prod(shape))
    return 0


def _unmasked_share(func: Any, args: Any, kwargs: dict[str, Any]) -> float:
    """Share of the scores that a causal attention kernel has to compute; 1 for everything else."""
    given = dict(_named(func, args, kwargs))
    if not (given.get("is_causal") or given.get("custom_mask_type")):
        return 1.0
    if given.get("max_q") is not None and "scaled_dot_product" not in func._schema.name:
        rows, columns = given["max_q"], given["max_k"]
    else:
        rows, columns = given["query"].shape[-2], given["key"].shape[-2]
    return causal_share(rows, columns)


def causal_share(rows: int, columns: int) -> float:
    """Of `rows` queries times `columns` keys, the pairs whose key is not after the query."""
    square = min(rows, columns)
    pairs = square * (square + 1) // 2 + (rows - square) * columns
    return pairs / (rows * columns)
