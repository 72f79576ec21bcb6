"""The simulated ledger on fake CPU tensors, in this process; the fake device has its own tests."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.simulate.memory.ledger import SimulatedLedger, follow_resizes
from harness.simulate.memory.replay import walk


@pytest.fixture
def ledger() -> SimulatedLedger:
    return SimulatedLedger("cpu", workspace_bytes=0)


def live(ledger: SimulatedLedger) -> int:
    return sum(event.delta for event in ledger.events)


def test_births_and_deaths(ledger: SimulatedLedger) -> None:
    with FakeTensorMode(), ledger:
        first = torch.empty(1000, dtype=torch.float32)
        second = first + 1
        assert live(ledger) == 2 * 4096
        del first
        assert live(ledger) == 4096
        assert second.view(10, 100).shape == (10, 100)
        assert live(ledger) == 4096


def test_what_a_program_is_told(ledger: SimulatedLedger) -> None:
    with FakeTensorMode(), ledger:
        mask = torch.ones(4, 8, dtype=torch.bool)
        assert mask.all()
        assert not mask.any()
        assert not torch.isnan(torch.ones(3)).any()
        assert float(torch.ones(3).sum()) == 1.0


def test_routing_is_balanced_over_the_experts(ledger: SimulatedLedger) -> None:
    ledger.experts = 8
    with FakeTensorMode(), ledger:
        chosen = torch.zeros(2, 64, dtype=torch.bool)
        position, token = torch.where(chosen)
        # 2 choices of each of 64 tokens, an eighth of them for this expert.
        assert (position.shape, token.shape) == ((16,), (16,))
    assert ledger.assumed == {"balanced-routing"}


def test_each_multiplying_thread_takes_a_workspace_once() -> None:
    ledger = SimulatedLedger("cpu", workspace_bytes=8 * 2**20)
    with FakeTensorMode(), ledger:
        left = torch.empty(16, 16)
        before = live(ledger)
        product = left @ left
        again = left @ product
        assert live(ledger) - before == 8 * 2**20 + 2 * 1024
        del product, again
        assert live(ledger) - before == 8 * 2**20


def test_scratch_passes_through() -> None:
    ledger = SimulatedLedger("cpu", workspace_bytes=0)
    ledger.scratch["aten::mm"] = lambda args, out: 2**20
    with FakeTensorMode(), ledger:
        left = torch.empty(16, 16)
        ledger.enter_phase("forward")
        product = left @ left
        assert live(ledger) == 2 * 1024
        found = walk(ledger.events, None)
        assert found.peak == 2 * 1024 + 2**20
        del product


def test_resized_storages_change_their_block(ledger: SimulatedLedger) -> None:
    follow_resizes()
    with FakeTensorMode(), ledger:
        flat = torch.empty(4096, dtype=torch.uint8)
        assert live(ledger) == 4096
        flat.untyped_storage().resize_(0)
        assert live(ledger) == 0
        flat.untyped_storage().resize_(1024)
        assert live(ledger) == 1024
        del flat
        assert live(ledger) == 0


def test_nothing_is_counted_while_paused(ledger: SimulatedLedger) -> None:
    with FakeTensorMode(), ledger:
        with ledger.paused():
            kept = torch.empty(1024)
        assert live(ledger) == 0
        del kept
