"""What kinds of values the arguments of `adapter.lora_config` take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matrices.errors import UserError

BIASES = ("none", "all", "lora_only")


def refusal(argument: str, said: str) -> UserError:
    return UserError(said, key=f"adapter.lora_config.{argument}")


def check(given: Mapping[str, Any]) -> None:
    """Raise UserError for a value of another kind than its argument takes: PEFT takes a text for a
    list of letters, and looks at most values only when it uses them."""
    for name, (accepted, said) in _TYPES.items():
        value = given.get(name)
        if value is not None and not accepted(value):
            raise refusal(name, f"{value!r} is not {said}")


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _wholes(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_whole(each) for each in value)


def _pattern_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def accepted(value: Any) -> bool:
        return isinstance(value, Mapping) and all(map(accepts, value.values()))

    return accepted


def _is_number_above_0(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "modules_to_save": (_texts, "a list of module names"),
    "target_parameters": (_texts, "a list of parameter names"),
    "exclude_modules": (
        lambda value: isinstance(value, str) or _texts(value),
        "a list of module names or a regular expression",
    ),
    "layers_to_transform": (
        lambda value: _whole(value) or _wholes(value),
        "a layer's number or a list of them, counted from 0",
    ),
    "rank_pattern": (
        _pattern_of(lambda value: _whole(value) and value > 0),
        "a mapping of module names to ranks of at least 1",
    ),
    "alpha_pattern": (
        _pattern_of(_is_number_above_0),
        "a mapping of module names to alphas above 0",
    ),
    "trainable_token_indices": (
        lambda value: _wholes(value) or _pattern_of(_wholes)(value),
        "a list of token ids, or a mapping of embeddings to such lists",
    ),
    "bias": (lambda value: value in BIASES, f"one of {', '.join(BIASES)}"),
    "use_dora": (lambda value: isinstance(value, bool), "true or false"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
}
