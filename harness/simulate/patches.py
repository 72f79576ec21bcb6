"""Patches that let the training stack run on fake tensors, applied once per process. Each is a
function; its docstring says what it is for."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from harness.simulate.device import fake_cuda, torch_cuda
from harness.simulate.libraries import attention
from harness.simulate.memory.ledger import follow_resizes
from harness.simulate.memory.op_cache import without_torch_function
from matrices.catalogue.gpus import Gpu

if TYPE_CHECKING:
    from harness.simulate.libraries import bitsandbytes_4bit


def before_imports(gpu: Gpu | None) -> None:
    """Patch torch to have a device like `gpu`. To be called before transformers is imported, which
    looks for devices.

    bitsandbytes loads its library for the real device, so it is imported first. Raises
    fake_cuda.Unavailable.
    """
    with nothing_is_compiled():
        importlib.import_module("bitsandbytes")
    if gpu is not None:
        fake_cuda.enable()
        torch_cuda.patch(gpu)
        attention.stand_in_for_flash_attn()
        attention.choose_sdpa_kernel(gpu.compute_capability)


def switch_gpu(gpu: Gpu) -> None:
    """Patch torch to have another GPU than before."""
    torch_cuda.patch(gpu)
    attention.choose_sdpa_kernel(gpu.compute_capability)


def after_imports() -> bitsandbytes_4bit.ManagedMemory:
    """Patch the imported stack for fake tensors; returns the counter of managed memory."""
    from harness.simulate.libraries import bitsandbytes_4bit

    import_deepspeed()
    foreach_accepts_fake_tensors()
    swap_tensors_clears_the_memo()
    fake_tensors_are_not_traced()
    list_indices_are_made_on_the_host()
    deepcopy_clones()
    tensors_are_made_on_the_host()
    follow_resizes()
    without_torch_function()
    return bitsandbytes_4bit.patch()


@contextmanager
def nothing_is_compiled() -> Iterator[None]:
    """bitsandbytes compiles CPU kernels that no fake tensor meets, for which torch imports its
    compiler: a second."""
    compiler: Any = torch.compile
    torch.compile = lambda model=None, **_: model or (lambda function: function)  # type: ignore
    try:
        yield
    finally:
        torch.compile = compiler


def fill_conversion_cache() -> None:
    """peft asks transformers how checkpoints are converted, which compiles hundreds of regular
    expressions. Asked here, the forked simulations share the answer."""
    with suppress(ImportError, AttributeError):
        conversion: Any = importlib.import_module("transformers.conversion_mapping")
        conversion.get_checkpoint_conversion_mapping("")


def import_deepspeed() -> None:
    """accelerate imports DeepSpeed, if it is installed, when it unwraps a model. Imported here, the
    forked simulations share it."""
    if importlib.util.find_spec("deepspeed") is None:
        return
    if torch.cuda.is_available():
        # DeepSpeed would look for a driver to choose by.
        os.environ["DS_ACCELERATOR"] = "cuda"
    importlib.import_module("deepspeed")


def foreach_accepts_fake_tensors() -> None:
    """Optimizers use their foreach path for plain tensors and parameters only: add FakeTensor."""
    for name in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
        kinds: Any = vars(importlib.import_module(name))["_foreach_supported_types"]
        if FakeTensor not in kinds:
            kinds.append(FakeTensor)


def swap_tensors_clears_the_memo() -> None:
    """`Module.to` swaps parameters in place (`torch.utils.swap_tensors`), which fails on tensors
    with weak references; the fake mode's memo of converted tensors holds some. A `.to` that changes
    nothing does nothing."""
    swap = torch.utils.swap_tensors

    def forgetting(left: Any, right: Any) -> None:
        mode = getattr(left, "fake_mode", None) or getattr(right, "fake_mode", None)
        if mode is not None:
            same = left.untyped_storage()._cdata == right.untyped_storage()._cdata
            if same and (left.dtype, left.device) == (right.dtype, right.device):
                return
            mode.fake_tensor_converter.meta_converter.tensor_memo.clear()
        swap(left, right)

    torch.utils.swap_tensors = forgetting


def fake_tensors_are_not_traced() -> None:
    """transformers takes fake tensors as a sign of tracing by a compiler: it would build masks and
    expand grouped heads, which an eager step does not."""
    from transformers.utils import import_utils

    if hasattr(import_utils, "is_fake_tensor"):
        import_utils.is_fake_tensor = lambda tensor: False


def list_indices_are_made_on_the_host() -> None:
    """`x[..., [0]]` makes its index tensor on the device in C++, where no dispatch mode sees it:
    make it here."""
    plain_get, plain_set = torch.Tensor.__getitem__, torch.Tensor.__setitem__

    def indices(tensor: Any, key: Any) -> Any:
        if isinstance(key, list):
            return torch.tensor(key).to(tensor.device)
        if isinstance(key, tuple) and any(isinstance(part, list) for part in key):
            return tuple(indices(tensor, part) for part in key)
        return key

    FakeTensor.__getitem__ = lambda tensor, key: plain_get(tensor, indices(tensor, key))  # type: ignore[method-assign]
    FakeTensor.__setitem__ = lambda tensor, key, value: plain_set(  # type: ignore[method-assign]
        tensor, indices(tensor, key), value
    )


def deepcopy_clones() -> None:
    """`copy.deepcopy` gives a fake parameter a storage that later views of it do not share:
    clone."""

    def copied(tensor: Any, memo: dict[int, Any]) -> Any:
        if id(tensor) in memo:
            return memo[id(tensor)]
        made: Any = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            made = torch.nn.Parameter(made, tensor.requires_grad)
        memo[id(tensor)] = made
        return made

    FakeTensor.__deepcopy__ = copied  # type: ignore[method-assign]


def tensors_are_made_on_the_host() -> None:
    """`torch.tensor(values, device="cuda")` fills the device in C++, where no dispatch mode sees
    it: make the tensor on the host and copy it, which is what torch does."""
    make = torch.tensor
    # `with torch.device(...)` knows constructors by identity, from its first use on.
    importlib.import_module("torch.utils._device")._device_constructors()

    def made(data: Any, *, device: Any = None, **kwargs: Any) -> Any:
        if device is None or torch.device(device).type != "cuda":
            return make(data, device=device, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        return make(data, **kwargs).to(device).requires_grad_(requires_grad)

    torch.tensor = made  # type: ignore[assignment]
