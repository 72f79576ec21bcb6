"""The seam to the device: messages as torch really writes them, and counters on a real GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pynvml
import pytest
import torch

from harness import device

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# As raised by torch 2.x (c10/cuda/CUDACachingAllocator.cpp, c10/core/impl/alloc_cpu.cpp).
CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.65 GiB of "
    "which 3.06 MiB is free. Process 4242 has 23.64 GiB memory in use. Of the allocated memory "
    "22.90 GiB is allocated by PyTorch, and 301.22 MiB is reserved by PyTorch but unallocated."
)
CUDA_OLD = (
    "CUDA out of memory. Tried to allocate 1.50 GiB (GPU 0; 23.65 GiB total capacity; 21.02 GiB "
    "already allocated; 1.10 GiB free; 21.30 GiB reserved in total by PyTorch)"
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4503599627370496 bytes. Error code 12 (Cannot allocate memory)"
)
WINDOWS = (
    "[enforce fail at alloc_cpu.cpp:115] data. DefaultCPUAllocator: not enough memory: you tried "
    "to allocate 16777216 bytes."
)
DRIVER = (
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other "
    "API call, so the stacktrace below might be incorrect."
)
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (CUDA, 20 * 2**20),
        (CUDA_OLD, 3 * 2**29),
        (CPU, 2**52),
        (WINDOWS, 2**24),
        ("CUDA out of memory. Tried to allocate 512 bytes. GPU 0 has", 512),
        ("CUDA out of memory. Tried to allocate 2.00 KiB. GPU 0 has", 2048),
        (DRIVER, None),
        (CUBLAS, None),
        ("", None),
    ],
)
def test_bytes_asked_for(message: str, expected: int | None) -> None:
    assert device.requested_bytes(RuntimeError(message)) == expected


@pytest.mark.parametrize("message", [CUDA, CUDA_OLD, CPU, WINDOWS, DRIVER, CUBLAS])
def test_messages_that_mean_out_of_memory(message: str) -> None:
    assert device.is_out_of_memory(RuntimeError(message))


def test_errors_that_mean_out_of_memory() -> None:
    assert device.is_out_of_memory(torch.OutOfMemoryError(CUDA))
    assert device.is_out_of_memory(MemoryError())
    with pytest.raises(MemoryError) as caught:
        np.empty(2**52)
    assert device.is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError(CPU),
        KeyError("memory"),
    ],
)
def test_other_errors_do_not(error: Exception) -> None:
    assert not device.is_out_of_memory(error)


def test_the_hosts_peak_follows_an_allocation_and_its_reset() -> None:
    """Linux: 64 MiB written show in the peak, and are gone from it after a reset without them."""
    size = 64 * 2**20
    gc.collect()
    if not device.host_peak_is_resettable():
        before = device.host_peak_rss_bytes()
        assert before is None or before > 0
        return
    device.reset_host_peak()
    start = device.host_peak_rss_bytes()
    held = np.ones(size, dtype=np.uint8)
    high = device.host_peak_rss_bytes()
    assert start is not None
    assert high is not None
    assert high - start > 0.9 * size
    del held
    device.reset_host_peak()
    after = device.host_peak_rss_bytes()
    assert after is not None
    assert high - after > 0.9 * size


def test_allocator_settings_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "MALLOC_ARENA_MAX"):
        monkeypatch.delenv(name, raising=False)
    assert device.allocator_settings() == {}
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert device.allocator_settings() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.fixture
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    device._nvml_handle.cache_clear()
    yield
    device._nvml_handle.cache_clear()


@pytest.mark.usefixtures("_no_cuda")
def test_without_a_device_every_counter_is_none() -> None:
    assert device.training_device() == torch.device("cpu")
    assert device.peaks() == (None, None)
    readings = (device.process_bytes(), device.device_bytes(), device.energy_joules())
    assert readings == (None, None, None)


def test_nvml_readings_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a driver answers, played back: our process among others, one that hides its memory."""
    processes = [
        SimpleNamespace(pid=1, usedGpuMemory=7),
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=5 * 2**30),
    ]
    monkeypatch.setattr(device, "_nvml_handle", object)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: processes)
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetMemoryInfo", lambda _: SimpleNamespace(used=6 * 2**30)
    )
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda _: 2500)
    assert device.process_bytes() == 5 * 2**30
    assert device.device_bytes() == 6 * 2**30
    # Millijoules, says NVML's reference.
    assert device.energy_joules() == 2.5
    processes[1].usedGpuMemory = None
    assert device.process_bytes() is None


def test_a_driver_that_refuses_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(device, "_nvml_handle", object)
    for name in (
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetTotalEnergyConsumption",
    ):
        monkeypatch.setattr(pynvml, name, refuse)
    readings = (device.process_bytes(), device.device_bytes(), device.energy_joules())
    assert readings == (None, None, None)


def on_gpu(test: Any) -> Any:
    for mark in GPU:
        test = mark(test)
    return test


@on_gpu
def test_counters_equal_a_known_allocation() -> None:
    device.release_cache()
    device.reset_peaks()
    before = device.peaks().allocated_bytes
    assert before is not None
    held = torch.empty(64 * 2**20, dtype=torch.uint8, device=device.training_device())
    small = torch.empty(1, dtype=torch.uint8, device=device.training_device())
    peaks = device.peaks()
    assert peaks.allocated_bytes == before + 64 * 2**20 + 512
    assert peaks.reserved_bytes is not None
    assert peaks.reserved_bytes >= peaks.allocated_bytes
    del held, small


@on_gpu
def test_a_reset_starts_a_new_window() -> None:
    held = torch.empty(64 * 2**20, dtype=torch.uint8, device=device.training_device())
    del held
    high = device.peaks().allocated_bytes
    device.reset_peaks()
    low = device.peaks().allocated_bytes
    assert high is not None
    assert low is not None
    assert high - low >= 64 * 2**20


@on_gpu
def test_nvml_answers_about_this_process_and_device() -> None:
    held = torch.empty(64 * 2**20, dtype=torch.uint8, device=device.training_device())
    used = device.device_bytes()
    assert used is not None
    assert used >= 64 * 2**20
    process = device.process_bytes()
    # In a container NVML may not know this process by its id here.
    assert process is None or 64 * 2**20 <= process <= used
    del held


@on_gpu
def test_a_real_cuda_out_of_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device=device.training_device())
    assert device.is_out_of_memory(caught.value)
    asked = device.requested_bytes(caught.value)
    assert asked is not None
    assert asked >= 2**50


@pytest.mark.parametrize(
    ("before", "count", "after"),
    [
        (None, 1, "0"),
        (None, 2, "0,1"),
        ("3,1,2", 1, "3"),
        ("GPU-a,GPU-b", 2, "GPU-a,GPU-b"),
        ("", 1, ""),
    ],
)
def test_a_process_sees_the_gpus_of_its_cell(
    monkeypatch: pytest.MonkeyPatch, before: str | None, count: int, after: str
) -> None:
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    device.limit_visible_gpus(count)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after
