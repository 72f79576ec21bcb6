"""What this machine can run, and why not the rest, for `tunebench doctor`. It imports nothing heavy
and starts nothing."""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
from pydantic import BaseModel

from harness.models import packaged
from harness.records import provenance
from harness.system import platforms
from launch.planning.plan import this_machine
from matrices.catalogue.models import PACKAGED_MODELS
from matrices.cell import SECTIONS, Adapter, Cell, Data, Model, Quantization, Train
from matrices.parallelism import STRATEGIES
from matrices.rules.machine import Machine
from matrices.rules.verdicts import refusals
from reports.text import GIB, text_table

# The settings with choices that depend on the machine.
CHOICES = (
    "method",
    "model.compute_dtype",
    "model.weight_dtype",
    "model.attn_implementation",
    "quantization.quant_type",
    "quantization.quant_storage",
    "train.optimizer",
    "parallelism",
)

MARKS = {"ok": "+", "no": "-", "note": "·"}


@dataclass(frozen=True)
class Finding:
    """`state`: ok, no (not available here), or note (worth knowing)."""

    topic: Literal["software", "machine", "meters", "models", "network", "engines", "settings"]
    name: str
    state: Literal["ok", "no", "note"]
    detail: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def findings(devices: int, network: bool = False) -> list[Finding]:
    """All findings about this machine, which has so many devices. `network`: also ask the hub."""
    machine = this_machine()
    return [
        *_software(),
        *_hardware(),
        *_meters(machine),
        *_models(),
        *([_hub()] if network else []),
        *_engines(devices),
        *settings(machine),
    ]


def findings_text(findings: Sequence[Finding]) -> str:
    """By topic; `+` is available here, `-` is not, `·` is worth knowing."""
    rows = [(f"{MARKS[finding.state]} {finding.name}", finding.detail) for finding in findings]
    lines: list[str] = []
    topic = ""
    for finding, row in zip(findings, text_table(rows, indent="  "), strict=True):
        if finding.topic != topic:
            topic = finding.topic
            lines += ["", topic] if lines else [topic]
        lines.append(row)
    return "\n".join(lines)


def _software() -> Iterator[Finding]:
    stack = provenance.stack()
    yield Finding("software", "python", "ok", stack.python)
    commit = f", commit {stack.commit[:12]}" if stack.commit else ""
    dirty = " with local changes" if stack.dirty else ""
    own = stack.packages.get("tunebench", "run from a directory, not installed")
    yield Finding("software", "tunebench", "ok", f"{own}{commit}{dirty}")
    for name in provenance.MEASURED_PACKAGES:
        version = stack.packages.get(name)
        yield Finding("software", name, "ok" if version else "no", version or "not installed")
    deepspeed = stack.packages.get("deepspeed")
    yield Finding(
        "software",
        "deepspeed",
        "ok" if deepspeed else "note",
        deepspeed or "not installed (it runs on Linux only): no ZeRO, run or predicted",
    )
    flash = stack.packages.get("flash-attn")
    yield Finding(
        "software",
        "flash-attn",
        "ok" if flash else "note",
        flash or "not installed: attn_implementation flash_attention_2 is not to be had",
    )


def _hardware() -> Iterator[Finding]:
    if limits := platforms.limitations():
        yield Finding("machine", platforms.name(), "no", limits)
    else:
        yield Finding("machine", platforms.name(), "ok", "every command works")
    hardware, nvml = provenance.hardware(), provenance.nvml()
    yield Finding(
        "machine",
        "CPU",
        "ok",
        f"{hardware.cpu}, {hardware.cpu_count} processors, workers use "
        f"{provenance.cpu_threads()} threads",
    )
    memory = psutil.virtual_memory()
    available = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    yield Finding("machine", "memory", "ok", available)
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("machine", "disk", "ok", f"{free / GIB:.1f} GiB free in {Path.cwd()}")
    for number, gpu in enumerate(nvml.gpus):
        major, minor = gpu.compute_capability
        detail = (
            f"{gpu.name}, {gpu.memory_bytes / GIB:.1f} GiB, compute capability {major}.{minor}, "
            f"driver {gpu.driver}"
        )
        yield Finding("machine", f"GPU {number}", "ok", detail)
    if nvml.reason:
        yield Finding("machine", "GPU", "no", f"{nvml.reason}; cells run on the CPU")
    if nvml.gpus and not provenance.uses_gpu(provenance.stack(), hardware):
        torch = provenance.stack().packages.get("torch", "none")
        yield Finding("machine", "torch", "no", f"{torch} cannot use the GPU: a CPU-only build")


