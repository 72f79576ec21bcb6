"""Operations, bytes and floors against figures written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from harness.simulate.libraries import attention
from harness.simulate.memory.ledger import SimulatedLedger
from harness.simulate.step_time import roofline
from harness.simulate.step_time.op_cost import Cost, causal_share
from harness.simulate.step_time.roofline import Traffic, Work
from matrices.catalogue.gpus import Gpu

BF16, FP32, INT64 = 2, 4, 8


class Listen(TorchDispatchMode):
    """Tells a Traffic about every op."""

    def __init__(self, told: Traffic) -> None:
        super().__init__()
        self.told = told

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.told.note(func, args, kwargs or {}, out)
        return out


def heard(run: Callable[[], object], device_type: str = "cpu") -> list[Work]:
    told = Traffic(device_type)
    with Listen(told):
        run()
    return told.works()


def moved(run: Callable[[], object], device_type: str = "cpu") -> int:
    return roofline.total_moved(heard(run, device_type))


def half(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


WEIGHT, ROWS, BIAS = half(30, 40), half(20, 30), half(40)
TABLE, WHERE = half(1000, 16), torch.arange(5)
SCORES, TARGETS = torch.zeros(6, 50), torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: ROWS @ WEIGHT, BF16 * (20 * 30 + 30 * 40 + 20 * 40)),
        (lambda: torch.addmm(BIAS, ROWS, WEIGHT), BF16 * (40 + 600 + 1200 + 800)),
        (lambda: ROWS + 1, BF16 * 2 * 600),
        (lambda: ROWS + half(30).fill_(1), BF16 * (30 + 30 + 600 + 30 + 600)),
        (lambda: ROWS.clone().mul_(1), BF16 * 4 * 600),
        (lambda: ROWS.float(), (BF16 + FP32) * 600),
        (lambda: torch.add(ROWS, 1, out=torch.empty_like(ROWS)), BF16 * 2 * 600),
        # A view, a slice and an expansion are free; what reads an expanded row reads it once.
        (lambda: ROWS.view(-1).t().unsqueeze(0)[:, :3].expand(9, 3).detach(), 0),
        (lambda: half(1, 30).expand(20, 30) * ROWS, BF16 * (30 + 30 + 600 + 600)),
        # Memory is taken, not touched; filling it is writing.
        (lambda: (torch.empty(50), torch.empty_like(ROWS), ROWS.new_empty(7)), 0),
        (lambda: torch.zeros(50), FP32 * 50),
        (lambda: torch.zeros_like(ROWS), BF16 * 600),
        (lambda: torch.empty(600, dtype=torch.bfloat16).copy_(ROWS.view(-1)), BF16 * 2 * 600),
        # Rows of a table, wherever they are.
        (lambda: F.embedding(WHERE, TABLE), INT64 * 5 + BF16 * 2 * 5 * 16),
        (lambda: TABLE.index_select(0, WHERE), INT64 * 5 + BF16 * 2 * 5 * 16),
        (lambda: TABLE[WHERE], INT64 * 5 + BF16 * 2 * 5 * 16),
        (
            lambda: TABLE.index_add_(0, WHERE, half(5, 16)),
            BF16 * 80 + INT64 * 5 + BF16 * (80 + 2 * 80),
        ),
        # One score per row is read, and the sum of the weights is a result too.
        (lambda: F.nll_loss(SCORES, TARGETS), FP32 * 6 + INT64 * 6 + 2 * FP32),
        (lambda: ROWS.sum().item(), BF16 * (600 + 1)),
    ],
)
def test_bytes_of_an_op(run: Callable[[], object], expected: int) -> None:
    assert moved(run) == expected


def test_backward_of_a_loss_does_not_read_the_scores() -> None:
    scores = torch.zeros(6, 50, requires_grad=True)
    loss = F.nll_loss(scores, TARGETS)
    one = torch.ones(())
    # The gradient written, the gradient of the loss, targets and the sum of weights read.
    assert moved(lambda: torch.autograd.grad(loss, scores, one)) == FP32 * (300 + 2) + INT64 * 6


def test_fused_adamw_reads_and_writes_all_but_the_gradient() -> None:
    weight = nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.zeros(1000)
    optimizer.step()
    works = [work for work in heard(optimizer.step) if "_fused_adamw_" in work.op]
    # Weight and two moments in and out, the gradient in, and the step's number.
    assert [work.cost.moved for work in works] == [FP32 * (7 * 1000 + 1)]


def test_foreach_counts_every_tensor_of_its_lists() -> None:
    left, right = [torch.zeros(10), torch.zeros(30)], [torch.zeros(10), torch.zeros(30)]
    assert moved(lambda: torch._foreach_add_(left, right)) == FP32 * 3 * 40


def test_dequantizing_reads_packed_weights_and_writes_them_out() -> None:
    packed, state = bnb.functional.quantize_4bit(half(64, 128), quant_type="nf4")
    run = lambda: bnb.functional.dequantize_4bit(packed, state)  # noqa: E731
    assert moved(run) == 64 * 128 // 2 + FP32 * 64 * 128 // 64 + BF16 * 64 * 128


def test_a_fused_4bit_product_is_the_product_it_is() -> None:
    """Packed weight, one absmax for 64 values, rows and result; the weight out and in again."""
    layer = bnb.nn.Linear4bit(
        128, 64, bias=False, compute_dtype=torch.float32, compress_statistics=False
    ).to("cpu")
    [whole] = [w for w in heard(lambda: layer(torch.ones(3, 128))) if "gemm_4bit" in w.op]
    weight = 128 * 64
    packed = weight // 2 + FP32 * weight // 64
    assert whole.cost.flops == 2 * 3 * weight
    assert whole.cost.moved == packed + FP32 * (3 * 128 + 3 * 64) + 2 * FP32 * weight


def test_tensors_elsewhere_do_not_count() -> None:
    there = torch.empty(10, 10, device="meta")
    assert moved(lambda: there + there) == 0
    assert moved(lambda: there + there, "meta") == FP32 * 300


def test_causal_attention_needs_the_lower_triangle_only() -> None:
    """Of 24 x 24 scores 24 * 25 / 2; two products forward, five backward."""
    heads = [torch.ones(2, 4, 24, 8, requires_grad=True) for _ in range(3)]
    full = 2 * 2 * (2 * 4) * 24 * 24 * 8
    for causal, needed in ((False, full), (True, 2 * 2 * (2 * 4) * (24 * 25 // 2) * 8)):
        run = lambda causal=causal: F.scaled_dot_product_attention(*heads, is_causal=causal)  # noqa: E731
        [forward] = [work.cost for work in heard(run) if work.cost.flops]
        assert (forward.flops, forward.least_flops) == (full, needed)
        out = run().sum()
        [backward] = [work.cost for work in heard(out.backward) if work.cost.flops]
        assert (backward.flops, backward.least_flops) == (full * 5 // 2, needed * 5 // 2)


@pytest.mark.parametrize(("rows", "columns", "pairs"), [(1, 1, 1), (3, 3, 6), (2, 5, 3), (5, 2, 9)])
def test_causal_pairs(rows: int, columns: int, pairs: int) -> None:
    assert causal_share(rows, columns) == pairs / (rows * columns)


@pytest.mark.parametrize(("window", "pairs"), [(-1, 24 * 25 // 2), (3, 1 + 2 + 3 + 21 * 4)])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attn_tells_of_its_kernels(
    window: int, pairs: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences of 24 tokens, 4 heads, 2 of keys and values, 8 wide."""
    told = Traffic("cpu")
    monkeypatch.setattr(attention, "kernel_ran", told.note_kernel)
    shape = (48,) if packed else (2, 24)
    query = half(*shape, 4, 8).requires_grad_()
    key = half(*shape, 2, 8)
    ends = torch.tensor([0, 24, 48], dtype=torch.int32)
    bounds = {"causal": True, "window_size": (window, 0)}
    if packed:
        out = attention.flash_attn_varlen_func(query, key, key, ends, ends, 24, 24, **bounds)
    else:
        out = attention.flash_attn_func(query, key, key, **bounds)
    out.sum().backward()
    forward, backward = sorted((work.cost for work in told.works()), key=lambda cost: cost.flops)
    rows, sums = BF16 * 48 * 8, FP32 * 48 * 4
    # Query and result of 4 heads, key and value of 2; the backward has the gradients of all.
    assert forward.moved == (4 + 4 + 2 + 2) * rows + sums
    assert backward.moved == 2 * (4 + 4 + 2 + 2) * rows + sums
    for cost, products in ((forward, 2), (backward, 5)):
        assert cost.flops == products * 2 * (2 * 4) * 24 * 24 * 8
        assert cost.least_flops == products * 2 * (2 * 4) * pairs * 8


