"""Whether lm-eval will score a recipe's tasks, asked before anything is trained."""

from __future__ import annotations

from typing import Any

from harness import evaluate
from matrices.cell import Evaluate
from matrices.errors import UserError


def check_tasks(recipe: Evaluate) -> None:
    """Load the tasks, documents and all. Raises UserError for what lm-eval would refuse after the
    training: a dataset that cannot be had, a task that is asked for twice (alone and in a group),
    one that runs code or needs images."""
    manager = evaluate.task_manager(recipe)
    together: list[Any] = []
    for name in recipe.tasks:
        loaded = _loaded(manager, [name], f"lm-eval cannot load {name!r}")
        _check_kinds(loaded["tasks"])
        group = loaded["groups"].get(name)
        together += [group] if group is not None else loaded["tasks"].values()
    _loaded(manager, together, "lm-eval cannot score these tasks together")


def _loaded(manager: Any, tasks: list[Any], refused: str) -> dict[str, dict[str, Any]]:
    try:
        found: dict[str, dict[str, Any]] = manager.load(tasks)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{refused}: {lines[0]}", key="evaluate.tasks") from error
    return found


def _check_kinds(tasks: dict[str, Any]) -> None:
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
