"""What is passed through to TRL and PEFT, checked without importing them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from matrices.cell import SECTIONS, Cell
from matrices.errors import UserError
from matrices.expand import expand
from matrices.language.settings import BARE, LEAVES, MATRIX_KEYS, resolve
from matrices.libraries import installed_arguments
from matrices.libraries.hints import LIBRARY_NAMES, hint
from matrices.libraries.library_arguments import TABLES
from matrices.load import load
from matrices.rules.arguments import EFFECTS
from matrices.rules.passed_through import merged, mistakes

MISTAKES = [
    ("SFTConfig", {"adam_beta3": 0.9}, "has no argument 'adam_beta3'; did you mean 'adam_beta1'"),
    ("SFTConfig", {"use_dora": True}, "pass it through: adapter.lora_config: {use_dora: true}"),
    ("SFTConfig", {"micro_batch_size": 2}, "it is a setting: train.micro_batch_size"),
    ("SFTConfig", {"group_by_length": True}, "{train_sampling_strategy: group_by_length}"),
    ("SFTConfig", {"loss_type": "ndl"}, '"ndl" is not one of nll, dft, chunked_nll; did you mean'),
    ("SFTConfig", {"adam_beta1": "0.9"}, 'adam_beta1: "0.9" is not a number'),
    ("SFTConfig", {"full_determinism": 1}, "full_determinism: 1 is not true or false"),
    ("LoraConfig", {"use_drora": True}, "has no argument 'use_drora'; did you mean 'use_dora'"),
    ("LoraConfig", {"init_lora_weights": "gausian"}, "did you mean 'gaussian'"),
    ("LoraConfig", {"init_lora_weights": "pissa_niter_x"}, "is not true or false or one of"),
    ("LoraConfig", {"bias": "lora-only"}, "is not one of none, all, lora_only; did you mean"),
    ("LoraConfig", {"modules_to_save": "lm_head"}, '"lm_head" is not a list of str or null'),
    ("LoraConfig", {"layers_to_transform": ["1"]}, "is not a list of int or a whole number"),
]


@pytest.mark.parametrize(("class_name", "given", "said"), MISTAKES)
def test_a_wrong_argument_is_one_line(class_name: str, given: dict[str, Any], said: str) -> None:
    [error] = mistakes(class_name, given)
    assert said in str(error)
    assert "\n" not in str(error)
    assert error.key == TABLES[class_name][0]


@pytest.mark.parametrize(
    ("class_name", "given"),
    [
        ("SFTConfig", {"adam_epsilon": 1, "neftune_noise_alpha": None, "tf32": True}),
        ("SFTConfig", {"lr_scheduler_kwargs": {"lr_end": 0}, "pad_to_multiple_of": 8}),
        ("SFTConfig", {"max_steps": "a rule speaks of it", "save_steps": []}),
        ("LoraConfig", {"init_lora_weights": "pissa_niter_16", "modules_to_save": ["lm_head"]}),
        ("LoraConfig", {"trainable_token_indices": {"embed_tokens": [1]}, "bias": "all"}),
        ("LoraConfig", {"exclude_modules": "regular|expression", "use_bdlora": {"nblocks": 2}}),
    ],
)
def test_what_the_libraries_take_is_left_alone(class_name: str, given: dict[str, Any]) -> None:
    assert mistakes(class_name, given) == []


def test_nothing_is_said_where_the_source_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        installed_arguments.SOURCES, "SFTConfig", (("trl", "nowhere.py", "SFTConfig"),)
    )
    installed_arguments.fields.cache_clear()
    assert mistakes("SFTConfig", {"anything": 1}) == []
    installed_arguments.fields.cache_clear()


def test_reading_arguments_imports_nothing() -> None:
    installed_arguments.fields.cache_clear()
    before = set(sys.modules)
    assert installed_arguments.fields("SFTConfig")
    assert not {"trl", "peft", "transformers", "torch"} & (set(sys.modules) - before)


def cells(tmp_path: Path, text: str) -> tuple[list[Cell], tuple[str, ...]]:
    path = tmp_path / "m.yaml"
    path.write_text(f"method: lora\n{text}")
    found = merged(expand(load(path)))
    return list(found.cells), found.notes


def test_cells_that_differ_by_a_default_alone_are_one(tmp_path: Path) -> None:
    found, notes = cells(
        tmp_path, "axes: {train.sft_config: [{}, {loss_type: nll}, {loss_type: dft}]}\n"
    )
    assert [cell.train and cell.train.sft_config for cell in found] == [{}, {"loss_type": "dft"}]
    assert notes[0].startswith("train.sft_config: loss_type: nll is the default of trl ")
    assert notes[1] == "left out as the same as another: 1 cell"


def test_a_default_that_is_written_out_keeps_its_cell(tmp_path: Path) -> None:
    [found], notes = cells(tmp_path, "adapter: {lora_config: {bias: none, use_dora: true}}\n")
    assert found.adapter is not None
    assert found.adapter.lora_config == {"bias": "none", "use_dora": True}
    [note] = notes
    assert note.startswith("adapter.lora_config: bias: none is the default of peft ")


def test_every_table_entry_leads_somewhere() -> None:
    for key, table in TABLES.values():
        for name, argument in table.items():
            assert argument.said if argument.kind != "passed" else key, name
            assert not argument.needs or argument.needs in EFFECTS
            setting = argument.said.split(" ")[0].split(":")[0].rstrip(",")
            if argument.kind == "setting" and "." in setting:
                assert setting in LEAVES, name


def test_no_name_of_a_library_is_guessed_by_its_letters() -> None:
    """Also those of older releases and other trainers."""
    settings = {*BARE, *SECTIONS, *MATRIX_KEYS}
    for name in set(LIBRARY_NAMES) - settings:
        assert hint(name)
        with pytest.raises(UserError) as found:
            resolve(name, "x")
        assert "did you mean" not in found.value.message, name


HINTS = [
    ("num_train_epochs", "tunebench calls it train.steps (tunebench trains by steps)"),
    ("warmup_ratio", "tunebench calls it train.warmup_steps (a number of steps)"),
    ("group_by_length", "train.sft_config: {train_sampling_strategy: group_by_length}"),
    ("load_in_8bit", "not offered: only 4-bit storage is measured (method: qlora)"),
    ("device_map", "tunebench calls it parallelism: device-map"),
    ("use_dora", "pass it through: adapter.lora_config: {use_dora: true}"),
    ("report_to", "not offered: nothing is reported to a tracker"),
    ("save_steps", "not offered: nothing is saved during training"),
    ("lr_scheduler", "tunebench calls it train.lr_scheduler_type"),
    ("max_step", "did you mean 'max_steps'? tunebench calls it train.steps"),
    ("revision", "write model.revision or data.revision"),
]


@pytest.mark.parametrize("section", [None, "train", "adapter", "data", "quantization"])
@pytest.mark.parametrize(("name", "said"), HINTS)
def test_hints_lead_to_the_right_place(name: str, said: str, section: str | None) -> None:
    if (section, name) == ("data", "revision"):
        return
    with pytest.raises(UserError) as found:
        resolve(name, "m.yaml:1", section, [True])
    assert said in str(found.value)
