"""What would stop the cells of a sweep, found before it starts: models, data, targets, tasks.

Each check runs once for all the cells that share what it is about, and a problem is that of the
cells that have it. Also makes what every cell needs once: the packaged model, downloaded data,
compiled collectives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from harness import (
    checkpoint,
    data,
    evaluate,
    extensions,
    loading_info,
    model,
    profile_check,
    task_check,
)
from harness.problems import Findings, Problem, shared
from matrices.cell import Adapter, Cell, Data, Evaluate, Model
from matrices.errors import UserError, nearest


def problems(cells: Sequence[Cell]) -> list[Problem]:
    """Everything the user has to put right, each said once; empty when all cells can start."""
    found = Findings()
    _check_models(found, cells)
    # What follows needs the model's tokenizer.
    for (source, chosen), having in shared(found.without(cells), _trained_on):
        found.check(having, _check_data, source, chosen)
    for arguments, having in shared(cells, lambda cell: cell.train and cell.train.sft_config):
        found.check(having, _check_sft_config, arguments)
    for spread in (cell for cell in cells if cell.profile):
        found.check([spread], profile_check.check, spread)
    for (recipe, chosen), having in shared(found.without(cells), lambda c: (c.evaluate, c.model)):
        found.check(having, task_check.check_chat_template, recipe, chosen)
    for recipe, having in shared(cells, lambda cell: cell.evaluate):
        _check_recipe(found, having, recipe)
    zero = [cell for cell in cells if cell.parallelism.startswith("zero")]
    if zero:
        found.check(zero, extensions.load_host_collectives)
    return found.problems


def _check_models(found: Findings, cells: Sequence[Cell]) -> None:
    for _, having in shared(cells, lambda cell: (cell.method, cell.model, cell.quantization)):
        found.check(having, checkpoint.check, having[0])
    for chosen, having in shared(found.without(cells), lambda cell: cell.model):
        skeleton = found.check(having, _skeleton, chosen)
        if skeleton is None:
            continue
        for adapter, adapted in shared(having, lambda cell: cell.adapter):
            found.check(adapted, _check_adapter, adapter, skeleton)


def _trained_on(cell: Cell) -> tuple[Data, Model] | None:
    return (cell.data, cell.model) if cell.data is not None else None


def _check_recipe(found: Findings, cells: Sequence[Cell], recipe: Evaluate) -> None:
    if found.check(cells, evaluate.task_manager, recipe) is None:
        return
    unknown = evaluate.unknown_tasks(recipe)
    for error in unknown:
        found.add(cells, error)
    if not unknown:
        found.check(cells, task_check.check_tasks, recipe)


def _skeleton(chosen: Model) -> Any:
    """The model without weights (meta tensors), for its module names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name, keywords = model.source(chosen)
    try:
        config = AutoConfig.from_pretrained(name, **keywords)
        model.load_tokenizer(chosen)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(
                config, trust_remote_code=chosen.trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"{chosen.name!r} cannot be loaded as a causal language model: "
            f"{_first_line(error)}; give a directory with config.json, tokenizer and weights, or "
            "a hub id",
            key="model.name",
        ) from error
    loading_info.check(chosen, skeleton)
    return skeleton


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
