"""Check that the loaded objects are what the cell asks for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import nn

from harness import device
from harness.models import lora_layers, quantization
from harness.models.mismatch import VerificationError, require_equal
from harness.models.quantization import full_numel
from harness.records.verified import Verified
from harness.verify import adapter
from matrices.cell import Cell

# transformers' optim name -> (package and class that runs, the attributes of this variant).
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw_torch": ("torch.AdamW", {"fused": None}),
    "adamw_torch_fused": ("torch.AdamW", {"fused": True}),
    "adamw_8bit": ("bitsandbytes.AdamW", {"optim_bits": 8, "is_paged": False}),
    "adamw_bnb_8bit": ("bitsandbytes.AdamW", {"optim_bits": 8, "is_paged": False}),
    "paged_adamw_8bit": ("bitsandbytes.AdamW", {"optim_bits": 8, "is_paged": True}),
    "paged_adamw_32bit": ("bitsandbytes.AdamW", {"optim_bits": 32, "is_paged": True}),
    "lion_8bit": ("bitsandbytes.Lion", {"optim_bits": 8, "is_paged": False}),
    "lion_32bit": ("bitsandbytes.Lion", {"optim_bits": 32, "is_paged": False}),
    "paged_lion_8bit": ("bitsandbytes.Lion", {"optim_bits": 8, "is_paged": True}),
    "paged_lion_32bit": ("bitsandbytes.Lion", {"optim_bits": 32, "is_paged": True}),
    "adafactor": ("transformers.Adafactor", {}),
    "sgd": ("torch.SGD", {}),
}


# accelerate replaces torch's Adam by it where the optimizer is offloaded.
HOST_ADAM = "deepspeed.DeepSpeedCPUAdam"


def verify_model(model: Any, cell: Cell) -> Verified:
    """Check quantization, adapters, dtypes, attention and trainable parameters; return what was
    found.

    For a model that is loaded and has computed nothing yet: bitsandbytes casts the biases of 4-bit
    layers at their first forward. Raises VerificationError at the first mismatch.
    """
    _verify_structure(model, cell)
    _verify_weight_dtype(model, cell, set())
    return _findings(model)


def verify_again(model: Any, cell: Cell) -> dict[str, int]:
    """The same before the timed steps, when a trainer has prepared the model and it may have
    computed: biases of 4-bit layers and what is trained may have another dtype by then. Returns
    parameters by dtype. Raises VerificationError at the first mismatch."""
    _verify_structure(model, cell)
    four_bit = quantization.linear4bit(model).values()
    cast = {id(layer.bias) for layer in four_bit if layer.bias is not None}
    cast |= {id(p) for p in model.parameters() if p.requires_grad} if cell.adapter else set()
    _verify_weight_dtype(model, cell, cast)
    return _dtypes(model)


def _verify_structure(model: Any, cell: Cell) -> None:
    if cell.quantization is None:
        require_equal(len(quantization.linear4bit(model)), 0, "4-bit layers")
    else:
        quantization.verify(model, cell.quantization, cell.model.compute_dtype)
    adapters = lora_layers.all_loras(lora_layers.base_modules(model))
    if cell.adapter is None:
        require_equal(sorted(adapters), [], "adapted modules")
    elif not adapters:
        raise VerificationError("the cell says LoRA, but no module is adapted")
    else:
        adapter.verify(model, cell.adapter)
    if cell.method == "full":
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
        require_equal(frozen, [], "frozen parameters under full fine-tuning")
    require_equal(
        model.config._attn_implementation, cell.model.attn_implementation, "attn_implementation"
    )


def _verify_weight_dtype(model: Any, cell: Cell, cast: Collection[int]) -> None:
    """The base weights, but for what is in 4 bit, `cast` (ids) by a library since, and what
    transformers keeps in fp32 for this architecture."""
    prepared = cell.quantization is not None and cell.quantization.kbit_preparation
    wanted = {device.DTYPES[cell.model.weight_dtype]}
    if prepared and cell.method == "qlora":
        wanted = {device.DTYPES["fp32"]}
    kept = _kept_in_fp32(model, cell.model.weight_dtype)
    found = {
        parameter.dtype
        for place in lora_layers.base_modules(model)
        for name, parameter in lora_layers.direct_parameters(place).items()
        if id(parameter) not in cast
        and getattr(parameter, "quant_state", None) is None
        and not (parameter.dtype == device.DTYPES["fp32"] and _matches_name(name, kept))
    }
    require_equal(found, wanted, "weight_dtype")


def _kept_in_fp32(model: Any, weight_dtype: str) -> set[str]:
    """What an architecture asks transformers to keep in fp32 where weights are loaded in half
    precision: some in fp16 alone."""
    base = lora_layers.base_model(model)
    kept = set(getattr(base, "_keep_in_fp32_modules_strict", None) or ())
    if weight_dtype == "fp16":
        kept |= set(getattr(base, "_keep_in_fp32_modules", None) or ())
    return kept


def _matches_name(name: str, wanted: Collection[str]) -> bool:
    return any(re.search(rf"(^|\.){each}($|\.)", name) for each in wanted)


def _findings(model: Any) -> Verified:
    linear4bit = quantization.linear4bit(model)
    adapters = lora_layers.all_loras(lora_layers.base_modules(model))
    share = None
    if linear4bit or getattr(model, "is_loaded_in_4bit", False):
        share = quantization.quantized_share(quantization.base_parameters(model))
    said = quantization.explain_share(model, share) if share is not None else None
    return Verified(
        quantized_modules=len(linear4bit),
        quant_types=sorted({m.weight.quant_state.quant_type for m in linear4bit.values()}),
        quantized_share=share,
        adapter=adapter.summarize(model) if adapters else None,
        adapter_modules=sorted({_module_of(name, adapters[name]) for name in adapters}),
        adapter_module_count=len(adapters),
        attn_implementation=str(getattr(model.config, "_attn_implementation", "")),
        weight_dtypes=_dtypes(model),
        substitutions=[said] if said else [],
    )


def _module_of(name: str, layer: Any) -> str:
    """The last part of an adapted module's name."""
    owner = name.rpartition(".")[0] if hasattr(layer, "parameter_name") else name
    return owner.rpartition(".")[2]


