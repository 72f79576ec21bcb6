"""Check before training that lm-eval can score a recipe's tasks."""

from __future__ import annotations

from typing import Any

from harness.evaluation import evaluate
from harness.models import model
from matrices.cell import Evaluate, Model
from matrices.errors import UserError, first_line


def check_tasks(recipe: Evaluate) -> None:
    """Load the tasks, documents and all. Raises UserError for what lm-eval would refuse after the
    training: a dataset that cannot be loaded, a task that is listed twice (alone and in a group),
    one that runs code or needs images."""
    manager = evaluate.task_manager(recipe)
    together: list[Any] = []
    for name in recipe.tasks:
        loaded = _load(manager, [name], f"lm-eval cannot load {name!r}")
        _check_supported(loaded["tasks"])
        group = loaded["groups"].get(name)
        together += [group] if group is not None else loaded["tasks"].values()
    _load(manager, together, "lm-eval cannot score these tasks together")


def check_chat_template(recipe: Evaluate, chosen: Model) -> None:
    """Raises UserError when the recipe asks for a chat template and the tokenizer has none."""
    if recipe.apply_chat_template and model.load_tokenizer(chosen).chat_template is None:
        raise UserError(
            f"the tokenizer of {chosen.name} has no chat template; leave apply_chat_template out",
            key="evaluate.apply_chat_template",
        )


def _load(manager: Any, tasks: list[Any], refused: str) -> dict[str, dict[str, Any]]:
    try:
        found: dict[str, dict[str, Any]] = manager.load(tasks)
    except Exception as error:
        raise UserError(f"{refused}: {first_line(error)}", key="evaluate.tasks") from error
    return found


def _check_supported(tasks: dict[str, Any]) -> None:
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"{name!r} runs code that the model writes, which lm-eval does only with a "
                "confirmation that tunebench does not give; leave it out",
                key="evaluate.tasks",
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"{name!r} needs a model that reads images or sound; leave it out",
                key="evaluate.tasks",
            )
