"""From a cell to a loaded model: base weights, 4-bit storage, k-bit preparation, adapters."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import device
from harness.models import loading_info, packaged, quantization
from harness.models.lora_layers import ends_with
from harness.models.quantization import full_numel
from harness.records import hub
from harness.records.record import Record
from matrices.catalogue.models import PACKAGED_MODELS
from matrices.cell import Adapter, Cell, Model, Quantization
from matrices.errors import UserError, nearest
from matrices.files.fingerprint import refuse_hub_id_of_directory
from matrices.rules.parallelism import reentrant

QV_NAMES = {"q_proj", "v_proj", "query", "value", "q", "v", "wq", "wv"}
# Projections that hold query, key and value in one matrix stand for query and value too.
FUSED_QKV_NAMES = {"qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "W_pack", "in_proj"}


def source(model: Model) -> tuple[str, dict[str, Any]]:
    """The arguments of `from_pretrained`: a directory or hub id, and keyword arguments.

    One process loads all files of a hub model from one commit."""
    if model.name in PACKAGED_MODELS:
        return str(packaged.ensure_model(model.name)), {}
    if not hub.is_hub_model(model):
        trusted = {"trust_remote_code": True} if model.trust_remote_code else {}
        return str(Path(model.name).expanduser()), trusted
    refuse_hub_id_of_directory(model.name, "model.name")
    return model.name, {
        "revision": commit(model) or model.revision or "main",
        "trust_remote_code": model.trust_remote_code,
    }


def commit(model: Model) -> str | None:
    """The commit of a hub model, looked up once per process; None for other models, and where
    neither the hub nor a local copy gives it."""
    return _commit(model.name, model.revision) if hub.is_hub_model(model) else None


@functools.cache
def _commit(name: str, revision: str | None) -> str | None:
    from transformers.utils.hub import resolve_revision

    found = resolve_revision(name, revision)
    return getattr(found, "resolved", None) or hub.known_commit(name, revision)


def cell_at_commit(record: Record) -> Cell:
    """The cell of a record with its hub model at the recorded commit: another process must score
    the same model that was trained."""
    cell, read = record.cell, record.provenance.model.get("commit")
    if read is None or not hub.is_hub_model(cell.model):
        return cell
    return cell.model_copy(update={"model": cell.model.model_copy(update={"revision": read})})


def load_tokenizer(model: Model) -> Any:
    from transformers import AutoTokenizer

    name, keywords = source(model)
    return AutoTokenizer.from_pretrained(name, **keywords)


def load_base(cell: Cell, place: torch.device | None = None, directory: Path | None = None) -> Any:
    """The base model on `place` or the training device, in 4 bit when the cell asks for it; from
    `directory` when its weights have been trained.

    Raises loading_info.WeightsError when a weight of it is not the checkpoint's."""
    name, keywords = source(cell.model) if directory is None else (str(directory), {})
    keywords |= {
        "dtype": device.DTYPES[cell.model.weight_dtype],
        "attn_implementation": cell.model.attn_implementation,
        "device_map": _device_map(cell, place),
    }
    if cell.quantization is not None:
        keywords["quantization_config"] = quantization_config(
            cell.quantization, cell.model.compute_dtype
        )
    loaded = loading_info.from_pretrained(name, **keywords)
    if cell.quantization is not None:
        quantization.disable_unsupported_kernels(loaded)
    return loaded


def _device_map(cell: Cell, place: torch.device | None) -> Any:
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        # ZeRO-3 divides the weights among the ranks as they are read.
        return None
    if cell.strategy.device_map and cell.devices > 1:
        return cell.strategy.device_map
    return {"": place or device.training_device()}


def quantization_config(quantization: Quantization, compute_dtype: str) -> Any:
    """Every field explicit: `load_in_4bit=True` alone means fp4, fp32 compute, no nesting."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_quant_storage=device.DTYPES[quantization.quant_storage],
        bnb_4bit_compute_dtype=device.DTYPES[compute_dtype],
    )


def prepare_kbit(model: Any, cell: Cell) -> Any:
    """PEFT's k-bit preparation, when the cell asks for it."""
    from peft import prepare_model_for_kbit_training

    if cell.quantization is None or cell.train is None or not cell.quantization.kbit_preparation:
        return model
    return prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=cell.train.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant(cell)},
    )


