"""How the processes of one cell are started: `accelerate launch` and the profile it is given.

The shipped profiles are files in `launch/profiles`, one per parallelism; a matrix can name another.
Either is rendered with the cell's values into the cell's own directory, so that it is kept beside
the record and the recorded command finds it there.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from harness import provenance
from harness.files import write_atomically
from matrices.cell import Cell
from matrices.errors import UserError, nearest
from matrices.profiles import DEEPSPEED_FILE, read_profile, rendered, values

SHIPPED = Path(__file__).resolve().parent / "profiles"
PROFILE = "profile.yaml"
DEEPSPEED = "deepspeed.json"
# Where the first of several machines listens: torchrun's own default.
PORT = 29500


def shipped() -> list[str]:
    """Names of the profiles that come with tunebench."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def text(name: str) -> str:
    """A shipped profile as it is written, or with `.json` the DeepSpeed file it names. Raises
    UserError for a name that is none."""
    known = [*shipped(), *sorted(path.name for path in SHIPPED.glob("*.json"))]
    if name not in known:
        raise UserError(
            f"no profile is called {name!r}{nearest(name, known)}; shipped are {', '.join(known)}"
        )
    return (SHIPPED / (name if name.endswith(".json") else f"{name}.yaml")).read_text()


def question(name: str) -> str:
    """What a shipped profile does: the first sentence of its comment."""
    lines = text(name).splitlines()
    words = " ".join(line.lstrip("# ") for line in lines[: lines.index("#")])
    return words.split(". ")[0].rstrip(".")


def is_spread(cell: Cell) -> bool:
    """Whether the cell trains in processes that `accelerate launch` starts together."""
    return cell.train is not None and cell.parallelism not in ("single", "device-map")


def content(cell: Cell) -> dict[str, Any]:
    """The profile of a cell, not filled in: its own, else the shipped one of its parallelism."""
    return dict(cell.profile) or read_profile(SHIPPED / f"{cell.parallelism}.yaml")


def write(cell: Cell, directory: Path, gpu: bool | None = None) -> None:
    """Render the profile of a cell into a directory: `profile.yaml`, and `deepspeed.json` if it
    names one. Nothing for a cell in one process. `gpu` is whether it trains on GPUs; none asks this
    machine.
    """
    if not is_spread(cell):
        return
    gpu = _uses_gpu() if gpu is None else gpu
    filled: dict[str, Any] = rendered(content(cell), values(cell, gpu))
    section = filled.get("deepspeed_config")
    if isinstance(section, dict) and isinstance(section.get(DEEPSPEED_FILE), dict):
        configuration = section[DEEPSPEED_FILE]
        section[DEEPSPEED_FILE] = DEEPSPEED
        write_atomically(directory / DEEPSPEED, json.dumps(configuration, indent=2) + "\n")
    origin = "the matrix's own profile" if cell.profile else f"the profile {cell.parallelism}"
    written = yaml.safe_dump(filled, sort_keys=False, default_flow_style=False)
    write_atomically(
        directory / PROFILE, f"# Made from {origin} for the cell beside it.\n{written}"
    )


def command(
    cell: Cell,
    directory: Path,
    gpu: bool,
    output: Path | None = None,
    address: str | None = None,
    port: int = PORT,
) -> list[str]:
    """argv that runs the `cell.json` in a directory by hand, as the runner would.

    `output` is where the record goes; none is a directory named after the cell's, where the command
    is called. For a cell on several machines it is machine 0's command, which the others repeat
    with their own `--machine_rank`; `address` and `port` are where its first rank listens, none
    means this machine.
    """
    cell_path = directory / "cell.json"
    output = output or Path(f"{directory.name}.by-hand")
    if not is_spread(cell):
        return provenance.worker_command(cell_path, output, gpu)
    # 0 is any free port; several machines have to know it beforehand.
    machines = ["--main_process_port", str(cell.profile.get("main_process_port", 0))]
    if cell.nodes > 1:
        machines = ["--machine_rank", "0", "--main_process_ip", address or socket.gethostname()]
        # Rank 0 is then on machine 0, whichever machine comes first.
        machines += ["--main_process_port", str(port), "--same_network"]
    local_ranks = max(1, cell.devices // cell.nodes)
    threads = max(1, provenance.cpu_threads() // local_ranks)
    deepspeed = ["--deepspeed_config_file", str(directory / DEEPSPEED)]
    return [
        *provenance.accelerate(),
        "launch",
        *("--config_file", str(directory / PROFILE)),
        *(deepspeed if names_deepspeed(cell) else ()),
        *("--num_processes", str(cell.devices)),
        *("--num_machines", str(cell.nodes)),
        *machines,
        *("--num_cpu_threads_per_process", str(threads)),
        "--quiet",
        *("--module", "harness.worker"),
        str(cell_path),
        str(output),
    ]


def names_deepspeed(cell: Cell) -> bool:
    """Whether the cell's profile has a DeepSpeed file."""
    section = content(cell).get("deepspeed_config")
    return isinstance(section, dict) and isinstance(section.get(DEEPSPEED_FILE), dict)


def launch_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments of `accelerate launch` in a command, without the module and its own."""
    return list(argv[argv.index("launch") + 1 : argv.index("--module")])


def _uses_gpu() -> bool:
    return provenance.uses_gpu(provenance.stack(), provenance.hardware())
