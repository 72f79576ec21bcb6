"""Check the adapter on the loaded model against PEFT's own resolved configuration."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import torch

from harness.models import lora_layers
from harness.models.lora_layers import ADAPTER, BaseModule
from harness.models.mismatch import VerificationError, require_equal
from harness.models.model import alpha, target_modules
from harness.records.verified import PassedThrough, VerifiedAdapter
from harness.verify import arguments
from matrices.cell import Adapter


def verify(model: Any, wanted: Adapter) -> None:
    """Raise VerificationError for the first layer that is not as the cell's settings and PEFT's
    matching of them say: where it is, its rank, scaling and kind, and what of the model trains."""
    found = lora_layers.base_modules(model)
    config = model.peft_config[ADAPTER]
    _verify_config(config, model, wanted)
    layers = lora_layers.all_loras(found)
    if not layers:
        raise VerificationError("the cell says LoRA, but no module is adapted")
    expected = lora_layers.targets(config, found) + lora_layers.target_parameters(config, found)
    require_equal(sorted(layers), sorted(expected), "adapted modules")
    for name, layer in layers.items():
        _verify_layer(name, layer, config)
    _verify_saved_modules(config, model, found)
    _verify_trainable(config, model, found)


def _verify_config(config: Any, model: Any, wanted: Adapter) -> None:
    """What PEFT was given is what the cell says."""
    require_equal(config.r, wanted.rank, "rank")
    require_equal(config.lora_alpha, alpha(wanted), "alpha")
    require_equal(config.lora_dropout, wanted.dropout, "dropout")
    ours = copy.copy(config)
    ours.target_modules = set(target_modules(wanted.target_modules, BaseModelView(model)))
    found = lora_layers.base_modules(model)
    names = lora_layers.targets(ours, found)
    require_equal(lora_layers.targets(config, found), names, "adapted modules")
    passed_through(model, wanted)


def passed_through(model: Any, wanted: Adapter) -> dict[str, PassedThrough]:
    """The arguments of `lora_config` as PEFT's configuration holds them. Raises VerificationError
    when it holds another value."""
    asked = dict(wanted.lora_config)
    if asked.get("ensure_weight_tying"):
        # PEFT adds the modules that are tied to them.
        asked.pop("modules_to_save", None)
    return arguments.verify_passed_through(asked, model.peft_config[ADAPTER])


class BaseModelView:
    """The base model of a PEFT model: each module under its own name, without wrappers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._modules = {place.name: place.module for place in lora_layers.base_modules(model)}

    def named_modules(self) -> Any:
        return self._modules.items()

    def get_output_embeddings(self) -> Any:
        head = lora_layers.base_model(self._model).get_output_embeddings()
        return lora_layers.unwrapped(head)


def _verify_layer(name: str, layer: Any, config: Any) -> None:
    rank, wanted_alpha = lora_layers.rank_of(config, name), lora_layers.alpha_of(config, name)
    require_equal(layer.r[ADAPTER], rank, f"rank of {name}")
    require_equal(layer.lora_alpha[ADAPTER], wanted_alpha, f"alpha of {name}")
    scaling = wanted_alpha / (math.sqrt(rank) if config.use_rslora else rank)
    require_equal(layer.scaling[ADAPTER], scaling, f"scaling of {name}")
    if ADAPTER in layer.lora_dropout:
        found = getattr(layer.lora_dropout[ADAPTER], "p", 0.0)
        require_equal(found, config.lora_dropout, f"dropout of {name}")
    require_equal(bool(layer.use_dora.get(ADAPTER, False)), config.use_dora, f"use_dora of {name}")


def _verify_saved_modules(config: Any, model: Any, found: list[BaseModule]) -> None:
    """Check the saved module copies and the embedding rows that train with the adapter."""
    saved = [place.name for place in found if lora_layers.saved_copies(place)]
    require_equal(saved, lora_layers.modules_to_save(config, found), "modules_to_save")
    for name, ids in lora_layers.token_indices(config, model).items():
        held = [
            layer.token_indices[ADAPTER]
            for place in found
            if place.name.endswith(name)
            for layer in lora_layers.token_layers(place)
        ]
        if not held:
            raise VerificationError(f"trainable_token_indices: nothing of {name} is trained")
        for each in held:
            require_equal(list(each), list(ids), f"trainable_token_indices of {name}")


def _verify_trainable(config: Any, model: Any, found: list[BaseModule]) -> None:
    expected: dict[int, Any] = {}
    for place in found:
        for parameter in _trained_parameters(place, config):
            expected[id(parameter)] = parameter
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    trained = {names[id(p)] for p in model.parameters() if p.requires_grad}
    wanted = {names[each] for each in expected}
    require_equal(sorted(trained - wanted), [], "trainable parameters outside the adapter")
    require_equal(sorted(wanted - trained), [], "parameters of the adapter that are frozen")


def _trained_parameters(place: BaseModule, config: Any) -> list[torch.nn.Parameter]:
    layers = lora_layers.loras_of(place).values()
    trained = [p for layer in layers for p in lora_layers.trained_parameters(layer)]
    trained += [p for copy in lora_layers.saved_copies(place) for p in copy.parameters()]
    trained += [rows.trainable_tokens_delta[ADAPTER] for rows in lora_layers.token_layers(place)]
    bias = getattr(place.module, "bias", None)
    asked = config.bias == "all" or (config.bias == "lora_only" and layers)
    if asked and isinstance(bias, torch.nn.Parameter):
        trained.append(bias)
    return trained


def summarize(model: Any) -> VerifiedAdapter:
    """The adapter as found on the model, for the record."""
    found = lora_layers.base_modules(model)
    config = model.peft_config[ADAPTER]
    layers = lora_layers.all_loras(found)
    biases = [
        place.module.bias
        for place in found
        if isinstance(getattr(place.module, "bias", None), torch.nn.Parameter)
    ]
    return VerifiedAdapter(
        ranks=_counted(layer.r[ADAPTER] for layer in layers.values()),
        scalings=_counted(layer.scaling[ADAPTER] for layer in layers.values()),
        layers=sorted({number for name in layers for number in _numbers(name)}),
        parameters=sorted(
            {
                name.rpartition(".")[2]
                for name, layer in layers.items()
                if hasattr(layer, "parameter_name")
            }
        ),
        dora=sum(bool(layer.use_dora.get(ADAPTER)) for layer in layers.values()),
        init=str(config.init_lora_weights),
        modules_to_save=[place.name for place in found if lora_layers.saved_copies(place)],
        trained_tokens={
            place.name: len(layer.token_indices[ADAPTER])
            for place in found
            for layer in lora_layers.token_layers(place)
        },
        trained_biases=sum(bias.requires_grad for bias in biases),
    )


def _counted(values: Any) -> dict[str, int]:
    return {f"{value:g}": count for value, count in sorted(Counter(values).items())}


def _numbers(name: str) -> list[int]:
    """The number of the layer that a module is in: the first of its path."""
    return [int(part) for part in name.split(".") if part.isdigit()][:1]
