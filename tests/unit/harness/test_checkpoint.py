"""Model directories as users have them: each wrong one is one line that says what it is."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from model_directories import (
    CONFIG,
    EMBEDDING,
    NORM,
    safetensors,
    write_model,
    write_shards,
)
from safetensors.numpy import save_file

from harness.models import checkpoint
from harness.models.safetensors_header import read_header
from matrices.cell import Cell, Model, Quantization
from matrices.errors import UserError

WHOLE = safetensors({**EMBEDDING, **NORM})
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
BNB = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
}


def said(directory: Path, **cell: Any) -> str:
    """What is said of a directory; empty when nothing is."""
    model = Model(name=str(directory), compute_dtype=cell.pop("compute_dtype", "bf16"))
    try:
        checkpoint.check(Cell(model=model, **{"method": "lora", **cell}))
    except UserError as error:
        found = str(error)
    else:
        return ""
    assert found.startswith(f"model.name: {directory}")
    assert "\n" not in found
    return found


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"model__safetensors": b""}, "model.safetensors is empty"),
        (
            {"model__safetensors": WHOLE[:-1]},
            f"it has {len(WHOLE) - 1} bytes and needs {len(WHOLE)}",
        ),
        ({"model__safetensors": WHOLE[:40]}, "model.safetensors is truncated"),
        ({"model__safetensors": b"abc"}, "model.safetensors is truncated: 3 bytes"),
        ({"model__safetensors": WHOLE + b"xy"}, "holds 2 bytes after its last tensor"),
        ({"model__safetensors": "<!DOCTYPE html>" * 9}, "is not a safetensors file"),
        (
            {"model__safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
            "is a Git LFS pointer and not the weights; run 'git lfs pull'",
        ),
        ({"model__safetensors": WHOLE.replace(b"[6, 4]", b"[5, 4]")}, "has 96 bytes and needs 80"),
        ({}, "holds no weights"),
        ({"llama__gguf": b"GGUF"}, "; llama.gguf is not what transformers reads"),
        ({"pytorch_model__bin": b""}, "pytorch_model.bin is empty"),
        ({"pytorch_model__bin": b"PK\3\4 cut off"}, "pytorch_model.bin is truncated"),
        ({"pytorch_model__bin": "<html>"}, "is not a file of torch.save"),
        (
            {"model__safetensors": WHOLE, "adapter_config__json": ADAPTER},
            "holds a whole model and, in adapter_config.json, an adapter",
        ),
        ({"adapter_config__json": ADAPTER}, "is a LORA adapter of org/base, not a model"),
        (
            {"model__safetensors": safetensors({"model.embed_tokens.weight": (7, 4)})},
            "model.embed_tokens.weight is 7 x 4, and config.json says vocab_size 6 x hidden_size 4",
        ),
    ],
)
def test_a_directory_that_is_no_model(tmp_path: Path, files: dict[str, Any], problem: str) -> None:
    assert problem in said(write_model(tmp_path / "model", **files))


@pytest.mark.parametrize(
    ("config", "cell", "problem"),
    [
        ({}, {}, ""),
        ({"quantization_config": BNB}, {}, "is a 4-bit bitsandbytes checkpoint"),
        ({"quantization_config": BNB}, {"method": "full"}, "which method full does not start from"),
        ({"quantization_config": BNB}, {"method": "base"}, "is a 4-bit bitsandbytes checkpoint"),
        ({"quantization_config": BNB}, {"quantization": Quantization()}, ""),
        (
            {"quantization_config": BNB},
            {"quantization": Quantization(quant_type="fp4")},
            "with bnb_4bit_quant_type 'nf4', and the cell has quant_type 'fp4'",
        ),
        (
            {"quantization_config": BNB},
            {"quantization": Quantization(), "compute_dtype": "fp32"},
            "with bnb_4bit_compute_dtype 'bfloat16', and the cell has compute_dtype 'float32'",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            {"quantization": Quantization()},
            "is a 4-bit gptq checkpoint",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, "is a fp8 checkpoint"),
        ({"architectures": ["BertForMaskedLM"]}, {}, "is an encoder (BertForMaskedLM"),
        ({"architectures": ["BertForMaskedLM"], "is_decoder": True}, {}, ""),
        ({"architectures": None}, {}, ""),
        # What other families call it, and what is wider than the layers.
        ({"model_type": "gpt2", "n_embd": 9, "hidden_size": None}, {}, "n_embd 9"),
        ({"model_type": "opt", "hidden_size": 9, "word_embed_proj_dim": 4}, {}, ""),
        ({"model_type": "electra", "hidden_size": 9}, {}, ""),
        ({"text_config": {**CONFIG, "vocab_size": 5}}, {}, "vocab_size 5"),
    ],
)
def test_a_config_that_says_what_the_weights_are(
    tmp_path: Path, config: dict[str, Any], cell: dict[str, Any], problem: str
) -> None:
    made = write_model(tmp_path / "model", CONFIG | config, model__safetensors=WHOLE)
    found = said(made, **cell)
    assert problem in found
    assert bool(problem) == bool(found)


def test_shards(tmp_path: Path) -> None:
    whole = write_shards(tmp_path / "whole")
    assert said(whole) == ""
    found = checkpoint.read(whole)
    assert found.tensors is not None
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == EMBEDDING | NORM

    assert "has no model.safetensors.index.json" in said(write_shards(tmp_path / "bare", False))
    second = "model-00002-of-00002.safetensors"
    (whole / second).unlink()
    assert f"lacks 1 of the 2 files that {checkpoint.INDEX} names, {second} first" in said(whole)
    assert checkpoint.read(whole, complete=False).files == (), "still being downloaded"
    (whole / second).write_bytes(safetensors({"other": (4,)}))
    assert "does not hold model.norm.weight, which the index says" in said(whole)
    (whole / checkpoint.INDEX).write_text("{")
    assert "is not JSON" in said(whole)
    (whole / checkpoint.INDEX).write_text("{}")
    assert "has no weight_map" in said(whole)


def test_what_transformers_reads_is_what_is_looked_at(tmp_path: Path) -> None:
    """In its order: one file, an index, then torch's; or the file that config.json names."""
    both = write_shards(tmp_path / "both")
    (both / "model.safetensors").write_bytes(safetensors(NORM))
    assert [file.name for file in checkpoint.read(both).files] == ["model.safetensors"]
    named = write_model(
        tmp_path / "named", CONFIG | {"transformers_weights": "x.safetensors"}, x__safetensors=WHOLE
    )
    assert said(named) == ""
    torch_file = write_model(tmp_path / "torch")
    with zipfile.ZipFile(torch_file / "pytorch_model.bin", "w") as archive:
        archive.writestr("data.pkl", b"")
    assert said(torch_file) == ""
    broken = write_model(tmp_path / "broken")
    (broken / "model.safetensors").symlink_to(tmp_path / "nowhere")
    assert "model.safetensors is a link to a file that is not there" in said(broken)
    assert "holds no config.json" in said(write_model(tmp_path / "x") / "..")


