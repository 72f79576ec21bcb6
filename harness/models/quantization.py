"""What is in 4 bit: which layers transformers converts, whether it did, and what share that is.

transformers' bitsandbytes integration converts layers whose class is exactly `nn.Linear` or
`Conv1D`. Experts held in one fused parameter, and subclasses of `nn.Linear` (Falcon's), stay as
they are, so a "4-bit" model may hold most of its weights elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from harness import device
from harness.models.lora_layers import base_modules
from harness.models.mismatch import VerificationError, require_equal
from harness.records.verified import MOSTLY_IN_4BIT
from matrices.cell import Quantization


def linear4bit(model: nn.Module) -> dict[str, Any]:
    """Layers in 4 bit by the base model's names."""
    import bitsandbytes as bnb

    return {
        p.name: p.module for p in base_modules(model) if isinstance(p.module, bnb.nn.Linear4bit)
    }


def modules_not_converted(model: Any) -> list[str]:
    """Names (and name endings) that transformers does not convert: the head and tied modules."""
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        return list(quantizer.modules_to_not_convert)
    return list(
        Bnb4BitHfQuantizer.get_modules_to_not_convert(
            model, None, getattr(model, "_keep_in_fp32_modules", None)
        )
    )


def is_converted(name: str, module: nn.Module, kept: Collection[str]) -> bool:
    """Whether transformers turns this layer into one of 4 bit (integrations/bitsandbytes.py,
    replace_with_bnb_linear)."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    convertible = type(module) is nn.Linear or isinstance(module, Conv1D)
    return convertible and should_convert_module(name, list(kept))


def is_or_will_be_4bit(name: str, module: nn.Module, kept: Collection[str]) -> bool:
    """The same for a skeleton, whose layers may be converted already."""
    import bitsandbytes as bnb

    return isinstance(module, bnb.nn.Linear4bit) or is_converted(name, module, kept)


def verify(model: Any, wanted: Quantization, compute_dtype: str) -> None:
    """Every layer that transformers converts is in 4 bit, stored and computed as the cell says."""
    kept = modules_not_converted(model)
    plain = [p.name for p in base_modules(model) if is_converted(p.name, p.module, kept)]
    require_equal(plain, [], "linear layers left unquantized")
    storage = device.DTYPES[wanted.quant_storage]
    for name, layer in linear4bit(model).items():
        state = layer.weight.quant_state
        if state is None:
            raise VerificationError(f"{name} is a 4-bit layer whose weight is not quantized")
        require_equal(state.quant_type, wanted.quant_type, f"quant_type of {name}")
        require_equal(bool(state.nested), wanted.double_quant, f"double_quant of {name}")
        require_equal(layer.weight.dtype, storage, f"quant_storage of {name}")
        require_equal(layer.compute_dtype, device.DTYPES[compute_dtype], f"compute_dtype of {name}")


def disable_unsupported_kernels(model: nn.Module) -> None:
    """Keep bitsandbytes' packed CPU kernel off the layers it fails on: for inference it re-packs
    every 4-bit weight, whatever its shape (functional.py, _convert_weight_packed_for_cpu)."""
    import bitsandbytes as bnb

    for layer in model.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if not isinstance(layer, bnb.nn.Linear4bit) or state is None:
            continue
        if layer.out_features % 32 or layer.in_features % state.blocksize:
            layer.support_avx512bf16_for_cpu = False


def quantized_share(parameters: Iterable[nn.Parameter]) -> float:
    """The share of these weights that is in 4 bit, by number; shared ones count once."""
    four_bit = total = 0
    for parameter in {id(each): each for each in parameters}.values():
        state = getattr(parameter, "quant_state", None)
        size = full_numel(parameter) if state is None else torch.Size(state.shape).numel()
        total += size
        four_bit += size if state is not None else 0
    return four_bit / total if total else 0.0


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The base model's parameters, without what an adapter adds."""
    return [p for place in base_modules(model) for p in place.module.parameters(recurse=False)]


def explain_share(model: nn.Module, share_: float) -> str | None:
    """Why most weights are not in 4 bit; None where most are."""
    if share_ >= MOSTLY_IN_4BIT:
        return None
    largest: Counter[str] = Counter()
    for place in base_modules(model):
        for parameter in place.module.parameters(recurse=False):
            if getattr(parameter, "quant_state", None) is None:
                largest[type(place.module).__name__] += full_numel(parameter)
    names = ", ".join(name for name, _ in largest.most_common(2))
    return (
        f"4 bit asked for; {share_:.0%} of the weights are in 4 bit, since transformers converts "
        f"nn.Linear and Conv1D layers only and most of this model is in {names}"
    )


def full_numel(parameter: torch.Tensor) -> int:
    """Elements of a parameter; for one that ZeRO-3 has partitioned, of the full parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