def _meters(machine: Machine) -> Iterator[Finding]:
    yield Finding("meters", "memory ledger", "ok", "live tensor bytes, on any machine")
    if machine.has_gpu:
        yield Finding("meters", "CUDA and NVML memory", "ok", "torch's counters and the driver's")
    else:
        yield Finding("meters", "CUDA and NVML memory", "no", "no GPU in use")
    counters = sorted(platforms.RAPL.glob("intel-rapl:*/energy_uj"))
    readable = [path for path in counters if os.access(path, os.R_OK)]
    if machine.has_gpu:
        yield Finding("meters", "energy", "ok", "NVML's counter, where the GPU has one")
    elif readable:
        yield Finding("meters", "energy", "ok", f"RAPL, {len(readable)} counters")
    elif counters:
        why = f"{counters[0]} may be read by root only: chmod a+r it to measure energy"
        yield Finding("meters", "energy", "no", why)
    else:
        why = "no NVML device and no RAPL counter (a virtual machine has none)"
        yield Finding("meters", "energy", "no", why)


def _models() -> Iterator[Finding]:
    for name in PACKAGED_MODELS:
        ready = packaged.is_ready(name)
        detail = f"in {packaged.model_path(name)}" if ready else "made when first used"
        yield Finding("models", name, "ok" if ready else "note", detail)


def _hub() -> Finding:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Finding("network", "hub", "no", "HF_HUB_OFFLINE is set")
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=10) as answer:  # noqa: S310
            return Finding("network", "hub", "ok", f"{constants.ENDPOINT}: {answer.status}")
    except (urllib.error.URLError, OSError) as error:
        return Finding("network", "hub", "no", f"{constants.ENDPOINT}: {error}")


def _engines(devices: int) -> Iterator[Finding]:
    """The engines that `tunebench run` can use."""
    kind = "GPU" if provenance.nvml().gpus else "processor"
    detail = f"cells on up to {devices} {kind}{'s' if devices != 1 else ''}"
    yield Finding("engines", "local", "ok", detail)
    extras = {"slurm": "submitit", "ray": "ray"}
    for engine, package in extras.items():
        installed = provenance.version(package)
        if installed is None:
            why = f"{package} is not installed: pip install 'tunebench[{engine}]'"
            yield Finding("engines", f"--on {engine}", "note", why)
        elif engine == "slurm" and shutil.which("sbatch") is None:
            why = f"{package} {installed}, but no sbatch: this is no node of a SLURM cluster"
            yield Finding("engines", f"--on {engine}", "note", why)
        else:
            yield Finding("engines", f"--on {engine}", "ok", f"{package} {installed}")


def settings(machine: Machine) -> Iterator[Finding]:
    """For each choice that depends on the machine: what runs, and why the rest does not."""
    for key in CHOICES:
        for value in _choices(key):
            reasons = [refused.reason for refused in refusals(_cell_with(key, value), machine)]
            state: Literal["ok", "no"] = "no" if reasons else "ok"
            yield Finding("settings", f"{key}: {value}", state, "; ".join(reasons))


def _choices(key: str) -> tuple[str, ...]:
    section, _, leaf = key.rpartition(".")
    owner: type[BaseModel] = SECTIONS[section] if section else Cell
    return get_args(owner.model_fields[leaf].annotation)


def _cell_with(key: str, value: str) -> Cell:
    """A cell with this setting and defaults otherwise, of a method that has the setting."""
    section, _, leaf = key.rpartition(".")
    method = value if key == "method" else "qlora" if section == "quantization" else "lora"
    given = {section: {leaf: value}} if section else {}
    return Cell(
        method=method,  # type: ignore[arg-type]
        model=Model(**given.get("model", {})),  # type: ignore[arg-type]
        quantization=Quantization(**given.get("quantization", {}))  # type: ignore[arg-type]
        if method == "qlora"
        else None,
        parallelism=value if key == "parallelism" else "single",  # type: ignore[arg-type]
        devices=2 if key == "parallelism" and STRATEGIES[value].several_devices else 1,  # type: ignore[index]
        adapter=Adapter() if method in ("lora", "qlora") else None,
        data=None if method == "base" else Data(),
        train=None if method == "base" else Train(**given.get("train", {})),  # type: ignore[arg-type]
    )
