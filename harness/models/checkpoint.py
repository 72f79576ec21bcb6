"""The content of a model directory, read from its files before anything is loaded.

Light (no torch): it reads config.json, the headers of the weights and their sizes, in milliseconds.
It looks for files in the same order as transformers.
"""

from __future__ import annotations

import functools
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.models import packaged
from harness.models.safetensors_header import (
    LFS_POINTER,
    Tensor,
    read_header,
    refuse_empty_or_pointer,
    wrong_file,
)
from harness.records import hub
from matrices.catalogue.models import PACKAGED_MODELS, REQUIRED, key_of
from matrices.cell import Cell, Model
from matrices.errors import UserError
from matrices.files.fingerprint import is_written_as_path

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_WEIGHTS = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"
SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
# What transformers' save_pretrained writes under a distributed configuration.
DISTRIBUTED_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
OTHER_WEIGHTS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
EMBEDDINGS = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings)\.weight$")


@dataclass(frozen=True)
class Checkpoint:
    """A model directory. `tensors` is None where only torch can read the names (.bin)."""

    directory: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor] | None


def check(cell: Cell) -> None:
    """Raise UserError, in one line, when the files of the cell's model cannot be what the cell
    measures: an adapter, no weights or only a part of them, weights stored in few bits, an
    encoder, or weights of another shape than config.json says.

    Of a hub model it looks at the files that are here already.
    """
    directory = directory_of(cell.model)
    if directory is None:
        return
    found = read(directory, complete=not hub.is_hub_model(cell.model))
    _refuse_quantized(found, cell)
    _refuse_encoder(found)
    _refuse_other_shape(found)


def directory_of(model: Model) -> Path | None:
    """The directory of a model's files: a local one, or the local copy of a hub model or a packaged
    model; None for a bare config.json or a model that is not on this machine yet."""
    if model.name in PACKAGED_MODELS and model.fingerprint is None:
        return packaged.model_path(model.name) if packaged.is_ready(model.name) else None
    if hub.is_hub_model(model):
        return hub.snapshot(model.name, model.revision)
    local = model.fingerprint is not None or is_written_as_path(model.name)
    return Path(model.name).expanduser() if local and model.config is None else None


def read(directory: Path, complete: bool = True) -> Checkpoint:
    """What the directory holds. With `complete` false, weights may be missing (an unfinished
    download), but no file may be truncated. Raises UserError."""
    try:
        files = [path for path in sorted(directory.iterdir()) if path.is_file()]
        state = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    except OSError as error:
        raise wrong_file(directory, f"cannot be read: {error.strerror}") from error
    return _read(directory, complete, state)


@functools.lru_cache(maxsize=64)
def _read(directory: Path, complete: bool, state: tuple[tuple[str, int, int], ...]) -> Checkpoint:
    names = [name for name, _, _ in state]
    _refuse_adapter(directory, names)
    if "config.json" not in names:
        raise wrong_file(directory, f"holds no config.json{_other_weights(names)}")
    config = _json_object(directory / "config.json")
    if any(DISTRIBUTED_SHARD.fullmatch(name) for name in names):
        return Checkpoint(directory, config, (), None)
    files = _weight_files(directory, config, names, complete)
    tensors: dict[str, Tensor] = {}
    for file, placed in files.items():
        if file.suffix != ".safetensors":
            _check_torch_file(file)
            continue
        held = read_header(file)
        lost = [name for name in placed if name not in held]
        if lost:
            raise wrong_file(
                file,
                f"does not hold {lost[0]}, which the index says is in it ({len(lost)} such); "
                "the files are of different models",
            )
        tensors |= held
    return Checkpoint(directory, config, tuple(files), tensors or None)


