"""Find problems of a sweep before it starts: in models, data, adapters, tasks.

Each check runs once for all cells with the same settings, and a problem names its cells. Preflight
also builds what all cells need: the packaged model, downloaded data, compiled collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.evaluation import evaluate, task_check
from harness.models import loading_info, model
from harness.preflight import adapter_check, data_check, profile_check, quick_checks
from harness.preflight.problems import Findings, Problem, group_cells
from harness.ranks import deepspeed_build
from harness.verify import arguments, behaviour
from matrices.cell import Adapter, Cell, Evaluate, Model, Quantization
from matrices.errors import UserError, first_line


def problems(cells: Sequence[Cell]) -> list[Problem]:
    """All problems, each once; empty when all cells can start."""
    found = Findings()
    quick_checks.check(found, cells)
    # Models that failed the quick checks are not loaded. Rows need the tokenizer of their model.
    loadable = _check_models(found, found.without(cells))
    for about, having in group_cells(loadable, data_check.subject):
        found.check(having, data_check.check, *about)
    for _, having in group_cells(found.without(cells), _sft_settings):
        found.check(having, arguments.check_sft, having[0])
    for _, having in group_cells(found.without(loadable), _special_tokens):
        found.check(having, arguments.check_tokens, having[0])
    for cell in (cell for cell in cells if cell.profile):
        found.check([cell], profile_check.check, cell)
    for (recipe, chosen), having in group_cells(
        found.without(cells), lambda c: (c.evaluate, c.model)
    ):
        found.check(having, task_check.check_chat_template, recipe, chosen)
    for recipe, having in group_cells(cells, lambda cell: cell.evaluate):
        _check_recipe(found, having, recipe)
    zero = [cell for cell in cells if cell.strategy.zero_stage]
    if zero:
        found.check(zero, deepspeed_build.load_host_collectives)
    return found.problems


def _check_models(found: Findings, cells: Sequence[Cell]) -> list[Cell]:
    """Check models and adapters; the cells whose model can be loaded."""
    loadable: list[Cell] = []
    for chosen, having in group_cells(cells, lambda cell: cell.model):
        skeleton = found.check(having, _skeleton, chosen)
        if skeleton is None:
            continue
        loadable += having
        for (adapter, quantization), adapted in group_cells(having, _adapter_settings):
            found.check(adapted, _check_adapter, adapter, skeleton, quantization)
    return loadable


def _adapter_settings(cell: Cell) -> tuple[Adapter, Quantization | None] | None:
    return (cell.adapter, cell.quantization) if cell.adapter is not None else None


def _sft_settings(cell: Cell) -> Any:
    """The settings that the SFTConfig depends on; None without passed-through arguments."""
    if cell.train is None or not cell.train.sft_config:
        return None
    return cell.train, cell.data, cell.model.compute_dtype


def _special_tokens(cell: Cell) -> Any:
    """The model and its special tokens in sft_config; None without any."""
    given = cell.train.sft_config if cell.train is not None else {}
    tokens = given.get("eos_token"), given.get("pad_token")
    return (cell.model, *tokens) if any(tokens) else None


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
            f"{first_line(error)}; give a directory with config.json, tokenizer and weights, or "
            "a hub id",
            key="model.name",
        ) from error
    behaviour.refuse_encoder(skeleton, chosen)
    loading_info.check(chosen, skeleton)
    return skeleton


def _check_adapter(adapter: Adapter, skeleton: Any, quantization: Quantization | None) -> None:
    model.lora_config(adapter, skeleton)
    adapter_check.check(adapter, skeleton, quantization)
    adapter_check.try_attach(adapter, skeleton, quantization is not None)