def _dtypes(model: nn.Module) -> dict[str, int]:
    """Parameters by dtype."""
    dtypes: Counter[str] = Counter()
    for parameter in model.parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += full_numel(parameter)
    return dict(dtypes)


def verify_optimizer(optimizer: Any, name: str) -> tuple[str, list[str]]:
    """Class that runs, and what replaced what was asked. Raises VerificationError on a mismatch."""
    inner = optimizer
    # accelerate's wrapper, DeepSpeed's wrapper, DeepSpeed's sharded optimizer.
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    wanted, attributes = OPTIMIZERS[name]
    found = f"{type(inner).__module__.split('.')[0]}.{type(inner).__name__}"
    if (found, wanted) == (HOST_ADAM, "torch.AdamW"):
        said = (
            f"{name} asked for; DeepSpeed's own Adam for host memory ran, as its states are there"
        )
        return found, [said]
    require_equal(found, wanted, "optimizer class")
    for attribute, value in attributes.items():
        require_equal(_attribute(inner, attribute), value, f"optimizer {attribute}")
    substitutions = []
    if attributes.get("is_paged") and not device.has_cuda():
        substitutions.append(
            f"{name} asked for; its states were not paged, because bitsandbytes pages CUDA memory "
            "and there is no CUDA device"
        )
    return found, substitutions


def _attribute(optimizer: Any, name: str) -> Any:
    if name == "optim_bits":
        return optimizer.args.optim_bits
    if name in optimizer.defaults:
        return optimizer.defaults[name]
    return getattr(optimizer, name)
