"""Several devices: rank 0 of a run on `cell.devices` ranks, as `accelerate launch` starts it.

torch's fake process group answers every collective at once, so the libraries' own code shards the
model: accelerate prepares FSDP2, FSDP1 or DeepSpeed inside the Trainer, by the environment
variables that its launcher sets. `harness.simulate.run` uses it so; everything else is as on one
device:

    with ranks(cell) as rank:            # before the model is built
        with FakeTensorMode(allow_non_fake_inputs=True), ledger:
            ... build the model on rank.load_device, trainer = build_trainer(...)
            rank.begin(ledger, model)    # when training begins (Observer.train_begin)
            rank.step(ledger, optimizer) # when the optimizer's phase starts

and reads `rank.modelled`, `rank.assumptions` and `rank.host_bytes()` at the end.

Only rank 0 is simulated. The other ranks hold as much: FSDP1 and ZeRO pad what they shard; FSDP2
gives the first ranks the larger share if rows do not divide evenly, so rank 0 has the peak.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from harness.simulate.memory.ledger import SimulatedLedger
from harness.simulate.parallel import ddp, fsdp, zero
from matrices.cell import Cell
from matrices.errors import UserError
from matrices.parallelism import STRATEGIES

ALIKE = "rank 0 is simulated; the other ranks are alike by construction"
COLLECTIVES = "communication: NCCL's own buffers are not counted, collectives take no time"


def _no_bytes() -> int:
    return 0


def _nothing(*_: Any) -> None:
    return None


@dataclass
class SimulatedRank:
    """The simulated rank of a cell.

    `load_device` is where the weights have to be loaded: host memory if the library shards from
    there, None for the training device. `begin(ledger, model)` and `step(ledger, optimizer)` tag
    the shards in the ledger. `host_bytes()` is the training state of this rank in host memory.
    """

    ranks: int = 1
    load_device: torch.device | None = None
    begin: Callable[[SimulatedLedger, Any], None] = _nothing
    step: Callable[[SimulatedLedger, Any], None] = _nothing
    host_bytes: Callable[[], int] = _no_bytes
    modelled: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)


@contextlib.contextmanager
def ranks(cell: Cell) -> Iterator[SimulatedRank]:
    """Environment and process group of rank 0; nothing for a cell on one device.

    Raises UserError if the installed libraries do not have the cell's kind of parallelism.
    """
    strategy = cell.strategy
    if not strategy.is_distributed:
        if cell.devices != 1:
            others = [name for name, each in STRATEGIES.items() if each.is_distributed]
            raise UserError(
                f"{cell.devices} devices and no way to use them; set parallelism to one of "
                f"{', '.join(others)}",
                key="parallelism",
            )
        yield SimulatedRank()
        return
    if not torch.cuda.is_available():
        raise UserError(
            f"{cell.parallelism} on {cell.devices} devices is simulated on the fake cuda device "
            "only, which cannot be had here",
            key="parallelism",
        )
    layout = SimulatedRank(ranks=cell.devices, modelled=[ALIKE], assumptions=[COLLECTIVES])
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, _launcher(cell.devices)))
        stack.enter_context(_process_group(cell.devices))
        stack.enter_context(storages_have_addresses())
        stack.enter_context(data_assignment_keeps_the_device())
        stack.enter_context(rng_states_are_not_synchronized())
        # What divides the weights takes its part of them from host memory.
        layout.load_device = torch.device("cpu") if strategy.shards_parameters else None
        if strategy.replicates:
            stack.enter_context(ddp.buckets(layout.modelled))
        elif strategy.fsdp_version:
            stack.enter_context(patch.dict(os.environ, fsdp.environment(strategy.fsdp_version)))
            stack.enter_context(fsdp.patched())
            layout.begin, layout.step = fsdp.tag_shards, fsdp.tag_gradients
        else:
            stack.enter_context(patch.dict(os.environ, zero.environment(cell)))
            stack.enter_context(zero.patched())
            layout.begin, layout.step = zero.tag_shards, zero.tag_gradients
            layout.host_bytes = zero.host_bytes
            layout.assumptions.append(zero.BUCKETS)
        yield layout


def check(cell: Cell, model: nn.Module) -> None:
    """Refuse more ranks than the longest weight has rows. Raises UserError."""
    if not cell.strategy.shards:
        return
    rows = max((p.shape[0] for p in model.parameters() if p.dim() > 1), default=1)
    if cell.devices > rows:
        raise UserError(
            f"{cell.devices} ranks are more than the {rows} rows of the model's longest weight: "
            f"some would hold no part of any layer; use at most {rows}",
            key="devices",
        )


def _launcher(count: int) -> dict[str, str]:
    """Environment variables that torchrun sets for the first process of a node."""
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        # Not used: the process group exists already when the libraries ask for it.
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }


@contextlib.contextmanager
def _process_group(count: int) -> Iterator[None]:
    """torch's fake process group of `count` ranks, and accelerate's state reset before and
    after."""
    from accelerate.state import AcceleratorState
    from torch.testing._internal.distributed.fake_pg import FakeStore

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        with patch.object(torch.cuda, "device_count", lambda: count):
            yield
    finally:
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def storages_have_addresses() -> Iterator[None]:
    """FSDP and DeepSpeed compare addresses to see which tensors share memory, and whether they have
    any; fake tensors have address 0. The identity of the storage serves as its address."""
    real = torch.UntypedStorage.data_ptr

    def of_storage(storage: torch.UntypedStorage) -> int:
        if storage.device.type != "meta":
            return real(storage)
        return storage._cdata if storage.nbytes() else 0

    def of_tensor(tensor: torch.Tensor) -> int:
        start = of_storage(tensor.untyped_storage())
        return start + int(tensor.storage_offset()) * tensor.element_size() if start else 0

    with (
        patch.object(torch.UntypedStorage, "data_ptr", of_storage),
        patch.object(FakeTensor, "data_ptr", of_tensor),
    ):
        yield


@contextlib.contextmanager
def data_assignment_keeps_the_device() -> Iterator[None]:
    """`p.data = p.to("cuda")` does not change `fake_device` of a fake tensor: set it too."""
    plain: Any = torch.Tensor.data

    def exchange(tensor: Any, value: Any) -> None:
        plain.__set__(tensor, value)
        if isinstance(value, FakeTensor):
            tensor.fake_device = value.fake_device

    with patch.object(FakeTensor, "data", property(plain.__get__, exchange)):
        yield


@contextlib.contextmanager
def rng_states_are_not_synchronized() -> Iterator[None]:
    """accelerate broadcasts rank 0's random state; a fake tensor has no value to set it from."""
    import accelerate.data_loader

    with patch.object(accelerate.data_loader, "synchronize_rng_states", _nothing):
        yield
