"""Every verification on a really loaded model: passes when it is what the cell says, and fails
when one thing about it is not."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.models import model as model_module
from harness.models.mismatch import VerificationError
from harness.verify.verify import verify_again, verify_model
from matrices.cell import Adapter, Cell, Data, Model, Quantization, Train

TINY = Model(name="tiny-llama")
PARTS: dict[str, Any] = {"model": TINY, "data": Data(), "train": Train()}
FULL = Cell(method="full", **PARTS)
LORA = Cell(method="lora", adapter=Adapter(rank=4, dropout=0.25), **PARTS)
QLORA = Cell(method="qlora", adapter=Adapter(rank=4), quantization=Quantization(), **PARTS)
BASE = Cell(method="base", model=TINY)
QUANTIZED_BASE = Cell(method="base", model=TINY, quantization=Quantization())

pytestmark = pytest.mark.usefixtures("tiny_llama")


def but(cell: Cell, section: str, **changes: Any) -> Cell:
    part = getattr(cell, section).model_copy(update=changes)
    return cell.model_copy(update={section: part})


@functools.cache
def _load(cell_json: str) -> Any:
    cell = Cell.model_validate_json(cell_json)
    loaded = model_module.prepare_kbit(model_module.load_base(cell), cell)
    return model_module.add_adapter(loaded, cell)


def load(cell: Cell) -> Any:
    """The model of a cell, for looking at only."""
    return _load(cell.model_dump_json())


def load_to_change(cell: Cell) -> Any:
    return copy.deepcopy(load(cell))


def fails(loaded: Any, cell: Cell, about: str) -> None:
    with pytest.raises(VerificationError, match=about):
        verify_model(loaded, cell)


CASES = [
    FULL,
    but(FULL, "model", weight_dtype="fp32"),
    LORA,
    but(LORA, "adapter", target_modules="all-linear", alpha=3, dropout=0.0),
    but(LORA, "adapter", target_modules=("q_proj", "layers.1.mlp.up_proj")),
    QLORA,
    but(QLORA, "quantization", quant_type="fp4", double_quant=True),
    but(QLORA, "quantization", kbit_preparation=False, quant_storage="bf16"),
    but(QLORA, "model", compute_dtype="fp32"),
    but(QLORA, "train", gradient_checkpointing=True),
    but(FULL, "model", attn_implementation="eager"),
    BASE,
    QUANTIZED_BASE,
]


@pytest.mark.parametrize("cell", CASES, ids=range(len(CASES)))
def test_what_the_cell_says_passes(cell: Cell) -> None:
    found = verify_model(load(cell), cell)
    assert found.attn_implementation == cell.model.attn_implementation
    assert found.quantized_modules == (21 if cell.quantization else 0)


def test_findings_are_those_of_the_loaded_model() -> None:
    """Three layers of 7 linear ones (q, k, v, o, gate, up, down); rank 4 on q, k, v, o."""
    found = verify_model(load(QLORA), QLORA)
    assert found.quantized_modules == 21
    assert found.quant_types == ["nf4"]
    assert found.adapter_modules == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert found.adapter_module_count == 12
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 320
    # Two values a byte; embedding, head and norms in fp32 by k-bit preparation, LoRA in fp32.
    assert found.weight_dtypes == {
        "uint8": 3 * layer // 2,
        "float32": 2 * 259 * 128 + 7 * 128 + 3 * 4 * (2 * (128 + 128) + 2 * (128 + 64)),
    }
    assert verify_model(load(FULL), FULL).weight_dtypes == {
        "bfloat16": 3 * layer + 2 * 259 * 128 + 7 * 128
    }


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"quant_type": "fp4"}, "quant_type of .*: the cell says 'fp4', loaded is 'nf4'"),
        ({"double_quant": True}, "double_quant of .*: the cell says True, loaded is False"),
        ({"quant_storage": "bf16"}, "quant_storage of .*: the cell says torch.bfloat16"),
        ({"kbit_preparation": False}, "weight_dtype"),
    ],
)
def test_other_quantization(changes: dict[str, Any], about: str) -> None:
    fails(load(QLORA), but(QLORA, "quantization", **changes), about)


def test_one_layer_quantized_otherwise() -> None:
    other = load(but(QLORA, "quantization", quant_type="fp4", double_quant=True))
    loaded = load_to_change(QLORA)
    place = "base_model.model.model.layers.1.mlp"
    loaded.get_submodule(place).up_proj = other.get_submodule(place).up_proj
    fails(loaded, QLORA, r"quant_type of .*layers\.1\.mlp\.up_proj")


def test_one_layer_left_unquantized() -> None:
    loaded = load_to_change(QLORA)
    place = loaded.get_submodule("base_model.model.model.layers.1.mlp")
    place.up_proj = nn.Linear(128, 320, bias=False).requires_grad_(False)
    fails(loaded, QLORA, r"left unquantized.*layers\.1\.mlp\.up_proj")


def test_not_quantized_at_all_or_although_not_asked() -> None:
    fails(load(LORA), QLORA, "left unquantized")
    fails(load(QLORA), LORA, "4-bit layers: the cell says 0, loaded is 21")
    fails(load(BASE), QUANTIZED_BASE, "left unquantized")


def test_other_compute_dtype() -> None:
    fails(load(QLORA), but(QLORA, "model", compute_dtype="fp32"), "compute_dtype of")


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"rank": 8, "alpha": 8}, "rank: the cell says 8, loaded is 4"),
        ({"alpha": 16}, "alpha: the cell says 16, loaded is 8"),
        ({"dropout": 0.5}, "dropout: the cell says 0.5, loaded is 0.25"),
        ({"dropout": 0.0}, "dropout: the cell says 0.0, loaded is 0.25"),
        ({"target_modules": "qv"}, "adapted modules"),
        ({"target_modules": "all-linear"}, "adapted modules"),
        ({"target_modules": ("q_proj", "k_proj", "v_proj")}, "adapted modules"),
    ],
)
def test_another_adapter(changes: dict[str, Any], about: str) -> None:
    fails(load(LORA), but(LORA, "adapter", **changes), about)


def test_an_adapter_missing_on_one_module() -> None:
    loaded = load_to_change(LORA)
    attention = loaded.get_submodule("base_model.model.model.layers.2.self_attn")
    attention.k_proj = attention.k_proj.base_layer
    fails(loaded, LORA, "adapted modules")


def test_one_module_with_another_rank() -> None:
    loaded = load_to_change(LORA)
    loaded.get_submodule("base_model.model.model.layers.2.self_attn.k_proj").r["default"] = 2
    fails(loaded, LORA, r"rank of .*layers\.2\.self_attn\.k_proj: the cell says 4, loaded is 2")


def test_adapters_where_none_are_asked_and_none_where_they_are() -> None:
    fails(load(LORA), FULL, "adapted modules")
    fails(load(FULL), LORA, "no module is adapted")


def test_what_is_trainable() -> None:
    frozen = load_to_change(FULL)
    frozen.get_input_embeddings().weight.requires_grad_(False)
    fails(frozen, FULL, "frozen parameters under full fine-tuning.*embed_tokens")
    loose = load_to_change(LORA)
    loose.get_output_embeddings().weight.requires_grad_(True)
    fails(loose, LORA, "trainable parameters outside the adapter.*lm_head")
    dead = load_to_change(LORA)
    dead.requires_grad_(False)
    fails(dead, LORA, "parameters of the adapter that are frozen.*lora_A")


def arguments(cell: Cell, **given: Any) -> Cell:
    """With further arguments of LoraConfig."""
    return but(cell, "adapter", lora_config=given)


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        (arguments(LORA, rank_pattern={"q_proj": 8}), {"ranks": {"4": 9, "8": 3}}),
        (
            arguments(QLORA, alpha_pattern={r"layers\.1\.self_attn\.v_proj": 3}),
            {"scalings": {"0.75": 1, "2": 11}},
        ),
        (arguments(LORA, use_rslora=True), {"scalings": {"4": 12}}),
        (arguments(QLORA, use_dora=True), {"dora": 12}),
        (arguments(LORA, layers_to_transform=[0, 2]), {"layers": [0, 2]}),
        (arguments(LORA, exclude_modules=["k_proj", "o_proj"]), {"ranks": {"4": 6}}),
        (arguments(QLORA, modules_to_save=["lm_head"]), {"modules_to_save": ["lm_head"]}),
        (
            arguments(LORA, trainable_token_indices=[5, 6]),
            {"trained_tokens": {"model.embed_tokens": 2}},
        ),
        (arguments(LORA, init_lora_weights="mica"), {"init": "mica"}),
        (arguments(LORA, kasa_config={"beta": 0.1}), {"ranks": {"4": 12}}),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(dict(value.adapter.lora_config)),
)
def test_arguments_are_found_as_peft_resolves_them(cell: Cell, found: dict[str, Any]) -> None:
    verified = verify_model(load(cell), cell).adapter
    assert verified is not None
    assert {name: getattr(verified, name) for name in found} == found
    plain = cell.model_copy(update={"adapter": cell.adapter.model_copy(update={"lora_config": {}})})
    if not cell.adapter.lora_config.keys() & {"rank_pattern", "alpha_pattern"}:
        # The other way round: what was asked for and is not there.
        fails(load(plain), cell, "the cell says|is trained|was passed through")


def test_a_layer_that_is_not_as_its_pattern_says() -> None:
    cell = arguments(LORA, rank_pattern={"q_proj": 8}, use_rslora=True)
    loaded = load_to_change(cell)
    layer = loaded.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    layer.scaling["default"] = 1.0
    fails(loaded, cell, r"scaling of .*layers\.1\.self_attn\.q_proj")
    layer.r["default"] = 4
    fails(loaded, cell, r"rank of .*layers\.1.*: the cell says 8, loaded is 4")


def test_layers_with_biases_in_4bit_before_and_after_their_first_forward(tmp_path: Path) -> None:
    """bitsandbytes casts the bias of a 4-bit layer to its input's dtype: Qwen2, GPT-2, Pythia."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 259}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, **heads))
    made.to(torch.bfloat16).save_pretrained(tmp_path)
    cell = arguments(but(QLORA, "model", name=str(tmp_path)), bias="all")
    loaded = load_to_change(cell)
    found = verify_model(loaded, cell)
    assert found.adapter is not None
    assert found.adapter.trained_biases == 2 * 3, "query, key and value of two layers"
    attention = 2 * 64 * 64 + 2 * 64 * 32
    in_4bit = 2 * (attention + 3 * 64 * 96)
    elsewhere = 2 * 259 * 64 + 5 * 64 + 2 * (64 + 2 * 32)
    assert found.quantized_share == pytest.approx(in_4bit / (in_4bit + elsewhere))
    loaded.requires_grad_(False)
    ids = torch.arange(8)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loaded.train()(input_ids=ids)
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad_("lora_" in name or name.endswith("bias"))
    fails(loaded, cell, "weight_dtype")
    verify_again(loaded, cell)


