"""From a matrix to its cells: counts by hand, collapsing, layers, identity, properties."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matrices.cell import Cell, base_cells, canonical_json, label
from matrices.errors import UserError
from matrices.expand import Expansion, expand
from matrices.language.presets import PRESETS
from matrices.load import load, shipped


def expanded(directory: Path, text: str, *overrides: str) -> Expansion:
    path = directory / "m.yaml"
    path.write_text(text)
    return expand(load(path, overrides))


def one(directory: Path, text: str) -> Cell:
    (cell,) = expanded(directory, text).cells
    return cell


DESIGN = """\
name: quantization
question: What do NF4, FP4 and double quantization cost and buy?
model: smollm2-135m
data: {source: python-reference, max_length: 256, packing: true}
train: {steps: 40, warmup_steps: 4, micro_batch_size: 2, gradient_accumulation_steps: 1,
        learning_rate: 2.0e-4}
evaluate: {tasks: [python_reference_bpb, python_reference_topic]}
axes:
  method: [full, lora, qlora]
  quant_type: [nf4, fp4]
  double_quant: [false, true]
  rank: [8, 64]
  target_modules: [qv, attention, all-linear]
  seed: [0, 1, 2]
exclude:
  - {method: full, rank: 64}
"""


def test_the_example_of_the_design(tmp_path: Path) -> None:
    found = expanded(tmp_path, DESIGN)
    # 3 methods x 2 types x 2 double x 2 ranks x 3 targets x 3 seeds, less full at rank 64.
    assert found.combinations == 3 * 2 * 2 * 2 * 3 * 3 - 2 * 2 * 3 * 3 == 180
    methods = [cell.method for cell in found.cells]
    assert methods.count("full") == 3  # seeds
    assert methods.count("lora") == 2 * 3 * 3  # ranks, targets, seeds
    assert methods.count("qlora") == 2 * 2 * 2 * 3 * 3
    assert len(found.cells) == 93
    assert found.notes == ()


def test_108_combinations_are_43_cells(tmp_path: Path) -> None:
    text = """\
axes:
  method: [full, lora, qlora]
  quant_type: [nf4, fp4]
  quant_storage: [uint8, bf16, fp32]
  rank: [8, 64]
  target_modules: [qv, attention, all-linear]
