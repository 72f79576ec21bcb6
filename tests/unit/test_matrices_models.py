"""Shipped architectures by closed forms, names and hub ids; what is wrong with a config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from matrices.catalogue.models import (
    ARCHITECTURES,
    REQUIRED,
    architecture,
    architecture_names,
    architecture_path,
    architectures,
    config_name,
    config_of,
    key_of,
    near_architectures,
    positions_key,
    read_config,
)
from matrices.cell import Model
from matrices.errors import UserError

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def write(path: Path, config: Any) -> Path:
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_every_file_is_in_the_index_and_every_entry_has_a_file() -> None:
    files = {path.stem for path in ARCHITECTURES.glob("*.json")}
    assert files == set(architecture_names())
    for found in architectures().values():
        assert read_config(found.path)["model_type"] in {*REQUIRED}
        assert found.source


def test_no_name_stands_for_two_architectures() -> None:
    names = [
        name.lower()
        for found in architectures().values()
        for name in {found.name, *found.aliases, *found.hub_ids}
    ]
    assert len(names) == len(set(names))


def gated_decoder(config: dict[str, Any], bias: bool = False) -> int:
    """Parameters of a llama-like decoder, by hand: grouped attention, gated MLP, RMSNorm."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    queries, keys = heads * width, config["num_key_value_heads"] * width
    attention = hidden * queries * 2 + hidden * keys * 2 + (queries + 2 * keys if bias else 0)
    layer = attention + 3 * hidden * config["intermediate_size"] + 2 * hidden
    embeddings = hidden * vocabulary * (1 if config["tie_word_embeddings"] else 2)
    return int(embeddings + config["num_hidden_layers"] * layer + hidden)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, found in architectures().items()
        if json.loads(found.path.read_text())["model_type"] in ("llama", "mistral", "qwen2")
        and "code" not in name.split("-")
    ],
)
def test_the_published_total_follows_from_the_config(name: str) -> None:
    config = read_config(ARCHITECTURES / f"{name}.json")
    biased = config["model_type"] == "qwen2"
    assert gated_decoder(config, biased) == architectures()[name].parameters


def test_a_santacoder_by_hand() -> None:
    """Multi-query attention with biases, learned positions, tied head; the 1.1B of its paper."""
    config = read_config(ARCHITECTURES / "santacoder.json")
    n, layers, inner = config["n_embd"], config["n_layer"], config["n_inner"]
    one_head = n // config["n_head"]
    attention = n * (n + 2 * one_head) + (n + 2 * one_head) + n * n + n
    layer = attention + n * inner + inner + inner * n + n + 4 * n
    total = (config["vocab_size"] + config["n_positions"]) * n + layers * layer + 2 * n
    assert total == architectures()["santacoder"].parameters == 1_124_886_528


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("META-LLAMA/llama-2-7b-HF", "llama-2-7b"),
        ("mistral-7b", "mistral-7b-v0.1"),
        ("gpt2", "gpt2"),
        ("bigcode/gpt_bigcode-santacoder", "santacoder"),
        ("tiny-llama", None),
        ("llama-9", None),
        ("", None),
    ],
)
def test_names_and_hub_ids_in_any_case(asked: str, name: str | None) -> None:
    found = architecture(asked)
    assert (found.name if found else None) == name
    assert architecture_path(asked) == (ARCHITECTURES / f"{name}.json" if name else None)


def test_a_misspelt_name_has_a_hint() -> None:
    assert "'llama-3.1-8b'" in near_architectures("lama-3.1-8b")
    assert near_architectures("zzzz") == ""


def test_where_the_config_comes_from(tmp_path: Path) -> None:
    local = tmp_path / "gpt2"
    local.mkdir()
    write(local / "config.json", TINY)
    given = str(write(tmp_path / "own.json", TINY))
    assert config_of(Model(name="llama-2-7b", config=given)) == Path(given)
    assert config_of(Model(name=str(local))) == local / "config.json"
    assert config_of(Model(name=str(local), fingerprint="f")) == local / "config.json"
    assert config_of(Model(name="gpt2")) == ARCHITECTURES / "gpt2.json"
    assert config_of(Model(name="gpt2", revision="main")) == ARCHITECTURES / "gpt2.json"
    assert config_of(Model(name="gpt2", revision="v2")) is None
    assert config_of(Model(name="someone/something")) is None


def test_a_config_is_called_after_its_file_or_directory() -> None:
    assert config_name(Path("/a/tiny/config.json")) == "tiny"
    assert config_name(Path("/a/tiny-llama.json")) == "tiny-llama"
    assert config_name(Path("/config.json")) == "config"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json: not JSON"),
        ("[" * 100_000, "config.json: not JSON"),
        ("[1]", "config.json: not a config.json"),
        ({"hidden_size": 4}, "config.json: model_type: is missing"),
        ({"model_type": 3}, "config.json: model_type: is missing"),
    ],
)
def test_what_is_no_config(tmp_path: Path, text: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_config(write(tmp_path / "config.json", text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read: No such file"):
        read_config(tmp_path / "nowhere.json")


@pytest.mark.parametrize("key", [key for key in TINY if key in REQUIRED["llama"]])
def test_a_missing_value_names_file_and_key(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "config.json", {k: v for k, v in TINY.items() if k != key})
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: {key}: is missing")
    assert read_config(path, {key: 8})[key] == 8


def test_an_unknown_model_type_is_left_to_transformers(tmp_path: Path) -> None:
    path = write(tmp_path / "config.json", {"model_type": "brand_new"})
    assert read_config(path) == {"model_type": "brand_new"}


def test_overrides_replace(tmp_path: Path) -> None:
    path = write(tmp_path / "config.json", TINY)
    changed = read_config(path, {"vocab_size": 101, "rope_theta": 5.0, "of_my_own_class": 1})
    assert changed == TINY | {"vocab_size": 101, "rope_theta": 5.0, "of_my_own_class": 1}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("vocab_sice", "vocab_size"),
        ("n_layer", "num_hidden_layers"),
        ("n_positions", "max_position_embeddings"),
        ("num_hidden_layer", "num_hidden_layers"),
    ],
)
def test_an_override_without_effect_is_told_the_right_name(
    tmp_path: Path, wrong: str, right: str
) -> None:
    path = write(tmp_path / "config.json", TINY)
    with pytest.raises(UserError, match=f"has no '{wrong}' and calls it '{right}'") as caught:
        read_config(path, {wrong: 8})
    assert caught.value.key == "model.config_overrides"


def test_one_quantity_under_its_names() -> None:
    gpt2 = read_config(ARCHITECTURES / "gpt2.json")
    assert key_of(gpt2, "hidden_size") == "n_embd"
    assert positions_key(gpt2) == "n_positions"
    assert positions_key(TINY) == "max_position_embeddings"
    assert positions_key(TINY | {"alibi": True}) is None
    assert positions_key({"model_type": "llama"}) is None
