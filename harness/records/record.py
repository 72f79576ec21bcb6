"""The record: what is known about one cell after (or before) it ran. A versioned contract.

Its parts are in the files beside this one; `harness.records.reading` reads it from disk. All are
light (no torch), so that launch and reports read records quickly. Bytes are `int` bytes, durations
`float` seconds, times ISO 8601 in UTC. A figure that could not be measured is `None`, and
`Record.missing` gives the reason under its dotted name.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field, PrivateAttr

from harness.records.memory import Memory
from harness.records.part import Part, Status
from harness.records.quality import Quality
from harness.records.ranks import Failure, Placement, RankState
from harness.records.speed import Preparation, Speed, Steps
from harness.records.stack import Hardware, Provenance, Stack
from harness.records.verified import Verified
from matrices.cell import Cell

SCHEMA_VERSION = 1


class Artifacts(Part):
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    adapter_bytes: int | None = Field(None, description="size of the saved adapter file")
    adapter_path: str | None = Field(None, description="relative to the record's directory")


class RecordedPrediction(Part):
    """What was predicted for this cell on this device before it ran, and how far off it was.

    `stack` names the versions the prediction executed; `margin` is the relative error it allowed
    for. Seconds are of one optimizer step.
    """

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    steady_allocated_bytes: int | None = None
    peak_phase: str | None = None
    by_phase: dict[str, int] = Field(default_factory=dict)
    engine: str | None = None
    device: str | None = None
    margin: float | None = None
    stack: dict[str, str] = Field(default_factory=dict)
    floor_seconds: float | None = None
    expected_seconds: float | None = None
    error: float | None = Field(
        None, description="predicted / measured - 1 of the training peak (memory.peak_bytes)"
    )
    expected_seconds_error: float | None = Field(
        None, description="predicted / measured - 1 of the median step time"
    )


class Record(Part):
    schema_version: int = SCHEMA_VERSION
    cell_id: str
    cell: Cell
    base_cell_ids: dict[str, str] = Field(
        default_factory=dict, description="untouched and quantized: the cells to judge against"
    )
    stack_id: str
    stack: Stack
    hardware: Hardware
    command: list[str] = Field(
        description="argv that reproduces this cell by hand, called in the record's directory"
    )
    status: Status
    reason: str | None = None
    phase: str | None = Field(None, description="what the worker was doing last")
    started: str
    ended: str | None = None
    attempt: int = 1
    preparation: Preparation | None = None
    memory: Memory = Field(default_factory=Memory)
    steps: Steps = Field(default_factory=Steps)
    speed: Speed = Field(default_factory=Speed)
    quality: Quality = Field(default_factory=Quality)
    artifacts: Artifacts = Field(default_factory=Artifacts)
    verified: Verified = Field(default_factory=Verified)
    prediction: RecordedPrediction | None = None
    ranks: list[RankState] = Field(default_factory=list)
    placement: Placement = Field(default_factory=Placement)
    contaminated: list[str] = Field(
        default_factory=list, description="why its figures are in doubt: what else used its devices"
    )
    failure: Failure | None = None
    provenance: Provenance = Field(default_factory=Provenance)
    missing: dict[str, str] = Field(
        default_factory=dict, description="dotted name of a None figure to the reason"
    )

    # Settings of the cell that only a newer writer knows; each has that writer's default, as any
    # other value would be part of `cell_id` (see `harness.records.reading.read_record`).
    _unknown_settings: dict[str, Any] = PrivateAttr(default_factory=dict)

    def to_json(self) -> str:
        text = self.model_dump_json(indent=1)
        if self._unknown_settings:
            plain = json.loads(text)
            for name, value in self._unknown_settings.items():
                known = plain["cell"].get(name)
                plain["cell"][name] = known | value if isinstance(known, dict) else value
            text = json.dumps(plain, indent=1, ensure_ascii=False)
        return text + "\n"
