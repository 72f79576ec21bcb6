"""What a record ran on and read: software, hardware, provenance."""

from __future__ import annotations

from pydantic import Field

from harness.records.part import Part


class Stack(Part):
    """Software: package versions, and the commit of a tunebench run from a checkout."""

    python: str
    packages: dict[str, str]
    commit: str | None = None
    dirty: bool | None = None


class Hardware(Part):
    cpu: str
    cpu_count: int
    host_memory_bytes: int
    accelerator: str | None = Field(None, description="device name; none on a CPU machine")
    accelerator_count: int = 0
    accelerator_memory_bytes: int | None = None
    driver: str | None = None


class Provenance(Part):
    """Which bytes were read: commits of hub models, hashes of files."""

    model: dict[str, str] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict)
    unexpected_weights: dict[str, int] = Field(
        default_factory=dict,
        description="tensors of the checkpoint that the model has no place for: names with * for "
        "numbers, and how many each",
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="variables that change results, as they were"
    )
