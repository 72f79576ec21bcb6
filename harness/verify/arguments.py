"""Check that the objects of TRL and PEFT hold the arguments that were passed through to them, and
give the record these values with the library's defaults."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from harness import device
from harness.models.mismatch import VerificationError
from harness.models.model import load_tokenizer
from harness.records.verified import PassedThrough
from harness.train import TrainingSchedule, sft_config
from matrices.cell import Cell
from matrices.errors import UserError, first_line, nearest
from matrices.libraries.library_arguments import SFT_ARGUMENTS, SFT_CONFIG
from matrices.rules import passed_through

# TRL's names of AdamW's and Lion's arguments: the optimizer's own name, and the index in it.
OPTIMIZER_ARGUMENTS: dict[str, tuple[str, int | None]] = {
    "adam_beta1": ("betas", 0),
    "adam_beta2": ("betas", 1),
    "adam_epsilon": ("eps", None),
}


def verify_passed_through(asked: Mapping[str, Any], resolved: Any) -> dict[str, PassedThrough]:
    """Each argument as `resolved` (an SFTConfig, a LoraConfig) holds it.

    Raises VerificationError when it holds something else: another cell would be measured."""
    class_name = _class_name(resolved)
    new = passed_through.unclassified(class_name, asked)
    found = {}
    for name, value in asked.items():
        default = _default(resolved, name)
        held = _plain(getattr(resolved, name))
        if not _same(value, held) and value != default:
            raise VerificationError(
                f"{name} {value!r} was passed through to {class_name}, which holds {held!r}"
                + ("; that is its default, so nothing would differ" if held == default else "")
            )
        found[name] = PassedThrough(
            asked=value, held=held, default=default, classified=name not in new
        )
    return found


def verify_optimizer_arguments(asked: Mapping[str, Any], optimizer: Any) -> None:
    """Raises VerificationError when the optimizer's groups do not have what was passed through."""
    for name, (theirs, place) in OPTIMIZER_ARGUMENTS.items():
        if name not in asked:
            continue
        for group in optimizer.param_groups:
            held = group[theirs] if place is None else group[theirs][place]
            if held != asked[name]:
                raise VerificationError(
                    f"{name} {asked[name]!r} was passed through, and the optimizer has {held!r}"
                )


def check_sft(cell: Cell) -> None:
    """Build the SFTConfig of a cell as training will. Raises UserError where it refuses an
    argument that is passed through, or reads it as another."""
    assert cell.train is not None
    given = {
        name: value
        for name, value in cell.train.sft_config.items()
        if device.has_cuda() or name not in SFT_ARGUMENTS or SFT_ARGUMENTS[name].needs != "gpu"
    }
    train = cell.train.model_copy(update={"sft_config": given})
    schedule = TrainingSchedule(train.steps, train.learning_rate, prepared=True)
    alone = cell.model_copy(update={"train": train})
    try:
        config = sft_config(alone, None, schedule, Path("unused"))
        verify_passed_through(given, config)
        get_scheduler(
            config.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=train.learning_rate),
            num_warmup_steps=train.warmup_steps,
            num_training_steps=train.steps,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError, ImportError, VerificationError) as error:
        raise UserError(f"SFTConfig refuses it: {first_line(error)}", key=SFT_CONFIG) from error


def check_tokens(cell: Cell) -> None:
    """Raises UserError for an `eos_token` or `pad_token` that the model's tokenizer does not
    have."""
    assert cell.train is not None
    known = load_tokenizer(cell.model).get_vocab()
    for name in ("eos_token", "pad_token"):
        token = cell.train.sft_config.get(name)
        if token is not None and token not in known:
            raise UserError(
                f"{name} {token!r} is no token of {cell.model.name}"
                + nearest(token, (word for word in known if word.startswith(token[:1]))),
                key=SFT_CONFIG,
            )


def _class_name(resolved: Any) -> str:
    return "SFTConfig" if hasattr(resolved, "max_steps") else "LoraConfig"


def _default(resolved: Any, name: str) -> Any:
    for field in dataclasses.fields(resolved):
        if field.name == name:
            if field.default is not dataclasses.MISSING:
                return _plain(field.default)
            if field.default_factory is not dataclasses.MISSING:
                return _plain(field.default_factory())
    return None


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(each) for name, each in vars(value).items()}
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, set):
        return sorted(_plain(each) for each in value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _same(asked: Any, held: Any) -> bool:
    """Whether an object holds what was asked: of a mapping the entries that were named, of a list
    the same ones, as PEFT makes sets of them."""
    if isinstance(asked, dict) and isinstance(held, dict):
        return all(name in held and _same(value, held[name]) for name, value in asked.items())
    if isinstance(asked, list | tuple) and isinstance(held, list):
        return sorted(map(repr, asked)) == sorted(map(repr, held))
    return bool(asked == held) or (isinstance(asked, str) and asked == str(held))
