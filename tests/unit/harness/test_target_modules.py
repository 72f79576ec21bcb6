"""Named target sets on real architectures, without weights, against PEFT's own resolution."""

from __future__ import annotations

import functools
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM

from harness.models.model import (
    adaptable_modules,
    count_parameters,
    lora_config,
    shortest_endings,
    target_modules,
)
from matrices.cell import Adapter
from matrices.errors import UserError

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED = SMALL | {"intermediate_size": 32, "num_key_value_heads": 1}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": GATED,
    "Mistral": GATED,
    "Qwen2": GATED,
    "Gemma": GATED | {"head_dim": 8},
    "Phi3": GATED,
    "Mixtral": GATED | {"num_local_experts": 2},
    # As OPT-350m: embeddings narrower than the model, projected in and out.
    "OPT": SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 8},
    "GPT2": {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "GPTNeoX": SMALL | {"intermediate_size": 32},
    "Falcon": SMALL,
}
# What a practitioner names by hand, from each model's own code: (qv, attention, mlp).
SPLIT = (
    {"q_proj", "v_proj"},
    {"q_proj", "k_proj", "v_proj", "o_proj"},
    {"gate_proj", "up_proj", "down_proj"},
)
NEOX = (
    {"query_key_value"},
    {"query_key_value", "dense"},
    {"dense_h_to_4h", "dense_4h_to_h"},
)
EXPECTED: dict[str, tuple[set[str], set[str], set[str]]] = {
    "Llama": SPLIT,
    "Mistral": SPLIT,
    "Qwen2": SPLIT,
    "Gemma": SPLIT,
    "Phi3": ({"qkv_proj"}, {"qkv_proj", "o_proj"}, {"gate_up_proj", "down_proj"}),
    "OPT": (
        {"q_proj", "v_proj"},
        {"q_proj", "k_proj", "v_proj", "out_proj"},
        {"fc1", "fc2"},
    ),
    # Both halves of a GPT-2 block call their output c_proj.
    "GPT2": ({"c_attn"}, {"c_attn", "attn.c_proj"}, {"c_fc", "mlp.c_proj"}),
    "GPTNeoX": NEOX,
    "Falcon": NEOX,
}


@functools.cache
def config_of(architecture: str) -> Any:
    return getattr(transformers, f"{architecture}Config")(**CONFIGS[architecture], **TOKENS)


def skeleton(architecture: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(architecture))


def adapted(model: Any, wanted: Any) -> set[str]:
    """Full names of the modules PEFT puts an adapter on."""
    with torch.device("meta"):
        config = peft.LoraConfig(r=2, target_modules=wanted, task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(model, config)
    return {
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize("architecture", sorted(EXPECTED))
def test_all_linear_is_what_peft_calls_so(architecture: str) -> None:
    ours = target_modules("all-linear", skeleton(architecture))
    assert adapted(skeleton(architecture), ours) == adapted(skeleton(architecture), "all-linear")


@pytest.mark.parametrize("architecture", sorted(EXPECTED))
def test_named_sets_are_what_a_practitioner_names(architecture: str) -> None:
    model = skeleton(architecture)
    found = tuple(set(target_modules(name, model)) for name in ("qv", "attention", "mlp"))
    assert found == EXPECTED[architecture]


@pytest.mark.parametrize("architecture", sorted(EXPECTED))
def test_attention_and_mlp_part_the_layers(architecture: str) -> None:
    """PEFT adapts every linear layer of every block by exactly one of the two sets."""
    sets = [
        adapted(skeleton(architecture), target_modules(name, skeleton(architecture)))
        for name in ("attention", "mlp")
    ]
    inside = {n for n in adaptable_modules(skeleton(architecture)) if "project_" not in n}
    assert sets[0] | sets[1] == inside
    assert sets[0].isdisjoint(sets[1])


def test_fused_experts_are_refused_rather_than_left_out() -> None:
    """PEFT's own all-linear adapts Mixtral's experts as parameters; layer names cannot."""
    for name in ("mlp", "all-linear"):
        with pytest.raises(UserError, match=r"mlp\.experts.*'attention'") as caught:
            target_modules(name, skeleton("Mixtral"))
        assert caught.value.key == "adapter.target_modules"
    assert set(target_modules("attention", skeleton("Mixtral"))) == SPLIT[1]
    assert set(target_modules("qv", skeleton("Mixtral"))) == SPLIT[0]


def test_an_explicit_list_stays_as_it_is() -> None:
    model = skeleton("Llama")
    assert target_modules(["o_proj", "q_proj"], model) == ["o_proj", "q_proj"]
    assert target_modules(["layers.1.mlp.up_proj"], model) == ["layers.1.mlp.up_proj"]
    assert target_modules("v_proj", model) == ["v_proj"]


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(UserError) as caught:
        target_modules(["q_proj", "out_prj"], skeleton("OPT"))
    message = caught.value.message
    assert message.startswith("'out_prj' matches no layer LoRA can be put on; this model has ")
    assert "embed_tokens, fc1, fc2, k_proj" in message
    assert "did you mean 'out_proj'" in message
    # A part of a name is not a name: PEFT would not match it either.
    with pytest.raises(UserError, match="matches no layer"):
        target_modules(["proj"], skeleton("Llama"))
    with pytest.raises(UserError, match="lm_head"):
        target_modules(["lm_head"], skeleton("Llama"))


def test_a_set_that_matches_nothing_is_told_what_there_is() -> None:
    class NoAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])

        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(UserError, match="'qv' matches no linear layer of this model, which has 0"):
        target_modules("qv", NoAttention())


