"""What a measurement runs on: packages, commit, hardware, environment; and what identifies it.

Light on purpose (no torch): versions come from the installed metadata, the accelerator from NVML.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from harness.records import hub
from harness.records.record import Record
from harness.records.stack import Hardware, Provenance, Stack
from matrices.cell import Cell, base_cells

# Versions that can change a figure. They are part of stack_id, with python and the hardware.
MEASURED_PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "lm-eval",
    "numpy",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
)
# Recorded too, but a newer version keeps old figures comparable.
NOTED_PACKAGES = (
    "deepspeed",
    "flash-attn",
    "huggingface-hub",
    "kernels",
    "liger-kernel",
    "nvidia-ml-py",
    "pandas",
    "pyarrow",
    "triton",
    "tunebench",
)
ENVIRONMENT = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_OFFLINE",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OPENBLAS_CORETYPE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "TOKENIZERS_PARALLELISM",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRANSFORMERS_OFFLINE",
)
THREADS_OPTION = "--num_cpu_threads_per_process"
CHECKOUT = Path(__file__).resolve().parents[2]


class NvmlGpu(NamedTuple):
    """One visible accelerator, as NVML reports it."""

    name: str
    uuid: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    driver: str


class Nvml(NamedTuple):
    """The visible accelerators, or why NVML reports none."""

    gpus: tuple[NvmlGpu, ...]
    reason: str | None


def now() -> str:
    """This moment, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def version(package: str) -> str | None:
    """Installed version of a distribution, none when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def stack() -> Stack:
    """Software of this process's environment."""
    found = {name: version(name) for name in (*MEASURED_PACKAGES, *NOTED_PACKAGES)}
    commit, dirty = _checkout_state(CHECKOUT)
    return Stack(
        python=platform.python_version(),
        packages={name: number for name, number in sorted(found.items()) if number},
        commit=commit,
        dirty=dirty,
    )


def _checkout_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit of a git checkout, and whether its packages differ from it; none elsewhere."""
    if not (root / ".git").exists():
        return None, None
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", "matrices", "harness", "reports", "launch")
    return commit, None if commit is None or changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    """Standard output of a git command; none without git, or where git refuses."""
    try:
        done = subprocess.run(  # noqa: S603 - a fixed argv, no user input in it
            ["git", "-C", str(root), *arguments],  # noqa: S607 - whichever git is on the path
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def nvml() -> Nvml:
    """Accelerators that NVML sees and CUDA_VISIBLE_DEVICES leaves visible."""
    try:
        import pynvml
    except ImportError as error:
        return Nvml((), f"nvidia-ml-py is not installed: {error}")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Nvml((), f"NVML: {error}")
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        gpus = [_gpu(pynvml, index, driver) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return Nvml((), f"NVML: {error}")
    finally:
        pynvml.nvmlShutdown()
    seen = visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    hidden = "CUDA_VISIBLE_DEVICES hides them all" if gpus else "NVML finds no device"
    return Nvml(tuple(seen), None if seen else hidden)


def _gpu(pynvml: Any, index: int, driver: str) -> NvmlGpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return NvmlGpu(
        name=str(pynvml.nvmlDeviceGetName(handle)),
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        compute_capability=(int(major), int(minor)),
        driver=driver,
    )


def visible(gpus: list[NvmlGpu], setting: str | None) -> list[NvmlGpu]:
    """The devices CUDA would use, in its order, under a value of CUDA_VISIBLE_DEVICES.

    As CUDA does, the list ends at the first entry that names no device.
    """
    if setting is None:
        return list(gpus)
    chosen: list[NvmlGpu] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit() and int(entry) < len(gpus):
            chosen.append(gpus[int(entry)])
            continue
        named = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
        if len(named) != 1:
            break
        chosen += named
    return chosen


@functools.cache
def hardware() -> Hardware:
    """This machine. Several visible accelerators are described by the first."""
    gpus = nvml().gpus
    first = gpus[0] if gpus else None
    return Hardware(
        cpu=cpu_model(),
        cpu_count=usable_cpus(),
        host_memory_bytes=psutil.virtual_memory().total,
        accelerator=first.name if first else None,
        accelerator_count=len(gpus),
        accelerator_memory_bytes=first.memory_bytes if first else None,
        driver=first.driver if first else None,
    )


def cpu_model() -> str:
    """The processor's name as /proc/cpuinfo gives it, else as python knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Logical processors this process may run on (a container or taskset may leave fewer)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def uses_gpu(of: Stack, on: Hardware) -> bool:
    """Whether torch of this stack computes on the accelerator: a CPU-only build cannot."""
    return on.accelerator is not None and not of.packages.get("torch", "").endswith("+cpu")


