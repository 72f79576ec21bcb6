"""Floating point operations against products written out by hand: m x k times k x n is 2mnk."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from harness.meters.memory.ledger import Ledger
from harness.meters.steps import FlopCounter, MemorySteps

BATCH, LENGTH = 2, 24
TOKENS = BATCH * LENGTH
HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 32, 80, 4, 2, 56
HEAD = HIDDEN // HEADS


def product(m: int, k: int, n: int) -> int:
    return 2 * m * k * n


# One decoder layer and the head, forward. The embedding is a look-up: no product.
LINEAR = (
    2 * product(TOKENS, HIDDEN, HIDDEN)  # q_proj, o_proj
    + 2 * product(TOKENS, HIDDEN, KV_HEADS * HEAD)  # k_proj, v_proj
    + 3 * product(TOKENS, HIDDEN, INNER)  # gate_proj, up_proj, down_proj
    + product(TOKENS, HIDDEN, VOCABULARY)  # lm_head
)
# One of the products in attention: q @ k^T or scores @ v. torch's formulas count the whole square
# of scores, although under the causal mask half of it is never used: full attention is counted.
SCORES = BATCH * HEADS * product(LENGTH, HEAD, LENGTH)


def llama(implementation: str) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            attn_implementation=implementation,
        )
    )


def loss_of(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(TOKENS).view(BATCH, LENGTH) % VOCABULARY
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def count(run: Callable[[], object]) -> int:
    operations = FlopCounter()
    with operations:
        run()
    return operations.total


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_forward_of_a_layer(implementation: str) -> None:
    model = llama(implementation)
    assert count(lambda: loss_of(model)) == LINEAR + 2 * SCORES


@pytest.mark.parametrize(
    # Eager attention keeps its scores; the fused kernel makes them again: 5 products, not 4.
    ("implementation", "attention_products"),
    [("sdpa", 5), ("eager", 4)],
)
def test_backward_of_a_layer(implementation: str, attention_products: int) -> None:
    """Each linear product has two in the backward: for its input and for its weight."""
    model = llama(implementation)
    loss = loss_of(model)
    assert count(loss.backward) == 2 * LINEAR + attention_products * SCORES


def test_backward_through_frozen_weights_makes_input_gradients_only() -> None:
    """What LoRA saves: with the lm_head alone trainable, its weight's gradient alone is made."""
    model = llama("sdpa").requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(True)
    loss = loss_of(model)
    assert count(loss.backward) == product(VOCABULARY, TOKENS, HIDDEN)


def test_recomputation_is_executed_and_so_counted() -> None:
    """The layer runs again in the backward, up to the last tensor anybody needs: all of its
    products but the last one, whose result nobody does. The head is no part of the checkpoint."""
    model = llama("eager").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    loss = loss_of(model)
    layer = LINEAR - product(TOKENS, HIDDEN, VOCABULARY) + 2 * SCORES
    recomputed = layer - product(TOKENS, INNER, HIDDEN)
    assert count(loss.backward) == 2 * LINEAR + 4 * SCORES + recomputed


def test_agrees_with_torchs_flop_counter() -> None:
    """torch's own counter, but for the CPU attention kernel it has no formula for."""
    model = llama("eager")
    with FlopCounterMode(display=False) as torchs:
        loss_of(model).backward()
    assert count(lambda: loss_of(model).backward()) == torchs.get_total_flops() > 0


def test_steps_average_over_whole_steps() -> None:
    model = llama("sdpa")
    meter = MemorySteps(model, VOCABULARY)
    assert meter.flops_per_step is None
    with meter:
        for step in (1, 2):
            for _micro_batch in range(3):
                meter.phase("forward")
                loss = loss_of(model)
                meter.phase("backward")
                loss.backward()
            meter.step_end(step)
    assert meter.flops_per_step == 3 * (3 * LINEAR + 7 * SCORES)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("rows", [1, 48])
def test_a_4bit_product_counts_as_the_product_it_is(rows: int, double: bool) -> None:
    """Forward and input gradient, as of a frozen nn.Linear of the same shape; dequantization is
    no product. The ledger takes the fused op apart, without it the forward would count nothing."""
    plain = nn.Linear(128, 64, bias=False).requires_grad_(False)
    quantized = bnb.nn.Linear4bit(
        128, 64, bias=False, compute_dtype=torch.float32, compress_statistics=double
    ).to("cpu")
    totals = []
    for layer in (plain, quantized):
        x = torch.ones(rows, 128, requires_grad=True)
        operations = FlopCounter()
        with operations, Ledger("cpu"):
            layer(x).sum().backward()
        totals.append(operations.total)
    assert totals == [2 * product(rows, 128, 64)] * 2


def test_a_grouped_product_counts_every_row_once() -> None:
    """Rows of 3 experts after each other: forward, gradient of the rows and of the weights each
    multiply every row with one expert's weight."""
    rows = torch.ones(24, 16, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.ones(3, 16, 32, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([8, 16, 24], dtype=torch.int32)
    totals = []
    operations = FlopCounter()
    with operations:
        out = F.grouped_mm(rows, weights, offs=ends)
        totals.append(operations.total)
        out.backward(torch.ones_like(out))
        totals.append(operations.total)
    assert totals == [product(24, 16, 32), 3 * product(24, 16, 32)]
