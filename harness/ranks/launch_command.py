"""The command that runs one cell: `accelerate launch` and its arguments.

Every command that is shown, recorded or run is built here from a cell; the command in a record is
never run. Paths in a record's command are relative to the record's directory, so that the command
stays right when the directory is moved.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.records import provenance
from harness.records.reading import CELL
from harness.records.record import Record
from matrices.accelerate_profiles import DEEPSPEED_FILE
from matrices.cell import Cell

PROFILE, DEEPSPEED = "profile.yaml", "deepspeed.json"
BY_HAND = "by-hand"
SINGLE_PROCESS = Path(__file__).resolve().parent / "single_process.yaml"
MODULE = "harness.worker"
# Where the first of several machines listens: torchrun's own default.
RENDEZVOUS_PORT = 29500
CURRENT_DIRECTORY = Path()
ACCELERATE_MODULE = "accelerate.commands.accelerate_cli"
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:-]*")


def has_deepspeed_file(cell: Cell) -> bool:
    """Whether the cell's profile has a DeepSpeed file; the shipped ones of ZeRO do."""
    section = cell.profile.get("deepspeed_config") if cell.profile else {}
    own = isinstance(section, dict) and isinstance(section.get(DEEPSPEED_FILE), dict)
    return own if cell.profile else bool(cell.strategy.zero_stage)


def threads_per_process(cell: Cell, cores: int | None = None) -> int:
    """Threads of each process of a cell on `cores` cores; None means all cores of this machine."""
    return max(1, (cores or provenance.cpu_threads()) // cell.ranks_per_node)


def fixed_port(cell: Cell) -> int:
    """The port that a user's profile asks for; 0 is any free one."""
    port = str(cell.profile.get("main_process_port"))
    return int(port) if port.isdigit() else 0


def accelerate() -> list[str]:
    """The start of an argv for accelerate's own command line, in this environment."""
    script = Path(sys.executable).parent / "accelerate"
    if script.exists():
        return [str(script)]
    return [sys.executable, "-m", ACCELERATE_MODULE]


def runs_accelerate(argv: Sequence[str]) -> bool:
    """Whether an argv starts accelerate's command line."""
    return Path(argv[0]).name == "accelerate" or ACCELERATE_MODULE in argv


def command(
    cell: Cell,
    gpu: bool,
    threads: int,
    directory: Path = CURRENT_DIRECTORY,
    output: Path | None = None,
    program: Sequence[str] = ("accelerate",),
    rendezvous: tuple[str, int] = ("localhost", RENDEZVOUS_PORT),
    machine_rank: int = 0,
) -> list[str]:
    """argv that runs the `cell.json` in a directory, and puts the record into `output`."""
    return [
        *program,
        "launch",
        *launch_arguments(cell, gpu, threads, directory, rendezvous, machine_rank),
        *("--module", MODULE),
        *(str(directory / CELL), str(output or directory / BY_HAND)),
    ]


def launch_arguments(
    cell: Cell,
    gpu: bool,
    threads: int,
    directory: Path = CURRENT_DIRECTORY,
    rendezvous: tuple[str, int] = ("localhost", RENDEZVOUS_PORT),
    machine_rank: int = 0,
) -> list[str]:
    """The arguments of `accelerate launch` before the module that it runs.

    Every option that a user's accelerate configuration could change is explicit. The worker
    sets its precision itself. `threads` are those of each process; accelerate would otherwise
    choose a number, and sums over a different number of threads differ in the last digits.
    `rendezvous` is the address and port where the first rank of a cell on several machines listens.
    """
    profile = ["--config_file", str(directory / PROFILE)]
    if cell.is_distributed:
        deepspeed = ["--deepspeed_config_file", str(directory / DEEPSPEED)]
        chosen = [
            *profile,
            *(deepspeed if has_deepspeed_file(cell) else ()),
            *("--num_processes", str(cell.devices)),
            *("--num_machines", str(cell.nodes)),
            *_rendezvous_arguments(cell, rendezvous, machine_rank),
        ]
    else:
        chosen = [
            *(profile if gpu else ["--cpu"]),
            *("--num_processes", "1"),
            *("--num_machines", "1"),
            *("--mixed_precision", "no"),
            *("--dynamo_backend", "no"),
        ]
    # The worker prints its error; accelerate's own traceback would hide it.
    return [*chosen, provenance.THREADS_OPTION, str(threads), "--quiet"]


def _rendezvous_arguments(cell: Cell, rendezvous: tuple[str, int], machine_rank: int) -> list[str]:
    # On one machine the launcher finds a free port; several machines need a known port.
    if cell.nodes == 1:
        return ["--main_process_port", str(fixed_port(cell))]
    address, port = rendezvous
    # Rank 0 is then on machine 0, whichever machine comes first.
    return [
        *("--machine_rank", str(machine_rank)),
        *("--main_process_ip", address),
        *("--main_process_port", str(port)),
        "--same_network",
    ]


def command_of_record(
    record: Record,
    directory: Path,
    output: Path | None = None,
    program: Sequence[str] = ("accelerate",),
) -> list[str]:
    """The command of a record in a directory, built from its cell."""
    gpu = provenance.uses_gpu(record.stack, record.hardware)
    hosts = [host for host in record.placement.hosts if _HOST.fullmatch(host)]
    rendezvous = (hosts[0] if hosts else "localhost", RENDEZVOUS_PORT)
    threads = provenance.recorded_threads(record) or threads_per_process(record.cell)
    return command(record.cell, gpu, threads, directory, output, program, rendezvous)


def copy_profile(source: Path, target: Path) -> None:
    """Copy the profile of a cell to the directory of its record."""
    for name in (PROFILE, DEEPSPEED):
        if (source / name).exists() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
