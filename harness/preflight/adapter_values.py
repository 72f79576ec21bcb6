"""Valid values of the arguments of `adapter.lora_config`, beyond the types that PEFT declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matrices.errors import UserError
from matrices.rules import passed_through


def refusal(argument: str, message: str) -> UserError:
    return UserError(message, key=f"adapter.lora_config.{argument}")


def check(given: Mapping[str, Any]) -> None:
    """Raise UserError for a value that its argument does not take: PEFT treats a text as a list of
    letters, and checks most values only when it uses them."""
    for mistake in passed_through.mistakes("LoraConfig", given):
        raise mistake
    for name, (accepted, said) in _VALUES.items():
        value = given.get(name)
        if value is not None and not accepted(value):
            raise refusal(name, f"{value!r} is not {said}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_counts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_count(each) for each in value)


def _pattern_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def accepted(value: Any) -> bool:
        return isinstance(value, Mapping) and all(map(accepts, value.values()))

    return accepted


def _is_number_above_0(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "layers_to_transform": (
        lambda value: _is_count(value) or _are_counts(value),
        "a layer's number or a list of them, counted from 0",
    ),
    "rank_pattern": (
        _pattern_of(lambda value: _is_count(value) and value > 0),
        "a mapping of module names to ranks of at least 1",
    ),
    "alpha_pattern": (
        _pattern_of(_is_number_above_0),
        "a mapping of module names to alphas above 0",
    ),
    "trainable_token_indices": (
        lambda value: _are_counts(value) or _pattern_of(_are_counts)(value),
        "a list of token ids, or a mapping of embeddings to such lists",
    ),
}