def _refuse_adapter(directory: Path, names: Sequence[str]) -> None:
    if ADAPTER_CONFIG not in names:
        return
    if any(name in names for name in (WEIGHTS, INDEX, TORCH_WEIGHTS, TORCH_INDEX)):
        raise wrong_file(
            directory,
            f"holds a whole model and, in {ADAPTER_CONFIG}, an adapter, which transformers would "
            "put on it without a word; move the adapter to a directory of its own, or merge it",
        )
    config = _json_object(directory / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path") or "a model it does not name"
    kind = f" {config['peft_type']}" if isinstance(config.get("peft_type"), str) else ""
    raise wrong_file(
        directory,
        f"is a{kind} adapter of {base}, not a model; name that model, or save the two merged",
    )


def _weight_files(
    directory: Path, config: Mapping[str, Any], names: Sequence[str], complete: bool
) -> dict[Path, list[str]]:
    """The files that transformers would read, each with the tensors that an index assigns to it."""
    explicit = config.get("transformers_weights")
    wanted = (
        [explicit] if isinstance(explicit, str) else [WEIGHTS, INDEX, TORCH_WEIGHTS, TORCH_INDEX]
    )
    first = next((name for name in wanted if name in names), None)
    if first is None:
        if not complete:
            return {}
        raise _no_weights(directory, wanted, names)
    if not first.endswith(".index.json"):
        return {directory / first: []}
    return _shards(directory / first, complete)


def _no_weights(directory: Path, wanted: Sequence[str], names: Sequence[str]) -> UserError:
    shards = [name for name in names if SHARD.fullmatch(name)]
    if shards:
        index = INDEX if shards[0].endswith(".safetensors") else TORCH_INDEX
        return wrong_file(
            directory,
            f"holds {shards[0]} and has no {index}, which says what is in which file; copy it too",
        )
    links = [name for name in wanted if (directory / name).is_symlink()]
    if links:
        return wrong_file(directory / links[0], "is a link to a file that is not there")
    return wrong_file(
        directory,
        f"holds no weights ({' or '.join(wanted)}){_other_weights(names)}; save or download them, "
        "or give the config.json alone under model: {config: ...} for a prediction",
    )


def _other_weights(names: Sequence[str]) -> str:
    others = [name for name in names if name.endswith(OTHER_WEIGHTS)]
    return f"; {', '.join(others[:3])} is not what transformers reads" if others else ""


def _shards(index: Path, complete: bool) -> dict[Path, list[str]]:
    placed = _json_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise wrong_file(index, "has no weight_map, which says what is in which file")
    shards: dict[Path, list[str]] = {}
    for name, file in placed.items():
        shards.setdefault(index.parent / str(file), []).append(name)
    missing = [file.name for file in sorted(shards) if not file.is_file()]
    if missing and complete:
        raise wrong_file(
            index.parent,
            f"lacks {len(missing)} of the {len(shards)} files that {index.name} names, "
            f"{missing[0]} first; copy or download them",
        )
    return {} if missing else shards


def _check_torch_file(path: Path) -> None:
    """A file of torch.save is a zip archive, whose end is written last; before torch 1.6 a pickle.
    Transformers reads both with weights_only."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise wrong_file(path, f"cannot be read: {error.strerror}") from error
    refuse_empty_or_pointer(path, start)
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise wrong_file(path, "is truncated; download it again")
    if not start.startswith((b"PK", b"\x80")):
        raise wrong_file(path, "is not a file of torch.save; download it again")


def _refuse_quantized(found: Checkpoint, cell: Cell) -> None:
    """Raise UserError for a quantized checkpoint, unless the cell asks for exactly its settings."""
    stored = found.config.get("quantization_config")
    if not isinstance(stored, dict):
        return
    method = str(stored.get("quant_method") or "bitsandbytes")
    bits = stored.get("bits") or (4 if stored.get("load_in_4bit") else None)
    bits = bits or (8 if stored.get("load_in_8bit") else None)
    what = f"{f'{bits}-bit ' if bits else ''}{method} checkpoint"
    wanted = cell.quantization
    if wanted is None or bits != 4 or method != "bitsandbytes":
        raise wrong_file(
            found.directory,
            f"is a {what} (quantization_config in config.json), which method {cell.method} does "
            "not start from; name the model it was made of, and quantize it with method: qlora",
        )
    dtypes = {"uint8": "uint8", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    storage, compute = dtypes[wanted.quant_storage], dtypes[cell.model.compute_dtype]
    for key, default, value, setting in (
        ("bnb_4bit_quant_type", "fp4", wanted.quant_type, "quant_type"),
        ("bnb_4bit_use_double_quant", False, wanted.double_quant, "double_quant"),
        ("bnb_4bit_quant_storage", "uint8", storage, "quant_storage"),
        ("bnb_4bit_compute_dtype", "float32", compute, "compute_dtype"),
    ):
        held = stored.get(key, default)
        if held != value:
            raise wrong_file(
                found.directory,
                f"is a {what} with {key} {held!r}, and the cell has {setting} {value!r}; what is "
                "stored stays as it is: set it so, or name the model it was made of",
            )


def _refuse_encoder(found: Checkpoint) -> None:
    """Raise UserError for an encoder: its tokens see later ones, so its loss means nothing."""
    made_as = found.config.get("architectures") or []
    encoders = [name for name in made_as if str(name).endswith("ForMaskedLM")]
    if encoders and len(encoders) == len(made_as) and not found.config.get("is_decoder"):
        raise wrong_file(
            found.directory,
            f"is an encoder ({encoders[0]} in config.json), not a causal language model; name a "
            "model whose architecture ends in ForCausalLM",
        )


def _refuse_other_shape(found: Checkpoint) -> None:
    """Raise UserError when the embeddings have another shape than config.json says."""
    inner = found.config.get("text_config")
    config = inner if isinstance(inner, dict) else found.config
    names = [name for name in found.tensors or () if EMBEDDINGS.search(name)]
    # Of other families it is not known whether the embeddings are as wide as the layers.
    if found.tensors is None or len(names) != 1 or config.get("model_type") not in REQUIRED:
        return
    width = "word_embed_proj_dim" if "word_embed_proj_dim" in config else None
    width = width or key_of(config, "hidden_size") or "hidden_size"
    wanted = (config.get("vocab_size"), config.get(width))
    shape = found.tensors[names[0]].shape
    if all(isinstance(size, int) for size in wanted) and shape != wanted:
        raise wrong_file(
            found.directory,
            f"is not one model: {names[0]} is {' x '.join(map(str, shape))}, and config.json says "
            f"vocab_size {wanted[0]} x {width} {wanted[1]}; take both from one model",
        )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise wrong_file(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise wrong_file(path, f"is not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise wrong_file(path, "is not a JSON object, {...}")
    return found
