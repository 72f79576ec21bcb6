"""The environment of a rank: the variables that `accelerate launch` and torchrun set.

Ranks of a sweep are forked from a server that has the stack imported, which saves each of them 10
to 15 s. Their environment comes out of accelerate's own launcher, given the arguments of the
recorded command, so that both ways run the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from harness.ranks.launch_command import MODULE


@dataclass(frozen=True)
class RankPosition:
    """One rank: the `local_rank`-th of `local_ranks` on the `node_rank`-th of `nodes`
    machines, whose first rank listens at `address`:`port`."""

    local_rank: int = 0
    local_ranks: int = 1
    node_rank: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def rank(self) -> int:
        return self.node_rank * self.local_ranks + self.local_rank

    @property
    def world_size(self) -> int:
        return self.nodes * self.local_ranks


def set_environment(arguments: Sequence[str], place: RankPosition) -> None:
    """Make this process the rank at `place` of `accelerate launch <arguments>`.

    Raises ValueError, in accelerate's words, when its launcher refuses the arguments.
    """
    os.environ.update(environment(arguments, place))


def environment(arguments: Sequence[str], place: RankPosition) -> dict[str, str]:
    """The variables that differ from this process's own."""
    found = _accelerate_variables(arguments) | torchrun_variables(place)
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


def _accelerate_variables(arguments: Sequence[str]) -> dict[str, str]:
    """As accelerate/commands/launch.py: launch_command, up to where it starts processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import check_cuda_p2p_ib_support
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    parser = launch_command_parser()
    given = parser.parse_args([*arguments, "--module", MODULE])
    given, defaults, precision_from_file = _validate_launch_command(given)
    # With 0 the launcher does not check that the port is free: rank 0 may already use it.
    given.main_process_port = 0
    if given.use_deepspeed:
        fields = list(defaults.deepspeed_config) if defaults else []
        fields += ["mixed_precision"] if precision_from_file else []
        given.deepspeed_fields_from_accelerate_config = ",".join(fields)
        found = dict(prepare_deepspeed_cmd_env(given)[1])
        # It puts the current directory first on the path, which may have a harness.py.
        found.pop("PYTHONPATH", None)
    else:
        found = dict(prepare_multi_gpu_env(given))
    if not check_cuda_p2p_ib_support():
        found.setdefault("NCCL_P2P_DISABLE", "1")
        found.setdefault("NCCL_IB_DISABLE", "1")
    return found


def torchrun_variables(place: RankPosition) -> dict[str, str]:
    """The variables that torch.distributed's elastic agent sets for a worker."""
    return {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "GROUP_RANK": str(place.node_rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_WORLD_SIZE": str(place.local_ranks),
        "GROUP_WORLD_SIZE": str(place.nodes),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
    }