"""
    found = expanded(tmp_path, text)
    # full: 1; lora: 2 ranks x 3 targets; qlora: all 36.
    assert (found.combinations, len(found.cells)) == (108, 43)


def test_a_matrix_without_axes_is_one_cell(tmp_path: Path) -> None:
    found = expanded(tmp_path, "rank: 4\n")
    assert (found.combinations, len(found.cells)) == (1, 1)


def test_the_last_axis_changes_fastest(tmp_path: Path) -> None:
    found = expanded(tmp_path, "axes: {rank: [2, 1], seed: [1, 0]}\n")
    order = [(cell.adapter.rank, cell.seed) for cell in found.cells if cell.adapter]
    assert order == [(2, 1), (2, 0), (1, 1), (1, 0)]


def test_sections_are_there_for_the_methods_that_have_them(tmp_path: Path) -> None:
    found = expanded(tmp_path, "axes: {method: [base, full, lora, qlora]}\n").cells
    present = {
        cell.method: [
            name
            for name in ("quantization", "adapter", "data", "train")
            if getattr(cell, name) is not None
        ]
        for cell in found
    }
    assert present == {
        "base": [],
        "full": ["data", "train"],
        "lora": ["adapter", "data", "train"],
        "qlora": ["quantization", "adapter", "data", "train"],
    }


@pytest.mark.parametrize(
    "text",
    [
        "method: full\naxes: {rank: [1, 2], dropout: [0, 0.1], quant_type: [nf4, fp4]}",
        "method: lora\naxes: {quant_type: [nf4, fp4], double_quant: [true, false]}",
        "method: base\naxes: {seed: [0, 1], rank: [1, 2], steps: [1, 2], max_length: [8, 9]}",
        "method: base\naxes: {compute_dtype: [bf16, fp32]}",
        "method: base\naxes: {parallelism: [single, fsdp], devices: [1, 2]}",
        "rank: 8\naxes: {alpha: [null, 16]}",
        "axes: {target_modules: [[q_proj, v_proj], [v_proj, q_proj, v_proj]]}",
        "warmup_steps: 3\naxes: {timing_warmup_steps: [null, 3]}",
        "gradient_checkpointing: false\naxes: {use_reentrant: [true, false]}",
        "packing: false\naxes: {packing_strategy: [wrapped, bfd, bfd_split]}",
        "compute_dtype: fp32\naxes: {autocast: [true, false]}",
        "autocast: false\naxes: {compute_dtype: [bf16, fp16]}",
        "tasks: []\naxes: {limit: [null, 5], num_fewshot: [null, 0, 2], evaluate.batch_size: "
        "[1, 8], apply_chat_template: [true, false]}",
    ],
)
def test_what_means_nothing_collapses(tmp_path: Path, text: str) -> None:
    found = expanded(tmp_path, text)
    assert len(found.cells) == 1
    assert found.combinations > 1


@pytest.mark.parametrize(
    "text",
    [
        "method: qlora\naxes: {quant_type: [nf4, fp4]}",
        "axes: {alpha: [null, 16]}",  # 2 x 16 by default
        "axes: {timing_warmup_steps: [null, 0]}",
        "gradient_checkpointing: true\naxes: {use_reentrant: [true, false]}",
        "packing: true\naxes: {packing_strategy: [wrapped, bfd]}",
        "axes: {autocast: [true, false]}",
        "parallelism: fsdp\naxes: {devices: [1, 2]}",
        "devices: 2\naxes: {parallelism: [fsdp, zero3]}",
        "axes: {config_overrides: [{}, {vocab_size: 32001}]}",
        "method: qlora\nautocast: false\naxes: {compute_dtype: [bf16, fp16]}",
        "axes: {limit: [null, 5]}",
        "tasks: []\naxes: {sample_prompts: [[a], [b]]}",
        "axes: {sft_config: [{}, {neftune_noise_alpha: 5}]}",
        "axes: {lora_config: [{use_dora: true}, {use_rslora: true}]}",
        "method: base\naxes: {weight_dtype: [bf16, fp32]}",
    ],
)
def test_what_means_something_stays(tmp_path: Path, text: str) -> None:
    assert len(expanded(tmp_path, text).cells) == 2


def test_alpha_is_twice_the_rank_unless_given(tmp_path: Path) -> None:
    found = expanded(tmp_path, "axes: {rank: [8, 64], alpha: [null, 5]}\n").cells
    alphas = [(c.adapter.rank, c.adapter.alpha) for c in found if c.adapter]
    assert alphas == [(8, 16), (8, 5), (64, 128), (64, 5)]


def test_a_base_cell_is_the_one_derived_from_a_trained_cell(tmp_path: Path) -> None:
    base = one(tmp_path, "method: base\nseed: 3\ncompute_dtype: fp32\nlimit: 5\n")
    trained = one(tmp_path, "method: lora\nseed: 3\ncompute_dtype: fp32\nlimit: 5\n")
    assert base == base_cells(trained)["untouched"]


def test_layers_override_in_order(tmp_path: Path) -> None:
    preset = PRESETS["low-memory"]
    cell = one(tmp_path, "preset: low-memory\n")
    assert cell.method == "qlora"
    assert cell.adapter is not None
    assert cell.train is not None
    assert cell.quantization is not None
    assert cell.adapter.rank == preset["adapter.rank"]
    assert cell.train.optimizer == preset["train.optimizer"]
    assert cell.train.learning_rate == 2e-4  # the default
    constant = one(tmp_path, "preset: low-memory\nrank: 3\nmethod: lora\n")
    assert constant.adapter is not None
    assert (constant.method, constant.adapter.rank) == ("lora", 3)
    found = expanded(tmp_path, "preset: low-memory\naxes: {rank: [1, 2]}\n").cells
    assert [c.adapter.rank for c in found if c.adapter] == [1, 2]
    (overridden,) = expanded(tmp_path, "axes: {rank: [1, 2]}\n", "rank=9").cells
    assert overridden.adapter is not None
    assert overridden.adapter.rank == 9


def test_presets_as_an_axis(tmp_path: Path) -> None:
    found = expanded(tmp_path, "axes: {preset: [low-memory, balanced, high-quality]}\n").cells
    assert [c.adapter.rank for c in found if c.adapter] == [8, 16, 64]
    assert [c.method for c in found] == ["qlora", "lora", "lora"]
    steps = {
        c.train.micro_batch_size * c.train.gradient_accumulation_steps for c in found if c.train
    }
    assert steps == {4}  # the same optimizer steps, so that they can be compared
    text = "axes: {preset: [low-memory, balanced]}\nexclude: [{preset: balanced}]\n"
    assert [c.method for c in expanded(tmp_path, text).cells] == ["qlora"]


def test_exclude_looks_at_defaults_constants_and_axes(tmp_path: Path) -> None:
    text = "rank: 8\naxes: {seed: [0, 1]}\nexclude:\n  - {rank: 8, steps: 40, seed: 1}\n"
    found = expanded(tmp_path, text)
    assert [cell.seed for cell in found.cells] == [0]
    assert found.notes == ()


def test_exclude_compares_before_anything_collapses(tmp_path: Path) -> None:
    axes = "axes: {method: [full, lora], rank: [8, 64]}\n"
    found = expanded(tmp_path, axes + "exclude: [{method: full, rank: 64}]\n")
    assert [cell.method for cell in found.cells] == ["full", "lora", "lora"]
    assert found.combinations == 3
    found = expanded(tmp_path, axes + "exclude: [{method: full}]\n")
    assert [cell.method for cell in found.cells] == ["lora", "lora"]


def test_an_exclude_that_matches_nothing_is_a_note(tmp_path: Path) -> None:
    text = "axes: {rank: [8]}\nexclude:\n  - {rank: 8, seed: 3}\n  - {method: full}\n"
    assert expanded(tmp_path, text).notes == (
        f"{tmp_path}/m.yaml:3: exclude matches no combination (adapter.rank: 8, seed: 3)",
        f'{tmp_path}/m.yaml:4: exclude matches no combination (method: "full")',
    )


def test_include_takes_all_values_of_the_axes_it_does_not_name(tmp_path: Path) -> None:
    text = (
        "learning_rate: 2e-4\naxes: {method: [lora, qlora], seed: [0, 1, 2]}\n"
        "include:\n  - {method: full, learning_rate: 2e-5}\n"
    )
    found = expanded(tmp_path, text)
    assert (found.combinations, len(found.cells)) == (9, 9)
    rates = {(c.method, c.seed): c.train.learning_rate for c in found.cells if c.train}
    assert [rates["full", seed] for seed in (0, 1, 2)] == [2e-5] * 3
    assert {rates[method, 1] for method in ("lora", "qlora")} == {2e-4}


def test_include_may_name_a_preset(tmp_path: Path) -> None:
    text = "preset: balanced\ninclude:\n  - {preset: low-memory}\n"
    assert [c.method for c in expanded(tmp_path, text).cells] == ["lora", "qlora"]


def test_exclude_drops_from_includes_too(tmp_path: Path) -> None:
    text = (
        "axes: {rank: [8, 64]}\ninclude: [{method: qlora}]\nexclude: [{method: qlora, rank: 64}]\n"
    )
    found = expanded(tmp_path, text)
    assert [(c.method, c.adapter.rank) for c in found.cells if c.adapter] == [
        ("lora", 8),
        ("lora", 64),
        ("qlora", 8),
    ]
    assert found.combinations == 3
    assert found.notes == ()


def test_a_contradiction_names_both_places(tmp_path: Path) -> None:
    text = "exclude:\n  - {rank: 64}\ninclude:\n  - {rank: 32}\n  - {rank: 64, seed: 1}\n"
    with pytest.raises(UserError) as caught:
        expanded(tmp_path, text)
    path = tmp_path / "m.yaml"
    assert str(caught.value) == (
        f"{path}:5: include: contradicts the exclude at {path}:2, which drops everything it adds; "
        "remove one of them"
    )


def test_an_include_that_adds_nothing_is_a_note(tmp_path: Path) -> None:
    found = expanded(tmp_path, "axes: {rank: [8, 64]}\ninclude: [{rank: 8}]\n")
    assert len(found.cells) == 2
    assert found.notes == (f"{tmp_path}/m.yaml:2: include adds no cell that is not there already",)


def test_an_axis_that_changes_nothing_is_a_note(tmp_path: Path) -> None:
    found = expanded(tmp_path, "method: lora\naxes:\n  rank: [8]\n  quant_type: [nf4, fp4]\n")
    assert found.notes == (
        f"{tmp_path}/m.yaml:4: the axis quantization.quant_type changes nothing for method lora",
    )
    text = "axes:\n  method: [lora, qlora]\n  quant_type: [nf4, fp4]\n"
    assert expanded(tmp_path, text).notes == ()


def test_everything_excluded(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        expanded(tmp_path, "axes: {rank: [8, 16]}\n\nexclude: [{method: lora}]\n")
    assert str(caught.value) == (
        f"{tmp_path}/m.yaml:3: exclude: every combination is excluded, so nothing is left to run; "
        "remove an entry"
    )


def test_too_many_combinations_are_refused_before_they_are_made(tmp_path: Path) -> None:
    many = ",".join(str(number) for number in range(1, 1002))
    with pytest.raises(UserError, match=r"m\.yaml:1: axes: the axes make 1,002,001 combinations"):
        expanded(tmp_path, f"axes: {{rank: [{many}], seed: [{many}]}}\n")


def test_local_files_are_in_the_cell_by_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("text\nhello\n")
    (tmp_path / "c.csv").write_text("text\nother\n")
    found = expanded(tmp_path, "axes: {data: [a.csv, b.csv, c.csv]}\n")
    assert found.combinations == 3
    # a and b hold the same, so they are one cell.
    sources = [cell.data.source for cell in found.cells if cell.data]
    assert sources == [str(tmp_path / "a.csv"), str(tmp_path / "c.csv")]
    assert all(cell.data.fingerprint for cell in found.cells if cell.data)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "z.csv").write_text("text\nother\n")
    (moved,) = expanded(elsewhere, "data: z.csv\n").cells
    assert moved.cell_id == found.cells[1].cell_id


def test_a_config_is_in_the_cell_by_content_and_called_after_its_place(tmp_path: Path) -> None:
    for name, size in (("tiny", 8), ("twin", 8), ("wide", 16)):
        (tmp_path / name).mkdir()
        text = json.dumps({"model_type": "llama", "hidden_size": size})
        (tmp_path / name / "config.json").write_text(text)
    found = expanded(
        tmp_path,
        "axes: {model.config: [tiny/config.json, twin/config.json, wide/config.json]}\n",
    )
    assert [cell.model.name for cell in found.cells] == ["tiny", "wide"]
    assert [cell.model.config for cell in found.cells] == [
        str(tmp_path / "tiny" / "config.json"),
        str(tmp_path / "wide" / "config.json"),
    ]
    named = one(tmp_path, "model: {name: mine, config: twin/config.json}\n")
    assert named.model.name == "mine"
    assert named.cell_id == found.cells[0].cell_id
    hashed = hashlib.sha256((tmp_path / "twin" / "config.json").read_bytes()).hexdigest()
    assert canonical_json(named) == (
        f'{{"adapter":{{"alpha":32}},"data":{{}},"model":{{"fingerprint":"{hashed}"}},"train":{{}}}}'
    )
    changed = one(
        tmp_path, "model: {config: tiny/config.json, config_overrides: {hidden_size: 9}}\n"
    )
    assert changed.model.fingerprint == hashed
    assert changed.cell_id != named.cell_id


def test_a_config_in_one_entry_of_several_models(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"model_type": "llama"}')
    found = expanded(
        tmp_path,
        "axes: {model: [gpt2, llama-2-7b]}\ninclude:\n  - {model.config: own.json, model: mine}\n",
    )
    assert [cell.model.name for cell in found.cells] == ["gpt2", "llama-2-7b", "mine"]
    assert [bool(cell.model.config) for cell in found.cells] == [False, False, True]


def test_spread_cells_share_their_bases_with_single_ones(tmp_path: Path) -> None:
    single, spread = expanded(
        tmp_path, "method: qlora\ninclude: [{parallelism: fsdp, devices: 2}]\n"
    ).cells
    assert (spread.parallelism, spread.devices) == ("fsdp", 2)
    assert base_cells(single) == base_cells(spread)
    assert label(spread) == f"{label(single)} fsdp x2"


@pytest.mark.parametrize("name", shipped())
def test_shipped_matrices_expand(name: str) -> None:
    matrix = load(name)
    found = expand(matrix)
    assert matrix.name == name
    assert matrix.question.endswith("?")
    assert found.notes == ()
    assert len({cell.cell_id for cell in found.cells}) == len(found.cells)


def test_the_quickstart_is_what_it_says() -> None:
    cells = expand(load("quickstart")).cells
    assert [cell.method for cell in cells] == ["lora"] * 4 + ["full"] + ["qlora"] * 3
    lora = {(c.adapter.rank, c.adapter.target_modules) for c in cells[:4] if c.adapter}
    assert lora == {(8, "qv"), (8, "all-linear"), (32, "qv"), (32, "all-linear")}
    stored = [
        (c.quantization.quant_type, c.quantization.double_quant)
        for c in cells[5:]
        if c.quantization
    ]
    assert stored == [("nf4", False), ("nf4", True), ("fp4", False)]
    assert {(c.adapter.rank, c.adapter.target_modules) for c in cells[5:] if c.adapter} == {
        (8, "all-linear")
    }
    assert all(c.train == cells[0].train for c in cells), "methods are compared on one recipe"
    assert {cell.seed for cell in cells} == {0}


# Settings and values whose every combination is a valid matrix.
VALUES: dict[str, list[Any]] = {
    "method": ["base", "full", "lora", "qlora"],
    "quant_type": ["nf4", "fp4"],
    "double_quant": [False, True],
    "rank": [1, 8],
    "alpha": [None, 2, 16],
    "target_modules": ["qv", ["q_proj", "v_proj"], ["v_proj", "q_proj"]],
    "seed": [0, 1],
    "packing": [True, False],
    "packing_strategy": ["wrapped", "bfd"],
    "compute_dtype": ["bf16", "fp32"],
    "autocast": [True, False],
    "tasks": [[], ["a"]],
    "limit": [None, 3],
    "preset": ["low-memory", "balanced"],
    "sft_config": [{}, {"neftune_noise_alpha": 5}],
}


@st.composite
def matrices(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True, max_size=5))
    split = draw(st.integers(0, len(names)))
    subset = {
        name: draw(st.lists(st.sampled_from(VALUES[name]), min_size=1, unique_by=json.dumps))
        for name in names
    }
    plain: dict[str, Any] = {name: subset[name][0] for name in names[:split]}
    plain["axes"] = {name: subset[name] for name in names[split:]}
    extra = draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True, min_size=1, max_size=2))
    if draw(st.booleans()):
        plain["include"] = [{name: draw(st.sampled_from(VALUES[name])) for name in extra}]
    return plain


def expanded_json(plain: dict[str, Any]) -> Expansion:
    with tempfile.TemporaryDirectory() as directory:
        return expanded(Path(directory), json.dumps(plain))  # JSON is YAML


def shuffled(draw: st.DrawFn, value: Any, key: str = "") -> Any:
    """The same mappings with their keys in another order."""
    if isinstance(value, dict):
        keys = draw(st.permutations(sorted(value)))
        return {name: shuffled(draw, value[name], name) for name in keys}
    if key == "include":
        return [shuffled(draw, entry) for entry in value]
    return value


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_order_of_keys_changes_no_cell(data: st.DataObject) -> None:
    plain = data.draw(matrices())
    found = expanded_json(plain)
    again = expanded_json(shuffled(data.draw, plain))
    assert {cell.cell_id for cell in found.cells} == {cell.cell_id for cell in again.cells}
    assert found.combinations == again.combinations


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_cells_are_distinct_collapsed_and_valid(plain: dict[str, Any]) -> None:
    found = expanded_json(plain)
    ids = [cell.cell_id for cell in found.cells]
    assert len(set(ids)) == len(ids) <= found.combinations
    for cell in found.cells:
        assert Cell.model_validate_json(cell.model_dump_json()) == cell
        assert (cell.adapter is not None) == (cell.method in ("lora", "qlora"))
        assert (cell.quantization is not None) == (cell.method == "qlora")
        assert (cell.train is not None) == (cell.data is not None) == (cell.method != "base")
        if cell.adapter is not None:
            assert cell.adapter.alpha is not None


@settings(max_examples=30, deadline=None)
@given(matrices())
def test_expansion_is_pure(plain: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.yaml"
        path.write_text(json.dumps(plain))
        matrix = load(path)
    # The file is gone: expansion reads nothing.
    before = copy.deepcopy(matrix)
    first, second = expand(matrix), expand(matrix)
    assert first == second
    assert matrix == before


TEN_THOUSAND = "axes: {{rank: [{numbers}], seed: [{numbers}]}}\n".format(
    numbers=",".join(str(number) for number in range(1, 101))
)


def test_each_distinct_section_is_built_once(tmp_path: Path) -> None:
    found = expanded(tmp_path, TEN_THOUSAND)
    assert len(found.cells) == 10_000
    assert len({id(cell.train) for cell in found.cells}) == 1
    assert len({id(cell.evaluate) for cell in found.cells}) == 1
    assert len({id(cell.adapter) for cell in found.cells}) == 100


def test_ten_thousand_combinations(tmp_path: Path, benchmark: Any) -> None:
    """Reads, validates, expands and hashes 10,000 distinct cells; the target is 2 seconds."""
    found = benchmark.pedantic(expanded, args=(tmp_path, TEN_THOUSAND), rounds=3)
    assert (found.combinations, len(found.cells)) == (10_000, 10_000)


@pytest.mark.parametrize(
    ("written", "columns", "expected"),
    [
        ("", "prompt,completion,text", "auto"),
        # Named under its default name, which a cell cannot show.
        ("data.text_column: text", "prompt,completion,text", "text"),
        ("prompt_column: prompt", "prompt,completion,text,messages", "prompt-completion"),
        # Where it would be read anyway, the cell stays the one it was.
        ("data.text_column: text", "text,id", "auto"),
        ("messages_column: messages", "prompt,completion,messages", "auto"),
        # A column that differs from its default is named by the cell itself.
        ("data.text_column: body", "prompt,completion,body", "auto"),
        ("data.text_column: text", "prompt,completion", "auto"),
        ("{data.text_column: text, format: chat}", "prompt,completion,text,messages", "chat"),
        ("{data.text_column: text, prompt_column: prompt}", "prompt,completion,text", "auto"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_column_named_by_its_default_is_named(
    written: str, columns: str, expected: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"rows.{suffix}"
    rows = pd.DataFrame({name: ["a"] for name in columns.split(",")})
    if suffix == "csv":
        rows.to_csv(path, index=False)
    elif suffix == "jsonl":
        rows.to_json(path, orient="records", lines=True)
    else:
        rows.to_parquet(path, index=False)
    text = written.strip("{}").replace(", ", "\n")
    (cell,) = expanded(tmp_path, f"source: ./rows.{suffix}\n{text}\n").cells
    assert cell.data is not None
    assert cell.data.format == expected
