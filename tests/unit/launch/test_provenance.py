"""What a record says about where it was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.records import provenance
from harness.records.provenance import NvmlGpu, same_stack, stack_id, visible
from harness.records.stack import Hardware, Stack
from matrices.cell import Cell, Data, Model, Quantization, Train

STACK = Stack(python="3.11.7", packages={"torch": "2.13.0", "trl": "1.16.0", "tunebench": "0.1.0"})
HARDWARE = Hardware(cpu="a Z80", cpu_count=2, host_memory_bytes=2**30)


def test_versions_are_those_installed() -> None:
    stack = provenance.stack()
    for name in ("torch", "transformers", "lm-eval", "tunebench"):
        assert stack.packages[name] == importlib.metadata.version(name)
    assert stack.python == platform.python_version()
    assert "deepspeed" not in stack.packages or importlib.metadata.version("deepspeed")


def test_hardware_is_this_machine() -> None:
    hardware = provenance.hardware()
    assert hardware.host_memory_bytes == psutil.virtual_memory().total
    assert hardware.cpu_count == len(os.sched_getaffinity(0))
    assert hardware.cpu in Path("/proc/cpuinfo").read_text()


CELL = Cell(method="base")
ZERO = Cell(method="full", data=Data(), train=Train(), parallelism="zero2", devices=2)
FLASH = Cell(method="base", model=Model(attn_implementation="flash_attention_2"))
GPU = {"accelerator": "NVIDIA A100", "accelerator_count": 8}


def identity(
    cell: Cell = CELL,
    packages: dict[str, str] | None = None,
    python: str = "3.11.7",
    threads: int | None = 2,
    **hardware: object,
) -> str:
    stack = Stack(python=python, packages=STACK.packages | (packages or {}))
    return stack_id(cell, stack, HARDWARE.model_copy(update=hardware), threads)


@pytest.mark.parametrize(
    ("cell", "changes", "follows"),
    [
        (CELL, {"packages": {"torch": "2.14.0"}}, True),
        (CELL, {"packages": {"peft": "1.0"}}, True),
        (CELL, {"packages": {"tunebench": "0.2.0", "pandas": "9"}}, False),
        (CELL, {"packages": {"deepspeed": "1", "flash-attn": "2", "triton": "3"}}, False),
        (ZERO, {"packages": {"deepspeed": "1"}}, True),
        (FLASH, {"packages": {"flash-attn": "2"}}, True),
        (FLASH, {"packages": {"kernels": "2"}}, True),
        (CELL, {"python": "3.11.9"}, False),
        (CELL, {"python": "3.12.0"}, True),
        (CELL, {"cpu": "a 6502"}, True),
        (CELL, {"cpu_count": 64}, True),
        (CELL, {"threads": 4}, True),
        (CELL, {"host_memory_bytes": 1, "driver": "1"}, False),
        (CELL, GPU, True),
    ],
)
def test_identity_follows_what_the_cell_uses(
    cell: Cell, changes: dict[str, Any], follows: bool
) -> None:
    assert len(identity(cell)) == 64
    assert (identity(cell, **changes) != identity(cell)) is follows


def test_on_a_gpu_the_host_is_not_used_but_triton_is() -> None:
    def known(**changes: Any) -> str:
        return identity(**{**GPU, **changes})

    assert known(cpu="a 6502", cpu_count=64, threads=4) == known()
    assert known(packages={"triton": "3"}) != known()


def test_whether_a_record_counts_is_decided_by_what_it_holds() -> None:
    record = provenance.new_record(CELL, []).model_copy(update={"stack_id": "an older way"})
    stack, hardware = provenance.stack(), provenance.hardware()
    threads = provenance.cpu_threads()
    assert same_stack(record, stack, hardware, threads)
    more = hardware.model_copy(update={"cpu_count": hardware.cpu_count + 1})
    assert not same_stack(record, stack, more, threads)
    record.provenance.environment.pop("OMP_NUM_THREADS", None)
    assert same_stack(record, stack, hardware, threads + 1), "it does not say how many threads"
    record.provenance.environment["OMP_NUM_THREADS"] = str(threads)
    assert not same_stack(record, stack, hardware, threads + 1)


def test_a_cpu_build_of_torch_does_not_use_the_gpu() -> None:
    with_gpu = HARDWARE.model_copy(update={"accelerator": "NVIDIA A100"})
    cpu_only = STACK.model_copy(update={"packages": {"torch": "2.13.0+cpu"}})
    assert provenance.uses_gpu(STACK, with_gpu)
    assert not provenance.uses_gpu(cpu_only, with_gpu)
    assert not provenance.uses_gpu(STACK, HARDWARE)
    assert stack_id(CELL, cpu_only, with_gpu, 1) == stack_id(CELL, cpu_only, HARDWARE, 1)


GPUS = [NvmlGpu(f"gpu {n}", f"GPU-{n}{n}{n}", n, (8, 0), "1") for n in range(3)]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        ("1,7,0", [1]),
        ("GPU-222", [2]),
        ("GPU-9", []),
        ("GPU-", []),
    ],
)
def test_visible_devices_as_cuda_reads_them(setting: str | None, expected: list[int]) -> None:
    assert visible(GPUS, setting) == [GPUS[index] for index in expected]


def test_only_variables_that_are_set_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in provenance.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert provenance.environment() == {}
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert provenance.environment() == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def test_a_new_record_knows_its_bases_and_is_interrupted_until_somebody_knows_better() -> None:
    cell = Cell(method="qlora", quantization=Quantization(), data=Data(), train=Train())
    record = provenance.new_record(cell, ["run"], attempt=2)
    assert (record.status, record.reason, record.ended) == ("interrupted", "did not start", None)
    assert (record.cell_id, record.attempt) == (cell.cell_id, 2)
    assert set(record.base_cell_ids) == {"untouched", "quantized"}
    threads = provenance.cpu_threads()
    assert record.stack_id == stack_id(cell, record.stack, record.hardware, threads)


def test_the_commit_of_a_checkout_and_whether_it_is_dirty(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        argv = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()

    assert provenance._checkout_state(tmp_path) == (None, None)
    git("init")
    assert provenance._checkout_state(tmp_path) == (None, None)
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert provenance._checkout_state(tmp_path) == (head, False)
    (tmp_path / "notes.txt").write_text("not ours")
    assert provenance._checkout_state(tmp_path) == (head, False)
    (tmp_path / "harness" / "a.py").write_text("2")
    assert provenance._checkout_state(tmp_path) == (head, True)


def test_threads_are_the_setting_else_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert provenance.cpu_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= provenance.cpu_threads() <= len(os.sched_getaffinity(0))
