"""What PEFT would pass over in silence is refused by name; what it runs is not refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness.preflight import adapter_check
from harness.verify import behaviour
from matrices.cell import Adapter, Model, Quantization
from matrices.errors import UserError

SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Qwen2 has biases on query, key and value; Mixtral holds its experts in fused parameters.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "tied": ("llama", SIZES | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", SIZES),
    "neox": ("gpt_neox", SIZES),
    "mixtral": ("mixtral", SIZES | {"num_local_experts": 4}),
}


@functools.cache
def skeleton(name: str) -> Any:
    kind, settings = MODELS[name]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))


def check(name: str, arguments: dict[str, Any], in_4bit: bool = False, **adapter: Any) -> None:
    wanted = Adapter(lora_config=arguments, **adapter)
    adapter_check.check(wanted, skeleton(name), Quantization() if in_4bit else None)
    adapter_check.try_attach(wanted, skeleton(name), in_4bit)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"modules_to_save": ["lm_haed"]}, "'lm_haed' matches no module.*'lm_head'"),
    ("llama", {"modules_to_save": "lm_head"}, "is not a list of str"),
    ("llama", {"rank_pattern": {"q_porj": 8}}, "'q_porj' matches no adapted module.*'q_proj'"),
    ("llama", {"rank_pattern": {"q_proj": 0}}, "ranks of at least 1"),
    ("llama", {"alpha_pattern": {"up_proj": 8}}, "'up_proj' matches no adapted module"),
    ("llama", {"exclude_modules": ["k_prjo"]}, "'k_prjo' matches no module that would be adapted"),
    ("llama", {"exclude_modules": ["up_proj"]}, "'up_proj' matches no module that would"),
    ("llama", {"layers_to_transform": [0, 2]}, "layer 2 is adapted; .* 0 to 1"),
    ("llama", {"layers_to_transform": [0], "layers_pattern": "blocks"}, "layer 0 is adapted"),
    ("llama", {"trainable_token_indices": [5, 259]}, "token 259 .* rows 0 to 258"),
    ("llama", {"trainable_token_indices": {"wte": [5]}}, "'wte' matches no embedding"),
    ("tied", {"trainable_token_indices": [5]}, "head is tied"),
    ("llama", {"bias": "all"}, "no effect: no module here has a bias"),
    ("llama", {"bias": "some"}, "one of none, all, lora_only"),
    ("llama", {"init_lora_weights": "foo"}, "foo. is not true or false or one of"),
    ("llama", {"lora_bias": True, "use_dora": True}, "PEFT refuses it: .*lora_bias"),
    ("llama", {"target_parameters": ["q_proj.weight"]}, "PEFT refuses it: .*q_proj"),
    (
        "mixtral",
        {"target_parameters": ["experts.gate_up"]},
        "no parameter; there are .*gate_up_proj",
    ),
]
ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("llama", {"rank_pattern": {"q_proj": 8, r".*\.1\..*v_proj": 2}}),
    ("llama", {"exclude_modules": ".*k_proj"}),
    ("llama", {"layers_to_transform": 1}),
    ("llama", {"trainable_token_indices": {"embed_tokens": [0, 258]}}),
    ("qwen2", {"bias": "lora_only"}),
    ("mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ("llama", {"use_dora": True, "use_rslora": True}),
    *(
        ("llama", {"init_lora_weights": init})
        for init in (True, False, "gaussian", "orthogonal", "olora", "pissa", "mica")
    ),
]


@pytest.mark.parametrize("init", ["foo", "pissa_niter_x"])
def test_what_peft_alone_refuses_is_said_in_its_words(init: str) -> None:
    with pytest.raises(UserError, match=f"PEFT refuses it: .*{init[-1]}"):
        adapter_check.try_attach(
            Adapter(lora_config={"init_lora_weights": init}), skeleton("llama")
        )


@pytest.mark.parametrize(("name", "arguments", "about"), REFUSED)
def test_an_argument_without_effect(name: str, arguments: dict[str, Any], about: str) -> None:
    with pytest.raises(UserError, match=about) as caught:
        check(name, arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "arguments"), ACCEPTED)
def test_an_argument_that_works(name: str, arguments: dict[str, Any]) -> None:
    check(name, arguments)


def test_in_4bit_what_has_no_gradient_is_refused() -> None:
    check("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}, in_4bit=True)
    check("llama", {"init_lora_weights": "olora"}, in_4bit=True)
    check("mixtral", {"target_parameters": ["experts.down_proj"]}, in_4bit=True)
    for arguments, about in (
        ({"modules_to_save": ["mlp"]}, r"holds layers in 4 bit .*mlp\.gate_proj"),
        ({"target_parameters": ["up_proj.weight"]}, "is in 4 bit"),
        ({"init_lora_weights": "pissa"}, "PEFT refuses it: .*PiSSA"),
        ({"init_lora_weights": "orthogonal"}, "PEFT refuses it: .*orthogonal"),
    ):
        check("llama", arguments)
        with pytest.raises(UserError, match=about):
            check("llama", arguments, in_4bit=True)


def test_biases_of_norms_in_4bit_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-NeoX's norms have biases, Qwen2's have not."""
    check("qwen2", {"bias": "all"}, in_4bit=True)
    check("neox", {"bias": "all"})
    check("neox", {"bias": "lora_only"}, in_4bit=True)
    with pytest.raises(UserError, match=r"bias of gpt_neox\.layers\.0\.input_layernorm in bf16"):
        check("neox", {"bias": "all"}, in_4bit=True)
    monkeypatch.setattr(adapter_check.device, "has_cuda", lambda: True)
    check("neox", {"bias": "all"}, in_4bit=True)


def test_embeddings_are_adapted_when_they_are_named() -> None:
    check("llama", {"use_rslora": True}, target_modules=("embed_tokens", "q_proj"))
    with pytest.raises(UserError, match=r"'embed_token' matches no layer.*'embed_tokens'"):
        check("llama", {"use_rslora": True}, target_modules=("embed_token",))
    with pytest.raises(UserError, match="tied head"):
        check("tied", {"ensure_weight_tying": True}, target_modules=("embed_tokens",))


def test_an_encoder_is_told_without_weights() -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    with torch.device("meta"):
        encoder, decoder = (
            AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **sizes, is_decoder=each))
            for each in (False, True)
        )
    with pytest.raises(UserError, match="'mine' is an encoder"):
        behaviour.refuse_encoder(encoder, Model(name="mine"))
    behaviour.refuse_encoder(decoder, Model(name="mine"))
    behaviour.refuse_encoder(skeleton("mixtral"), Model(name="mine"))
