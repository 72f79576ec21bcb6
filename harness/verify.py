"""Look at the loaded objects and refuse to measure something else than what the cell says."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from harness import device
from harness.model import alpha, target_modules, whole_numel
from harness.record import Verified
from matrices.cell import Adapter, Cell, Quantization

# transformers' optim name -> (package and class that runs, its attributes that tell the variants
# apart).
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


# accelerate puts it in the place of torch's where the optimizer is offloaded.
HOST_ADAM = "deepspeed.DeepSpeedCPUAdam"


class VerificationError(RuntimeError):
    """What was loaded is not what the cell asks for: a figure would belong to another cell."""


def demand(found: Any, wanted: Any, what: str) -> None:
    if found != wanted:
        raise VerificationError(f"{what}: the cell says {wanted!r}, loaded is {found!r}")


def verify_model(model: Any, cell: Cell) -> Verified:
    """Check quantization, adapters, dtypes, attention and what is trainable; return what is there.

    Raises VerificationError at the first mismatch.
    """
    linear4bit = _linear4bit(model)
    if cell.quantization is None:
        demand(len(linear4bit), 0, "4-bit layers")
    else:
        _verify_quantization(linear4bit, model, cell.quantization, cell.model.compute_dtype)
    adapters = _adapters(model)
    if cell.adapter is None:
        demand(sorted(adapters), [], "adapted modules")
    else:
        _verify_adapters(adapters, model, cell.adapter)
    _verify_trainable(model, cell)
    demand(model.config._attn_implementation, cell.model.attn_implementation, "attn_implementation")
    _verify_weight_dtype(model, cell)
    return _findings(model, linear4bit, adapters)


def _linear4bit(model: nn.Module) -> dict[str, Any]:
    import bitsandbytes as bnb

    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def _adapters(model: nn.Module) -> dict[str, Any]:
    """Modules that carry a LoRA, by the name they have without PEFT's wrapper."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def _verify_quantization(
    layers: dict[str, Any], model: nn.Module, wanted: Quantization, compute_dtype: str
) -> None:
    plain = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and ".lora_" not in name and not _is_head(name, model)
    ]
    demand(plain, [], "linear layers left unquantized")
    if not layers:
        raise VerificationError("the cell says 4-bit, but no layer is quantized")
    for name, layer in layers.items():
        state = layer.weight.quant_state
        demand(state.quant_type, wanted.quant_type, f"quant_type of {name}")
        demand(bool(state.nested), wanted.double_quant, f"double_quant of {name}")
        storage = device.DTYPES[wanted.quant_storage]
        demand(layer.weight.dtype, storage, f"quant_storage of {name}")
        demand(layer.compute_dtype, device.DTYPES[compute_dtype], f"compute_dtype of {name}")


def _is_head(name: str, model: Any) -> bool:
    """The output head, and what PEFT's skip list (`llm_int8_skip_modules`) names with it."""
    head = model.get_output_embeddings()
    skipped = getattr(model.config, "quantization_config", None)
    names = set(getattr(skipped, "llm_int8_skip_modules", None) or ())
    return dict(model.named_modules()).get(name) is head or name.rsplit(".", 1)[-1] in names


def _verify_adapters(adapters: dict[str, Any], model: Any, wanted: Adapter) -> None:
    if not adapters:
        raise VerificationError("the cell says LoRA, but no module is adapted")
    base = model.get_base_model()
    endings = target_modules(wanted.target_modules, _Unadapted(base))
    for name, layer in adapters.items():
        demand(layer.r["default"], wanted.rank, f"rank of {name}")
        demand(layer.lora_alpha["default"], alpha(wanted), f"alpha of {name}")
        dropout = layer.lora_dropout["default"]
        demand(getattr(dropout, "p", 0.0), wanted.dropout, f"dropout of {name}")
    expected = {
        name
        for name in _Unadapted(base).names
        if any(name == end or name.endswith("." + end) for end in endings)
    }
    demand(sorted(adapters), sorted(expected), "adapted modules")


class _Unadapted:
    """A PEFT-wrapped base seen as it was before: LoRA layers stand for the layer they wrap."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self._modules = {
            name: getattr(module, "base_layer", module)
            for name, module in base.named_modules()
            if ".lora_" not in name and not name.endswith(".base_layer")
        }

    @property
    def names(self) -> list[str]:
        from harness.model import adaptable_modules

        return adaptable_modules(self)

    def named_modules(self) -> Any:
        return self._modules.items()

    def get_output_embeddings(self) -> Any:
        return self._base.get_output_embeddings()


def _verify_trainable(model: Any, cell: Cell) -> None:
    if cell.method == "base":
        return
    if cell.method == "full":
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
        demand(frozen, [], "frozen parameters under full fine-tuning")
        return
    wrong = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    if cell.adapter is not None and not cell.adapter.lora_config:
        demand(wrong, [], "trainable parameters outside the adapter")
    if not any(p.requires_grad for p in model.parameters()):
        raise VerificationError("nothing is trainable")


def _verify_weight_dtype(model: nn.Module, cell: Cell) -> None:
    """The base weights, but for what k-bit preparation turns to fp32 on purpose."""
    prepared = cell.quantization is not None and cell.quantization.kbit_preparation
    wanted = {device.DTYPES[cell.model.weight_dtype]}
    if prepared and cell.method == "qlora":
        wanted = {device.DTYPES["fp32"]}
    found = {
        p.dtype
        for n, p in model.named_parameters()
        if "lora_" not in n and "modules_to_save" not in n and not hasattr(p, "quant_state")
    }
    demand(found, wanted, "weight_dtype")


def _findings(model: nn.Module, linear4bit: dict[str, Any], adapters: dict[str, Any]) -> Verified:
    dtypes: Counter[str] = Counter()
    for parameter in model.parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += whole_numel(parameter)
    return Verified(
        quantized_modules=len(linear4bit),
        quant_types=sorted({m.weight.quant_state.quant_type for m in linear4bit.values()}),
        adapter_modules=sorted({name.rsplit(".", 1)[-1] for name in adapters}),
        adapter_module_count=len(adapters),
        attn_implementation=str(getattr(model.config, "_attn_implementation", "")),
        weight_dtypes=dict(dtypes),
    )


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
    demand(found, wanted, "optimizer class")
    for attribute, value in attributes.items():
        demand(_attribute(inner, attribute), value, f"optimizer {attribute}")
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