def test_equal_calls_are_one_entry_with_a_count() -> None:
    [work] = heard(lambda: [ROWS @ WEIGHT for _ in range(5)])
    assert (work.op, work.dtype, work.count) == ("aten.mm.default", "bfloat16", 5)


def test_only_what_comes_after_a_clear_counts() -> None:
    told = Traffic("cpu")
    with Listen(told):
        _ = ROWS + 1, ROWS @ WEIGHT
        told.clear()
        _ = ROWS @ WEIGHT
    assert [(work.op, work.count) for work in told.works()] == [("aten.mm.default", 1)]


# Figures of no real device: 100 operations and 10 bytes a second.
SLOW = Gpu(
    name="slow",
    memory_bytes=1,
    context_bytes=0,
    bandwidth_bytes_per_second=10.0,
    bf16_flops_per_second=100.0,
    compute_capability=(8, 0),
    multiprocessors=1,
)


def test_floor_is_the_sum_of_what_binds_each_op() -> None:
    works = [
        # 10 s for its needed operations, 3 s for its bytes; twice.
        Work("product", "bfloat16", Cost(flops=2000, least_flops=1000, moved=30), 2),
        # 7 s for its bytes.
        Work("sum", "bfloat16", Cost(flops=0, least_flops=0, moved=70), 1),
    ]
    assert roofline.floor_seconds(works, SLOW) == 2 * 10 + 7
    assert roofline.total_flops(works) == 4000
    assert roofline.total_moved(works) == 130
    speed = roofline.predicted_speed(works, SLOW)
    assert (speed.gpu, speed.floor_seconds) == ("slow", 27.0)
    assert roofline.predicted_speed(works, None).floor_seconds is None


