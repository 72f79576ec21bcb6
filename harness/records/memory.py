"""The memory of a record: peaks by phase, categories, the largest tensors. Bytes are `int`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from harness.records.part import Part, Phase

CATEGORIES = (
    "weights",
    "quantized_weights",
    "quantization_state",
    "adapters",
    "gradients",
    "optimizer_states",
    "activations",
    "logits_and_loss",
    "temporaries",
    "workspaces",
)


class PhaseMemory(Part):
    """One phase on one rank. Peaks are within the phase.

    `ledger_*` count live tensor storages in 512-byte blocks on the training device; `allocated_`
    and `reserved_` are torch's CUDA counters; `process_` and `device_` are NVML's.
    """

    ledger_peak_bytes: int | None = None
    ledger_end_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    process_bytes: int | None = None
    device_bytes: int | None = None
    host_peak_rss_bytes: int | None = None


class LiveTensor(Part):
    """A storage that was live at the training peak."""

    bytes: int
    category: str
    op: str
    shape: list[int]
    dtype: str
    module: str
    phase: str


class Memory(Part):
    """`headline` names the meter behind `peak_bytes`: torch's CUDA counter where there is one,
    else the ledger. The peak is over the training phases of the untimed full-length steps; load
    and evaluation stand apart. `peak_bytes` and `peak_phase` are of one moment, and `by_category`,
    `top_tensors` and `ledger_peak_phase` are of another one where the headline is not the
    ledger's. On several ranks all of them are of the rank with the highest peak."""

    headline: Literal["cuda_allocated", "ledger"] | None = None
    peak_bytes: int | None = None
    peak_phase: Phase | None = None
    ledger_peak_bytes: int | None = Field(None, description="the ledger's training peak")
    ledger_peak_phase: Phase | None = Field(None, description="where the ledger has its peak")
    timed_peak_bytes: int | None = Field(
        None,
        description="torch's CUDA peak over the timed steps, whose phases are not told apart; on "
        "several ranks the largest",
    )
    phases: dict[Phase, list[PhaseMemory]] = Field(
        default_factory=dict, description="one entry per rank"
    )
    by_category: dict[str, int] = Field(
        default_factory=dict, description="ledger bytes by category at the ledger's training peak"
    )
    resident: dict[str, int] = Field(
        default_factory=dict,
        description="exact (unrounded) bytes by category held before the first step",
    )
    top_tensors: list[LiveTensor] = Field(default_factory=list)
    host_peak_rss_bytes: int | None = Field(None, description="over the timed steps")
    allocator_settings: dict[str, str] = Field(default_factory=dict)
