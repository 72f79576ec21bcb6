"""The rules about the loss, the steps and the schedule; see `matrices.rules.verdicts`."""

from __future__ import annotations

from matrices.cell import Cell
from matrices.rules.machine import Machine


def completion_loss_needs_completions(cell: Cell, machine: Machine) -> str | None:
    """completion_only_loss with format text."""
    # trl/trainer/sft_trainer.py, _prepare_dataset: no completion mask is made for plain text, and
    # without one every token carries a label.
    if cell.data is None or not cell.data.completion_only_loss or cell.data.format != "text":
        return None
    return (
        "plain text has no completions: TRL would take the loss of every token and say nothing; "
        "use format prompt-completion or chat, or completion_only_loss false"
    )


def steps_left_to_time(cell: Cell, machine: Machine) -> str | None:
    """A timing warm-up that leaves no step to time."""
    if cell.train is None:
        return None
    train = cell.train
    if train.timing_warmup_steps is not None:
        name, warmup = "timing_warmup_steps", train.timing_warmup_steps
    else:
        name, warmup = "warmup_steps", train.warmup_steps
    if warmup < train.steps:
        return None
    return (
        f"no step is left to time: {name} is {warmup} and steps is {train.steps}; raise steps or "
        "lower timing_warmup_steps"
    )


def polynomial_needs_higher_rate(cell: Cell, machine: Machine) -> str | None:
    """A polynomial schedule that would end above where it starts."""
    # transformers/optimization.py, get_polynomial_decay_schedule_with_warmup: lr_end=1e-7.
    if cell.train is None or cell.train.lr_scheduler_type != "polynomial":
        return None
    options = cell.train.sft_config.get("lr_scheduler_kwargs") or {}
    end = options.get("lr_end", 1e-7) if isinstance(options, dict) else 1e-7
    if not isinstance(end, int | float) or cell.train.learning_rate > end:
        return None
    return (
        f"transformers' polynomial schedule ends at {end:g} and refuses a learning_rate "
        f"({cell.train.learning_rate:g}) that is not above that"
    )


def head_takes_no_adapter(cell: Cell, machine: Machine) -> str | None:
    """lm_head among target_modules."""
    # trl/trainer/sft_trainer.py: the loss is computed from lm_head.weight directly.
    if cell.adapter is None or isinstance(cell.adapter.target_modules, str):
        return None
    if not any(name.rpartition(".")[2] == "lm_head" for name in cell.adapter.target_modules):
        return None
    return "TRL refuses an adapter on lm_head, as it would never be trained; leave it out"
