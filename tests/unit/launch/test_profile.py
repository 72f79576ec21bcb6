"""The profiles: what is written beside a cell, and the command that starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from typer.testing import CliRunner

from launch.cells import accelerate_command
from launch.cli import app
from matrices.accelerate_profiles import PLACEHOLDERS
from matrices.cell import Adapter, Cell, Data, Parallelism, Train
from matrices.errors import UserError

SPREAD = [name for name in get_args(Parallelism) if name not in ("single", "device-map")]


def cell(kind: str, devices: int = 2, **given: Any) -> Cell:
    train = Train(micro_batch_size=3, gradient_accumulation_steps=2, max_grad_norm=0.5)
    given = {"train": train} | given
    return Cell(
        method="lora", adapter=Adapter(), data=Data(), parallelism=kind, devices=devices, **given
    )


def written(of: Cell, directory: Path, gpu: bool = False) -> dict[str, Any]:
    accelerate_command.write(of, directory, gpu)
    found: dict[str, Any] = yaml.safe_load((directory / "profile.yaml").read_text())
    return found


def after(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def test_there_is_a_profile_for_every_way_to_spread_a_cell() -> None:
    assert accelerate_command.shipped() == sorted(SPREAD)


@pytest.mark.parametrize("kind", SPREAD)
@pytest.mark.parametrize("gpu", [True, False])
def test_nothing_is_left_to_fill_in(kind: str, gpu: bool, tmp_path: Path) -> None:
    found = written(cell(kind, 4), tmp_path, gpu)
    assert found["num_processes"] == 4
    assert not [path.name for path in tmp_path.iterdir() if "$" in path.read_text()]


@pytest.mark.parametrize("kind", SPREAD)
def test_it_says_what_the_cell_says(kind: str, tmp_path: Path) -> None:
    found = written(cell(kind, 4), tmp_path)
    if not kind.startswith("zero"):
        assert found["mixed_precision"] == "bf16"
        assert found["use_cpu"] is True
        assert not (tmp_path / "deepspeed.json").exists()
        return
    assert found["use_cpu"] is False
    told = json.loads((tmp_path / "deepspeed.json").read_text())
    assert told["zero_optimization"]["stage"] == int(kind[4])
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
    accelerate_command.write(cell("zero3-offload"), tmp_path, gpu)
    told = json.loads((tmp_path / "deepspeed.json").read_text())
    assert told["zero_force_ds_cpu_optimizer"] is compiled


@pytest.mark.parametrize("kind", ["single", "device-map"])
def test_one_process_needs_no_profile(kind: str, tmp_path: Path) -> None:
    alone = cell(kind, 1 if kind == "single" else 2)
    accelerate_command.write(alone, tmp_path, False)
    assert list(tmp_path.iterdir()) == []
    assert "--cpu" in accelerate_command.command(alone, tmp_path, False)
    # On a GPU accelerate has to be told to leave the user's own configuration alone.
    accelerate_command.write(alone, tmp_path, True)
    given = accelerate_command.command(alone, tmp_path, True, tmp_path / "out")
    assert after(given, "--config_file") == str(tmp_path / "profile.yaml")
    assert yaml.safe_load((tmp_path / "profile.yaml").read_text())["distributed_type"] == "NO"
    for option, value in (("processes", "1"), ("machines", "1")):
        assert after(given, f"--num_{option}") == value
    assert (after(given, "--mixed_precision"), after(given, "--dynamo_backend")) == ("no", "no")
    assert given[-2:] == [str(tmp_path / "cell.json"), str(tmp_path / "out")]


def test_a_base_cell_is_one_process(tmp_path: Path) -> None:
    base = Cell(method="base", parallelism="ddp", devices=2)
    accelerate_command.write(base, tmp_path, False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_the_files_in_the_cells_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    given = accelerate_command.command(cell("zero2", 4), tmp_path, False)
    assert after(given, "--config_file") == str(tmp_path / "profile.yaml")
    assert after(given, "--deepspeed_config_file") == str(tmp_path / "deepspeed.json")
    assert after(given, "--num_processes") == "4"
    assert after(given, "--num_machines") == "1"
    assert after(given, "--main_process_port") == "0"
    assert after(given, "--num_cpu_threads_per_process") == "2"
    assert given[-4:-2] == ["--module", "harness.worker"]
    assert given[-2:] == [str(tmp_path / "cell.json"), f"{tmp_path.name}.by-hand"]
    assert "--deepspeed_config_file" not in accelerate_command.command(cell("ddp"), tmp_path, False)


def test_the_launch_arguments_are_those_of_accelerate(tmp_path: Path) -> None:
    given = accelerate_command.command(cell("fsdp"), tmp_path, False)
    middle = accelerate_command.launch_arguments(given)
    at = given.index("launch")
    assert given[: at + 1] + middle + given[at + 1 + len(middle) :] == given
    assert middle[0] == "--config_file"
    assert middle[-1] == "--quiet"


def test_machine_0_says_where_the_others_meet_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    several = cell("ddp", 4, nodes=2)
    given = accelerate_command.command(several, tmp_path, False, None, "10.0.0.1", 29400)
    assert after(given, "--num_processes") == "4"
    assert after(given, "--num_machines") == "2"
    assert after(given, "--machine_rank") == "0"
    assert after(given, "--main_process_ip") == "10.0.0.1"
    assert after(given, "--main_process_port") == "29400"
    assert after(given, "--num_cpu_threads_per_process") == "4"  # two ranks on each
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
    assert (
        after(accelerate_command.command(mine, tmp_path, False), "--main_process_port") == "29999"
    )


def test_a_user_can_list_and_print_them() -> None:
    listed = CliRunner().invoke(app, ["profiles"])
    assert listed.exit_code == 0
    assert all(f"\n{name}" in listed.stdout for name in SPREAD)
    printed = CliRunner().invoke(app, ["profiles", "fsdp"])
    assert printed.stdout == (accelerate_command.SHIPPED / "fsdp.yaml").read_text()
    assert json.loads(CliRunner().invoke(app, ["profiles", "zero2.json"]).stdout)
    with pytest.raises(UserError, match="no profile is called 'zero4'; did you mean"):
        CliRunner().invoke(app, ["profiles", "zero4"], catch_exceptions=False)


def test_what_they_say_can_be_filled_in_is_true() -> None:
    named = {
        word.strip('",').lstrip("$")
        for path in accelerate_command.SHIPPED.iterdir()
        for line in path.read_text().splitlines()
        if not line.startswith("#")
        for word in line.split()
        if "$" in word
    }
    assert named <= PLACEHOLDERS.keys()


def test_it_imports_no_torch() -> None:
    code = "import launch.cells.accelerate_command, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
