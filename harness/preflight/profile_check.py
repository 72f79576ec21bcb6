"""Typos in an accelerate profile, by the names that accelerate and DeepSpeed know."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from harness import device
from matrices.accelerate_profiles import DEEPSPEED_FILE, rendered, values
from matrices.cell import Cell
from matrices.errors import UserError, nearest

# Sections of a profile whose names are the launcher's options, and the prefix of these. Within a
# section the prefix may be left out where accelerate adds it (accelerate/commands/launch.py,
# _validate_launch_command).
SECTIONS = {
    "fsdp_config": ("fsdp_", True),
    "fp8_config": ("fp8_", True),
    "dynamo_config": ("dynamo_", True),
    "parallelism_config": ("parallelism_config_", False),
}
# accelerate still reads these, but they are no fields: BaseConfig.process_config.
LEGACY_FIELDS = ("fp16", "dynamo_backend")
# What accelerate wants in the DeepSpeed file alone, where there is one (DeepSpeedPlugin,
# _deepspeed_config_checks).
DEEPSPEED_FILE_ONLY = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_param_nvme_path",
    "offload_optimizer_nvme_path",
    "zero3_save_16bit_model",
)
# DeepSpeed ignores what it does not know at its top level. These are the sections and values of
# deepspeed/runtime/config.py and of its documentation (docs/_pages/config-json.md).
DEEPSPEED_NAMES = (
    "activation_checkpointing",
    "aio",
    "amp",
    "autotuning",
    "bf16",
    "bfloat16",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "compression_training",
    "csv_monitor",
    "curriculum_learning",
    "data_efficiency",
    "data_types",
    "dataloader_drop_last",
    "disable_allgather",
    "dump_state",
    "eigenvalue",
    "elasticity",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_predivide_factor",
    "graph_harvesting",
    "hybrid_engine",
    "memory_breakdown",
    "nebula",
    "optimizer",
    "pipeline",
    "prescale_gradients",
    "progressive_layer_drop",
    "scheduler",
    "seq_parallel_communication_data_type",
    "sparse_attention",
    "sparse_gradients",
    "steps_per_print",
    "tensor_parallel",
    "tensorboard",
    "timers",
    "torch_autocast",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "wandb",
    "weight_quantization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)


def check(cell: Cell) -> None:
    """Raise UserError for the first unknown name in the cell's own profile, or value that DeepSpeed
    refuses."""
    if not cell.profile or cell.train is None:
        return
    profile = rendered(cell.profile, values(cell, device.has_cuda()))
    from accelerate.commands.config.config_args import ClusterConfig

    fields = [each.name for each in dataclasses.fields(ClusterConfig)]
    _check_names(profile, [*fields, *LEGACY_FIELDS], "the profile")
    options = _options()
    for name, (start, may_lack_it) in SECTIONS.items():
        names = {option for option in options if option.startswith(start)}
        if may_lack_it:
            names |= {option.removeprefix(start) for option in names}
        _check_names(_mapping(profile, name), names, name)
    section = _mapping(profile, "deepspeed_config")
    _check_names(section, _deepspeed_options(options), "deepspeed_config")
    configuration = section.get(DEEPSPEED_FILE)
    if isinstance(configuration, Mapping):
        _check_deepspeed(profile, section, configuration)


def _check_deepspeed(
    profile: Mapping[str, Any], section: Mapping[str, Any], configuration: Mapping[str, Any]
) -> None:
    twice = [name for name in DEEPSPEED_FILE_ONLY if name in section]
    if "mixed_precision" in profile:
        twice.append("mixed_precision")
    if twice:
        raise UserError(
            f"accelerate refuses {', '.join(twice)} beside a {DEEPSPEED_FILE}; write it there "
            "alone",
            key="profile",
        )
    _check_names(configuration, DEEPSPEED_NAMES, "the DeepSpeed file")
    zero = _mapping(configuration, "zero_optimization")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from pydantic import ValidationError

    _check_names(zero, _names_of(DeepSpeedZeroConfig), "zero_optimization")
    for inner, kind in (
        ("offload_param", DeepSpeedZeroOffloadParamConfig),
        ("offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
    ):
        _check_names(_mapping(zero, inner), _names_of(kind), f"zero_optimization.{inner}")
    try:
        DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"DeepSpeed refuses zero_optimization.{place}: {first['msg']}, not {first['input']!r}",
            key="profile",
        ) from error


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A section, empty where it is not given. Raises UserError when it is something else."""
    found = content.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise UserError(f"{key} of the profile is a section, not {found!r}", key="profile")
    return found


def _check_names(given: Mapping[str, Any], names: Collection[str], where: str) -> None:
    for name in given:
        if name not in names:
            raise UserError(f"{where} has no {name!r}{nearest(name, sorted(names))}", key="profile")


def _options() -> list[str]:
    """The names of accelerate's launch options."""
    from accelerate.commands.launch import launch_command_parser

    return [action.dest for action in launch_command_parser()._actions]


def _deepspeed_options(options: Iterable[str]) -> list[str]:
    starts = ("deepspeed_", "zero", "offload_", "gradient_")
    return [name for name in options if name.startswith(starts)]


def _names_of(model: Any) -> set[str]:
    """A pydantic model's fields, under their aliases too."""
    fields = model.model_fields
    return set(fields) | {field.alias for field in fields.values() if field.alias}
