"""Fake tensors on a `cuda` device without a GPU or driver: forward, backward and autocast.

torch's FakeTensorMode can have `cuda` tensors without a GPU, but two places in torch ask the device
itself. Both are replaced here for the rest of the process, so this needs a process of its own:

* Every op switches to its tensors' device through a guard. In a build without CUDA that guard is
  missing; `torch._C._ensureCUDADeviceGuardSet` (torch >= 2.10) puts torch's own do-nothing guard
  in its place, if there is one to replace.
* The autograd engine asks `CUDAHooksInterface` whether CUDA is built, and whether a context exists.

The memory layouts relied on: `c10::impl::device_guard_impl_registry` is an array of pointers by
device type (CUDA is 1), and the first virtual functions of `CUDAHooksInterface` are its two
destructors, `isBuilt`, `isAvailable`, `hasPrimaryContext`. Nothing promises either, hence
`harness.simulate.device.self_check`, which tries them in a child process.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

CUDA_DEVICE_TYPE = 1
IS_BUILT, HAS_PRIMARY_CONTEXT = 2, 4
# More entries than either table has; what lies behind them is never called.
GUARD_FUNCTIONS, HOOK_FUNCTIONS = 64, 128
# A CUDA kernel beside a decomposition: without the kernel's registration (a build without CUDA) the
# op would be taken apart, and its pieces allocate temporaries that the kernel does not.
WHOLE_ON_CUDA = ("silu_backward", "mish_backward", "_fused_rms_norm")

_kept_alive: list[Any] = []


class Unavailable(RuntimeError):
    """This torch's internals are not the ones known here."""


def look() -> None:
    """Whether this torch is of the known kind, without touching it. Raises Unavailable."""
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        raise Unavailable(f"torch {torch.__version__} has no guard for fake devices (2.10 has)")
    if torch.cuda.is_available():
        raise Unavailable("a real CUDA device is visible; hide it with CUDA_VISIBLE_DEVICES=")


def enable() -> None:
    """Make `torch.device("cuda")` usable under FakeTensorMode. Raises Unavailable."""
    look()
    built_with_cuda = _set_guard()
    _answer_hooks()
    if not built_with_cuda:
        _keep_whole()
    # What torch.cuda's Python side expects of the C side in a build with CUDA.
    if not hasattr(torch._C, "_cuda_getCurrentRawStream"):
        torch._C._cuda_getCurrentRawStream = lambda device: 0
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != "cuda":
        raise Unavailable(f"torch {torch.__version__} sees {accelerator} instead of cuda")


def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))


def _native(function: Any) -> int:
    """Address of a C function without arguments, to stand in for a virtual one."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _true() -> int:
    return _native(ctypes.pythonapi.Py_IsInitialized)


def _false() -> int:
    # Public since Python 3.13, there under the other name before.
    for name in ("Py_IsFinalizing", "_Py_IsFinalizing"):
        function = getattr(ctypes.pythonapi, name, None)
        if function is not None:
            return _native(function)
    raise Unavailable("this Python has no Py_IsFinalizing")


def _set_guard() -> bool:
    """Put the do-nothing guard in place; returns whether torch was built with CUDA."""
    try:
        registry = (ctypes.c_void_p * 8).in_dll(
            _library("libc10.so"), "_ZN3c104impl26device_guard_impl_registryE"
        )
    except (OSError, ValueError) as error:
        raise Unavailable(
            f"torch {torch.__version__}: no device guard registry: {error}"
        ) from error
    built_with_cuda = registry[CUDA_DEVICE_TYPE] is not None
    if not built_with_cuda:
        # A placeholder whose every function returns 0: `deviceCount() == 0` is what makes torch
        # exchange it for its own.
        table = (ctypes.c_void_p * GUARD_FUNCTIONS)(*[_false()] * GUARD_FUNCTIONS)
        guard = (ctypes.c_void_p * 1)(ctypes.addressof(table))
        _kept_alive.extend((table, guard))
        registry[CUDA_DEVICE_TYPE] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()
    return built_with_cuda


def _answer_hooks() -> None:
    """Give the CUDA hooks object a copy of its function table with two answers replaced."""
    try:
        find = _library("libtorch_cpu.so")._ZN2at6detail12getCUDAHooksEv
    except (OSError, AttributeError) as error:
        raise Unavailable(f"torch {torch.__version__}: no CUDA hooks: {error}") from error
    find.restype = ctypes.c_void_p
    hooks = ctypes.cast(find(), ctypes.POINTER(ctypes.c_void_p))
    old = ctypes.cast(hooks[0], ctypes.POINTER(ctypes.c_void_p))
    table = (ctypes.c_void_p * HOOK_FUNCTIONS)(*[old[at] for at in range(HOOK_FUNCTIONS)])
    table[IS_BUILT] = _true()
    table[HAS_PRIMARY_CONTEXT] = _false()
    _kept_alive.append(table)
    hooks[0] = ctypes.addressof(table)


def _keep_whole() -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("only fake tensors are on this device")

    library = torch.library.Library("aten", "IMPL")
    _kept_alive.append(library)
    for name in WHOLE_ON_CUDA:
        library.impl(name, never, "CUDA")
