"""Cells that cannot run or be predicted as asked, and why: one function per rule, named after it.

A rule stands for something a library refuses, or silently does differently, so that the record
would be about another configuration. What a library runs is never refused here. Each reason names
its source, as read in torch 2.13, transformers 5.23, accelerate 1.15, TRL 1.16 and PEFT 0.21.

`RULES` hold for a run on a machine. `PREDICTION_RULES` hold for a prediction, which is asked about
an imagined GPU with everything installed: what this machine lacks is no reason there.
"""

from __future__ import annotations

from collections.abc import Sequence

from matrices.catalogue.gpus import Gpu
from matrices.cell import Cell
from matrices.rules.arguments import ARGUMENT_RULES, ARGUMENT_RUN_RULES
from matrices.rules.machine import Machine, Refusal, Rule
from matrices.rules.models import (
    config_must_be_complete,
    hub_settings_need_hub,
    model_needs_weights,
    positions_end_in_table,
    sequence_needs_positions,
    shards_must_not_be_empty,
)
from matrices.rules.parallelism import (
    PARALLEL_PREDICTION_RULES,
    PARALLEL_RULES,
    PARALLEL_RUN_RULES,
)
from matrices.rules.precision import (
    flash_attention_needs_gpu,
    flash_attention_needs_half,
    flash_attention_needs_package,
    fp16_gradient_scaling,
    fp16_needs_gpu,
)
from matrices.rules.training import (
    completion_loss_needs_completions,
    head_takes_no_adapter,
    polynomial_needs_higher_rate,
    steps_left_to_time,
)


def refusals(cell: Cell, machine: Machine) -> list[Refusal]:
    """Every rule that refuses the cell on the machine; empty when it can run."""
    return _asked(RULES, cell, machine)


def prediction_refusals(cell: Cell, gpu: Gpu | None = None) -> list[Refusal]:
    """Every rule that refuses a prediction of the cell, on `gpu` if one is meant; empty when it
    can be predicted. Reads the model's config.json where that is local."""
    capability = float(f"{gpu.compute_capability[0]}.{gpu.compute_capability[1]}") if gpu else None
    imagined = Machine(has_gpu=True, compute_capability=capability)
    return _asked(PREDICTION_RULES, cell, imagined)


def _asked(rules: Sequence[Rule], cell: Cell, machine: Machine) -> list[Refusal]:
    reasons = {rule.__name__.replace("_", "-"): rule(cell, machine) for rule in rules}
    return [Refusal(name, reason) for name, reason in reasons.items() if reason]


RULES: tuple[Rule, ...] = (
    hub_settings_need_hub,
    fp16_needs_gpu,
    fp16_gradient_scaling,
    flash_attention_needs_gpu,
    flash_attention_needs_package,
    flash_attention_needs_half,
    completion_loss_needs_completions,
    steps_left_to_time,
    polynomial_needs_higher_rate,
    head_takes_no_adapter,
    *ARGUMENT_RULES,
    *ARGUMENT_RUN_RULES,
    *PARALLEL_RULES,
    *PARALLEL_RUN_RULES,
    model_needs_weights,
    positions_end_in_table,
)
# About this machine, or about a run's timing and weights.
_OF_A_RUN = {
    fp16_needs_gpu,
    flash_attention_needs_package,
    steps_left_to_time,
    model_needs_weights,
    *ARGUMENT_RUN_RULES,
    positions_end_in_table,
    *PARALLEL_RUN_RULES,
}
PREDICTION_RULES: tuple[Rule, ...] = (
    *(rule for rule in RULES if rule not in _OF_A_RUN),
    config_must_be_complete,
    sequence_needs_positions,
    shards_must_not_be_empty,
    *PARALLEL_PREDICTION_RULES,
)
