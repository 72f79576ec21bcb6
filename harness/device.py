"""The only access to CUDA and NVML. Everything here also works on a CPU machine, where a counter
that does not exist is `None`; no other file of the harness checks for a GPU library.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness.system import fork_safety  # noqa: F401 - resets torch in every forked child

NO_CUDA = "torch sees no CUDA device on this machine"
NO_NVML = "no NVIDIA driver answers NVML on this machine"
DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "uint8": torch.uint8,
}
# In messages of RuntimeErrors: torch's CPU and CUDA allocators, the driver (called by paged
# optimizers), and cuBLAS without memory for its workspace.
OUT_OF_MEMORY_MESSAGES = (
    "DefaultCPUAllocator",
    "not enough memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class Peaks(NamedTuple):
    """torch's CUDA counters since the last reset, bytes; None on CPU."""

    allocated_bytes: int | None
    reserved_bytes: int | None


def training_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def training_device_name() -> str:
    """The training device as NVML and CUDA_VISIBLE_DEVICES know it (`GPU-<uuid>`), or `cpu`."""
    if not has_cuda():
        return "cpu"
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return f"GPU-{uuid.removeprefix('GPU-')}"


def has_cuda() -> bool:
    return torch.cuda.is_available()


def limit_visible_gpus(count: int) -> None:
    """Hide all but the first `count` of the GPUs that this process may see. Call it before CUDA
    is used: a Trainer uses every visible GPU by default."""
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = [str(number) for number in range(count)] if setting is None else setting.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen[:count])


def set_threads_from_environment() -> None:
    """Compute with OMP_NUM_THREADS threads. torch read it when it was imported, perhaps in the
    server that this process was forked from, and each rank has its own value."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0 and int(wanted) != torch.get_num_threads():
        torch.set_num_threads(int(wanted))


def synchronize() -> None:
    """Wait for queued kernels, so that the next clock reading is right."""
    if has_cuda():
        torch.cuda.synchronize()


def release_cache() -> None:
    if has_cuda():
        torch.cuda.empty_cache()


def reset_peaks() -> None:
    """Start a new measuring window for torch's counters and the host's peak."""
    if has_cuda():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    reset_host_peak()


def peaks() -> Peaks:
    if not has_cuda():
        return Peaks(None, None)
    torch.cuda.synchronize()
    return Peaks(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


def host_peak_rss_bytes() -> int | None:
    """High-water mark of this process's resident set since the last reset (Linux VmHWM)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def reset_host_peak() -> None:
    try:
        # proc(5): writing 5 resets the peak resident set size to the current one.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # Not Linux, or not permitted: the peak then covers the life of the process; see
        # host_peak_is_resettable().
        return


@functools.cache
def host_peak_is_resettable() -> bool:
    return os.access("/proc/self/clear_refs", os.W_OK)


@functools.cache
def _nvml_handle() -> Any:
    """NVML's handle of the training device, or None."""
    if not has_cuda():
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(training_device_name())
    except pynvml.NVMLError:
        return None


def process_bytes() -> int | None:
    """Bytes that this process uses on the training device, as NVML reports them."""
    handle = _nvml_handle()
    if handle is None:
        return None
    import pynvml

    try:
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        # Some driver models do not report it (WSL, virtual GPUs).
        return None
    for process in running:
        if process.pid == os.getpid() and process.usedGpuMemory is not None:
            return int(process.usedGpuMemory)
    return None


def device_bytes() -> int | None:
    """Bytes in use on the training device by all processes, as NVML reports them."""
    handle = _nvml_handle()
    if handle is None:
        return None
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except pynvml.NVMLError:
        return None


def energy_joules() -> float | None:
    """NVML's energy counter of the training device, joules; only differences are meaningful."""
    handle = _nvml_handle()
    if handle is None:
        return None
    import pynvml

    try:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0
    except pynvml.NVMLError:
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY_MESSAGES)


def requested_bytes(error: BaseException) -> int | None:
    """The requested bytes in an out-of-memory message; None when it has none."""
    text = str(error)
    found = re.search(r"[Tt]ried to allocate (\d+) bytes", text)
    if found:
        return int(found.group(1))
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", text)
    if not found:
        return None
    unit = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[found.group(2)]
    return int(float(found.group(1)) * unit)


def allocator_settings() -> dict[str, str]:
    """Environment variables that change how much the allocator reserves for the same tensors."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "MALLOC_ARENA_MAX")
    return {name: os.environ[name] for name in names if name in os.environ}
