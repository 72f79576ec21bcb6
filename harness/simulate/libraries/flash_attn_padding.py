"""flash-attn's padding functions (`flash_attn.bert_padding`), as far as memory goes.

Sequences are full length, so taking the padding out copies everything, as it does on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch


class _Put(torch.autograd.Function):
    """Rows into a new tensor of `size` rows; the gradient takes them out again."""

    @staticmethod
    def forward(ctx: Any, values: Any, indices: Any, size: int) -> Any:
        ctx.save_for_backward(indices)
        return torch.zeros(size, *values.shape[1:], dtype=values.dtype, device=values.device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (indices,) = ctx.saved_tensors
        return grads[0][indices], None, None


class _Take(torch.autograd.Function):
    """Rows out of a tensor; the gradient puts them into zeros."""

    @staticmethod
    def forward(ctx: Any, values: Any, indices: Any) -> Any:
        ctx.save_for_backward(indices)
        ctx.size = values.shape[0]
        return values[indices]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0]
        return torch.zeros(ctx.size, *grad.shape[1:], dtype=grad.dtype, device=grad.device), None


def index_first_axis(values: Any, indices: Any) -> Any:
    """(rows, ...) and row numbers -> (chosen rows, ...)."""
    return _Take.apply(values, indices)


def pad_input(hidden_states: Any, indices: Any, batch: int, seqlen: int) -> Any:
    """(tokens, ...) -> (batch, seqlen, ...)."""
    padded = _Put.apply(hidden_states, indices, batch * seqlen)
    return padded.view(batch, seqlen, *hidden_states.shape[1:])


def unpad_input(hidden_states: Any, attention_mask: Any, unused_mask: Any = None) -> Any:
    """(batch, seqlen, ...) and mask -> (tokens, ...), their indices, bounds of the sequences, the
    longest length, and the lengths."""
    lengths = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(attention_mask.flatten()).flatten()
    bounds = torch.nn.functional.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))
    rows = hidden_states.flatten(0, 1)
    return (
        index_first_axis(rows, indices),
        indices,
        bounds,
        hidden_states.shape[1],
        lengths,
    )
