"""Model directories written by hand: a config.json and safetensors files, without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 6,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
Shapes = Mapping[str, tuple[int, ...]]
EMBEDDING: Shapes = {"model.embed_tokens.weight": (6, 4)}
NORM: Shapes = {"model.norm.weight": (4,)}


def safetensors(shapes: Shapes) -> bytes:
    """A file of float32 zeros, as the format's description has it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def write_model(directory: Path, config: Mapping[str, Any] = CONFIG, **files: object) -> Path:
    """A directory with config.json and `files`, whose names have __ for a dot: bytes, text, or
    what becomes JSON."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def write_shards(directory: Path, index: bool = True) -> Path:
    """A model in two files."""
    write_model(directory)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, shapes in zip(names, (EMBEDDING, NORM), strict=True):
        (directory / name).write_bytes(safetensors(shapes))
    placed = {
        tensor: name for name, s in zip(names, (EMBEDDING, NORM), strict=True) for tensor in s
    }
    if index:
        text = json.dumps({"metadata": {}, "weight_map": placed})
        (directory / "model.safetensors.index.json").write_text(text)
    return directory
