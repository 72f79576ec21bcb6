"""Options of `tunebench run` that say where cells run."""

from __future__ import annotations

from typing import Annotated

import typer

OnOption = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="ENGINE",
        help="Where cells run: local, slurm or ray.  [default: local]",
    ),
]
PartitionOption = Annotated[
    str | None,
    typer.Option("--partition", metavar="NAME", help="SLURM: partition.  [default: SLURM's]"),
]
TimeOption = Annotated[
    str | None,
    typer.Option(
        "--time",
        metavar="TIME",
        help="SLURM: limit for one cell, e.g. 90, 2:00:00 or 1-12.  [default: the partition's]",
    ),
]
AccountOption = Annotated[
    str | None, typer.Option("--account", metavar="NAME", help="SLURM: account to charge.")
]
QosOption = Annotated[
    str | None, typer.Option("--qos", metavar="NAME", help="SLURM: quality of service.")
]
ConstraintOption = Annotated[
    str | None, typer.Option("--constraint", metavar="FEATURE", help="SLURM: feature of the nodes.")
]
GresOption = Annotated[
    str | None,
    typer.Option(
        "--gres",
        metavar="NAME[:TYPE]",
        help="SLURM: what a device is; how many follows from the cell.  [default: gpu, where the "
        "partition has any]",
    ),
]
CpusPerTaskOption = Annotated[
    int | None,
    typer.Option(
        "--cpus-per-task",
        metavar="N",
        min=1,
        help="SLURM: processors of a cell on each node.  [default: SLURM's; all of a node where "
        "there are no GPUs]",
    ),
]
MemOption = Annotated[
    str | None,
    typer.Option("--mem", metavar="SIZE", help="SLURM: host memory on each node, e.g. 64G."),
]
RequeuesOption = Annotated[
    int,
    typer.Option(
        "--requeues",
        metavar="N",
        min=0,
        help="SLURM: how often a cell that reaches the time limit starts anew before that is its "
        "result.",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="Ray: the head node; auto finds one on this machine, local starts one for this run.  "
        "[default: RAY_ADDRESS, else auto]",
    ),
]
ResourceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--resource",
        metavar="NAME=PER_DEVICE",
        help="Ray: what a device is to the cluster, e.g. accelerator=1; repeatable, e.g. GPU=1 and "
        "CPU=8.  [default: a GPU; all processors of a node where there are none]",
    ),
]
