"""The profiles: what is written beside a cell, and the command that starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from harness.ranks.launch_command import (
    accelerate,
    command,
    fixed_port,
    launch_arguments,
    runs_accelerate,
    threads_per_process,
)
from harness.records.provenance import option
from launch.cells import accelerate_profile
from launch.cli import app
from matrices.accelerate_profiles import PLACEHOLDERS
from matrices.cell import Adapter, Cell, Data, Train
from matrices.errors import UserError
from matrices.parallelism import STRATEGIES

DISTRIBUTED = [name for name, each in STRATEGIES.items() if each.is_distributed]


def cell(kind: str, devices: int = 2, **given: Any) -> Cell:
    train = Train(micro_batch_size=3, gradient_accumulation_steps=2, max_grad_norm=0.5)
    given = {"train": train} | given
    return Cell(
        method="lora", adapter=Adapter(), data=Data(), parallelism=kind, devices=devices, **given
    )


def written(of: Cell, directory: Path, gpu: bool = False) -> dict[str, Any]:
    accelerate_profile.write(of, directory, gpu)
    found: dict[str, Any] = yaml.safe_load((directory / "profile.yaml").read_text())
    return found


def test_there_is_a_profile_for_every_kind_with_ranks() -> None:
    assert accelerate_profile.shipped_profiles() == sorted(DISTRIBUTED)


@pytest.mark.parametrize("kind", DISTRIBUTED)
def test_a_profile_says_what_the_table_says(kind: str, tmp_path: Path) -> None:
    found, strategy = written(cell(kind, 4), tmp_path), cell(kind).strategy
    assert found["distributed_type"] == strategy.distributed_types[0]
    assert found.get("fsdp_config", {}).get("fsdp_version") == (
        strategy.fsdp_version and str(strategy.fsdp_version)
    )
    zero = found.get("deepspeed_config", {}).get("deepspeed_config_file")
    told = json.loads((tmp_path / zero).read_text())["zero_optimization"] if zero else {}
    assert told.get("stage") == strategy.zero_stage
    assert ("offload_optimizer" in told, "offload_param" in told) == (strategy.offloads,) * 2


@pytest.mark.parametrize("kind", DISTRIBUTED)
@pytest.mark.parametrize("gpu", [True, False])
def test_nothing_is_left_to_fill_in(kind: str, gpu: bool, tmp_path: Path) -> None:
    found = written(cell(kind, 4), tmp_path, gpu)
    assert found["num_processes"] == 4
    assert not [path.name for path in tmp_path.iterdir() if "$" in path.read_text()]


@pytest.mark.parametrize("kind", DISTRIBUTED)
def test_it_says_what_the_cell_says(kind: str, tmp_path: Path) -> None:
    found = written(cell(kind, 4), tmp_path)
    if not cell(kind).strategy.zero_stage:
        assert found["mixed_precision"] == "bf16"
        assert found["use_cpu"] is True
        assert not (tmp_path / "deepspeed.json").exists()
        return
    assert found["use_cpu"] is False
    told = json.loads((tmp_path / "deepspeed.json").read_text())
    assert told["train_micro_batch_size_per_gpu"] == 3
    assert told["gradient_accumulation_steps"] == 2
    assert told["train_batch_size"] == 3 * 2 * 4
    assert told["gradient_clipping"] == 0.5
    assert (told["bf16"], told["fp16"]) == ({"enabled": True}, {"enabled": False})


def test_full_precision_is_said_in_words(tmp_path: Path) -> None:
    """YAML 1.1, which accelerate reads, would take a bare no for false."""
    plain = cell("ddp", train=Train(autocast=False))
    assert written(plain, tmp_path)["mixed_precision"] == "no"


@pytest.mark.parametrize(("gpu", "compiled"), [(True, True), (False, False)])
def test_offload_compiles_no_kernel_for_a_machine_without_gpus(
    gpu: bool, compiled: bool, tmp_path: Path
) -> None:
    accelerate_profile.write(cell("zero3-offload"), tmp_path, gpu)
    told = json.loads((tmp_path / "deepspeed.json").read_text())
    assert told["zero_force_ds_cpu_optimizer"] is compiled


@pytest.mark.parametrize("kind", ["single", "device-map"])
def test_one_process_needs_no_profile(kind: str, tmp_path: Path) -> None:
    alone = cell(kind, 1 if kind == "single" else 2)
    accelerate_profile.write(alone, tmp_path, False)
    assert list(tmp_path.iterdir()) == []
    assert "--cpu" in launch_arguments(alone, False, 2)
    # On a GPU accelerate has to be told to leave the user's own configuration alone.
    accelerate_profile.write(alone, tmp_path, True)
    given = command(alone, True, 2, tmp_path, tmp_path / "out")
    assert option(given, "--config_file") == str(tmp_path / "profile.yaml")
    assert yaml.safe_load((tmp_path / "profile.yaml").read_text())["distributed_type"] == "NO"
    for name, value in (("processes", "1"), ("machines", "1")):
        assert option(given, f"--num_{name}") == value
    assert (option(given, "--mixed_precision"), option(given, "--dynamo_backend")) == ("no", "no")
    assert given[-2:] == [str(tmp_path / "cell.json"), str(tmp_path / "out")]


def test_a_base_cell_is_one_process(tmp_path: Path) -> None:
    base = Cell(method="base", parallelism="ddp", devices=2)
    accelerate_profile.write(base, tmp_path, False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_the_files_in_the_cells_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    given = command(cell("zero2", 4), False, threads_per_process(cell("zero2", 4)), tmp_path)
    assert option(given, "--config_file") == str(tmp_path / "profile.yaml")
    assert option(given, "--deepspeed_config_file") == str(tmp_path / "deepspeed.json")
    assert option(given, "--num_processes") == "4"
    assert option(given, "--num_machines") == "1"
    assert option(given, "--main_process_port") == "0"
    assert option(given, "--num_cpu_threads_per_process") == "2"
    assert given[-4:-2] == ["--module", "harness.worker"]
    assert given[-2:] == [str(tmp_path / "cell.json"), str(tmp_path / "by-hand")]
    assert "--deepspeed_config_file" not in launch_arguments(cell("ddp"), False, 2)


@pytest.mark.parametrize("program", [("accelerate",), tuple(accelerate())])
def test_the_command_is_accelerates_with_the_worker_as_its_module(program: tuple[str, ...]) -> None:
    arguments = launch_arguments(cell("fsdp"), False, 2)
    assert command(cell("fsdp"), False, 2, program=program) == [
        *(*program, "launch", *arguments),
        *("--module", "harness.worker", "cell.json", "by-hand"),
    ]
    assert runs_accelerate(command(cell("fsdp"), False, 2, program=program))
    assert not runs_accelerate([sys.executable, "-m", "harness.worker"])


@pytest.mark.parametrize("machine", [0, 1])
def test_each_machine_says_which_it_is_and_where_they_meet(
    machine: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    several = cell("ddp", 4, nodes=2)
    meeting = ("10.0.0.1", 29400)
    given = command(
        several, False, threads_per_process(several), rendezvous=meeting, machine_rank=machine
    )
    assert option(given, "--num_processes") == "4"
    assert option(given, "--num_machines") == "2"
    assert option(given, "--machine_rank") == str(machine)
    assert option(given, "--main_process_ip") == "10.0.0.1"
    assert option(given, "--main_process_port") == "29400"
    assert option(given, "--num_cpu_threads_per_process") == "4"  # two ranks on each
    assert "--same_network" in given


def test_a_profile_of_the_users_own_takes_its_place(tmp_path: Path) -> None:
    own = {
        "distributed_type": "DEEPSPEED",
        "num_processes": "${devices}",
        "main_process_port": 29999,
        "deepspeed_config": {
            "deepspeed_config_file": {"gradient_accumulation_steps": "$gradient_accumulation_steps"}
        },
    }
    mine = cell("zero1", 4, profile=own)
    assert written(mine, tmp_path) == {
        "distributed_type": "DEEPSPEED",
        "num_processes": 4,
        "main_process_port": 29999,
        "deepspeed_config": {"deepspeed_config_file": "deepspeed.json"},
    }
    assert json.loads((tmp_path / "deepspeed.json").read_text()) == {
        "gradient_accumulation_steps": 2
    }
    assert option(launch_arguments(mine, False, 1), "--main_process_port") == "29999"


@pytest.mark.parametrize(("said", "port"), [(29999, 29999), ("29999", 29999), (None, 0)])
def test_the_port_of_a_profile_is_a_number_however_it_is_written(said: object, port: int) -> None:
    mine = cell("ddp", profile={"distributed_type": "MULTI_GPU", "main_process_port": said})
    assert fixed_port(mine) == port
    assert option(launch_arguments(mine, False, 1), "--main_process_port") == str(port)


def test_a_user_can_list_and_print_them() -> None:
    listed = CliRunner().invoke(app, ["profiles"])
    assert listed.exit_code == 0
    assert all(f"\n{name}" in listed.stdout for name in DISTRIBUTED)
    printed = CliRunner().invoke(app, ["profiles", "fsdp"])
    assert printed.stdout == (accelerate_profile.SHIPPED / "fsdp.yaml").read_text()
    assert json.loads(CliRunner().invoke(app, ["profiles", "zero2.json"]).stdout)
    with pytest.raises(UserError, match="no profile is called 'zero4'; did you mean"):
        CliRunner().invoke(app, ["profiles", "zero4"], catch_exceptions=False)


def test_what_they_say_can_be_filled_in_is_true() -> None:
    named = {
        word.strip('",').lstrip("$")
        for path in accelerate_profile.SHIPPED.iterdir()
        for line in path.read_text().splitlines()
        if not line.startswith("#")
        for word in line.split()
        if "$" in word
    }
    assert named <= PLACEHOLDERS.keys()


def test_it_imports_no_torch() -> None:
    code = "import launch.cells.accelerate_profile, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
