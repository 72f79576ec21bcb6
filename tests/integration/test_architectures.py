"""Every shipped config.json, built by the installed transformers and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from matrices.catalogue.models import architectures, key_of, positions_key

ONE_OF_EACH_TYPE = {
    json.loads(found.path.read_text())["model_type"]: name
    for name, found in reversed(architectures().items())
}


def built(path: Path) -> Any:
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ONE_OF_EACH_TYPE.values() else pytest.mark.slow)
        for name in architectures()
    ],
)
def test_the_model_has_the_published_parameters(name: str) -> None:
    found = architectures()[name]
    plain = json.loads(found.path.read_text())
    model = built(found.path)
    assert sum(parameter.numel() for parameter in model.parameters()) == found.parameters
    # transformers took the config at its word: its own class, its layers, its dtype.
    assert type(model).__name__ == plain["architectures"][0]
    key = key_of(plain, "num_hidden_layers")
    assert key is not None
    assert model.config.num_hidden_layers == plain[key]
    assert model.dtype == getattr(torch, plain.get("torch_dtype", "float32"))
    longest = positions_key(plain)
    assert longest is not None
    assert model.config.max_position_embeddings == plain[longest]


def test_old_spellings_of_rotary_positions_are_understood() -> None:
    """The files spell them as transformers 4 did; 5 must read the same from them."""

    def rope(name: str) -> Any:
        return AutoConfig.from_pretrained(architectures()[name].path).rope_parameters

    assert rope("llama-2-7b")["rope_theta"] == 10_000
    assert rope("mistral-7b-v0.3")["rope_theta"] == 1_000_000
    assert rope("llama-3.1-8b") == {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert rope("pythia-70m")["partial_rotary_factor"] == 0.25
    assert rope("phi-4-mini")["partial_rotary_factor"] == 0.75
    assert rope("phi-2")["partial_rotary_factor"] == 0.4
    gemma = rope("gemma-3-4b")
    assert gemma["sliding_attention"]["rope_theta"] == 10_000
    assert gemma["full_attention"]["rope_theta"] == 1_000_000
    assert gemma["full_attention"]["factor"] == 8.0


def test_windows_are_on_the_layers_of_the_reports() -> None:
    """Gemma 2 alternates windowed and full layers, Gemma 3 has five windowed to one full."""

    def layers(name: str) -> list[str]:
        found = AutoConfig.from_pretrained(architectures()[name].path).layer_types
        return [kind.partition("_")[0] for kind in found]

    assert layers("gemma-2-2b")[:4] == ["sliding", "full"] * 2
    assert layers("gemma-3-1b")[:7] == ["sliding"] * 5 + ["full", "sliding"]
    assert set(layers("qwen2.5-7b")) == {"full"}