@pytest.mark.parametrize("cell", [FULL, LORA, BASE])
def test_other_weight_dtype(cell: Cell) -> None:
    fails(load(cell), but(cell, "model", weight_dtype="fp32"), "weight_dtype")
    one = load_to_change(cell)
    one.get_output_embeddings().to(torch.float32)
    fails(one, cell, "weight_dtype")


def test_kbit_preparation_not_done() -> None:
    unprepared = but(QLORA, "quantization", kbit_preparation=False)
    fails(load(unprepared), QLORA, "weight_dtype")


def test_other_attention() -> None:
    eager = but(FULL, "model", attn_implementation="eager")
    fails(load(FULL), eager, "attn_implementation: the cell says 'eager', loaded is 'sdpa'")
    fails(load(eager), FULL, "attn_implementation")


def test_resident_bytes_of_what_is_loaded_from_disk(tiny_llama: Path) -> None:
    """Weights read from safetensors hold their own bytes, whatever the file is mapped as."""
    from harness.meters.memory.ledger import resident_bytes

    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 320
    outside = 2 * 259 * 128 + 7 * 128
    rotary = 2 * 16 * 4
    assert resident_bytes(load(FULL)) == {"weights": 2 * (3 * layer + outside) + rotary}
    found = resident_bytes(load(QLORA))
    assert found["quantized_weights"] == 3 * layer // 2
    assert found["quantization_state"] == 3 * layer // 64 * 4 + 21 * 64
    assert found["adapters"] == 3 * 4 * (2 * (128 + 128) + 2 * (128 + 64)) * 4
    assert found["weights"] == 4 * outside + rotary
