"""Ops whose GPU kernel allocates other memory than their fake implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from harness.simulate.libraries import bitsandbytes_4bit


def composites() -> dict[str, Callable[..., Any]]:
    """Functions to run in place of an op, by its schema name."""
    return {
        "bitsandbytes::gemm_4bit": bitsandbytes_4bit.gemm_4bit,
        "aten::_grouped_mm": grouped_mm,
        # Pinned host memory is not the device's.
        "aten::_pin_memory": lambda tensor, device=None: tensor,
    }


def grouped_mm(a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """One product per group; torch's fake implementation knows the bf16 kernel only, while the op
    computes other dtypes group by group into the same output (`_grouped_mm_cuda` in
    aten/src/ATen/native/cuda/GroupedBlas.cpp).

    a (rows, K) or (groups, rows, K), b (K, columns) or (groups, K, columns); where both are plain
    matrices, `offs` cuts their common dimension into groups.
    """
    if a.dim() == 2 and b.dim() == 2:
        shape: tuple[int, ...] = (offs.numel(), a.shape[0], b.shape[1])
    elif a.dim() == 3 and b.dim() == 3:
        shape = (a.shape[0], a.shape[1], b.shape[2])
    else:
        shape = (a.shape[-2], b.shape[-1])
    # Rows start at multiples of 16 bytes.
    dtype = out_dtype or a.dtype
    per_row = 16 // dtype.itemsize
    width = -(-shape[-1] // per_row) * per_row
    return torch.empty((*shape[:-1], width), dtype=dtype, device=a.device)[..., : shape[-1]]
