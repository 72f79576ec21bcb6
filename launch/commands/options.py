"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MatrixArgument = Annotated[
    str, typer.Argument(metavar="MATRIX", help="A YAML file, or the name of a shipped matrix.")
]
ResultsOption = Annotated[
    Path | None,
    typer.Option("--results", help="Results directory.  [default: results/<matrix name>]"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace a setting or an axis; a list makes an axis. Repeatable.",
    ),
]
SeedsOption = Annotated[int | None, typer.Option("--seeds", help="Run seeds 0 to N-1.", min=1)]
RetryOption = Annotated[
    str | None,
    typer.Option(
        "--retry",
        metavar="STATUS,...",
        help="Also run cells again that ended like this, e.g. oom,timeout. Failed and interrupted "
        "ones always are.",
    ),
]
TimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        min=1,
        help="Longest time for one cell.  [default: the matrix's timeout_seconds]",
    ),
]
PhaseTimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--phase-timeout",
        metavar="SECONDS",
        min=1,
        help="Longest time without progress (a phase entered, a step ended) of any process of a "
        "cell.  [default: the matrix's phase_timeout_seconds; else 1800 for cells on several "
        "devices and 14400 for those on one, not counting evaluation]",
    ),
]
SideBySideOption = Annotated[
    bool | None,
    typer.Option(
        "--side-by-side/--exclusive",
        help="Run cells that need fewer devices than there are at the same time, on devices of "
        "their own. Exclusive: one at a time, so that nothing disturbs its times; in SLURM, whole "
        "nodes.  [default: exclusive on this machine; what the partition does in SLURM]",
    ),
]
AllowBusyOption = Annotated[
    bool,
    typer.Option(
        "--allow-busy",
        help="Also use a GPU that another process uses; the record then says it is contaminated.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
GpuOption = Annotated[
    list[str] | None,
    typer.Option(
        "--gpu",
        metavar="NAME",
        help="Give a verdict for this GPU, e.g. rtx-4090. Repeatable; the libraries are told they "
        "run on the first.",
    ),
]
GpusFileOption = Annotated[
    Path | None,
    typer.Option(
        "--gpus-file",
        metavar="FILE",
        help="YAML with further GPUs, or other figures for known ones.",
    ),
]
StackOption = Annotated[
    str | None,
    typer.Option(
        "--stack",
        metavar="STACK",
        help="Predict under other versions: a directory of packages (pip install --no-deps "
        "--target), an interpreter, a requirements file, or pins NAME==VERSION,...",
    ),
]
NoSelfCheckOption = Annotated[
    bool, typer.Option("--no-self-check", help="Leave out the check of the fake device at start.")
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="ENGINE",
        help="fake-cuda or fake-cpu.  [default: fake-cuda where it can be had]",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", metavar="N", min=1, help="Cells at once.  [default: processors]"),
]
NoPredictOption = Annotated[
    bool, typer.Option("--no-predict", help="Leave the predictions out: the quick look.")
]
CheckOption = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Also make every check that a run makes before it starts: load configs, tokenizers, "
        "rows and tasks. Takes as long as the imports.",
    ),
]
SkipOption = Annotated[
    bool,
    typer.Option(
        "--skip-predicted-oom",
        help="Do not start cells that are predicted to run out of memory here; they are recorded "
        "as skipped, with the predicted figures.",
    ),
]
RecordsOption = Annotated[
    Path | None,
    typer.Option(
        "--records",
        metavar="DIR",
        help="Past records of the same GPU, to turn the floor of a step's time into an "
        "expectation.",
    ),
]
ExplainOption = Annotated[
    bool, typer.Option("--explain", help="Also by phase and category, the tensors at the peak.")
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model", metavar="MODEL", help="A known name, a hub id, or the path of a config.json."
    ),
]
OneGpuOption = Annotated[str, typer.Option("--gpu", metavar="NAME", help="A GPU, e.g. rtx-4090.")]
CountOption = Annotated[int, typer.Option("--count", metavar="N", min=1, help="How many of it.")]
MaxLengthOption = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        metavar="TOKENS",
        min=2,
        help="Length of the sequences.  [default: 2048, or the model's limit]",
    ),
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option("--method", help="full, lora or qlora; repeatable.  [default: all]"),
]
ParallelismOption = Annotated[
    list[str] | None,
    typer.Option("--parallelism", help="With several GPUs.  [default: ddp, fsdp, zero2, zero3]"),
]
LongestOption = Annotated[
    bool | None,
    typer.Option(
        "--longest/--no-longest",
        help="Search the longest sequence at micro batch 1 too.  [default: with one GPU]",
    ),
]

# Of `tunebench run`: where cells run.
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
