"""What accelerate's own launcher makes of the shipped profiles, against what the simulation assumes
where it changes memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from harness.ranks import launch_command, launch_environment
from harness.simulate.parallel import fsdp, zero
from launch.cells import accelerate_profile
from matrices.cell import Adapter, Cell, Data, Train
from matrices.parallelism import STRATEGIES

ZERO = [name for name, each in STRATEGIES.items() if each.zero_stage]
FSDP = [(name, each.fsdp_version) for name, each in STRATEGIES.items() if each.fsdp_version]


def cell(kind: str) -> Cell:
    return Cell(
        method="lora",
        adapter=Adapter(),
        data=Data(),
        train=Train(micro_batch_size=3, gradient_accumulation_steps=2),
        parallelism=kind,  # type: ignore[arg-type]
        devices=2,
    )


def accelerates(kind: str, directory: Path, gpu: bool) -> dict[str, str]:
    """The variables that `accelerate launch` sets for a profile, by accelerate's own functions."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    accelerate_profile.write(cell(kind), directory, gpu)
    given = launch_command.launch_arguments(cell(kind), gpu, 1, directory)
    arguments = launch_command_parser().parse_args([*given, "--module", "harness.worker"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    assert (arguments.num_processes, arguments.num_machines) == (2, 1)
    if not cell(kind).strategy.zero_stage:
        assert arguments.multi_gpu or arguments.use_fsdp
        found: dict[str, str] = prepare_multi_gpu_env(arguments)
        return found
    assert arguments.use_deepspeed
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    deepspeeds: dict[str, str] = prepare_deepspeed_cmd_env(arguments)[1]
    return deepspeeds


def clean(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(("kind", "version"), FSDP)
def test_fsdp_is_what_is_simulated(
    kind: str, version: int, gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = accelerates(kind, tmp_path, gpu)
    assumed = fsdp.environment(version)
    assert {name: found[name] for name in assumed} == assumed

    from accelerate import FullyShardedDataParallelPlugin

    def read(variables: dict[str, str]) -> dict[str, Any]:
        clean(monkeypatch, variables)
        plugin = vars(FullyShardedDataParallelPlugin())
        return {name: str(value) for name, value in plugin.items() if "function" not in str(value)}

    # Also what the simulation leaves to accelerate's defaults.
    assert read(found) == read(assumed)


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("kind", ZERO)
def test_zero_is_what_is_simulated(
    kind: str, gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = accelerates(kind, tmp_path, gpu)
    assumed = zero.environment(cell(kind))

    from accelerate import DeepSpeedPlugin
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    def read(variables: dict[str, str]) -> dict[str, Any]:
        clean(monkeypatch, variables)
        plugin = DeepSpeedPlugin()
        told = plugin.deepspeed_config["zero_optimization"]
        read_by_deepspeed = DeepSpeedZeroConfig(**told).model_dump()
        for name in ("offload_param", "offload_optimizer"):
            offload = read_by_deepspeed[name]
            if offload is not None and offload["device"] in (None, "none"):
                read_by_deepspeed[name] = None
            elif offload is not None and not gpu:
                # A GPU is simulated, and where there is none nothing can be pinned.
                del offload["pin_memory"]
        # About saving alone.
        del read_by_deepspeed["gather_16bit_weights_on_model_save"]
        return read_by_deepspeed | {"divided while read": plugin.zero3_init_flag}

    assert read(found) == read(assumed)
    assert found["ACCELERATE_USE_DEEPSPEED"] == assumed["ACCELERATE_USE_DEEPSPEED"]


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero2"])
def test_a_forked_rank_is_told_the_same(kind: str, gpu: bool, tmp_path: Path) -> None:
    found = accelerates(kind, tmp_path, gpu)
    given = launch_command.launch_arguments(cell(kind), gpu, 1, tmp_path)
    told = launch_environment.environment(given, launch_environment.RankPosition(1, 2))
    ours = {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP"))}
    assert ours.items() <= found.items()
    missing = {n for n in found if n.startswith(("ACCELERATE_", "FSDP"))} - ours.keys()
    assert all(os.environ.get(name) == found[name] for name in missing)
    assert (told["RANK"], told["LOCAL_RANK"], told["WORLD_SIZE"]) == ("1", "1", "2")


@pytest.mark.parametrize("kind", ZERO)
@pytest.mark.parametrize("autocast", [True, False])
def test_transformers_takes_the_values_that_are_written_out(
    kind: str, autocast: bool, tmp_path: Path
) -> None:
    """It compares each with the trainer's and raises where they differ; none is left on auto."""
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    spread = cell(kind)
    assert spread.train is not None
    train = spread.train.model_copy(update={"autocast": autocast, "max_grad_norm": 0.25})
    spread = spread.model_copy(update={"train": train})
    accelerate_profile.write(spread, tmp_path, False)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_grad_norm=0.25,
        bf16=autocast,
        use_cpu=True,
        report_to=[],
    )
    told = HfTrainerDeepSpeedConfig(str(tmp_path / "deepspeed.json"))
    assert "auto" not in str(told.config)
    told.trainer_config_process(arguments)
    # One process here, two in the cell.
    assert told.mismatches == ["- ds train_batch_size=12 vs hf train_batch_size (calculated)=6"]