def test_shortest_endings_select_exactly_the_chosen() -> None:
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc", "h.1.attn.c_proj"]
    assert shortest_endings(["h.0.mlp.c_fc"], names) == ["c_fc"]
    assert shortest_endings(["h.0.attn.c_proj", "h.1.attn.c_proj"], names) == ["attn.c_proj"]
    assert shortest_endings(["h.1.attn.c_proj"], names) == ["1.attn.c_proj"]
    assert shortest_endings(names, names) == ["c_fc", "c_proj"]
    # Not an ending of whole parts.
    assert shortest_endings(["a.up"], ["a.up", "a.gate_up"]) == ["up"]


def test_lora_config_says_what_the_cell_says() -> None:
    adapter = Adapter(rank=8, dropout=0.25, target_modules="qv", lora_config={"use_rslora": True})
    found = lora_config(adapter, skeleton("Llama"))
    assert (found.r, found.lora_alpha, found.lora_dropout, found.use_rslora) == (8, 16, 0.25, True)
    assert found.target_modules == {"q_proj", "v_proj"}
    assert lora_config(Adapter(rank=8, alpha=5), skeleton("Llama")).lora_alpha == 5


def test_parameters_are_counted_as_what_they_stand_for() -> None:
    """A Llama by hand: embedding and head 64 x 16 each; per layer q, o 16 x 16, k, v 16 x 8, three
    of 16 x 32, two norms of 16; a last norm. LoRA of rank 2 on q and v of each layer:
    2 x (16 + 16) + 2 x (16 + 8)."""
    model = skeleton("Llama")
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 2 * 16
    total = 2 * 64 * 16 + 2 * layer + 16
    assert count_parameters(model) == (total, total)
    with torch.device("meta"):
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        )
    lora = 2 * (2 * (16 + 16) + 2 * (16 + 8))
    assert count_parameters(wrapped) == (lora, total + lora)


def test_4bit_weights_count_as_the_weights_they_stand_for() -> None:
    layer = bnb.nn.Linear4bit(30, 7, bias=True).to("cpu").requires_grad_(False)
    layer.bias.requires_grad_(True)
    assert layer.weight.numel() == 105
    assert count_parameters(layer) == (7, 217)


def test_tied_weights_count_once() -> None:
    tied, head = nn.Embedding(30, 4), nn.Linear(4, 30, bias=False)
    head.weight = tied.weight
    assert count_parameters(nn.Sequential(tied, head)) == (120, 120)
