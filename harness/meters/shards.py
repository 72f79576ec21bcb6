"""What one rank holds of a model that FSDP or DeepSpeed has spread over several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from harness.meters.memory import Ledger, held, local, tensors_by_category


def tag(ledger: Ledger, model: nn.Module) -> None:
    """Say which storages the prepared parameters lie in, whole or in part."""
    for tensor, name in tensors_by_category(model):
        if tensor.numel():
            ledger.tag(tensor, name)
    for flat in _flat_parameters(model):
        names = getattr(flat, "_fqns", ())
        adapted = flat.requires_grad and any(".lora_" in f".{name}" for name in names)
        ledger.tag(flat.data, "adapters" if adapted else "weights")


def _flat_parameters(model: nn.Module) -> Iterator[Any]:
    """FSDP1's, each of which stands for the parameters of one wrapped module."""
    for module in model.modules():
        flat = getattr(getattr(module, "_handle", None), "flat_param", None)
        if flat is not None:
            yield flat


def tag_gradients(ledger: Ledger, optimizer: Any) -> None:
    """Gradients as the optimizer is about to use them; where it trains copies (ZeRO), those are
    its own, beside its states."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                ledger.tag(parameter.grad, "gradients")


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters that this rank holds, wherever it keeps them; quantization
    state and buffers left out, storages that share memory counted once."""
    held: dict[int, int] = {}
    for part in _parts(model):
        raw = part.untyped_storage()
        held[raw._cdata] = raw.nbytes()
    return sum(held.values())


def whole_parameter_bytes(model: nn.Module) -> int:
    """Bytes of all of the model's parameters, on however many ranks they are already."""
    divided = sum(
        int(parameter.ds_numel) * parameter.element_size()
        for parameter in model.parameters()
        if hasattr(parameter, "ds_numel")
    )
    return divided + parameter_bytes(
        nn.ParameterList(p for p in model.parameters() if not hasattr(p, "ds_numel"))
    )


def _parts(model: nn.Module) -> Iterator[torch.Tensor]:
    for flat in _flat_parameters(model):
        yield flat.data
    for parameter in model.parameters():
        yield local(held(parameter))
