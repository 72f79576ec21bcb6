"""The command that runs one cell by hand: `accelerate launch` and what it is given.

It is made from the cell, wherever it is shown, recorded or run; what a record says its command was
is never run. A record holds it as it is called in the record's own directory, so that it is right
wherever the directory is moved.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.records import provenance
from harness.records.record import Record
from matrices.accelerate_profiles import DEEPSPEED_FILE
from matrices.cell import Cell

CELL, PROFILE, DEEPSPEED = "cell.json", "profile.yaml", "deepspeed.json"
BY_HAND = "by-hand"
SINGLE_PROCESS = Path(__file__).resolve().parent / "single_process.yaml"
# Where the first of several machines listens: torchrun's own default.
PORT = 29500
HERE = Path()
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:-]*")


def is_spread(cell: Cell) -> bool:
    """Whether the cell trains in processes that `accelerate launch` starts together."""
    return cell.train is not None and cell.parallelism not in ("single", "device-map")


def names_deepspeed(cell: Cell) -> bool:
    """Whether the cell's profile has a DeepSpeed file; the shipped ones of ZeRO do."""
    section = cell.profile.get("deepspeed_config") if cell.profile else {}
    own = isinstance(section, dict) and isinstance(section.get(DEEPSPEED_FILE), dict)
    return own if cell.profile else cell.parallelism.startswith("zero")


def threads_of(cell: Cell, cores: int | None = None) -> int:
    """Threads of each process of a cell that is given so many cores; none means all of here."""
    ranks = max(1, cell.devices // cell.nodes) if is_spread(cell) else 1
    return max(1, (cores or provenance.cpu_threads()) // ranks)


def accelerate() -> list[str]:
    """The start of an argv for accelerate's own command line, in this environment."""
    script = Path(sys.executable).parent / "accelerate"
    if script.exists():
        return [str(script)]
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli"]


def by_hand(
    cell: Cell,
    gpu: bool,
    threads: int,
    directory: Path = HERE,
    output: Path | None = None,
    program: Sequence[str] = ("accelerate",),
    meeting: tuple[str, int] = ("localhost", PORT),
) -> list[str]:
    """argv that runs the `cell.json` in a directory, and puts the record into `output`.

    Every default that a user's own accelerate configuration could change is given. The worker
    sets its precision itself. The number of threads is named because accelerate would otherwise
    choose one, and sums over a different number of threads differ in the last digits. For a cell on
    several machines it is machine 0's, which the others repeat with their own `--machine_rank`;
    `meeting` is where its first rank listens.
    """
    ending = ["--quiet"]  # the worker tells what went wrong; a second traceback hides it
    ending += ["--module", "harness.worker"]
    ending += [str(directory / CELL), str(output or directory / BY_HAND)]
    threaded = [provenance.THREADS_OPTION, str(threads)]
    profile = ["--config_file", str(directory / PROFILE)]
    if not is_spread(cell):
        return [
            *program,
            "launch",
            *(profile if gpu else ["--cpu"]),
            *("--num_processes", "1"),
            *("--num_machines", "1"),
            *("--mixed_precision", "no"),
            *("--dynamo_backend", "no"),
            *threaded,
            *ending,
        ]
    deepspeed = ["--deepspeed_config_file", str(directory / DEEPSPEED)]
    return [
        *program,
        "launch",
        *profile,
        *(deepspeed if names_deepspeed(cell) else ()),
        *("--num_processes", str(cell.devices)),
        *("--num_machines", str(cell.nodes)),
        *_machines(cell, meeting),
        *threaded,
        *ending,
    ]


def _machines(cell: Cell, meeting: tuple[str, int]) -> list[str]:
    # 0 is any free port; several machines have to know it beforehand.
    if cell.nodes == 1:
        return ["--main_process_port", str(cell.profile.get("main_process_port", 0))]
    address, port = meeting
    # Rank 0 is then on machine 0, whichever machine comes first.
    return [
        *("--machine_rank", "0"),
        *("--main_process_ip", address),
        *("--main_process_port", str(port)),
        "--same_network",
    ]


def of_record(
    record: Record,
    directory: Path,
    output: Path | None = None,
    program: Sequence[str] = ("accelerate",),
) -> list[str]:
    """The command of a record that is in a directory now, made anew from its cell."""
    gpu = provenance.uses_gpu(record.stack, record.hardware)
    hosts = [host for host in record.placement.hosts if _HOST.fullmatch(host)]
    meeting = (hosts[0] if hosts else "localhost", PORT)
    threads = provenance.recorded_threads(record) or threads_of(record.cell)
    return by_hand(record.cell, gpu, threads, directory, output, program, meeting)


def copy_profile(source: Path, target: Path) -> None:
    """Put the profile that a cell is started with beside its record."""
    for name in (PROFILE, DEEPSPEED):
        if (source / name).exists() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
