"""Attention kernels that only exist on a GPU: their allocations, and what they compute.

* flash-attn 2: a stand-in package whose functions allocate what flash-attn 2.7's do (csrc/
  flash_attn/flash_api.cpp, mha_fwd and mha_bwd), so that transformers' own code around them runs.
* torch's scaled_dot_product_attention: its C++ chooser has no GPU to ask and would take the one
  that materializes the scores. The choice is made here by its rules (aten/src/ATen/native/
  transformers/cuda/sdp_utils.cpp), and the chosen kernel's own fake implementation runs.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from harness.simulate.libraries import flash_attn_padding

FLASH_VERSION = "2.7.4"
MAX_HEAD = 256
_original_sdpa = F.scaled_dot_product_attention


class Kernel(NamedTuple):
    """One call of a flash-attn kernel, which no dispatch mode sees. `tensors` is all it reads and
    writes, the query first; `pairs` of a query and a key to each head; `needed_pairs` those a
    causal kernel with this window cannot skip; `products` over them (2 forward, 5 backward)."""

    tensors: tuple[torch.Tensor, ...]
    pairs: int
    needed_pairs: int
    products: int


# Called with every call of a flash-attn kernel, if set.
kernel_ran: Callable[[Kernel], None] | None = None


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Flash(torch.autograd.Function):
    """query (..., H, D), key and value (..., Hk, D): batch x length in front, or the tokens of
    all sequences in one row (varlen). `lengths` = (sequences, longest); a query sees `window` keys
    before its own, -1 is all."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, lengths: tuple[int, int], window: int) -> Any:
        q, k, v = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
        out = torch.empty_like(q)
        *rows, heads, _ = q.shape
        lse = torch.empty((*rows[:-1], heads, rows[-1]), dtype=torch.float32, device=q.device)
        seed = torch.empty(2, dtype=torch.int64, device=q.device)
        ctx.save_for_backward(q, k, v, out, lse, seed)
        ctx.lengths, ctx.window = lengths, window
        _tell((q, k, v, out, lse), lengths[0], window, 2)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse, _ = ctx.saved_tensors
        grad = _last_contiguous(grads[0])
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # Allocated until the kernels are done.
        scratch = _backward_scratch(q, k, ctx.lengths)
        del scratch
        _tell((q, k, v, out, lse, grad, dq, dk, dv), ctx.lengths[0], ctx.window, 5)
        return dq, dk, dv, None, None


def _tell(tensors: tuple[torch.Tensor, ...], sequences: int, window: int, products: int) -> None:
    """Report a kernel call; sequences are assumed to be equally long."""
    if kernel_ran is None:
        return
    length = tensors[0].shape[:-2].numel() // sequences
    near = length if window < 0 else min(window + 1, length)
    needed = near * (near + 1) // 2 + (length - near) * near
    kernel_ran(Kernel(tensors, sequences * length**2, sequences * needed, products))


def _backward_scratch(q: Any, k: Any, lengths: tuple[int, int]) -> list[torch.Tensor]:
    """softmax_d, the fp32 accumulator of dq, and for grouped queries dk and dv of every head."""
    *rows, heads, width = q.shape
    sequences, longest = lengths
    if len(rows) == 2:
        shape = [sequences, heads, _round_up(longest, 128)]
        accumulator = [sequences, _round_up(longest, 128), heads, _round_up(width, 32)]
    else:
        total = rows[0] + 128 * sequences
        shape = [heads, total]
        accumulator = [total, heads, _round_up(width, 32)]
    scratch = [
        torch.empty(shape, dtype=torch.float32, device=q.device),
        torch.empty(accumulator, dtype=torch.float32, device=q.device),
    ]
    if k.shape[-2] != heads:
        expanded = (*k.shape[:-2], heads, width)
        scratch += [torch.empty(expanded, dtype=k.dtype, device=k.device) for _ in range(2)]
    return scratch


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """As flash-attn's: q (B, S, H, D), k and v (B, Sk, Hk, D), half precision."""
    _check_half(q)
    return _flash(q, k, v, (q.shape[0], q.shape[1]), window_size[0])


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:
    """As flash-attn's: q (tokens, H, D), k and v (tokens, Hk, D), bounds of the sequences."""
    _check_half(q)
    return _flash(q, k, v, (cu_seqlens_q.numel() - 1, q.shape[0]), window_size[0])


def _flash(q: Any, k: Any, v: Any, lengths: tuple[int, int], window: int) -> Any:
    width = q.shape[-1]
    if width % 8:
        q, k, v = (F.pad(tensor, [0, 8 - width % 8]) for tensor in (q, k, v))
    out = _Flash.apply(q, k, v, lengths, window)
    return out[..., :width] if out.shape[-1] != width else out


