"""The GPUs to predict for: those named on the command line, or the GPU of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.records import provenance
from matrices.catalogue import gpus
from matrices.catalogue.gpus import Gpu
from matrices.errors import UserError

# NVML counts the driver's memory too; a larger difference means another variant or a slice.
SAME_MEMORY = 0.05


def named_gpus(names: Sequence[str], file: Path | None) -> tuple[Gpu, ...]:
    """The GPUs with these names. A user's file adds to the catalogue and overrides it. Raises
    UserError."""
    if file is not None:
        gpus.gpus(file)  # raises for a mistake in it even when none of its GPUs is named
    return tuple(dict.fromkeys(gpus.gpu(name, file) for name in names))


def gpu_of_this_machine(file: Path | None = None) -> Gpu | None:
    """The GPU that torch would train on here; None without one, or when the catalogue lacks it."""
    installed = provenance.nvml().gpus
    if not installed or not provenance.uses_gpu_here():
        return None
    first = installed[0]
    try:
        known = gpus.gpu(first.name, file)
    except UserError:
        return None
    changes: dict[str, object] = {"compute_capability": first.compute_capability}
    if abs(first.memory_bytes / known.memory_bytes - 1) > SAME_MEMORY:
        changes["memory_bytes"] = first.memory_bytes
    return known.model_copy(update=changes)
