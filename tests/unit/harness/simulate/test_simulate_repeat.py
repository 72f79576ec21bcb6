"""Layers played back against the same layers run, on fake CPU tensors in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from harness.meters.memory.ledger import category
from harness.simulate.memory.ledger import SimulatedLedger
from harness.simulate.shortcuts.layer_replay import Repeats, Unrepeatable

WIDTH, DEPTH = 16, 9


class Layer(nn.Module):
    """A residual block; `mode` is how it is checkpointed."""

    def __init__(self, width: int = 4 * WIDTH, mode: str = "none") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, width)
        self.down = nn.Linear(width, WIDTH)
        self.mode = mode
        self.gradient_checkpointing = mode != "none"

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))

    def forward(self, x: torch.Tensor) -> Any:
        if self.mode == "none" or not torch.is_grad_enabled():
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.mode == "reentrant")


class Hoarder(Layer):
    """Hands an activation around itself, which is summed up at the end."""

    kept: list[torch.Tensor] = []  # noqa: RUF012 - shared on purpose

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        self.kept.append(up.detach() * 2)
        return x + self.down(up)


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        total = self.last(x).sum()
        while Hoarder.kept:
            total = total + Hoarder.kept.pop().sum()
        return total


def train(make: Callable[[], list[nn.Module]], repeat: bool, frozen: bool = False) -> Any:
    """Events of two steps of two micro batches, and how many layer calls were played back."""
    ledger = SimulatedLedger("cpu", workspace_bytes=0)
    with FakeTensorMode(), ledger:
        model = Stack(make())
        if frozen:
            for layer in model.layers:
                layer.up.requires_grad_(False)  # type: ignore[union-attr]
        repeats = Repeats(ledger, model) if repeat else None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            for _ in range(2):
                ledger.enter_phase("forward")
                loss = model(torch.empty(2, 5, WIDTH))
                ledger.enter_phase("backward")
                loss.backward()
                del loss
            ledger.enter_phase("optimizer_step")
            optimizer.step()
            optimizer.zero_grad()
        if repeats is not None:
            repeats.finish()
        ledger.close()
    number: dict[Any, int] = {}
    told = [
        (
            number.setdefault(event.storage, len(number)),
            event.delta,
            event.phase,
            event.visit,
            event.storage.op,
            event.storage.shape,
            event.storage.module,
            category(event.storage),
        )
        for event in ledger.events
    ]
    return told, repeats.played if repeats is not None else 0


@pytest.mark.parametrize("mode", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_event_is_the_same(mode: str, frozen: bool) -> None:
    def layers() -> list[nn.Module]:
        return [Layer(mode=mode) for _ in range(DEPTH)]

    run, _ = train(layers, repeat=False, frozen=frozen)
    played, times = train(layers, repeat=True, frozen=frozen)
    # Three layers at each end run, in each of four forwards.
    assert times == 4 * (DEPTH - 6)
    assert played == run


def test_a_layer_that_is_wider_is_run() -> None:
    def layers() -> list[nn.Module]:
        return [Layer(8 * WIDTH if at == 4 else 4 * WIDTH) for at in range(DEPTH)]

    run, _ = train(layers, repeat=False)
    played, times = train(layers, repeat=True)
    assert times == 4 * (DEPTH - 1 - 6)
    assert played == run


def test_a_short_stack_is_run() -> None:
    _, times = train(lambda: [Layer() for _ in range(6)], repeat=True)
    assert times == 0


def test_activations_that_leave_their_layer_are_noticed() -> None:
    with pytest.raises(Unrepeatable, match="outside of its layer"):
        train(lambda: [Hoarder() for _ in range(DEPTH)], repeat=True)
    Hoarder.kept.clear()


def test_checkpointed_layers_that_leave_activations_are_run() -> None:
    def layers() -> list[nn.Module]:
        return [Hoarder(mode="reentrant") for _ in range(DEPTH)]

    _, times = train(layers, repeat=True)
    assert times == 0
