"""The processes with memory on each GPU, as NVML reports them. Light: no torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import psutil

from harness.records import provenance


class Occupant(NamedTuple):
    """A process that computes on a GPU. `bytes` is None where the driver does not report them (WSL,
    containers); `name` is empty for a process of another container."""

    uuid: str
    gpu: str
    pid: int
    name: str
    bytes: int | None


def occupants(uuids: Collection[str]) -> list[Occupant]:
    """The processes that hold memory on these GPUs; none where no NVIDIA driver answers."""
    if not uuids or provenance.nvml().reason is not None:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []  # it answered before: the driver is being reloaded
    try:
        return [found for uuid in uuids for found in _on(pynvml, uuid)]
    finally:
        pynvml.nvmlShutdown()


def _on(pynvml: Any, uuid: str) -> list[Occupant]:
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        gpu = str(pynvml.nvmlDeviceGetName(handle))
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return []  # some driver models do not report them (WSL, virtual GPUs)
    return [
        Occupant(uuid, gpu, int(each.pid), process_name(each.pid), _bytes(each)) for each in running
    ]


def _bytes(running: Any) -> int | None:
    return None if running.usedGpuMemory is None else int(running.usedGpuMemory)


def process_name(pid: int) -> str:
    """The name of a process; empty when no process of this pid is visible."""
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""
