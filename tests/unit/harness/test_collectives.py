"""Bytes of collectives, against what DDP must send: the gradients of what is trained."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.meters.collectives import Collectives


@pytest.fixture
def two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def alone() -> Iterator[None]:
    os.environ.setdefault("MASTER_ADDR", "localhost")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_what_goes_in_or_out_counts_once(two_ranks: None) -> None:
    part, whole = torch.zeros(10), torch.zeros(20)
    with Collectives() as seen:
        dist.all_reduce(part)
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)
        dist.barrier()
    assert sum(seen.calls.values()) == 3
    assert sorted(seen.bytes.values()) == [40, 80, 80]


def test_ddp_sends_the_gradients_of_what_is_trained(alone: None) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    wrapped = DistributedDataParallel(model)
    with Collectives() as seen:
        wrapped(torch.randn(2, 16)).sum().backward()
    trained = 4 * (8 * 4 + 4)
    assert seen.communication.bytes == {"allreduce_": trained}


def test_a_step_starts_from_nothing(two_ranks: None) -> None:
    with Collectives() as seen:
        dist.all_reduce(torch.zeros(3))
        seen.clear()
        dist.all_reduce(torch.zeros(5))
    assert list(seen.communication.bytes.values()) == [20]
