"""Tiny models of several architectures, each in a directory with a byte-level tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

_LLAMA = {"num_key_value_heads": 2, "intermediate_size": 128}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
# transformers' model_type -> what its config needs beside the sizes that all of them share.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 128},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi": _LLAMA,
    "gemma": _LLAMA | {"head_dim": 16},
    "falcon": {},
    "starcoder2": _LLAMA,
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _LLAMA | _EXPERTS | {"num_experts": 4, "head_dim": 16},
}
# transformers holds all experts of a layer in one parameter: no linear layers to adapt.
FUSED = ("mixtral", "qwen3_moe")


def make_family(name: str, directory: Path, tokenizer: Path) -> None:
    """A model with seeded random weights in bf16, and a copy of the tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        name,
        vocab_size=259,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **FAMILIES[name],
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(directory)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, directory)
    for file in tokenizer.glob("chat_template*"):
        shutil.copy(file, directory)
