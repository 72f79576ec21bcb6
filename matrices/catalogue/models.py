"""Which model a name means, and the config.json it is predicted from; no torch, no network.

`architectures/` holds the public config.json values of the families people fine-tune. A config
says everything about memory and arithmetic and nothing about weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from matrices.cell import Model
from matrices.errors import UserError, nearest
from matrices.files import yaml_lines

# Models that need no hub: harness/models/packaged.py makes them.
PACKAGED_MODELS = ("smollm2-135m", "tiny-llama")
ARCHITECTURES = Path(__file__).parent / "architectures"

# One quantity under the names that config classes of transformers have for it.
SAME = (
    ("hidden_size", "n_embd", "d_model"),
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    ("num_key_value_heads", "num_kv_heads"),
    ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
    ("num_local_experts", "num_experts"),
)

# Without these the config class would silently take the values of some other model.
_CORE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_GATED = (*_CORE, "intermediate_size")
_GROUPED = (*_GATED, "num_key_value_heads")
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "falcon": _CORE,
    "gemma": _GROUPED,
    "gemma2": _GROUPED,
    "gemma3_text": _GROUPED,
    "gpt2": (*_CORE, "max_position_embeddings"),
    "gpt_bigcode": (*_CORE, "max_position_embeddings"),
    "gpt_neox": _GATED,
    # A llama config without num_key_value_heads has as many as attention heads: no guess.
    "granite": _GATED,
    "llama": _GATED,
    "mistral": _GROUPED,
    "mixtral": (*_GROUPED, "num_local_experts", "num_experts_per_tok"),
    "opt": (*_CORE, "intermediate_size", "max_position_embeddings"),
    "phi": _GATED,
    "phi3": _GATED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "qwen3_moe": (
        *_GROUPED,
        "num_local_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
    ),
    "starcoder2": _GROUPED,
}


@dataclass(frozen=True)
class Architecture:
    """A shipped config.json. `parameters` is the published total of the release, tied weights
    counted once; `packaged` says that the name can be run without a network."""

    name: str
    parameters: int
    source: str
    hub_ids: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    packaged: bool = False
    note: str = ""

    @property
    def path(self) -> Path:
        return ARCHITECTURES / f"{self.name}.json"


@cache
def architectures() -> dict[str, Architecture]:
    """Every shipped architecture under its name, in the order of the index."""
    index = yaml_lines.plain(yaml_lines.read(ARCHITECTURES / "index.yaml"))
    found = {}
    for name, entry in index.items():
        for listed in ("hub_ids", "aliases"):
            entry[listed] = tuple(entry.get(listed, ()))
        found[name] = Architecture(name=name, **entry)
    return found


def architecture_names() -> list[str]:
    """The names `model:` takes for a shipped architecture."""
    return list(architectures())


def architecture(name_or_hub_id: str) -> Architecture | None:
    """The shipped architecture of this name, alias or hub id, in any case; None for another."""
    return _by_any_name().get(name_or_hub_id.lower())


@cache
def _by_any_name() -> dict[str, Architecture]:
    return {
        name.lower(): found
        for found in architectures().values()
        for name in (*found.hub_ids, *found.aliases, found.name)
    }


def architecture_path(name_or_hub_id: str) -> Path | None:
    """The config.json of a shipped architecture, by name, alias or hub id in any case."""
    found = architecture(name_or_hub_id)
    return found.path if found else None


def config_of(model: Model) -> Path | None:
    """The local config.json a model is predicted from: the one given, a local directory's, or a
    shipped one; None where only the hub can say. A revision other than main is never shipped."""
    if model.config is not None:
        return Path(model.config)
    local = Path(model.name).expanduser() / "config.json"
    if model.fingerprint is not None or local.is_file():
        return local
    if model.revision not in (None, "main"):
        return None
    return architecture_path(model.name)


def config_name(path: Path) -> str:
    """What a config.json given without a name is called: its file's name, or its directory's
    where that says nothing (`tiny/config.json` is tiny)."""
    stem = path.stem
    return path.parent.name or stem if stem == "config" else stem


def read_config(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A config.json with `overrides` in place. Raises UserError naming the file and the key when
    it cannot be read, is no JSON object, has no model_type, lacks a value its model type cannot
    do without, or when an override would have no effect."""
    config = plain_config(path)
    changes = dict(overrides or {})
    for key in changes:
        _refuse_idle(key, config, path)
    merged = config | changes
    for key in REQUIRED.get(merged["model_type"], ()):
        if key_of(merged, key) is None:
            raise UserError(
                f"is missing, and a {merged['model_type']} model without it would silently be "
                "another; add it to the file or to config_overrides",
                key=key,
                where=str(path),
            )
    return merged


def plain_config(path: Path) -> dict[str, Any]:
    """A config.json as it is written. Raises UserError naming the file when it cannot be read, is
    no JSON object or has no model_type."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"not JSON: {problem}", where=str(path)) from error
    if not isinstance(config, dict):
        raise UserError("not a config.json, which is a JSON object, {...}", where=str(path))
    if not isinstance(config.get("model_type"), str):
        raise UserError(
            'is missing; a config.json names its architecture, e.g. "model_type": "llama"',
            key="model_type",
            where=str(path),
        )
    return config


def _refuse_idle(key: str, config: Mapping[str, Any], path: Path) -> None:
    """An override under a name that this config does not use."""
    if key in config:
        return
    group = next((names for names in SAME if key in names), ())
    other = next((name for name in group if name in config), None)
    if other is None:
        known = {*config, *(REQUIRED.get(str(config.get("model_type")), ()))}
        if key in known or any(key in shipped for shipped in _shipped_keys()):
            return
        other = next(iter(get_close_matches(key, known, n=1, cutoff=0.8)), None)
    if other is not None:
        raise UserError(
            f"{path} has no {key!r} and calls it {other!r}; write {other}",
            key="model.config_overrides",
        )


@cache
def _shipped_keys() -> tuple[frozenset[str], ...]:
    configs = (json.loads(found.path.read_text()) for found in architectures().values())
    return tuple({frozenset(config) for config in configs})


def key_of(config: Mapping[str, Any], key: str) -> str | None:
    """Whichever of its names a value has in this config; None where it has none."""
    names: Iterable[str] = next((group for group in SAME if key in group), (key,))
    return next((name for name in names if config.get(name) is not None), None)


def positions_key(config: Mapping[str, Any]) -> str | None:
    """The key of the longest sequence the model has positions for; None where nothing limits it
    (ALiBi) or the config does not say."""
    if config.get("alibi") or config.get("position_embedding_type") == "alibi":
        return None
    key = key_of(config, "max_position_embeddings")
    return key if key and isinstance(config[key], int) else None


def near_architectures(name: str) -> str:
    """`; did you mean ...?` for a name that is close to a shipped architecture's, else empty."""
    return nearest(name.lower(), _by_any_name())
