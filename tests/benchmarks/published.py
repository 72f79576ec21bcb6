"""Published GPU measurements as cells, so that predictions can be set against them.

Light (no torch). A row says in columns what was run; nothing in here knows a row or a model by
name. What a row's columns leave open (the resized vocabulary) is given by the caller.
"""

from __future__ import annotations

import csv
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matrices.cell import Adapter, Cell, Data, Model, Parallelism, Quantization, Train
from matrices.errors import UserError, nearest
from matrices.parallelism import STRATEGIES

COLUMNS = (
    "row_id", "gpu", "n_gpus", "parallelism", "model_id", "method", "quant_type", "double_quant",
    "rank", "target_modules", "trainable_params", "seq_len", "micro_batch", "grad_ckpt", "attn",
    "param_dtype", "optimizer", "mixed_precision", "lora_dropout", "scenario",
    "peak_allocated_bytes", "steady_allocated_bytes", "notes",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One published row: the columns as they are written, and the measured bytes on rank 0."""

    columns: Mapping[str, str]
    peak_allocated_bytes: int
    steady_allocated_bytes: int

    @property
    def row_id(self) -> str:
        return self.columns["row_id"]

    @property
    def model_id(self) -> str:
        return self.columns["model_id"]

    @property
    def devices(self) -> int:
        return _whole(self, "n_gpus")


def read(path: Path) -> list[Measurement]:
    """The rows of a CSV in file order. Raises UserError naming file, line and column."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if not rows:
        raise UserError("no rows", where=str(path))
    for column in COLUMNS:
        if column not in rows[0]:
            raise UserError(
                f"no such column{nearest(column, rows[0])}", key=column, where=str(path)
            )
    return [_measurement(row, f"{path}:{line}") for line, row in enumerate(rows, start=2)]


def _measurement(row: Mapping[str, str], where: str) -> Measurement:
    figures = {}
    for column in ("peak_allocated_bytes", "steady_allocated_bytes"):
        try:
            figures[column] = int(float(row[column]))
        except ValueError as error:
            raise UserError(
                f"{row[column]!r} is not a number of bytes", key=column, where=where
            ) from error
    return Measurement(row, **figures)


def cells(rows: Sequence[Measurement], vocabulary: Mapping[str, int]) -> list[Cell]:
    """The cell of every row. `vocabulary` is the resized one by `model_id`, for models that were
    resized. Builds each model once, without weights (torch is imported here)."""
    names = dict.fromkeys(row.model_id for row in rows)
    layers = {name: linear_layers(model(name, vocabulary.get(name))) for name in names}
    return [cell(row, vocabulary.get(row.model_id), layers[row.model_id]) for row in rows]


def model(model_id: str, vocabulary: int | None) -> Model:
    resized = {} if vocabulary is None else {"vocab_size": vocabulary}
    return Model(name=model_id, config_overrides=resized)


def linear_layers(model: Model) -> list[str]:
    """Full names of the layers that LoRA and 4-bit storage are for: all linear ones but the
    output head."""
    from harness.models.model import adaptable_modules
    from harness.simulate.libraries.blank_model import model_config, skeleton

    return adaptable_modules(skeleton(Cell(method="full", model=model), model_config(model)))


def cell(row: Measurement, vocabulary: int | None, layers: Iterable[str]) -> Cell:
    """The cell that trains what the row describes, at the model's own vocabulary without another.

    `layers` are the model's linear ones: a row may list targets of other architectures, which PEFT
    passes over, and Tunebench refuses names that match nothing. Raises UserError for a row whose
    columns say something that no cell can express.
    """
    method = _one_of(row, "method", ("full", "lora", "qlora"))
    parallelism = _parallelism(row)
    base = model(row.model_id, vocabulary).model_copy(
        update={
            "attn_implementation": _one_of(row, "attn", ("sdpa", "eager", "flash_attention_2")),
            "weight_dtype": _dtype(row, row.columns["param_dtype"].partition(" ")[0]),
        }
    )
    parts: dict[str, Any] = {"model": base, "data": _data(row), "train": _train(row)}
    if method != "full":
        parts["adapter"] = _adapter(row, {name.rpartition(".")[2] for name in layers})
    if method == "qlora":
        parts["quantization"] = _quantization(row, parallelism)
    return Cell(method=method, parallelism=parallelism, devices=row.devices, **parts)


def _data(row: Measurement) -> Data:
    return Data(max_length=_whole(row, "seq_len"), packing=True)


def _train(row: Measurement) -> Train:
    mixed = _one_of(row, "mixed_precision", ("none", "bf16"))
    return Train(
        micro_batch_size=_whole(row, "micro_batch"),
        optimizer=_one_of(row, "optimizer", ("adamw_torch",), first_word=True),
        gradient_checkpointing=row.columns["grad_ckpt"] == "True",
        # What transformers 4 did by itself.
        use_reentrant=row.columns["grad_ckpt"] == "True",
        autocast=mixed == "bf16",
        # Counted by the trainer itself, which empties the allocator's cache before the first step.
        sft_config={"skip_memory_metrics": False},
    )


def _adapter(row: Measurement, names: set[str]) -> Adapter:
    listed = row.columns["target_modules"].split(",")
    matching = tuple(sorted(set(listed) & names))
    if not matching:
        raise UserError(
            f"none of {', '.join(listed)} is a linear layer of {row.model_id}",
            key="target_modules",
            where=row.row_id,
        )
    rank = _whole(row, "rank")
    alpha = re.search(r"lora_alpha=(\d+)", row.columns["notes"])
    return Adapter(
        rank=rank,
        alpha=int(alpha[1]) if alpha else rank,
        dropout=float(row.columns["lora_dropout"] or 0),
        target_modules=matching,
    )


def _quantization(row: Measurement, parallelism: Parallelism) -> Quantization:
    return Quantization(
        quant_type=_one_of(row, "quant_type", ("nf4", "fp4")),
        double_quant=row.columns["double_quant"] == "True",
        # FSDP flattens parameters of one dtype only, so 4-bit weights are stored in the others'.
        quant_storage="bf16" if STRATEGIES[parallelism].fsdp_version else "uint8",
        kbit_preparation="norms fp32" in row.columns["param_dtype"],
    )


def _parallelism(row: Measurement) -> Parallelism:
    told = row.columns["parallelism"]
    if told == "fsdp" and "FSDP1" in row.columns["notes"]:
        return "fsdp1"
    found: Parallelism = _one_of(row, "parallelism", typing.get_args(Parallelism))
    return found


def _one_of(row: Measurement, column: str, known: tuple[Any, ...], first_word: bool = False) -> Any:
    value = row.columns[column]
    value = value.partition(" ")[0] if first_word else value
    if value not in known:
        raise UserError(
            f"{value!r} is none of {', '.join(known)}{nearest(value, known)}",
            key=column,
            where=row.row_id,
        )
    return value


def _dtype(row: Measurement, value: str) -> Any:
    if value not in ("bf16", "fp16", "fp32"):
        raise UserError(f"{value!r} is no dtype", key="param_dtype", where=row.row_id)
    return value


def _whole(row: Measurement, column: str) -> int:
    try:
        return int(float(row.columns[column]))
    except ValueError as error:
        raise UserError(
            f"{row.columns[column]!r} is not a whole number", key=column, where=row.row_id
        ) from error
