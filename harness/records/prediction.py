"""The prediction: the result of simulating one cell. Light (no torch), like the record.

Bytes are `int` bytes on one device unless a name says host; seconds are `float` s. Every
figure is predicted, none is measured.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from harness.records.memory import LiveTensor
from harness.records.part import Part
from matrices.catalogue.gpus import Gpu
from matrices.cell import Cell

PREDICTION_VERSION = 1

PredictionStatus = Literal["predicted", "invalid", "failed"]
Outcome = Literal["fits", "fits-after-retries", "oom"]
PredictionEngine = Literal["fake-cuda", "fake-cpu"]


class PredictedMemory(Part):
    """`peak_*` is over the training phases (forward, backward, optimizer_step), as torch's
    `max_memory_allocated` reset before `train()` would say; loading stands apart in `by_phase`."""

    peak_allocated_bytes: int | None = None
    steady_allocated_bytes: int | None = Field(
        None, description="live between steps: what is allocated when the last step is done"
    )
    peak_reserved_bytes: int | None = Field(
        None, description="held by the caching allocator, loading included; no capacity set"
    )
    peak_phase: str | None = None
    by_category: dict[str, int] = Field(
        default_factory=dict, description="live bytes by category at the training peak"
    )
    by_phase: dict[str, int] = Field(
        default_factory=dict, description="peak allocated bytes within each phase, load included"
    )
    resident: dict[str, int] = Field(
        default_factory=dict, description="exact bytes by category held before the first step"
    )
    top_tensors: list[LiveTensor] = Field(
        default_factory=list, description="largest storages that are live at the training peak"
    )
    outside_pool_bytes: int = Field(
        0, description="managed memory outside torch's pool (paged optimizer states)"
    )


class RankMemory(Part):
    """One rank. Where ranks are alike by construction only rank 0 is simulated, and the
    prediction's `modelled` says so."""

    rank: int
    peak_allocated_bytes: int
    steady_allocated_bytes: int
    peak_reserved_bytes: int
    host_bytes: int = Field(0, description="training state held in host memory (offload)")


class PredictedOutOfMemory(Part):
    """Where a device of the given capacity would refuse."""

    phase: str
    op: str
    module: str
    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int


class Verdict(Part):
    """One GPU's answer: the same allocations behind an allocator of that capacity."""

    gpu: str
    capacity_bytes: int = Field(description="device memory left for torch's pool")
    context_bytes: int = Field(description="assumed for the CUDA context and libraries")
    outcome: Outcome
    retries: int = Field(0, description="times the cache had to be freed to make room")
    peak_reserved_bytes: int | None = None
    oom: PredictedOutOfMemory | None = None


class PredictedSpeed(Part):
    """`floor_seconds` is what a step takes at the device's published rates; `expected_seconds`
    comes from past records of that device and is null, with the reason in `note`, without any."""

    gpu: str | None = None
    flops_per_step: int | None = None
    bytes_per_step: int | None = Field(
        None, description="device memory read and written by the step's operations"
    )
    floor_seconds: float | None = None
    expected_seconds: float | None = None
    expected_seconds_low: float | None = None
    expected_seconds_high: float | None = None
    calibration_records: int = 0
    note: str | None = None


class Prediction(Part):
    """`stack` names the versions that were executed. `assumptions` hold for every figure;
    `modelled` names the parts that were computed by a model instead of executed."""

    schema_version: int = PREDICTION_VERSION
    cell_id: str
    cell: Cell
    stack: dict[str, str]
    status: PredictionStatus
    reason: str | None = None
    engine: PredictionEngine | None = None
    margin: float | None = Field(
        None, description="relative error to allow for; wider where the fake device cannot be had"
    )
    device: str | None = Field(None, description="GPU whose properties the libraries were told")
    memory: PredictedMemory = Field(default_factory=PredictedMemory)
    per_rank: list[RankMemory] = Field(default_factory=list)
    verdicts: list[Verdict] = Field(default_factory=list)
    speed: PredictedSpeed = Field(default_factory=PredictedSpeed)
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    quantized_share: float | None = Field(
        None, description="of the base model's weights, those in 4 bit, by number"
    )
    assumptions: list[str] = Field(default_factory=list)
    modelled: list[str] = Field(default_factory=list)
    simulation_seconds: float | None = Field(None, description="without imports")

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


class Request(Part):
    """What the simulating process is asked: `python -m harness.simulate REQUEST.json`.

    It answers on standard output, one line of JSON `{"index": 0, "prediction": {...}}` per cell as
    each is done, in any order; everything else it or a library says goes to standard error.
    """

    cells: list[Cell]
    gpu: Gpu | None = Field(None, description="what the libraries are told; none: an A100-80GB")
    judge: list[Gpu] = Field(default_factory=list, description="GPUs to give verdicts for")
    engine: PredictionEngine | None = Field(
        None, description="none: fake-cuda, else fake-cpu with a note"
    )
    self_check: bool = True
    workers: int = 1