def test_a_change_is_seen(tmp_path: Path) -> None:
    made = write_model(tmp_path / "model", model__safetensors=WHOLE)
    assert said(made) == ""
    (made / "model.safetensors").write_bytes(WHOLE[:-4])
    assert "truncated" in said(made)


def test_headers_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    import numpy as np

    arrays: dict[str, Any] = {
        "a": np.zeros((2, 3), np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(1, np.int64),
    }
    save_file(arrays, tmp_path / "x.safetensors", {"format": "pt"})
    assert read_header(tmp_path / "x.safetensors") == {
        "a": ("F16", (2, 3)),
        "empty": ("F32", (0, 3)),
        "scalar": ("I64", ()),
    }


def test_a_large_model_takes_milliseconds_and_no_torch(tmp_path: Path) -> None:
    """As many tensors in as many files as a 70B model has."""
    made = write_model(tmp_path / "model")
    placed = {}
    for shard in range(30):
        name = f"model-{shard:05}-of-00030.safetensors"
        shapes = {f"model.layers.{layer}.{shard}.weight": (2, 2) for layer in range(24)}
        (made / name).write_bytes(safetensors(shapes))
        placed |= dict.fromkeys(shapes, name)
    (made / checkpoint.INDEX).write_text(json.dumps({"weight_map": placed}))
    started = time.perf_counter()
    assert said(made) == ""
    assert time.perf_counter() - started < 0.5
    modules = "harness.models.checkpoint, harness.verify.identity"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
