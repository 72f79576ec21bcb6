"""Rules about what is passed through to TRL and PEFT: it may not contradict a setting, and it has
an effect in its cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from matrices.cell import Cell
from matrices.libraries.library_arguments import LORA_ARGUMENTS, SFT_ARGUMENTS, Argument
from matrices.rules.machine import Machine

# PEFT's ways to start an adapter that need more than the base's weights: of `loftq` the
# unquantized ones, of the others a pass over the data.
UNPREPARED_INITS = ("eva", "corda", "loftq", "lora_ga")


def _optimizer(cell: Cell, *families: str) -> bool:
    assert cell.train is not None
    return any(family in cell.train.optimizer for family in families)


def _sft(cell: Cell, name: str) -> Any:
    assert cell.train is not None
    return cell.train.sft_config.get(name)


def _lora(cell: Cell, name: str) -> Any:
    assert cell.adapter is not None
    return cell.adapter.lora_config.get(name)


# What has to be so for an argument to have an effect, and what is said where it is not.
EFFECTS: dict[str, tuple[Callable[[Cell, Machine], bool], str]] = {
    "adam or lion": (lambda cell, _: _optimizer(cell, "adamw", "lion"), "optimizers with betas"),
    "adam": (lambda cell, _: _optimizer(cell, "adamw"), "the AdamW optimizers"),
    "gpu": (lambda _, machine: machine.has_gpu, "a GPU"),
    "dataloader workers": (
        lambda cell, _: bool(_sft(cell, "dataloader_num_workers")),
        "dataloader_num_workers above 0",
    ),
    "ddp": (lambda cell, _: cell.strategy.replicates, "parallelism ddp"),
    "several ranks": (lambda cell, _: cell.ranks > 1, "several ranks"),
    "unpacked rows": (lambda cell, _: not (cell.data and cell.data.packing), "packing false"),
    "use_liger_kernel": (lambda cell, _: bool(_sft(cell, "use_liger_kernel")), "use_liger_kernel"),
    "liger": (lambda _, machine: machine.has_gpu, "a GPU (its kernels are Triton's)"),
    "layers_to_transform": (
        lambda cell, _: _lora(cell, "layers_to_transform") is not None,
        "layers_to_transform",
    ),
}


def sft_config_contradicts(cell: Cell, machine: Machine) -> str | None:
    """sft_config naming what a setting decides, or what tunebench does not do."""
    if cell.train is None:
        return None
    return _contradiction("sft_config", cell.train.sft_config, SFT_ARGUMENTS)


def lora_config_contradicts(cell: Cell, machine: Machine) -> str | None:
    """lora_config naming what a setting decides, or what would be another experiment."""
    if cell.adapter is None:
        return None
    return _contradiction("lora_config", cell.adapter.lora_config, LORA_ARGUMENTS)


def _contradiction(
    mapping: str, given: Mapping[str, Any], arguments: Mapping[str, Argument]
) -> str | None:
    said = []
    for name in _with_nested(given):
        argument = arguments.get(name)
        if argument is not None and argument.kind == "setting":
            said.append(f"{name} (write {argument.said})")
        elif argument is not None and argument.kind == "refused":
            said.append(f"{name} ({argument.said})")
    return f"{mapping} may not give {', '.join(said)}" if said else None


def _with_nested(given: Mapping[str, Any]) -> Iterator[str]:
    for name, value in given.items():
        yield name
        if isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in value)


def arguments_have_effect(cell: Cell, machine: Machine) -> str | None:
    """sft_config or lora_config giving what is not read in this cell: a beta without an optimizer
    that has one, tf32 without a GPU, ddp_* without ddp."""
    idle = []
    for section, arguments in (
        (cell.train and cell.train.sft_config, SFT_ARGUMENTS),
        (cell.adapter and cell.adapter.lora_config, LORA_ARGUMENTS),
    ):
        for name in _with_nested(section or {}):
            needs = arguments[name].needs if name in arguments else ""
            if needs and not EFFECTS[needs][0](cell, machine):
                idle.append(f"{name} (only with {EFFECTS[needs][1]})")
    return f"nothing would differ: {', '.join(idle)}; leave it out" if idle else None


def adapter_starts_from_weights(cell: Cell, machine: Machine) -> str | None:
    """init_lora_weights eva, corda, lora_ga or loftq."""
    # peft/tuners/lora/layer.py, update_layer: eva is left as it is until
    # initialize_lora_eva_weights, corda needs preprocess_corda, loftq quantizes anew.
    chosen = _lora(cell, "init_lora_weights") if cell.adapter is not None else None
    if not isinstance(chosen, str) or chosen.lower() not in UNPREPARED_INITS:
        return None
    return f"init_lora_weights {chosen}: {LORA_ARGUMENTS['eva_config'].said}"


def liger_needs_package(cell: Cell, machine: Machine) -> str | None:
    """use_liger_kernel without the package liger-kernel."""
    if cell.train is None or not _sft(cell, "use_liger_kernel"):
        return None
    if "liger-kernel" in machine.packages:
        return None
    return "use_liger_kernel needs the package liger-kernel, which is not installed"


def memory_metrics_reset_meters(cell: Cell, machine: Machine) -> str | None:
    """skip_memory_metrics false, which a run that others have measured may have had."""
    # transformers/trainer_utils.py, TrainerMemoryTracker: it empties the allocator's cache and
    # resets torch's peak counters at the start and the end of training.
    if cell.train is None or _sft(cell, "skip_memory_metrics") in (None, True):
        return None
    return (
        "skip_memory_metrics false has the Trainer reset the counters that tunebench reads; it can "
        "be predicted and not run"
    )


ARGUMENT_RULES = (
    sft_config_contradicts,
    lora_config_contradicts,
    arguments_have_effect,
    adapter_starts_from_weights,
)
ARGUMENT_RUN_RULES = (liger_needs_package, memory_metrics_reset_meters)
