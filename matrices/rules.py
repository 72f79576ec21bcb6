"""Cells that cannot run or be predicted as asked, and why: one function per rule, named after it.

A rule stands for something a library refuses, or silently does differently, so that the record
would be about another configuration. What a library runs is never refused here. Each reason names
its source, as read in torch 2.13, transformers 5.23, accelerate 1.15, TRL 1.16 and PEFT 0.21.

`RULES` hold for a run on a machine. `PREDICTION_RULES` hold for a prediction, which is asked about
an imagined GPU with everything installed: what this machine lacks is no reason there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from matrices.argument_rules import ARGUMENT_RULES, ARGUMENT_RUN_RULES
from matrices.cell import Cell, Data
from matrices.gpus import Gpu
from matrices.model_rules import (
    config_must_be_complete,
    model_needs_weights,
    positions_end_in_table,
    sequence_needs_positions,
    shards_must_not_be_empty,
)
from matrices.models import PACKAGED_MODELS
from matrices.parallel_rules import (
    PARALLEL_PREDICTION_RULES,
    PARALLEL_RULES,
    PARALLEL_RUN_RULES,
)


@dataclass(frozen=True)
class Machine:
    """What the rules need to know about where a cell would run. `has_gpu` means a CUDA or ROCm
    device, `compute_capability` is CUDA's (8.6), `packages` are installed distributions
    (`flash-attn`) and their versions. `devices` are its GPUs, or without any the processors that
    may be used, and `nodes` the machines like it that one cell can have; none is not known."""

    has_gpu: bool
    compute_capability: float | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    devices: int | None = None
    nodes: int | None = 1


@dataclass(frozen=True)
class Refusal:
    rule: str
    reason: str


Rule = Callable[[Cell, Machine], str | None]


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


def fp16_needs_gpu(cell: Cell, machine: Machine) -> str | None:
    """Training under fp16 autocast on a machine without a GPU."""
    # accelerate/accelerator.py, Accelerator.__init__: fp16 sets native_amp only off the CPU.
    if machine.has_gpu or not _fp16_autocast(cell):
        return None
    return (
        "accelerate turns fp16 mixed precision on for accelerators only: on a CPU it would train "
        "without autocast and say nothing; use compute_dtype bf16 or fp32"
    )


def _fp16_autocast(cell: Cell) -> bool:
    return cell.train is not None and cell.train.autocast and cell.model.compute_dtype == "fp16"


def fp16_gradient_scaling(cell: Cell, machine: Machine) -> str | None:
    """Training under fp16 autocast where gradients come out in fp16 or bf16: full fine-tuning
    of weights that are not fp32, and qlora."""
    # Gradients have the dtype of the trained parameters. PEFT keeps lora's in fp32
    # (autocast_adapter_dtype); TRL casts qlora's to bf16 (trl/trainer/sft_trainer.py). DeepSpeed
    # scales by itself, the gradients of its fp32 copies.
    if not machine.has_gpu or not _fp16_autocast(cell) or cell.parallelism.startswith("zero"):
        return None
    if cell.method == "qlora":
        return (
            "TRL keeps the adapters of a quantized model in bf16, and the gradient scaler of fp16 "
            "mixed precision has no CUDA kernel for bf16 gradients (torch: "
            "_amp_foreach_non_finite_check_and_unscale_cuda); use compute_dtype bf16 or fp32"
        )
    if cell.parallelism in ("fsdp", "fsdp1"):
        # accelerate puts what is trained to fp32: fsdp_utils.py, fsdp2_prepare_model;
        # accelerator.py, prepare_model.
        return None
    if cell.method == "full" and cell.model.weight_dtype == "fp16":
        return (
            "torch's GradScaler refuses it (Attempting to unscale FP16 gradients): fp16 mixed "
            "precision needs weight_dtype fp32"
        )
    if cell.method == "full" and cell.model.weight_dtype == "bf16":
        return (
            "the gradient scaler of fp16 mixed precision has no CUDA kernel for bf16 gradients "
            "(torch: _amp_foreach_non_finite_check_and_unscale_cuda); use weight_dtype fp32 or "
            "compute_dtype bf16"
        )
    return None


def flash_attention_needs_gpu(cell: Cell, machine: Machine) -> str | None:
    """flash_attention_2 without a GPU, or on one older than Ampere."""
    # transformers/modeling_flash_attention_utils.py, FLASH_ATTENTION_COMPATIBILITY_MATRIX and
    # FLASH_ATTN_KERNEL_DEVICES; the capability is flash-attn's own check at the first call.
    if cell.model.attn_implementation != "flash_attention_2":
        return None
    if not machine.has_gpu:
        return (
            "transformers refuses flash_attention_2 without a GPU; use attn_implementation sdpa "
            "or eager"
        )
    if machine.compute_capability is not None and machine.compute_capability < 8.0:
        return (
            "flash-attn only supports Ampere GPUs or newer (compute capability 8.0, this one has "
            f"{machine.compute_capability}); use attn_implementation sdpa"
        )
    return None


def flash_attention_needs_package(cell: Cell, machine: Machine) -> str | None:
    """flash_attention_2 with neither the package flash-attn nor kernels installed."""
    # transformers/modeling_utils.py, _check_and_adjust_attn_implementation: `kernels`, if there,
    # downloads the same attention from the hub.
    if cell.model.attn_implementation != "flash_attention_2":
        return None
    if machine.packages.keys() & {"flash-attn", "kernels"}:
        return None
    return (
        "transformers needs the package flash-attn (or kernels) for flash_attention_2 and "
        "neither is installed; install one or use attn_implementation sdpa"
    )


def flash_attention_needs_half(cell: Cell, machine: Machine) -> str | None:
    """flash_attention_2 where queries stay fp32: fp32 weights without autocast."""
    # transformers/integrations/flash_attention.py, get_target_dtype: fp32 queries are cast to the
    # autocast dtype, else to that of the weights. Nothing is scored under autocast.
    model = cell.model
    if model.attn_implementation != "flash_attention_2" or model.weight_dtype != "fp32":
        return None
    if cell.train is not None and cell.train.autocast and model.compute_dtype != "fp32":
        return None
    return (
        "flash-attn only supports fp16 and bf16, and with weight_dtype fp32 nothing casts its "
        "inputs; use weight_dtype bf16 or attn_implementation sdpa"
    )


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


def hub_settings_need_hub(cell: Cell, machine: Machine) -> str | None:
    """revision, config or split of a model or data that does not come from the hub."""
    # harness/model.py and harness/data.py: what is packaged or local is read as it is.
    given = []
    model = cell.model
    if model.fingerprint or model.config or model.name in PACKAGED_MODELS:
        given += ["model.revision"] if model.revision is not None else []
    data = cell.data
    if data is not None and (data.fingerprint or data.source == Data().source):
        named = {"revision": data.revision, "config": data.config}
        given += [f"data.{name}" for name, value in named.items() if value is not None]
        given += ["data.split"] if data.split != Data().split else []
    if not given:
        return None
    verb = "has" if len(given) == 1 else "have"
    return (
        f"{' and '.join(given)} {verb} no effect, as what is read is not on the hub; leave it out, "
        "or name a hub id"
    )


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
