"""The part of a model on one rank, when FSDP or DeepSpeed has sharded it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from harness.meters.memory.ledger import Ledger, local_tensor, parameter_data, tensors_by_category


def tag(ledger: Ledger, model: nn.Module) -> None:
    """Tag the storages of the prepared parameters, whole or sharded."""
    for tensor, name in tensors_by_category(model):
        if tensor.numel():
            ledger.tag(tensor, name)
    for flat in _flat_parameters(model):
        names = getattr(flat, "_fqns", ())
        adapted = flat.requires_grad and any(".lora_" in f".{name}" for name in names)
        ledger.tag(flat.data, "adapters" if adapted else "weights")


def _flat_parameters(model: nn.Module) -> Iterator[Any]:
    """FSDP1's flat parameters; each has all parameters of one wrapped module."""
    for module in model.modules():
        flat = getattr(getattr(module, "_handle", None), "flat_param", None)
        if flat is not None:
            yield flat


def tag_gradients(ledger: Ledger, optimizer: Any) -> None:
    """Tag gradients before the optimizer uses them; ZeRO's optimizer has gradients of its own fp32
    copies."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                ledger.tag(parameter.grad, "gradients")


class ParameterSize(NamedTuple):
    """Number and bytes of parameters. A packed 4-bit weight counts in elements of its storage
    dtype; quantization state and buffers are left out; shared storages count once."""

    elements: int
    bytes: int


def on_this_rank(model: nn.Module) -> ParameterSize:
    """The model's parameters on this rank, in device or host memory."""
    return _total(_parts(model))


def on_all_ranks(model: nn.Module) -> ParameterSize:
    """The whole model's parameters, on all ranks."""
    divided = [p for p in model.parameters() if hasattr(p, "ds_numel")]
    whole = _total(p.data for p in model.parameters() if not hasattr(p, "ds_numel"))
    elements = sum(int(p.ds_numel) for p in divided)
    size = sum(int(p.ds_numel) * p.element_size() for p in divided)
    return ParameterSize(whole.elements + elements, whole.bytes + size)


def _total(parts: Iterable[torch.Tensor]) -> ParameterSize:
    storages = {part.untyped_storage()._cdata: part for part in parts}
    sizes = [(part.untyped_storage().nbytes(), part.element_size()) for part in storages.values()]
    return ParameterSize(sum(size // each for size, each in sizes), sum(size for size, _ in sizes))


def _parts(model: nn.Module) -> Iterator[torch.Tensor]:
    for flat in _flat_parameters(model):
        yield flat.data
    for parameter in model.parameters():
        yield local_tensor(parameter_data(parameter))
