"""What would stop a sweep, found before it starts: models, data, columns, targets, tasks.

Also makes what every cell needs once: the packaged model, downloaded data, compiled collectives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from harness import data, evaluate, extensions, model, profile_check, task_check
from matrices.cell import Adapter, Cell, Data, Evaluate, Model
from matrices.errors import UserError, nearest


def problems(cells: Sequence[Cell]) -> list[UserError]:
    """Everything the user has to put right, each said once; empty when all cells can start."""
    found: list[UserError] = []
    for chosen in _distinct(cell.model for cell in cells):
        skeleton = _checked(found, _skeleton, chosen)
        if skeleton is not None:
            adapters = (c.adapter for c in cells if c.model == chosen and c.adapter is not None)
            for adapter in _distinct(adapters):
                _checked(found, _check_adapter, adapter, skeleton)
    for source, template in _distinct((c.data, c.model) for c in cells if c.data is not None):
        _checked(found, _check_data, source, template)
    for arguments in (c.train.sft_config for c in cells if c.train is not None):
        _checked(found, _check_sft_config, arguments)
    for spread in (cell for cell in cells if cell.profile):
        _checked(found, profile_check.check, spread)
    for recipe in _distinct(cell.evaluate for cell in cells):
        unknown = evaluate.unknown_tasks(recipe) if _checks_path(found, recipe) else []
        found += unknown
        if not unknown:
            _checked(found, task_check.check_tasks, recipe)
    if any(cell.parallelism.startswith("zero") for cell in cells):
        _checked(found, extensions.load_host_collectives)
    return list({str(error): error for error in found}.values())


def _distinct(things: Iterable[Any]) -> list[Any]:
    """Equal things once, in order; not a set, since settings may hold dicts."""
    kept: list[Any] = []
    for thing in things:
        if thing not in kept:
            kept.append(thing)
    return kept


def _checked(found: list[UserError], check: Callable[..., Any], *about: Any) -> Any:
    """The check's answer, or None after its complaint is noted."""
    try:
        return check(*about)
    except UserError as error:
        found.append(error)
        return None


def _skeleton(chosen: Model) -> Any:
    """The model without weights (meta tensors), for its module names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name, keywords = model.source(chosen)
    try:
        config = AutoConfig.from_pretrained(name, **keywords)
        model.load_tokenizer(chosen)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=chosen.trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"{chosen.name!r} cannot be loaded as a causal language model: "
            f"{_first_line(error)}; give a directory with config.json, tokenizer and weights, or "
            "a hub id",
            key="model.name",
        ) from error


def _check_adapter(adapter: Adapter, skeleton: Any) -> None:
    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    for name in adapter.lora_config:
        if name not in fields:
            raise UserError(
                f"peft.LoraConfig has no argument {name!r}{nearest(name, fields)}",
                key="adapter.lora_config",
            )
    model.target_modules(adapter.target_modules, skeleton)


def _check_data(source: Data, chosen: Model) -> None:
    rows = data.load_rows(source)
    data.loss_arguments(source, rows.column_names)
    if "messages" in rows.column_names:
        tokenizer = model.load_tokenizer(chosen)
        if tokenizer.chat_template is None:
            raise UserError(
                f"{source.source} holds chat messages, but the tokenizer of {chosen.name} has no "
                "chat template",
                key="data.format",
            )


def _check_sft_config(arguments: dict[str, Any]) -> None:
    from trl import SFTConfig

    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    for name in arguments:
        if name not in fields:
            raise UserError(
                f"trl.SFTConfig has no argument {name!r}{nearest(name, fields)}",
                key="train.sft_config",
            )


def _checks_path(found: list[UserError], recipe: Evaluate) -> bool:
    return _checked(found, evaluate.task_manager, recipe) is not None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
