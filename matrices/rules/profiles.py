"""The rules about an accelerate profile of the user's own; see `matrices.rules.verdicts`."""

from __future__ import annotations

from typing import Any

from matrices.accelerate_profiles import DEEPSPEED_FILE, mixed_precision
from matrices.cell import Cell
from matrices.rules.machine import Machine


def own_profile_is_not_predicted(cell: Cell, machine: Machine) -> str | None:
    """A profile of the user's own: the simulation follows the shipped ones."""
    if not cell.profile:
        return None
    return "a profile of your own is not simulated, only the shipped ones are; run it"


def profile_matches_parallelism(cell: Cell, machine: Machine) -> str | None:
    """A profile of the user's own that is another kind of parallelism than the cell says."""
    if not cell.profile:
        return None
    said, strategy = str(cell.profile.get("distributed_type")), cell.strategy
    version = str(_at(cell.profile, "fsdp_config").get("fsdp_version", "1"))
    stage = _stage(cell.profile)
    if strategy.is_distributed and said == strategy.distributed_types[0]:
        if strategy.fsdp_version and version != str(strategy.fsdp_version):
            said = f"FSDP with fsdp_version {version}"
        elif strategy.zero_stage and stage != str(strategy.zero_stage):
            said = f"DEEPSPEED with ZeRO stage {stage}"
        else:
            return None
    return (
        f"the profile's distributed_type is {said}, which is not parallelism {cell.parallelism}; "
        f"start from what `tunebench profiles {cell.parallelism}` prints"
    )


def profile_matches_precision(cell: Cell, machine: Machine) -> str | None:
    """A profile of the user's own with another mixed_precision than the cell's."""
    # transformers/training_args.py: without bf16 and fp16 the launcher's word counts.
    said, meant = cell.profile.get("mixed_precision"), mixed_precision(cell)
    if said is None or str(said) in ("$mixed_precision", "${mixed_precision}", meant):
        return None
    return (
        f"the profile's mixed_precision is {said} and the cell's is {meant}; write "
        "$mixed_precision in the profile"
    )


def _stage(profile: dict[str, Any]) -> str:
    """DeepSpeed's ZeRO stage; accelerate's default is 2."""
    section = _at(profile, "deepspeed_config")
    inner = _at(_at(section, DEEPSPEED_FILE), "zero_optimization")
    return str(inner.get("stage", section.get("zero_stage", 2)))


def _at(content: dict[str, Any], key: str) -> dict[str, Any]:
    found = content.get(key)
    return found if isinstance(found, dict) else {}
