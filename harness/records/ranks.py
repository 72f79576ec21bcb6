"""The processes of a cell in its record: ranks, their collectives, failures, placement."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from harness.records.part import Part, Status
from harness.records.speed import Tokens


class Failure(Part):
    """Why the status is not ok. For oom: the phase, and the bytes asked for where known."""

    type: str
    message: str
    phase: str | None = None
    requested_bytes: int | None = None


class Communication(Part):
    """Collectives that one rank called in one optimizer step, by name: how often, and the bytes of
    the tensors it handed over or received, whichever is more."""

    calls: dict[str, int] = Field(default_factory=dict)
    bytes: dict[str, int] = Field(default_factory=dict)


class RankState(Part):
    """One rank: where it is (written by itself while it runs), and what only it can know.

    `beat` is when the process last showed that it is alive, `progressed` when it last entered a
    phase or ended a step: both seconds since the epoch.
    """

    rank: int
    world_size: int = 1
    host: str = ""
    pid: int | None = None
    device: str | None = Field(None, description="GPU's UUID, or cpu")
    phase: str | None = None
    step: int | None = None
    beat: float | None = None
    progressed: float | None = None
    status: Status | None = Field(None, description="none until it ended")
    reason: str | None = None
    failure: Failure | None = None
    exit_code: int | None = Field(None, description="of its process; negative for a signal")
    parameter_bytes: int | None = Field(
        None, description="parameters it holds once the model is prepared for training"
    )
    whole_parameter_bytes: int | None = Field(
        None, description="all parameters of the model, as they were loaded"
    )
    parameter_share: float | None = Field(
        None,
        description="of the model's parameters, those it holds, by number: FSDP2 turns what is "
        "trained to fp32, so bytes alone do not tell whether it is sharded",
    )
    tokens: Tokens | None = Field(None, description="its share of speed.tokens")
    communication: Communication | None = None
    stack_file: str | None = Field(
        None, description="where each of its threads stood when it was killed, beside the record"
    )


class Placement(Part):
    """Who started the cell, and on what. `devices` are GPU UUIDs, or cpu:0, cpu:1..."""

    engine: Literal["by hand", "local", "slurm", "ray"] = "by hand"
    hosts: list[str] = Field(default_factory=list)
    devices: list[str] = Field(default_factory=list)
    job: str | None = Field(None, description="the engine's name of the job")
    exclusive: bool | None = Field(
        None, description="whether no other cell ran on the machine meanwhile"
    )
