"""A profile of the user's own: read, embedded, filled in; and the batch over all devices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from matrices.accelerate_profiles import PLACEHOLDERS, rendered, values
from matrices.cell import Cell, Data, Model, Train, label
from matrices.errors import UserError
from matrices.expand import Expansion, expand
from matrices.load import load

PROFILE = """\
distributed_type: DEEPSPEED
num_processes: $devices
deepspeed_config:
  deepspeed_config_file: ds.json
"""
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "$micro_batch_size",
    "zero_optimization": {"stage": 2},
}
MATRIX = "method: lora\nparallelism: zero2\ndevices: 2\nprofile: ./mine.yaml\n"


def expanded(directory: Path, text: str, *overrides: str) -> Expansion:
    path = directory / "m.yaml"
    path.write_text(text)
    return expand(load(path, overrides))


def one(directory: Path, text: str, *overrides: str) -> Cell:
    [cell] = expanded(directory, text, *overrides).cells
    return cell


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "mine.yaml").write_text(PROFILE)
    (tmp_path / "ds.json").write_text(json.dumps(DEEPSPEED))
    return tmp_path


def test_a_profile_is_its_content(written: Path) -> None:
    assert one(written, MATRIX).profile == {
        "distributed_type": "DEEPSPEED",
        "num_processes": "$devices",
        "deepspeed_config": {"deepspeed_config_file": DEEPSPEED},
    }


def test_its_content_is_its_identity(written: Path) -> None:
    first = one(written, MATRIX).cell_id
    moved = written / "elsewhere"
    moved.mkdir()
    for name in ("mine.yaml", "ds.json"):
        (moved / name).write_text((written / name).read_text())
    assert one(moved, MATRIX).cell_id == first
    (written / "ds.json").write_text(json.dumps(DEEPSPEED | {"gradient_clipping": 0.5}))
    assert one(written, MATRIX).cell_id != first
    assert one(written, MATRIX.replace("profile: ./mine.yaml\n", "")).cell_id != first


def test_profiles_can_be_an_axis(written: Path) -> None:
    (written / "other.yaml").write_text("distributed_type: DEEPSPEED\n")
    text = MATRIX.replace("profile: ./mine.yaml\n", "axes: {profile: [mine.yaml, other.yaml]}\n")
    assert len(expanded(written, text).cells) == 2


def test_one_process_has_no_profile(written: Path) -> None:
    text = "method: lora\nprofile: ./mine.yaml\naxes: {seed: [0]}\n"
    assert one(written, text).profile == {}


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (
            "mine.yaml",
            "a: $devces\n",
            "mine.yaml:1: $devces is nothing a cell can fill in; did you",
        ),
        ("mine.yaml", "\nb: [x, $ 5]\n", "mine.yaml:2: a lone $"),
        ("mine.yaml", "- a\n", "not a mapping"),
        ("mine.yaml", "a: b: c\n", "mine.yaml:1: not YAML"),
        (
            "ds.json",
            '{\n"a": "$gou"}',
            "ds.json:2: $gou is nothing a cell can fill in; did you mean",
        ),
        ("ds.json", "", "ds.json: is not a mapping of keys, so not a DeepSpeed"),
    ],
)
def test_mistakes_in_the_files_name_file_and_line(
    written: Path, file: str, content: str, said: str
) -> None:
    (written / file).write_text(content)
    with pytest.raises(UserError) as raised:
        expanded(written, MATRIX)
    assert said in str(raised.value)
    assert str(raised.value).startswith(str(written / file))
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_one_line(written: Path) -> None:
    (written / "ds.json").unlink()
    with pytest.raises(UserError, match=r"mine\.yaml:4: deepspeed_config_file: 'ds\.json'"):
        expanded(written, MATRIX)
    (written / "mine.yaml").unlink()
    with pytest.raises(UserError, match=r"m\.yaml:4: profile: '\./mine\.yaml' .* is not a file"):
        expanded(written, MATRIX)


def test_a_profile_is_a_path_in_a_matrix(written: Path) -> None:
    with pytest.raises(UserError, match=r"m\.yaml:4: profile: is the path of a YAML file"):
        expanded(written, MATRIX.replace("./mine.yaml", "{distributed_type: FSDP}"))


def test_values_keep_their_types() -> None:
    cell = Cell(
        method="full",
        model=Model(),
        data=Data(),
        train=Train(micro_batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.5),
        parallelism="ddp",
        devices=4,
        nodes=2,
    )
    filled = values(cell, gpu=False)
    assert filled.keys() == PLACEHOLDERS.keys()
    given = {
        "a": ["$devices", "${nodes}", "$train_batch_size"],
        "b": {"c": "$bf16", "d": "$use_cpu", "e": "$max_grad_norm"},
        "f": "x$devices-$$5",
        "g": 7,
    }
    assert rendered(given, filled) == {
        "a": [4, 2, 3 * 5 * 4],
        "b": {"c": True, "d": True, "e": 0.5},
        "f": "x4-$5",
        "g": 7,
    }


@pytest.mark.parametrize(
    ("model", "autocast", "precision"),
    [
        (Model(), True, "bf16"),
        (Model(), False, "no"),
        (Model(compute_dtype="fp32"), True, "no"),
        (Model(compute_dtype="fp16"), True, "fp16"),
    ],
)
def test_mixed_precision_is_the_trainers(model: Model, autocast: bool, precision: str) -> None:
    cell = Cell(method="full", model=model, data=Data(), train=Train(autocast=autocast))
    filled = values(cell, gpu=True)
    assert filled["mixed_precision"] == precision
    assert (filled["bf16"], filled["fp16"]) == (precision == "bf16", precision == "fp16")


BATCH = "method: full\nmicro_batch_size: 2\nglobal_batch_size: 8\n"


def test_the_global_batch_sets_the_accumulation_steps(tmp_path: Path) -> None:
    text = BATCH + "parallelism: ddp\naxes: {devices: [1, 2, 4]}\n"
    cells = expanded(tmp_path, text).cells
    steps = [cell.train and cell.train.gradient_accumulation_steps for cell in cells]
    assert steps == [4, 2, 1]
    assert all(cell.train and cell.train.global_batch_size is None for cell in cells)


def test_it_is_identity_by_what_it_makes(tmp_path: Path) -> None:
    by_hand = "method: full\nmicro_batch_size: 2\ngradient_accumulation_steps: 4\n"
    assert one(tmp_path, BATCH).cell_id == one(tmp_path, by_hand).cell_id


def test_a_device_map_is_one_process(tmp_path: Path) -> None:
    found = one(tmp_path, BATCH + "parallelism: device-map\ndevices: 4\n")
    assert found.train is not None
    assert found.train.gradient_accumulation_steps == 4


def test_it_stays_where_it_does_not_divide(tmp_path: Path) -> None:
    found = one(tmp_path, BATCH + "parallelism: ddp\ndevices: 3\n")
    assert found.train is not None
    assert found.train.global_batch_size == 8
    assert found.train.gradient_accumulation_steps == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            BATCH + "gradient_accumulation_steps: 4\n",
            "m.yaml:3: train.global_batch_size: sets gradient_accumulation_steps, which is 4 at",
        ),
        (
            "method: full\nglobal_batch_size: 8\naxes: {gradient_accumulation_steps: [1, 2]}\n",
            "m.yaml:2: train.global_batch_size: sets gradient_accumulation_steps, which is 1 at",
        ),
        (
            "method: full\ngradient_accumulation_steps: 2\ninclude: [{global_batch_size: 8}]\n",
            "m.yaml:3: train.global_batch_size: sets gradient_accumulation_steps, which is 2 at",
        ),
    ],
)
def test_both_given_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        expanded(tmp_path, text)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_it_is_stronger_than_a_presets_accumulation_steps(tmp_path: Path) -> None:
    found = one(tmp_path, "preset: low-memory\nglobal_batch_size: 6\n")
    assert found.train is not None
    assert found.train.gradient_accumulation_steps == 6


def test_the_label_says_how_machines_share_the_devices() -> None:
    spread = Cell(method="full", parallelism="zero3", devices=8)
    assert label(spread) == "full zero3 x8"
    assert label(spread.model_copy(update={"nodes": 2})) == "full zero3 2x4"


def test_a_phase_has_a_limit_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("phase_timeout_seconds: 60\n")
    assert load(path).phase_timeout_seconds == 60.0
    assert load(path).timeout_seconds is None
    assert load(path, ["phase_timeout_seconds=5"]).phase_timeout_seconds == 5.0
    path.write_text("phase_timeout_seconds: -1\n")
    with pytest.raises(UserError, match=r"m\.yaml:1: phase_timeout_seconds: -1 is not a number"):
        load(path)