def uses_gpu_here() -> bool:
    """The same of this process's own stack and machine."""
    return uses_gpu(stack(), hardware())


def environment_id(of: Stack, on: Hardware) -> str:
    """sha256, hex, of what all cells of one environment share: versions, python's minor, the
    device's kind. Older records have it as their stack_id."""
    return _digest(_shared_identity(of, on))


def stack_id(cell: Cell, of: Stack, on: Hardware, threads: int | None) -> str:
    """sha256, hex, of all that the cell uses of a stack and a machine; see `stack_identity`."""
    return _digest(stack_identity(cell, of, on, threads))


def stack_identity(cell: Cell, of: Stack, on: Hardware, threads: int | None) -> dict[str, Any]:
    """What makes figures of a cell comparable: versions, python's minor, the device's kind and
    number; on a CPU its processors and the threads of each process.

    The commit and the version of tunebench are not part of it, so that results stay valid after an
    upgrade; both are in every record's stack. Unknown values are left out.
    """
    found = _shared_identity(of, on)
    names = [name for name in optional_packages(cell, uses_gpu(of, on)) if name in of.packages]
    found["packages"] |= {name: of.packages[name] for name in names}
    found["devices"] = cell.devices
    if not uses_gpu(of, on):
        found["processors"] = on.cpu_count
        if threads is not None:
            found["threads"] = threads
    return found


def optional_packages(cell: Cell, gpu: bool) -> set[str]:
    """The packages that this cell uses and not every cell does."""
    names = {cell.strategy.package} if cell.strategy.package else set()
    attention = cell.model.attn_implementation
    if attention.startswith("flash_attention"):
        names |= {"flash-attn", "kernels"}  # transformers takes a kernel where flash-attn lacks
    if "/" in attention or cell.quantization is not None:
        names.add("kernels")  # bitsandbytes takes its 4-bit kernels for a CPU from there
    if gpu:
        names.add("triton")
    return names


def same_stack(record: Record, of: Stack, on: Hardware, threads: int | None) -> bool:
    """Whether a record was made by the stack that its cell would use now. Values that an older
    record lacks are not compared."""
    then = stack_identity(record.cell, record.stack, record.hardware, recorded_threads(record))
    now = stack_identity(record.cell, of, on, threads)
    return all(now.get(name) == value for name, value in then.items())


def recorded_stack_id(record: Record) -> str:
    """The stack_id of a record, computed from its content."""
    return stack_id(record.cell, record.stack, record.hardware, recorded_threads(record))


def option(argv: Sequence[str], name: str) -> str | None:
    """The value of an option in an argv; None where it has none."""
    return argv[argv.index(name) + 1] if name in argv[:-1] else None


def recorded_threads(record: Record) -> int | None:
    """Threads of each process of a recorded cell; None where the record does not have them."""
    said = option(record.command, THREADS_OPTION)
    if said is None:
        said = record.provenance.environment.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdigit() and int(said) > 0 else None


def _shared_identity(of: Stack, on: Hardware) -> dict[str, Any]:
    return {
        "packages": {name: of.packages[name] for name in MEASURED_PACKAGES if name in of.packages},
        "python": ".".join(of.python.split(".")[:2]),
        "hardware": on.accelerator if uses_gpu(of, on) else on.cpu,
    }


def _digest(identity: dict[str, Any]) -> str:
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def environment() -> dict[str, str]:
    """The variables that can change a result, as set; one that is not set is left out."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def cpu_threads() -> int:
    """Threads of one worker: OMP_NUM_THREADS, else the physical cores this process may use."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if setting.isdigit() and int(setting) > 0:
        return int(setting)
    available = usable_cpus()
    return min(_physical_cores() or available, available)


@functools.cache
def _physical_cores() -> int | None:
    return psutil.cpu_count(logical=False)


def new_record(
    cell: Cell, command: list[str], attempt: int = 1, threads: int | None = None
) -> Record:
    """The record a cell starts with: everything known before it runs, and `interrupted` until
    the worker or the runner knows better. `threads` are those of each of its processes; none means
    as many as this one would have."""
    software, machine = stack(), hardware()
    return Record(
        cell_id=cell.cell_id,
        cell=cell,
        base_cell_ids={name: base.cell_id for name, base in base_cells(cell).items()},
        stack_id=stack_id(cell, software, machine, threads or cpu_threads()),
        stack=software,
        hardware=machine,
        command=command,
        status="interrupted",
        reason="did not start",
        started=now(),
        attempt=attempt,
        provenance=Provenance(environment=environment(), **hub.known_commits(cell)),
    )
