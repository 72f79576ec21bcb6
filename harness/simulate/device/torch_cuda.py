"""Patches of `torch.cuda` for a GPU that does not exist: properties, streams, events, memory
counters.

They last as long as the process, which only simulates.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch

from harness.simulate.memory import ledger
from matrices.catalogue.gpus import Gpu

# As a build with CUDA reports it; libraries compare it with the least they need.
CUDA_VERSION = "12.8"


class _Current(threading.local):
    stream: Stream | None = None


class Stream:
    """A CUDA stream that orders nothing: work on the fake device is done at once."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda", 0)
        self.device_index = 0
        self.device_type = 1
        self.priority = priority
        self.stream_id = next(_stream_ids)
        self.cuda_stream = 0

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or FakeEvent()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def __enter__(self) -> Self:
        self._outside = _current.stream
        _current.stream = self
        return self

    def __exit__(self, *exception: Any) -> None:
        _current.stream = self._outside


_stream_ids = itertools.count()
_current = _Current()
_default = Stream()


def current_stream(device: Any = None) -> Stream:
    return _current.stream or _default


@contextlib.contextmanager
def use_stream(stream: Stream | None) -> Iterator[None]:
    outside = _current.stream
    _current.stream = stream or outside
    try:
        yield
    finally:
        _current.stream = outside


def set_stream(stream: Stream) -> None:
    _current.stream = stream


class FakeEvent:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 1.0


def _silent() -> Callable[..., None]:
    """A new function that does nothing: torch's compiler refuses to see one under two names."""

    def silent(*_: Any, **__: Any) -> None:
        return None

    return silent


def _block() -> Callable[..., Any]:
    """A new context manager that does nothing."""

    @contextlib.contextmanager
    def block(*_: Any, **__: Any) -> Iterator[None]:
        yield

    return block


def patch(gpu: Gpu) -> None:
    """Patch `torch.cuda` to have one device like `gpu`; with several, a trainer would use them
    all."""
    _fake_tensors_know_the_device()
    for name, answer in (_properties(gpu) | _queues() | _counters(gpu)).items():
        setattr(torch.cuda, name, answer)
    torch.Tensor.record_stream = _silent()  # type: ignore[method-assign]
    torch.accelerator.current_stream = current_stream  # type: ignore[assignment]
    torch.cuda.nvtx.range_push = lambda message: 0
    torch.cuda.nvtx.range_pop = lambda: 0
    # Autocast for cuda turns itself off, without a word, where this says so.
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    if torch.version.cuda is None:
        torch.version.cuda = CUDA_VERSION


def _fake_tensors_know_the_device() -> None:
    """FakeTensorMode would start the driver before the first tensor on the device."""
    from torch._subclasses import fake_tensor

    fake_tensor.init_gpu_context = _silent()  # type: ignore[assignment]
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda mode: True)  # type: ignore[assignment,method-assign]


def _properties(gpu: Gpu) -> dict[str, Any]:
    properties = types.SimpleNamespace(
        name=gpu.name,
        major=gpu.compute_capability[0],
        minor=gpu.compute_capability[1],
        total_memory=gpu.memory_bytes,
        multi_processor_count=gpu.multiprocessors,
        warp_size=32,
        gcnArchName="",
        is_integrated=0,
        uuid="simulated",
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": _silent(),
        "_lazy_init": _silent(),
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": _silent(),
        "device": _block(),
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: gpu.compute_capability,
        "get_device_name": lambda device=None: gpu.name,
        # Before Ampere bf16 is emulated, which torch counts as support unless told not to.
        "is_bf16_supported": lambda including_emulation=True: (
            including_emulation or gpu.compute_capability >= (8, 0)
        ),
        "get_arch_list": lambda: ["sm_{}{}".format(*gpu.compute_capability)],
    }


def _queues() -> dict[str, Any]:
    return {
        "Stream": Stream,
        "Event": FakeEvent,
        "stream": use_stream,
        "set_stream": set_stream,
        "current_stream": current_stream,
        "default_stream": lambda device=None: _default,
        "synchronize": _silent(),
        "ipc_collect": _silent(),
    }


def _counters(gpu: Gpu) -> dict[str, Any]:
    """The ledger counts memory here, not torch; random state is a buffer nobody reads."""
    return {
        "empty_cache": ledger.release_cached,
        "reset_peak_memory_stats": _silent(),
        "memory_stats": lambda device=None: {},
        "mem_get_info": lambda device=None: (gpu.capacity_bytes, gpu.memory_bytes),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "manual_seed": _silent(),
        "manual_seed_all": _silent(),
        "get_rng_state": lambda device=None: torch.empty(16, dtype=torch.uint8),
        "set_rng_state": _silent(),
        "get_rng_state_all": lambda: [],
        "set_rng_state_all": _silent(),
    }
