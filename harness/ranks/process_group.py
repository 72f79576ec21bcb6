"""The process group of a cell on several ranks: join, verify, release."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness import device
from harness.models.mismatch import VerificationError
from harness.ranks import deepspeed_build
from harness.ranks.launch_environment import RankPosition, torchrun_variables
from harness.ranks.state_files import record_path
from harness.records.reading import read_record
from harness.records.record import Record
from harness.system.child_process import fork
from harness.train import TrainingSchedule, sft_config
from matrices.accelerate_profiles import mixed_precision
from matrices.cell import Cell
from matrices.rules.parallelism import reentrant

CAST_BACK = "every weight to {dtype}, and trains fp32 copies of what is trained"
REENTRANT_FORCED = (
    "use_reentrant false: TRL checkpoints adapters under ZeRO-3 with use_reentrant true only"
)
# Another machine's file may become visible late: NFS keeps a directory's attributes for a minute.
FILE_WAIT_SECONDS = 120.0


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(cell: Cell, output_dir: Path) -> Any:
    """Join the process group.

    Returns the training arguments. The caller keeps them while it loads models: transformers reads
    from them whether ZeRO-3 partitions the weights. Raises VerificationError when the number of
    ranks is not the cell's number of devices: a launcher with other arguments starts fewer.
    """
    from accelerate import PartialState

    if world_size() != cell.devices:
        raise VerificationError(
            f"the cell asks for {cell.devices} ranks, and {world_size()} were started; start it by "
            "its recorded command"
        )
    if device.has_cuda():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif cell.strategy.fsdp_version:
        from harness.ranks import cpu_fsdp

        cpu_fsdp.install()
    if cell.strategy.zero_stage:
        deepspeed_build.load_host_collectives()
    state = PartialState(cpu=not device.has_cuda())
    if state.num_processes != cell.devices:
        raise VerificationError(
            f"the cell asks for {cell.devices} ranks, and {state.num_processes} met"
        )
    if cell.strategy.zero_stage:
        from deepspeed import init_distributed

        # DeepSpeed keeps its own count of ranks; on a CPU accelerate does not initialize it.
        init_distributed(auto_mpi_discovery=False)
    return sft_config(cell, None, TrainingSchedule(1, 0.0, prepared=True), output_dir)


def verify(accelerator: Any, cell: Cell) -> tuple[str, int]:
    """(distributed type, ranks) of a trainer's accelerator once it is prepared. Raises
    VerificationError when it is not what the cell asks for."""
    found = accelerator.distributed_type.value, int(accelerator.num_processes)
    if found[0] not in cell.strategy.distributed_types or found[1] != cell.ranks:
        raise VerificationError(
            f"the cell says {cell.parallelism} on {cell.devices} devices, accelerate trains as "
            f"{found[0]} on {found[1]} ranks"
        )
    return found


def load_device(cell: Cell) -> torch.device:
    """The device that weights are loaded to. FSDP shards them from host memory; DeepSpeed
    partitions them while they are read."""
    if cell.is_distributed and cell.strategy.fsdp_version:
        return torch.device("cpu")
    return device.training_device()


def shards_model(cell: Cell) -> bool:
    """Whether the engine shards the model: DDP only wraps it."""
    return cell.is_distributed and not cell.strategy.replicates


def release_engine(trainer: Any, cell: Cell) -> None:
    """Free the memory of an engine, so that another one can be built."""
    if not cell.is_distributed:
        return
    engine = trainer.model_wrapped
    if cell.strategy.zero_stage and hasattr(engine, "destroy"):
        engine.destroy()
    trainer.accelerator.free_memory()


def substitutions(cell: Cell) -> list[str]:
    """What ran instead of what the cell asks for, on these devices."""
    from harness.ranks import cpu_fsdp

    said = []
    if cell.strategy.fsdp_version and not device.has_cuda():
        said.append(cpu_fsdp.SUBSTITUTION)
    if cell.strategy.zero_stage and mixed_precision(cell) != "no":
        # deepspeed/runtime/engine.py, _cast_module_mixed_precision.
        if cell.quantization is not None and cell.quantization.kbit_preparation:
            said.append(f"kbit_preparation's fp32 norms and head: DeepSpeed casts {CAST_BACK}")
        elif cell.model.weight_dtype == "fp32":
            said.append(f"weight_dtype fp32: DeepSpeed casts {CAST_BACK}")
    train = cell.train
    if (
        train is not None
        and train.gradient_checkpointing
        and reentrant(cell) != train.use_reentrant
    ):
        said.append(REENTRANT_FORCED)
    return [each.format(dtype=mixed_precision(cell)) for each in said]


def clear_environment() -> None:
    """Remove the launcher's variables from this process: libraries would look for other ranks."""
    ours = torchrun_variables(RankPosition())
    for name in list(os.environ):
        if name in ours or name.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_")):
            del os.environ[name]


def wait_for_everyone() -> None:
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def other_records(output_dir: Path, count: int) -> list[Record]:
    """The records of ranks 1 to count - 1, in order. Call it after the ranks have written them.

    Raises RuntimeError when a file does not appear within FILE_WAIT_SECONDS.
    """
    return [_wait_for_record(record_path(output_dir, each)) for each in range(1, count)]


def _wait_for_record(path: Path) -> Record:
    until = time.monotonic() + FILE_WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            raise RuntimeError(
                f"{path.name} of another rank did not appear: do all machines of this cell share "
                "the results directory?"
            )
        time.sleep(0.2)
    return read_record(path)


def run_in_child(work: Callable[[], int]) -> int:
    """Run `work` in a forked process and wait; returns its exit code, negative for a signal.

    A training engine or CUDA context that it creates ends with it. When the caller is interrupted
    by an exception, as a signal handler raises, the child is ended first.
    """
    child = fork(work)
    try:
        _, status = os.waitpid(child, 0)
    except BaseException:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    return os.waitstatus_to_exitcode(status)
