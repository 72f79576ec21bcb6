"""What a cell starts with: its first record, its ranks and their environment."""

from __future__ import annotations

import dataclasses
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.ranks.launch_command import (
    RENDEZVOUS_PORT,
    command,
    fixed_port,
    launch_arguments,
    threads_per_process,
)
from harness.ranks.launch_environment import RankPosition
from harness.records import provenance
from harness.records.ranks import Placement
from harness.records.record import Record
from harness.system.files import write_atomically
from launch.cells.devices import Grant
from launch.processes.workers import Ranks, free_port
from matrices.cell import Cell

EngineName = Literal["by hand", "local", "slurm", "ray"]
RENDEZVOUS_FILE = "rendezvous.json"


@dataclass(frozen=True)
class Rendezvous:
    """Where the machines of one cell meet: the first machine's address and port. `job` identifies
    one start of one cell, so that no machine joins an earlier start."""

    address: str
    port: int
    job: str


def first_record(
    cell: Cell,
    place: Path,
    attempt: int,
    grant: Grant | None = None,
    placed: Placement | None = None,
    meeting: Rendezvous | None = None,
    threads: int | None = None,
) -> Record:
    """The record that an attempt starts with. Its command is relative to the record's directory."""
    threads = threads or threads_per_process(cell, grant.cores if grant is not None else None)
    argv = command(cell, provenance.uses_gpu_here(), threads, rendezvous=_meeting_place(meeting))
    record = provenance.new_record(cell, argv, attempt, threads)
    if grant is not None:
        record.provenance.environment |= _environment(threads, grant)
    return record.model_copy(update={"placement": placed or Placement()})


def placement(engine: EngineName, job: str | None, grant: Grant) -> Placement:
    """The engine, host and devices of a cell."""
    return Placement(
        engine=engine,
        hosts=[socket.gethostname()],
        devices=list(grant.devices),
        job=job,
        exclusive=grant.exclusive,
    )


def _environment(threads: int, grant: Grant) -> dict[str, str]:
    """The variables of every process of a cell: the devices it may see, and the number of threads
    that its recorded command names."""
    return {"OMP_NUM_THREADS": str(threads)} | grant.environment


def ranks(
    cell: Cell,
    working: Path,
    grant: Grant,
    meeting: Rendezvous | None = None,
    node_rank: int = 0,
) -> Ranks:
    """The processes of a cell on this machine. They start as the recorded command starts them, but
    with the profile in the working directory.

    Raises UserError when the port that its profile asks for is in use.
    """
    threads = threads_per_process(cell, grant.cores)
    variables = _environment(threads, grant)
    if not cell.is_distributed:
        return Ranks(environment=variables)
    gpu = provenance.uses_gpu_here()
    arguments = launch_arguments(cell, gpu, threads, working, _meeting_place(meeting), node_rank)
    count = cell.ranks_per_node
    address = meeting or Rendezvous("127.0.0.1", free_port(fixed_port(cell)), "")
    first = RankPosition(0, count, node_rank, cell.nodes, address.address, address.port)
    return Ranks(
        places=tuple(dataclasses.replace(first, local_rank=number) for number in range(count)),
        launch_arguments=tuple(arguments),
        environment=variables,
    )


def _meeting_place(meeting: Rendezvous | None) -> tuple[str, int]:
    """Address and port; none is this machine."""
    return (meeting.address, meeting.port) if meeting else (socket.gethostname(), RENDEZVOUS_PORT)


def announce(working: Path, rendezvous: Rendezvous) -> None:
    """Tell the other machines of a cell to use this working directory."""
    text = json.dumps(dataclasses.asdict(rendezvous)) + "\n"
    write_atomically(working / RENDEZVOUS_FILE, text)


def announced(working: Path) -> Rendezvous | None:
    """The rendezvous of a working directory; none for a cell on one machine."""
    try:
        return Rendezvous(**json.loads((working / RENDEZVOUS_FILE).read_text()))
    except (OSError, ValueError):
        return None  # not written yet, or the cell is published now
