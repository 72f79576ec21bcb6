"""PEFT's layers on a model, and the modules that its configuration matches.

PEFT wraps modules in place. `base_modules` lists the modules of the base model, each with its
wrappers, so that a name means the same module with and without an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ADAPTER = "default"


@dataclass(frozen=True)
class BaseModule:
    """A module of the base model by its own name, and what PEFT wrapped it in, outermost first."""

    name: str
    module: nn.Module
    wrappers: tuple[Any, ...]


def base_model(model: Any) -> Any:
    """The model that a PEFT model adapts; any other model is its own."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_modules(model: Any) -> list[BaseModule]:
    """All modules of a base model, adapted or not; a PEFT model is seen as its base model."""
    return list(_walk("", base_model(model)))


def _walk(name: str, module: nn.Module) -> Iterator[BaseModule]:
    wrappers = []
    inner = module
    while (within := _wrapped_module(inner)) is not None:
        wrappers.append(inner)
        inner = within
    yield BaseModule(name, inner, tuple(wrappers))
    for child_name, child in inner.named_children():
        yield from _walk(f"{name}.{child_name}" if name else child_name, child)


def _wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module that a PEFT layer wraps; None for any other module."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, BaseTunerLayer):
        return module.base_layer  # type: ignore[no-any-return]
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module  # type: ignore[no-any-return]
    return None


def unwrapped(module: Any) -> Any:
    """The base model's module without PEFT's wrappers."""
    while module is not None and (within := _wrapped_module(module)) is not None:
        module = within
    return module


def is_lora(wrapper: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(wrapper, LoraLayer)


def loras_of(place: BaseModule) -> dict[str, Any]:
    """LoRA layers of one module, by what they adapt: the module's name, or for a parameter of its
    own (`target_parameters`) that parameter's."""
    return {
        f"{place.name}.{wrapper.parameter_name}"
        if hasattr(wrapper, "parameter_name")
        else place.name: wrapper
        for wrapper in place.wrappers
        if is_lora(wrapper)
    }


def all_loras(places: Iterable[BaseModule]) -> dict[str, Any]:
    """LoRA layers of several modules, by the name of what each adapts."""
    return {name: layer for place in places for name, layer in loras_of(place).items()}


def saved_copies(place: BaseModule) -> list[nn.Module]:
    """The trained copy of a module that `modules_to_save` names."""
    from peft.utils.other import ModulesToSaveWrapper

    return [
        w.modules_to_save[ADAPTER] for w in place.wrappers if isinstance(w, ModulesToSaveWrapper)
    ]


def token_layers(place: BaseModule) -> list[Any]:
    """The layer that holds the rows `trainable_token_indices` asks for."""
    from peft.utils.other import TrainableTokensWrapper

    return [w.token_adapter for w in place.wrappers if isinstance(w, TrainableTokensWrapper)]


def targets(config: Any, found: list[BaseModule]) -> list[str]:
    """Names of the modules that PEFT's resolved configuration adapts, by PEFT's own matching."""
    from peft.tuners.tuners_utils import check_target_module_exists

    return [p.name for p in found if p.name and check_target_module_exists(config, p.name)]


def target_parameters(config: Any, found: list[BaseModule]) -> list[str]:
    """Names of the parameters that are adapted without a layer of their own."""
    wanted = config.target_parameters or []
    return [
        name
        for place in found
        for name in direct_parameters(place)
        if any(ends_with(name, target) for target in wanted)
    ]


def direct_parameters(place: BaseModule) -> dict[str, nn.Parameter]:
    """The parameters of a module without those of its children, by their full names."""
    return {
        f"{place.name}.{leaf}" if place.name else leaf: parameter
        for leaf, parameter in place.module.named_parameters(recurse=False)
    }


def modules_to_save(config: Any, found: list[BaseModule]) -> list[str]:
    """Names of the modules of which a copy is trained (peft/utils/other.py, _set_trainable)."""
    # With ensure_weight_tying PEFT names what is tied to them too.
    wanted = (*(config.modules_to_save or ()), *(getattr(config, "modules_to_tie", None) or ()))
    return [p.name for p in found if wanted and p.name.endswith(wanted)]


def token_indices(config: Any, model: Any) -> dict[str, list[int]]:
    """Rows to train, by the embedding's name as it is asked for; a list means the input's."""
    wanted = config.trainable_token_indices
    if not wanted:
        return {}
    return dict(wanted) if isinstance(wanted, dict) else {input_embedding(model): list(wanted)}


def input_embedding(model: Any) -> str:
    """The full name of the layer that token ids are looked up in."""
    base = base_model(model)
    layer = unwrapped(base.get_input_embeddings())
    return next(place.name for place in base_modules(base) if place.module is layer)


def rank_of(config: Any, name: str) -> int:
    return int(_pattern_value(config.rank_pattern, name, config.r))


def alpha_of(config: Any, name: str) -> float:
    return float(_pattern_value(config.alpha_pattern, name, config.lora_alpha))


def _pattern_value(pattern: dict[str, Any], name: str, otherwise: Any) -> Any:
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(list(pattern), name), otherwise)


def ends_with(full: str, ending: str) -> bool:
    return full == ending or full.endswith("." + ending)


def trained_parameters(layer: Any) -> list[torch.nn.Parameter]:
    """The parameters of a LoRA layer that train: a variant may freeze some of them."""
    frozen = {id(p) for p in layer.lora_B.parameters()} if _is_mica(layer) else set()
    return [
        parameter
        for name, child in layer.named_children()
        if name != "base_layer"
        for parameter in child.parameters()
        if id(parameter) not in frozen
    ]


def _is_mica(layer: Any) -> bool:
    """MiCA trains A alone (peft/tuners/lora/config.py, init_lora_weights)."""
    return type(getattr(layer, "lora_variant", {}).get(ADAPTER)).__name__.startswith("MiCA")
