"""The kinds of parallelism: one row each, read by rules, ranks, profiles, simulation and reports.

A new kind is a name in `Parallelism`, a row in `STRATEGIES` and a profile in `launch/profiles`.
Nothing else decides by the name of a kind; `tests/unit/test_matrices_parallelism.py` holds that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# How one cell is divided among devices. `fsdp` is FSDP2 (fully_shard), `fsdp1` the older wrapper.
Parallelism = Literal[
    "single",
    "ddp",
    "fsdp",
    "fsdp1",
    "zero1",
    "zero2",
    "zero3",
    "zero3-offload",
    "device-map",
]
Sharded = Literal["optimizer", "gradients", "parameters"]
ONE_PROCESS = ("NO",)


@dataclass(frozen=True)
class Strategy:
    """What a kind of parallelism does.

    `distributed_types` are accelerate's DistributedType: the first is what a profile says, each may
    be what accelerate reports when it trains. `shards` is what each rank holds only a part of.
    `fsdp_version` and `zero_stage` are set for torch's FSDP and DeepSpeed's ZeRO alone. `offloads`
    keeps the sharded state in host memory. `device_map` is transformers' own, for one process that
    puts its layers on several devices. `package` is a distribution, and its module, that no other
    kind needs.
    """

    distributed_types: tuple[str, ...]
    shards: tuple[Sharded, ...] = ()
    fsdp_version: int | None = None
    zero_stage: int | None = None
    offloads: bool = False
    device_map: str | None = None
    package: str | None = None

    @property
    def is_distributed(self) -> bool:
        """Whether `accelerate launch` starts one process, a rank, per device."""
        return self.distributed_types != ONE_PROCESS

    @property
    def several_devices(self) -> bool:
        """Whether a cell may have more than one device."""
        return self.is_distributed or self.device_map is not None

    @property
    def replicates(self) -> bool:
        """Whether each rank holds the whole model and optimizer, as DDP has it."""
        return self.is_distributed and not self.shards

    @property
    def shards_parameters(self) -> bool:
        """Whether each rank holds a part of the weights, the frozen ones too."""
        return "parameters" in self.shards


# What each stage of ZeRO divides: its paper's P_os, P_os+g and P_os+g+p (arXiv:1910.02054), and
# deepspeed/runtime/zero/config.py, ZeroStageEnum.
_OPTIMIZER: tuple[Sharded, ...] = ("optimizer",)
_GRADIENTS: tuple[Sharded, ...] = ("optimizer", "gradients")
_ALL: tuple[Sharded, ...] = ("optimizer", "gradients", "parameters")


def _zero(stage: int, shards: tuple[Sharded, ...], offloads: bool = False) -> Strategy:
    return Strategy(
        ("DEEPSPEED",), shards, zero_stage=stage, offloads=offloads, package="deepspeed"
    )


STRATEGIES: Mapping[Parallelism, Strategy] = {
    "single": Strategy(ONE_PROCESS),
    # accelerate's launcher starts the ranks of MULTI_GPU without GPUs too, as MULTI_CPU.
    "ddp": Strategy(("MULTI_GPU", "MULTI_CPU")),
    "fsdp": Strategy(("FSDP",), _ALL, fsdp_version=2),
    "fsdp1": Strategy(("FSDP",), _ALL, fsdp_version=1),
    "zero1": _zero(1, _OPTIMIZER),
    "zero2": _zero(2, _GRADIENTS),
    "zero3": _zero(3, _ALL),
    "zero3-offload": _zero(3, _ALL, offloads=True),
    # Layers are divided evenly among the visible devices, which compute one after another.
    "device-map": Strategy(ONE_PROCESS, device_map="balanced"),
}