def add_adapter(model: Any, cell: Cell) -> Any:
    """Attach LoRA as the cell says. The initial weights depend on the seed alone."""
    from peft import get_peft_model
    from transformers import set_seed

    if cell.adapter is None:
        return model
    config = lora_config(cell.adapter, model)
    # As SFTTrainer does before it attaches an adapter itself, so that losses agree with it.
    set_seed(cell.seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise refused_by_peft(error) from error


def lora_config(adapter: Adapter, model: Any) -> Any:
    """PEFT's configuration of an adapter on `model`. Raises UserError for what PEFT refuses."""
    from peft import LoraConfig

    names = target_modules(adapter.target_modules, model)
    try:
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=adapter.rank,
            lora_alpha=alpha(adapter),
            lora_dropout=adapter.dropout,
            target_modules=names,
            # PEFT modifies its arguments.
            **copy.deepcopy(adapter.lora_config),
        )
    except LIBRARY_REFUSALS as error:
        raise refused_by_peft(error) from error


# What PEFT raises for values that it refuses.
LIBRARY_REFUSALS = (ValueError, TypeError, AttributeError, KeyError, ImportError)


def refused_by_peft(error: Exception) -> UserError:
    said = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"PEFT refuses it: {said}", key="adapter.lora_config")


def alpha(adapter: Adapter) -> int:
    return adapter.alpha if adapter.alpha is not None else 2 * adapter.rank


# LoRA can be put on these too, where they are asked for by name.
_BY_NAME_ONLY = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def adaptable_modules(model: Any) -> list[str]:
    """Full names of the linear layers LoRA can be put on, the output head left out."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def target_modules(wanted: str | Sequence[str], model: Any) -> list[str]:
    """`qv`, `attention`, `mlp`, `all-linear` or explicit names, as name endings PEFT matches.

    Raises UserError when a name matches nothing, with the names the model has.
    """
    names = adaptable_modules(model)
    explicit = [wanted] if isinstance(wanted, str) and wanted not in _GROUPS else wanted
    if isinstance(explicit, str):
        if explicit in ("mlp", "all-linear"):
            _refuse_fused_experts(explicit, model)
        chosen = [name for name in names if _GROUPS[explicit](name)]
        if not chosen:
            raise UserError(
                f"{explicit!r} matches no linear layer of this model, which has "
                + ", ".join(sorted({_leaf(name) for name in names})),
                key="adapter.target_modules",
            )
        return shortest_endings(chosen, names)
    names += [full for full, module in model.named_modules() if isinstance(module, _BY_NAME_ONLY)]
    for name in explicit:
        if not any(ends_with(full, name) for full in names):
            leaves = sorted({_leaf(full) for full in names})
            raise UserError(
                f"{name!r} matches no layer LoRA can be put on; this model has {', '.join(leaves)}"
                + nearest(name, leaves),
                key="adapter.target_modules",
            )
    return list(explicit)


def _refuse_fused_experts(wanted: str, model: Any) -> None:
    """Experts held in one parameter are no linear layers: a set that should contain them would
    silently adapt the rest alone."""
    for name, module in model.named_modules():
        layers = (part for part in module.modules() if isinstance(part, nn.Linear))
        if _leaf(name) == "experts" and next(layers, None) is None:
            raise UserError(
                f"{wanted!r} cannot adapt {name}: this model holds its experts in fused "
                "parameters, not in linear layers; choose 'attention' or 'qv', or name layers",
                key="adapter.target_modules",
            )


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _in_attention(name: str) -> bool:
    return any(re.search("attn|attention", part) for part in name.split("."))


def _is_qv(name: str) -> bool:
    return _in_attention(name) and _leaf(name) in QV_NAMES | FUSED_QKV_NAMES


_GROUPS = {
    "qv": _is_qv,
    "attention": _in_attention,
    # In a numbered layer: OPT-350m's project_in and project_out are in none.
    "mlp": lambda name: not _in_attention(name) and any(p.isdigit() for p in name.split(".")),
    "all-linear": lambda name: True,
}


def shortest_endings(chosen: Iterable[str], names: Sequence[str]) -> list[str]:
    """The shortest name endings that select exactly `chosen` among `names`, sorted.

    A leaf name is enough unless the same leaf exists outside (GPT-2's `attn.c_proj`, `mlp.c_proj`).
    """
    wanted = set(chosen)
    endings = set()
    for full in wanted:
        parts = full.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if all(name in wanted for name in names if ends_with(name, ending)):
                endings.add(ending)
                break
    return sorted(endings)


def provenance(model: Model) -> dict[str, str]:
    """Which weights are read: the hub commit, or a local directory's fingerprint."""
    found = {"name": model.name}
    if of_hub := commit(model):
        found["commit"] = of_hub
    if model.fingerprint:
        found["fingerprint"] = model.fingerprint
    if model.name == "smollm2-135m":
        found |= {"wheel": packaged.WHEEL, "wheel_sha256": packaged.WHEEL_SHA256}
    return found


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; a 4-bit weight counts its elements, not its bytes."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = full_numel(parameter) if state is None else torch.Size(state.shape).numel()
        total += size
        trainable += size if parameter.requires_grad else 0
    return trainable, total