def _check_half(q: torch.Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")


def _unused(*_: Any, **__: Any) -> Any:
    raise RuntimeError("paged caches are not simulated")


class _FlashMetadata(importlib.metadata.Distribution):
    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {FLASH_VERSION}\n",
            "top_level.txt": "flash_attn\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Any:
        return path


class _FlashFinder(importlib.metadata.DistributionFinder):
    """Metadata of an installed flash-attn, which libraries ask for its version."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        if (
            context is None
            or context.name is None
            or context.name.replace("_", "-").lower() == "flash-attn"
        ):
            yield _FlashMetadata()


def stand_in_for_flash_attn() -> bool:
    """Install the stand-in package if flash-attn is not installed; returns whether it did."""
    if importlib.util.find_spec("flash_attn") is not None:
        return False
    package = _module("flash_attn")
    package.__version__ = FLASH_VERSION  # type: ignore[attr-defined]
    package.__path__ = []
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    package.flash_attn_with_kvcache = _unused  # type: ignore[attr-defined]
    bert_padding = _module("flash_attn.bert_padding")
    for function in (
        flash_attn_padding.index_first_axis,
        flash_attn_padding.pad_input,
        flash_attn_padding.unpad_input,
    ):
        setattr(bert_padding, function.__name__, function)
    package.bert_padding = bert_padding  # type: ignore[attr-defined]
    layers, rotary = _module("flash_attn.layers"), _module("flash_attn.layers.rotary")
    rotary.apply_rotary_emb = _unused  # type: ignore[attr-defined]
    del layers, rotary
    sys.meta_path.append(_FlashFinder())
    return True


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module
    return module


def choose_sdpa_kernel(compute_capability: tuple[int, int]) -> None:
    """Replace `F.scaled_dot_product_attention` for cuda tensors on such a device."""

    def chosen(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if torch.is_autocast_enabled("cuda"):
            # sdpa is on autocast's list (ATen/autocast_mode.h), which comes before the choice.
            query, key, value, attn_mask = map(_autocast, (query, key, value, attn_mask))
        kernel = _kernel(query, key, attn_mask, compute_capability)
        if kernel == "flash":
            return _sdpa_flash(query, key, value, dropout_p, is_causal, scale)
        if kernel == "efficient":
            return _sdpa_efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
        return _original_sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    F.scaled_dot_product_attention = chosen


def _autocast(tensor: Any) -> Any:
    """Cast as autocast does: fp32 on the device becomes the autocast dtype."""
    if tensor is None or tensor.device.type != "cuda" or tensor.dtype is not torch.float32:
        return tensor
    return tensor.to(torch.get_autocast_dtype("cuda"))


def _kernel(query: Any, key: Any, mask: Any, capability: tuple[int, int]) -> str:
    """flash, efficient or math, in torch's order of preference."""
    if query.device.type != "cuda" or query.dim() != 4:
        return "math"
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and mask is None and capability >= (8, 0) and query.shape[-1] <= MAX_HEAD:
        return "flash"
    grouped = query.shape[-3] != key.shape[-3]
    fits = query.dtype is not torch.bfloat16 or capability >= (8, 0)
    # The memory-efficient kernel takes no grouped heads, and masks only in the query's dtype.
    if grouped or not fits or query.dtype is torch.float64:
        return "math"
    return "efficient"


def _sdpa_flash(q: Any, k: Any, v: Any, dropout: float, causal: bool, scale: Any) -> Any:
    width = q.shape[-1]
    scale = scale if scale is not None else width**-0.5
    if width % 8:
        q, k, v = (F.pad(tensor, [0, 8 - width % 8]) for tensor in (q, k, v))
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    out = attend(q, k, v, dropout, causal, scale=scale)[0]
    return out[..., :width] if width % 8 else out


def _sdpa_efficient(
    q: Any, k: Any, v: Any, mask: Any, dropout: float, causal: bool, scale: Any
) -> Any:
    if mask is not None:
        mask = _additive(mask, q, k)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, mask, needs_grad, dropout, causal, scale=scale)[0]


def _additive(mask: Any, q: Any, k: Any) -> Any:
    """A boolean mask as the bias the kernel takes, its rows padded to 16 entries."""
    if mask.dtype is torch.bool:
        zero = torch.zeros_like(mask, dtype=q.dtype)
        mask = zero.masked_fill_(mask.logical_not(), float("-inf"))
    extra = -mask.shape[-1] % 16
    if extra:
        mask = F.pad(mask, [0, extra])[..., : mask.shape[-1]]
    return mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def flash_backward_scratch(args: tuple[Any, ...], _: Any) -> int:
    """Bytes torch's flash backward needs for itself: as flash-attn's, heads before length."""
    query, key = args[1], args[2]
    batch, heads, length, width = query.shape
    rows = batch * heads * _round_up(length, 128)
    scratch = 4 * rows * (_round_up(width, 32) + 1)
    if key.shape[1] != heads:
        scratch += 2 * batch * heads * key.shape[2] * width * key.element_size()
    return int(scratch)


SCRATCH = {"aten::_scaled_dot_product_flash_attention_backward": flash_backward_scratch}
