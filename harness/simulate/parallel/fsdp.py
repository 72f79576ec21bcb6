"""FSDP on a fake device: accelerate's environment variables, and patches of torch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from harness.meters.memory.ledger import tensors_by_category
from harness.simulate.memory import ledger as simulated_ledger
from harness.simulate.memory.ledger import SimulatedLedger
from matrices.errors import UserError


def environment(version: int) -> dict[str, str]:
    """What `accelerate launch` sets for the shipped profiles `fsdp` and `fsdp1`: full sharding,
    layers wrapped by the model's `_no_split_modules`.

    Raises UserError when accelerate is too old to know FSDP2 and would run FSDP1 instead.
    """
    import accelerate
    from accelerate import FullyShardedDataParallelPlugin

    known = {each.name for each in dataclasses.fields(FullyShardedDataParallelPlugin)}
    if version == 2 and "fsdp_version" not in known:
        raise UserError(
            f"accelerate {accelerate.__version__} has no FSDP2; use parallelism: fsdp1 or "
            "accelerate 1.6 and later",
            key="parallelism",
        )
    common = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": str(version),
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        # Weights then go to the devices unit by unit; with it, parameter by parameter.
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_SYNC_MODULE_STATES": "false",
    }
    if version == 2:
        return common | {"FSDP_RESHARD_AFTER_FORWARD": "true"}
    return common | {
        "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
        "FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE",
        "FSDP_FORWARD_PREFETCH": "false",
        "FSDP_USE_ORIG_PARAMS": "true",
    }


@contextlib.contextmanager
def patched() -> Iterator[None]:
    with shape_propagation_is_not_counted(), device_meshes_have_values(), accelerator_is_cuda():
        yield


@contextlib.contextmanager
def accelerator_is_cuda() -> Iterator[None]:
    """FSDP2 takes its mesh's device from torch's C++, which finds no GPU."""
    with patch.object(torch._C, "_get_accelerator", lambda check=None: torch.device("cuda")):
        yield


@contextlib.contextmanager
def shape_propagation_is_not_counted() -> Iterator[None]:
    """DTensor runs ops on fake tensors of the whole size to get shapes; that is no memory."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    name = "_propagate_tensor_meta_non_cached"
    propagate = getattr(ShardingPropagator, name)

    def quietly(*args: Any, **kwargs: Any) -> Any:
        with simulated_ledger.pause_all():
            return propagate(*args, **kwargs)

    with patch.object(ShardingPropagator, name, quietly):
        yield


@contextlib.contextmanager
def device_meshes_have_values() -> Iterator[None]:
    """A device mesh reads its ranks from a tensor, so it is made of real tensors."""
    from torch.distributed import device_mesh
    from torch.distributed.fsdp import _fully_shard
    from torch.utils._python_dispatch import _disable_current_modes

    make = device_mesh.init_device_mesh

    def outside(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return make(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for owner in (device_mesh, torch.distributed, _fully_shard._fsdp_init):
            if getattr(owner, "init_device_mesh", None) is make:
                stack.enter_context(patch.object(owner, "init_device_mesh", outside))
        yield


def tag_shards(ledger: SimulatedLedger, model: Any) -> None:
    """Tag the storages of sharded parameters, and those they are gathered into."""
    for tensor, name in tensors_by_category(model):
        ledger.tag(tensor, name)
    for module in model.modules():
        handle = getattr(module, "_handle", None)
        flat = getattr(handle, "flat_param", None)
        if flat is not None:
            kind = "adapters" if flat.requires_grad and _has_adapters(flat) else "weights"
            ledger.tag(flat.data, kind)


def _has_adapters(flat: Any) -> bool:
    return any(".lora_" in f".{name}" for name in getattr(flat, "_fqns", ()))


def tag_gradients(ledger: SimulatedLedger, optimizer: Any) -> None:
    """Tag gradient shards before the optimizer uses them."""
    for parameter in _parameters(optimizer):
        if parameter.grad is not None:
            ledger.tag(parameter.grad, "gradients")


def _parameters(optimizer: Any) -> Iterable[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
