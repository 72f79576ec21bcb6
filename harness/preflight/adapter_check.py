"""Check `adapter.lora_config` against the model before anything is trained.

PEFT itself matches names to modules. What it would silently ignore (a name that matches nothing, a
setting without effect) is refused here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from harness import device
from harness.models import lora_layers
from harness.models.lora_layers import BaseModule
from harness.models.model import LIBRARY_REFUSALS, lora_config, refused_by_peft
from harness.preflight import adapter_values
from harness.preflight.adapter_values import refusal
from matrices.cell import Adapter, Quantization
from matrices.errors import UserError, nearest


def check(adapter: Adapter, model: Any, quantization: Quantization | None = None) -> None:
    """Raise UserError for the first argument that matches nothing in `model`, has no effect there,
    or would make another model of it. Names and shapes alone count: weights may be meta tensors.
    """
    if not adapter.lora_config:
        return
    adapter_values.check(adapter.lora_config)
    config = lora_config(adapter, model)
    found = lora_layers.base_modules(model)
    for name, check_argument in _CHECKS.items():
        if adapter.lora_config.get(name) is not None:
            check_argument(config, model, found)
    _check_tied_head(config, model)
    if quantization is not None:
        _check_in_4bit(config, model, found)
        if quantization.kbit_preparation:
            _check_norm_biases(config, found)


def try_attach(adapter: Adapter, skeleton: Any, in_4bit: bool = False) -> None:
    """Let PEFT attach the adapter to a copy of `skeleton` (meta tensors). Raises UserError when
    PEFT refuses. Initial values need real weights: they are tried on one small layer."""
    from peft import get_peft_model

    if not adapter.lora_config:
        return
    config = lora_config(adapter, skeleton)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _initialize_small_layer(config, in_4bit)
            config.init_lora_weights = False
            get_peft_model(copy.deepcopy(skeleton), config)
    except LIBRARY_REFUSALS as error:
        raise refused_by_peft(error) from error


def _initialize_small_layer(config: Any, in_4bit: bool) -> None:
    from peft import LoraModel

    small = copy.deepcopy(config)
    small.target_modules, small.exclude_modules = {"0"}, None
    small.layers_to_transform = small.layers_pattern = small.target_parameters = None
    small.modules_to_save = small.trainable_token_indices = None
    small.r, small.rank_pattern, small.alpha_pattern = 2, {}, {}
    with torch.random.fork_rng(devices=[]):
        try:
            LoraModel(nn.Sequential(_small_layer(in_4bit)), small, lora_layers.ADAPTER)
        except (RuntimeError, AssertionError) as error:
            # Integer weights have no gradients; or the device does not exist.
            raise ValueError(f"init_lora_weights {config.init_lora_weights!r}: {error}") from error


def _small_layer(in_4bit: bool) -> nn.Module:
    if not in_4bit:
        return nn.Linear(64, 64, dtype=torch.bfloat16)
    import bitsandbytes as bnb

    layer: nn.Module = bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    return layer


def _leaves(names: Iterable[str]) -> list[str]:
    leaves = {name.rpartition(".")[2] for name in names}
    return sorted(leaf for leaf in leaves if leaf and not leaf.isdigit())


def _no_match(argument: str, wanted: Any, names: Iterable[str], what: str) -> UserError:
    """The error for an argument that matches none of `names`."""
    leaves = _leaves(names)
    hint = nearest(wanted, leaves) if isinstance(wanted, str) else ""
    shown = ", ".join(leaves[:30]) + (", ..." if len(leaves) > 30 else "")
    return refusal(argument, f"{wanted!r} matches no {what}; there are {shown}{hint}")


def _check_rank_pattern(config: Any, model: Any, found: list[BaseModule]) -> None:
    _check_pattern("rank_pattern", config, found)


def _check_alpha_pattern(config: Any, model: Any, found: list[BaseModule]) -> None:
    _check_pattern("alpha_pattern", config, found)


def _check_pattern(argument: str, config: Any, found: list[BaseModule]) -> None:
    from peft.utils.other import get_pattern_key

    adapted = lora_layers.targets(config, found) + lora_layers.target_parameters(config, found)
    for key in getattr(config, argument):
        # It returns its argument when nothing matches.
        if not any(get_pattern_key([key], name) == key for name in adapted):
            raise _no_match(argument, key, adapted, "adapted module")


def _check_layers(config: Any, model: Any, found: list[BaseModule]) -> None:
    wanted = config.layers_to_transform
    for layer in [wanted] if isinstance(wanted, int) else wanted:
        one = copy.copy(config)
        one.layers_to_transform = [layer]
        if not lora_layers.targets(one, found):
            one.layers_to_transform = None
            numbers = sorted(
                {
                    int(part)
                    for name in lora_layers.targets(one, found)
                    for part in name.split(".")
                    if part.isdigit()
                }
            )
            there = f"{numbers[0]} to {numbers[-1]}" if numbers else "none with a number"
            raise refusal(
                "layers_to_transform",
                f"no module of layer {layer} is adapted; the layers that can be are {there}",
            )


def _check_excluded(config: Any, model: Any, found: list[BaseModule]) -> None:
    every = copy.copy(config)
    every.exclude_modules = None
    adapted = lora_layers.targets(every, found)
    wanted = config.exclude_modules
    for name in [wanted] if isinstance(wanted, str) else sorted(wanted):
        one = copy.copy(config)
        one.exclude_modules = name if isinstance(wanted, str) else {name}
        if lora_layers.targets(one, found) == adapted:
            raise _no_match("exclude_modules", name, adapted, "module that would be adapted")


def _check_saved(config: Any, model: Any, found: list[BaseModule]) -> None:
    for name in config.modules_to_save:
        if not any(place.name.endswith(name) for place in found):
            raise _no_match("modules_to_save", name, (p.name for p in found), "module")


def _check_in_4bit(config: Any, model: Any, found: list[BaseModule]) -> None:
    """A weight in 4 bit is no number that has a gradient, and no matrix an adapter can be added to:
    neither a copy of it can be trained nor a parameter adapted."""
    from harness.models.quantization import is_or_will_be_4bit, modules_not_converted

    kept = modules_not_converted(model)
    held = [p.name for p in found if is_or_will_be_4bit(p.name, p.module, kept)]
    for name in lora_layers.modules_to_save(config, found):
        within = [each for each in held if each == name or each.startswith(f"{name}.")]
        if within:
            raise refusal(
                "modules_to_save",
                f"{name!r} holds layers in 4 bit ({within[0]}), which cannot be trained; name "
                "modules that stay as they are (the head, embeddings, norms)",
            )
    for name in lora_layers.target_parameters(config, found):
        if name.rpartition(".")[0] in held:
            raise refusal(
                "target_parameters",
                f"{name!r} is in 4 bit; name its layer in target_modules instead",
            )


def _check_norm_biases(config: Any, found: list[BaseModule]) -> None:
    """TRL turns what is trained beside a 4-bit model to bf16 (trl/trainer/sft_trainer.py), k-bit
    preparation the rest to fp32; CUDA's autocast brings the two together, the CPU's does not."""
    if config.bias != "all" or device.has_cuda():
        return
    for place in found:
        if isinstance(place.module, nn.LayerNorm) and place.module.bias is not None:
            raise refusal(
                "bias",
                f"'all' trains the bias of {place.name} in bf16 beside its fp32 weight, which "
                "torch's layer_norm refuses on a CPU; use lora_only, or kbit_preparation false",
            )


def _check_parameters(config: Any, model: Any, found: list[BaseModule]) -> None:
    names = [name for place in found for name in lora_layers.direct_parameters(place)]
    for wanted in config.target_parameters:
        if not any(lora_layers.ends_with(name, wanted) for name in names):
            raise _no_match("target_parameters", wanted, names, "parameter")


def _check_tokens(config: Any, model: Any, found: list[BaseModule]) -> None:
    saved = lora_layers.modules_to_save(config, found)
    for name, ids in lora_layers.token_indices(config, model).items():
        rows = [
            p.module
            for p in found
            if p.name.endswith(name) and _embedding_rows(p.module) is not None
        ]
        if not rows:
            there = [p.name for p in found if isinstance(p.module, nn.Embedding)]
            raise _no_match("trainable_token_indices", name, there, "embedding")
        if any(p.name.endswith(name) for p in found if p.name in saved):
            raise refusal(
                "trainable_token_indices",
                f"{name} is trained whole by modules_to_save; give one of the two",
            )
        count = min(rows_ for module in rows if (rows_ := _embedding_rows(module)) is not None)
        beyond = [each for each in ids if each >= count]
        if beyond:
            raise refusal(
                "trainable_token_indices",
                f"token {beyond[0]} is beyond {name}, which has the rows 0 to {count - 1}",
            )
        if not ids or len(set(ids)) < len(ids):
            raise refusal("trainable_token_indices", f"{ids} names no token, or one of them twice")


def _check_tied_head(config: Any, model: Any) -> None:
    """TRL computes the loss from the head's own weight and bias (trl/trainer/utils.py,
    add_fused_lm_head), past a wrapper that PEFT puts on a tied head."""
    head = model.get_output_embeddings()
    if head is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    embedding = lora_layers.input_embedding(model)
    if any(embedding.endswith(name) for name in lora_layers.token_indices(config, model)):
        raise refusal(
            "trainable_token_indices",
            "the head is tied to the embedding here, so PEFT wraps it too, and TRL, which computes "
            "the loss from the head itself, fails on that; train all rows instead "
            "(modules_to_save: [embed_tokens])",
        )
    tied = getattr(config, "ensure_weight_tying", False)
    if tied and any(lora_layers.ends_with(embedding, name) for name in config.target_modules):
        raise refusal(
            "ensure_weight_tying",
            "PEFT puts the embedding's adapter on the tied head too, and TRL refuses an adapter "
            "there, as it would never be trained; leave it out",
        )


def _embedding_rows(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None


def _check_bias(config: Any, model: Any, found: list[BaseModule]) -> None:
    if config.bias == "none":
        return
    biased = [p.name for p in found if isinstance(getattr(p.module, "bias", None), torch.Tensor)]
    if config.bias == "lora_only":
        adapted = set(lora_layers.targets(config, found))
        biased = [name for name in biased if name in adapted]
    if not biased:
        whose = "adapted module" if config.bias == "lora_only" else "module"
        raise refusal("bias", f"{config.bias!r} has no effect: no {whose} here has a bias")


_CHECKS: dict[str, Callable[[Any, Any, list[BaseModule]], None]] = {
    "layers_to_transform": _check_layers,
    "exclude_modules": _check_excluded,
    "modules_to_save": _check_saved,
    "target_parameters": _check_parameters,
    "rank_pattern": _check_rank_pattern,
    "alpha_pattern": _check_alpha_pattern,
    "trainable_token_indices": _check_tokens,
    "bias": _check_bias,
}
