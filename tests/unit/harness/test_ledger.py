"""The ledger against hand-computed storages and against torch's own profiler of allocations.

Shapes are chosen so that every tensor of interest is a whole number of 512-byte blocks; scalars
take one block each.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from harness.meters.memory import ledger as memory
from harness.meters.memory.ledger import Ledger, block_bytes, by_category, live_at
from harness.meters.steps import MemorySteps

SCALAR = 512
ROWS, WIDTH, HIDDEN = 64, 256, 512
INPUT = ROWS * WIDTH * 4
INNER = ROWS * HIDDEN * 4
MATRIX = WIDTH * HIDDEN * 4
VOCABULARY = 96


class TwoProducts(nn.Module):
    """loss = sum(relu(x @ w1) @ w2): every tensor it makes is known."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.full((WIDTH, HIDDEN), 0.01))
        self.w2 = nn.Parameter(torch.full((HIDDEN, WIDTH), 0.01))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.relu(x @ self.w1) @ self.w2).sum()


@pytest.fixture
def ledger() -> Ledger:
    return Ledger("cpu", VOCABULARY)


def live_now(ledger: Ledger) -> dict[str, int]:
    return by_category(live_at(ledger.events, len(ledger.events) - 1))


def one_step(ledger: Ledger, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ledger.enter_phase("forward")
    x = torch.ones(ROWS, WIDTH)
    loss = model(x)
    ledger.enter_phase("backward")
    loss.backward()
    del loss
    ledger.enter_phase("optimizer_step")
    optimizer.step()
    memory.tag_optimizer(ledger, optimizer)


def test_a_step_whose_every_tensor_is_known(ledger: Ledger) -> None:
    """Forward: x, h = x @ w1 and relu(h) are live together; h is dropped (relu keeps its result),
    y = relu(h) @ w2 is smaller. Backward: the peak is at the gradient of w1, when x, the gradient
    of h and both weight gradients are live, with loss and the backward's seed as scalars.
    Optimizer step (AdamW, one tensor at a time): two states and a step count for each weight, and
    for the second weight a square root and its quotient beside the quotient of the first."""
    model = TwoProducts()
    memory.tag_model(ledger, model)
    hooks = memory.tag_gradients(ledger, model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with ledger:
        one_step(ledger, model, optimizer)
    for hook in hooks:
        hook.remove()
    peaks, ends = memory.phase_peaks(ledger.events), memory.phase_ends(ledger.events)
    weights = 2 * MATRIX
    assert peaks["load"].bytes == ends["load"] == weights
    assert peaks["forward"].bytes == weights + INPUT + 2 * INNER
    assert ends["forward"] == weights + INPUT + INNER + SCALAR
    assert peaks["backward"].bytes == weights + INPUT + INNER + 2 * MATRIX + 2 * SCALAR
    assert ends["backward"] == weights + INPUT + 2 * MATRIX
    states = 4 * MATRIX + 2 * SCALAR
    assert peaks["optimizer_step"].bytes == ends["backward"] + states + 3 * MATRIX
    # x lives until one_step returned, which was within the optimizer step.
    assert ends["optimizer_step"] == weights + 2 * MATRIX + states
    assert live_now(ledger) == {
        "weights": weights,
        "gradients": 2 * MATRIX,
        "optimizer_states": states,
    }


def test_categories_at_each_peak_of_a_known_step(ledger: Ledger) -> None:
    model = TwoProducts()
    memory.tag_model(ledger, model)
    memory.tag_gradients(ledger, model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with ledger:
        one_step(ledger, model, optimizer)
    found = {
        phase: by_category(live_at(ledger.events, peak.at))
        for phase, peak in memory.phase_peaks(ledger.events).items()
    }
    weights = {"weights": 2 * MATRIX}
    # h does not outlive the forward: a temporary. What relu made does: an activation, as is the
    # scalar seed of the backward, which torch makes with gradients enabled.
    assert found["forward"] == weights | {"activations": INPUT + INNER, "temporaries": INNER}
    assert found["backward"] == weights | {
        "activations": INPUT + 2 * SCALAR,
        "temporaries": INNER,
        "gradients": 2 * MATRIX,
    }
    assert found["optimizer_step"] == weights | {
        "activations": INPUT,
        "gradients": 2 * MATRIX,
        "optimizer_states": 4 * MATRIX + 2 * SCALAR,
        "temporaries": 3 * MATRIX,
    }


def test_the_second_step_starts_from_the_states(ledger: Ledger) -> None:
    """Adam's states are made in the first step: only the second backward has them beside it."""
    model = TwoProducts()
    memory.tag_model(ledger, model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with ledger:
        one_step(ledger, model, optimizer)
        optimizer.zero_grad()
        first = memory.phase_peaks(ledger.events)["backward"].bytes
        one_step(ledger, model, optimizer)
    second = memory.phase_peaks(ledger.events)["backward"].bytes
    assert second - first == 4 * MATRIX + 2 * SCALAR


def test_logits_are_told_by_the_vocabulary(ledger: Ledger) -> None:
    """(rows, vocabulary) is logits wherever it is made; a vector of that length is not."""
    with ledger:
        ledger.enter_phase("forward")
        x = torch.ones(ROWS, 8)
        logits = x @ torch.ones(8, VOCABULARY)
        bias = torch.ones(VOCABULARY)
        held = (x, logits, bias)
        ledger.enter_phase("backward")
        with torch.no_grad():
            gradient = torch.ones_like(logits)
    assert live_now(ledger) == {
        "activations": ROWS * 8 * 4 + block_bytes(VOCABULARY * 4),
        "logits_and_loss": 2 * ROWS * VOCABULARY * 4,
    }
    del held, gradient


class TiledHead(nn.Module):
    """A language model whose loss cuts the vocabulary into tiles of 40, as fused heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False))
        self.lm_head = nn.Linear(16, VOCABULARY, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.backbone(x)
        return (hidden @ self.lm_head.weight[:40].t()).sum()


def test_tiles_of_logits_are_told_by_the_forward_around_the_head(ledger: Ledger) -> None:
    """Both (rows, 40) in the backward and the forward are logits; widths that the backbone has
    (24), and the hidden width itself (16), are not."""
    model = TiledHead()
    memory.track_modules(ledger, model)
    with ledger:
        ledger.enter_phase("forward")
        loss = model(torch.ones(ROWS, 16))
        ledger.enter_phase("backward")
        with torch.no_grad():
            held = [torch.ones(ROWS, width) for width in (40, VOCABULARY, 24, 16)]
    born = [e.storage for e in ledger.events if e.delta > 0 and len(e.storage.shape) == 2]
    widths = {s.shape[1]: memory.category(s) for s in born if s.phase == "backward"}
    assert widths == {
        40: "logits_and_loss",
        VOCABULARY: "logits_and_loss",
        24: "temporaries",
        16: "temporaries",
    }
    forward = {s.shape[1]: memory.category(s) for s in born if s.phase == "forward"}
    assert forward[40] == "logits_and_loss"
    assert forward[24] == "activations"
    del loss, held


@pytest.mark.parametrize(("reentrant", "recomputed"), [(False, 1), (True, 2)])
def test_recomputation_under_checkpointing_is_activations(
    ledger: Ledger, reentrant: bool, recomputed: int
) -> None:
    """A checkpointed block keeps its input alone; what it makes again in the backward (x @ w and,
    where torch does not stop early, silu of it) is activations; silu's gradient, made by autograd,
    is a temporary."""
    block = nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False), nn.SiLU())
    memory.tag_model(ledger, block)
    memory.tag_gradients(ledger, block)
    with ledger:
        ledger.enter_phase("forward")
        x = torch.ones(ROWS, WIDTH, requires_grad=True)
        loss = checkpoint(block, x, use_reentrant=reentrant).sum()
        at_end = live_now(ledger)
        ledger.enter_phase("backward")
        loss.backward()
    again = [
        event.storage
        for event in ledger.events
        if event.phase == "backward" and event.delta == INNER
    ]
    found = Counter(memory.category(one) for one in again)
    assert found == {"activations": recomputed, "temporaries": 1}
    rng_state = block_bytes(torch.get_rng_state().nbytes)
    kept = at_end["activations"] - INPUT
    assert kept <= rng_state + 2 * SCALAR


def test_what_was_there_before_is_counted_from_its_tag_on(ledger: Ledger) -> None:
    x = torch.ones(128)
    ledger.tag(x, "weights")
    ledger.tag(x.view(2, 64), "adapters")
    assert live_now(ledger) == {"adapters": 512}
    del x
    assert [event.delta for event in ledger.events] == [512, -512]


def test_views_and_in_place_results_are_no_new_storage(ledger: Ledger) -> None:
    with ledger:
        x = torch.zeros(256)
        y = x.view(16, 16).t()[3:]
        x.add_(1).mul_(2)
    assert len(ledger.events) == 1
    del x
    assert len(ledger.events) == 1, "y still holds the storage"
    del y
    assert [event.delta for event in ledger.events] == [1024, -1024]


def test_another_device_and_empty_tensors_are_not_counted(ledger: Ledger) -> None:
    with ledger:
        held = [torch.empty(100, device="meta"), torch.empty(0)]
    assert ledger.events == []
    del held


def test_closing_stops_the_writing(ledger: Ledger) -> None:
    with ledger:
        x = torch.zeros(128)
    ledger.close()
    del x
    assert [event.delta for event in ledger.events] == [512]


def test_a_reused_address_is_a_new_storage(ledger: Ledger) -> None:
    """The allocator gives the same address again and again."""
    with ledger:
        for _ in range(50):
            torch.zeros(128)
    assert [event.delta for event in ledger.events] == [512, -512] * 50


def test_an_entered_phase_without_a_change_has_what_was_live(ledger: Ledger) -> None:
    """k-bit preparation of an fp32 model changes nothing: its peak is what was loaded."""
    x = torch.zeros(128)
    ledger.tag(x, "weights")
    ledger.enter_phase("kbit_preparation")
    ledger.close()
    assert memory.phase_peaks(ledger.events)["kbit_preparation"].bytes == 512
    assert memory.phase_ends(ledger.events)["kbit_preparation"] == 512
    del x


def test_adamw_states_are_two_fp32_copies_of_the_trainable_parameters(ledger: Ledger) -> None:
    """Kingma and Ba 2015: two moments per parameter; a frozen weight has none."""
    model = TwoProducts()
    model.w2.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    memory.tag_model(ledger, model)
    with ledger:
        one_step(ledger, model, optimizer)
    assert live_now(ledger)["optimizer_states"] == 2 * MATRIX + SCALAR


def test_adamw_8bit_states_are_two_bytes_a_parameter_and_absmax(ledger: Ledger) -> None:
    """bitsandbytes: two uint8 moments in blocks of 256 with one float32 absmax each (Dettmers et
    al. 2022), and two code tables of 256 float32 that all parameters share. A parameter of fewer
    than 4096 elements keeps two float32 moments."""
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 40, bias=False))
    sizes = [WIDTH * HIDDEN, HIDDEN * 40]
    optimizer = bnb.optim.AdamW(model.parameters(), optim_bits=8)
    memory.tag_model(ledger, model)
    with ledger:
        ledger.enter_phase("forward")
        loss = model(torch.ones(ROWS, WIDTH)).sum()
        ledger.enter_phase("backward")
        loss.backward()
        ledger.enter_phase("optimizer_step")
        optimizer.step()
        memory.tag_optimizer(ledger, optimizer)
    moments = sum(2 * size + 2 * block_bytes(size // 256 * 4) for size in sizes)
    assert live_now(ledger)["optimizer_states"] == moments + 2 * HIDDEN * 4 + 2 * 1024


def test_4bit_forward_holds_the_dequantized_weight_for_a_moment(ledger: Ledger) -> None:
    """bitsandbytes dequantizes the whole weight before the product: n x 2 bytes in bf16, seen
    although the fused op hides it, and gone before the forward ends."""
    layer = bnb.nn.Linear4bit(
        WIDTH, HIDDEN, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False
    ).to("cpu")
    memory.tag_model(ledger, layer)
    with ledger:
        ledger.enter_phase("forward")
        x = torch.ones(ROWS, WIDTH, dtype=torch.bfloat16)
        y = layer(x)
    weight = WIDTH * HIDDEN // 2 + WIDTH * HIDDEN // 64 * 4 + SCALAR
    peak = memory.phase_peaks(ledger.events)["forward"]
    assert peak.bytes == weight + MATRIX // 2 + INPUT // 2 + INNER // 2
    assert by_category(live_at(ledger.events, peak.at))["temporaries"] == MATRIX // 2
    assert memory.phase_ends(ledger.events)["forward"] == weight + INPUT // 2 + INNER // 2
    del y


def llama(implementation: str, checkpointing: bool) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation=implementation,
        )
    )
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def llama_loss(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(128).view(2, 64) % VOCABULARY
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def observed_steps(
    model: nn.Module, loss_of: Callable[[nn.Module], torch.Tensor], steps: int
) -> tuple[MemorySteps, int]:
    """Train under MemorySteps as the trainer does; the meter and the events before the steps."""
    optimizer = torch.optim.AdamW(model.parameters())
    meter = MemorySteps(model, VOCABULARY)
    with meter:
        before = len(meter.ledger.events)
        meter.train_begin(optimizer)
        for step in range(1, steps + 1):
            meter.phase("forward")
            loss = loss_of(model)
            meter.phase("backward")
            loss.backward()
            del loss
            meter.phase("optimizer_step")
            optimizer.step()
            optimizer.zero_grad()
            meter.step_end(step)
    return meter, before


def allocations(profiler: Any) -> list[int]:
    """Bytes of every allocation (negative: release) on the CPU in order, as torch profiled them."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def in_blocks(delta: int) -> int:
    return block_bytes(delta) if delta > 0 else -block_bytes(-delta)


def running_peak(deltas: list[int]) -> int:
    live = peak = 0
    for delta in deltas:
        live += delta
        peak = max(peak, live)
    return peak


# How often an op allocates inside itself: copies of an expanded gradient for two products, the CPU
# flash attention's two buffers for each forward, the random generator's state (5056 bytes) that a
# checkpoint copies. The ledger, which sees tensors between ops, does not count these.
UNSEEN = {"mlp": 2, "eager": 0, "sdpa": 2, "checkpointing": 2 * 2 + 1}


def profiled_allocations(run: Callable[[], Any]) -> tuple[list[int], Any]:
    """Block bytes of every allocation and release of `run` on the CPU, and its answer.

    The garbage collector waits: what earlier tests left to it must not be released in between.
    """
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            answer = run()
    finally:
        gc.enable()
    return [in_blocks(delta) for delta in allocations(profiler)], answer


@pytest.mark.parametrize("case", ["mlp", "eager", "sdpa", "checkpointing"])
def test_same_allocations_and_peak_as_the_profiler(case: str) -> None:
    """Every allocation above two blocks that the ledger sees, the profiler saw, and the other way
    round but for the named scratch; the peaks agree to within a few scalars."""
    if case == "mlp":
        model, loss_of = nn.Sequential(TwoProducts()), lambda m: m(torch.ones(ROWS, WIDTH))
    else:
        model = llama("eager" if case == "eager" else "sdpa", case == "checkpointing")
        loss_of = llama_loss
    profiled, (meter, before) = profiled_allocations(
        lambda: observed_steps(model, loss_of, steps=1)
    )
    seen = [event.delta for event in meter.ledger.events[before:]]
    big_profiled = Counter(delta for delta in profiled if delta > 2 * SCALAR)
    big_seen = Counter(delta for delta in seen if delta > 2 * SCALAR)
    assert sum(big_seen.values()) >= 9
    assert not big_seen - big_profiled
    assert (big_profiled - big_seen).total() == UNSEEN[case]
    assert abs(running_peak(profiled) - running_peak(seen)) <= 6 * SCALAR
    assert abs(sum(profiled) - sum(seen)) <= SCALAR


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_meters_hardly_change_what_is_allocated(checkpointing: bool) -> None:
    """The same step with and without the ledger, the operation counter and all hooks.

    Nothing disappears. What is added is known: autograd adds two gradients of one tensor in place,
    but not while any Python dispatch mode is on (`isTensorSubclassLike` in its input buffer), so
    that a residual gradient is made anew; the peak rises by one of them at most. (Under torch's
    FlopCounterMode this would fail: it runs SiLU's backward as five ops on the wider tensor.)"""

    def bare() -> None:
        optimizer = torch.optim.AdamW(model.parameters())
        loss = llama_loss(model)
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()

    model = llama("sdpa", checkpointing)
    without, _ = profiled_allocations(bare)
    model = llama("sdpa", checkpointing)
    under, _ = profiled_allocations(lambda: observed_steps(model, llama_loss, steps=1))
    before, now = (Counter(d for d in run if d > 2 * SCALAR) for run in (without, under))
    hidden_state = 128 * 128 * 4
    assert not before - now
    assert set(now - before) <= {hidden_state, hidden_state // 2}
    assert 0 <= running_peak(under) - running_peak(without) <= hidden_state + 6 * SCALAR
