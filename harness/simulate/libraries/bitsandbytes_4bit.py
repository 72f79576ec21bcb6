"""bitsandbytes on fake tensors: 4-bit weights and optimizer states of their true sizes.

Replaced are functions that read values (code tables are computed on real tensors), that call the
driver (managed memory, synchronization), and `Params4bit`, which refuses tensors without data.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import bitsandbytes as bnb
import bitsandbytes.functional
import bitsandbytes.nn.modules
import bitsandbytes.optim.optimizer
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from harness import device

_ASKED = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
_CARRIED = (
    "blocksize",
    "compress_statistics",
    "quant_type",
    "quant_storage",
    "quant_state",
    "bnb_quantized",
    "module",
)


class Params4bit(FakeTensor, bnb.nn.Params4bit):
    """A 4-bit weight without data. Libraries ask for the class by its name and by isinstance."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False, **given: Any) -> Params4bit:
        """Quantize `data`, as when a weight is quantized anew (PEFT's OLoRA). The original
        quantizes when it is moved to its device; this one's data is there already."""
        return _packed(data, given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        copied: Any = torch.nn.Parameter(torch.Tensor.clone(self), requires_grad=False)
        copied.__class__ = Params4bit
        for name in _CARRIED:
            setattr(copied, name, getattr(self, name, None))
        copied.quant_state = copy.deepcopy(self.quant_state, memo)
        return cast(Params4bit, copied)

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """Move together with the quantization state; on the right device already, return itself.
        The original would build the parameter anew."""
        place = torch._C._nn._parse_to(*args, **kwargs)[0]
        if place is None or place.type == self.device.type:
            return self
        self.quant_state.to(place)
        moved: Any = torch.nn.Parameter(torch.Tensor.to(self, place), requires_grad=False)
        moved.__class__ = Params4bit
        for name in _CARRIED:
            setattr(moved, name, getattr(self, name))
        return cast(Params4bit, moved)

    def detach(self) -> Params4bit:
        """Itself: it has no gradient, and the result has to be a Params4bit."""
        return self

    def cuda(self, *_: Any, **__: Any) -> Params4bit:
        return self.to("cuda")

    def cpu(self, *_: Any, **__: Any) -> Params4bit:
        return self.to("cpu")


def quantize(module: Any, weight: torch.Tensor) -> None:
    """Give a `Linear4bit` its weight as bitsandbytes quantizes `weight` (out, in) on its device."""
    given = {name: getattr(module.weight, name) for name in _ASKED}
    module.weight = _packed(weight, given | {"module": module})


def _packed(weight: torch.Tensor, given: dict[str, Any]) -> Params4bit:
    place = weight.device
    asked = {name: given[name] for name in _ASKED if given.get(name) is not None}
    if not _has_operators() and place.type == "cpu":
        # Such a release cannot quantize on CPU: quantize on the device, where the state stays.
        weight = weight.to(device.training_device())
    packed, state = bnb.functional.quantize_4bit(weight, **asked)
    parameter: Any = torch.nn.Parameter(packed.to(place), requires_grad=False)
    parameter.__class__ = Params4bit
    parameter.blocksize = state.blocksize
    parameter.compress_statistics = asked.get("compress_statistics", False)
    parameter.quant_type = state.quant_type
    parameter.quant_storage = packed.dtype
    parameter.quant_state = state
    parameter.bnb_quantized = True
    parameter.module = given.get("module")
    if parameter.module is not None:
        parameter.module.quant_state = state
    return cast(Params4bit, parameter)


class ManagedMemory:
    """Counts managed memory in bytes (paged optimizer states), which is outside torch's pool."""

    def __init__(self) -> None:
        self.nbytes = 0

    def get(self, *shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Any:
        tensor: Any = torch.empty(shape, dtype=dtype, device="cpu")
        tensor.is_paged = True
        tensor.page_deviceid = getattr(device, "index", 0)
        self.nbytes += tensor.numel() * tensor.element_size()
        return tensor


def patch() -> ManagedMemory:
    """Patch bitsandbytes to run without driver calls; returns the counter of managed memory."""
    functional, optimizer = bnb.functional, bnb.optim.optimizer
    functional.create_dynamic_map = _computed(functional.create_dynamic_map)
    paged = ManagedMemory()
    functional.get_paged = paged.get
    functional.prefetch_tensor = _none
    functional.fill = _none
    optimizer.sync_gpu = _none
    if not _has_operators():
        _call_nothing(functional)
    bnb.nn.modules.fix_4bit_weight_quant_state_from_module = _state_from_module
    return paged


def forget() -> None:
    """Drop code tables that bitsandbytes keeps from another simulation of this process."""
    bnb.functional.name2qmap.clear()


class _AsItIs(bnb.nn.Params4bit):
    """Params4bit of a fake tensor is a plain parameter (FSDP's view of a flat parameter)."""

    def __new__(cls, data: Any = None, *given: Any, **named: Any) -> Any:
        if isinstance(data, FakeTensor):
            return torch.nn.Parameter(data, requires_grad=False)
        return bnb.nn.Params4bit(data, *given, **named)


def _has_operators() -> bool:
    """bitsandbytes 0.46 made torch operators of its functions."""
    return hasattr(torch.ops.bitsandbytes, "quantize_4bit")


class _Silent:
    """A C library whose every function does nothing."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_, **__: 0


def _call_nothing(functional: Any) -> None:
    """Before its operators bitsandbytes was Python around its C library: tensors are
    allocated there, and addresses handed over."""
    bnb.nn.modules.Params4bit = _AsItIs
    functional.lib = _Silent()
    functional.get_ptr = _none
    functional.is_on_gpu = lambda tensors: True
    kernels = (_none,) * 3
    for name in list(vars(functional)):
        if name.startswith("str2optimizer"):
            setattr(functional, name, defaultdict(lambda: kernels))


def _computed(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def outside(*args: Any, **kwargs: Any) -> torch.Tensor:
        with _disable_current_modes():
            return make(*args, **kwargs)

    return outside


def _none(*_: Any, **__: Any) -> None:
    return None


def _state_from_module(module: Any) -> None:
    """FSDP's flat parameters lose the state; the original would rebuild the parameter too."""
    if getattr(module.weight, "quant_state", None) is None:
        module.weight.quant_state = module.quant_state


def gemm_4bit(
    a: Any,
    b: Any,
    shape: Any,
    absmax: Any,
    blocksize: int,
    quant_type: str,
    bias: Any = None,
    absmax_8bit: Any = None,
    absmax_code: Any = None,
    absmax_offset: Any = None,
) -> Any:
    """The fused product as the CUDA backend computes it for many rows: the whole weight is
    dequantized first (`_dequant_linear_fallback` in bitsandbytes' backends/cuda/ops.py)."""
    scales = []
    if absmax_8bit is not None:
        # Both are there until the product is done.
        scales.append(torch.empty_like(absmax_8bit, dtype=torch.float32))
        scales.append(scales[0] + absmax_offset)
    weight = torch.empty(shape, dtype=a.dtype, device=a.device)
    return torch.ops.aten.linear(a, weight, bias)