HIDDEN, INNER, LAYERS, VOCABULARY, TOKENS = 32, 80, 3, 56, 2 * 24
# Weights of the products: q, k, v and o, the MLP's three, and the head.
PER_LAYER = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER
HEAD = HIDDEN * VOCABULARY


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    ).train()


def product_flops(model: nn.Module) -> int:
    """Of the weights' products in one step; attention's own are another op."""
    ids = (torch.arange(TOKENS) % VOCABULARY).view(2, 24)
    works = heard(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())
    return sum(work.cost.flops * work.count for work in works if work.op == "aten.mm.default")


def test_a_dense_model_takes_6_operations_per_weight_and_token() -> None:
    """2 forward, 4 backward (Kaplan et al., 2020, section 2.1)."""
    with FakeTensorMode():
        assert product_flops(llama()) == 6 * (LAYERS * PER_LAYER + HEAD) * TOKENS


def test_recomputing_every_layer_takes_8() -> None:
    with FakeTensorMode():
        model = llama()
        model.activation_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        expected = (8 * LAYERS * PER_LAYER + 6 * HEAD) * TOKENS
        assert product_flops(model) == expected


def test_lora_makes_no_gradient_of_frozen_weights() -> None:
    """4 operations per frozen weight and token, 6 per adapter weight; but the gradient of the
    first layer's input, which nobody wants, is not made: 2 less for what reads it."""
    rank = 4
    adapted = get_peft_model(
        llama(), LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    adapters = LAYERS * 2 * (2 * HIDDEN * rank)
    unwanted = 3 * HIDDEN * HIDDEN + 2 * HIDDEN * rank
    expected = 4 * (LAYERS * PER_LAYER + HEAD) + 6 * adapters - 2 * unwanted
    assert product_flops(adapted) == expected * TOKENS


def test_fake_tensors_cost_what_real_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers takes fake tensors for a compiler's and would build a mask for them.
    monkeypatch.setattr("transformers.utils.import_utils.is_fake_tensor", lambda tensor: False)

    def step() -> list[tuple[str, Cost, int]]:
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.zeros(2, 24, dtype=torch.int64)

        def run() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()

        return sorted((w.op, w.cost, w.count) for w in heard(run) if w.cost.flops)

    real = step()
    # The ledger answers what the program asks its tensors for.
    with FakeTensorMode(), SimulatedLedger("cpu", 0):
        assert step() == real
    assert real
