"""The cells that answer a claim by simulation, and the figures read off their predictions.

What a claim leaves open is assumed, and every assumption is said. The first case decides; others
tell whether the claim holds with another assumption that people make.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.records.prediction import Prediction
from matrices.cell import Adapter, Cell, Data, Model, Quantization, TargetSet, Train
from reports.claims.language import Claim

GB, MB = 10**9, 10**6
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
RANK = 16
TARGETS: TargetSet = "attention"
LENGTHS = (1024, 2048, 4096)
EXPONENT_MODEL = "llama-2-7b"
# Micro batch and sequence length of a claim that names none: a small one, and a usual one.
SMALL, USUAL = (1, 512), (4, 2048)
STATES = ("weights", "quantized_weights", "quantization_state", "adapters")
OTHER = ("activations", "logits_and_loss", "temporaries")

PredictedFigure = Callable[[Sequence[Prediction]], float]


@dataclass(frozen=True)
class Case:
    """A figure under assumptions: the cells to predict, and what to make of them."""

    assuming: str
    cells: tuple[Cell, ...]
    figure: PredictedFigure


def cases(claim: Claim) -> list[Case]:
    """How a `count` or `predict` claim is answered; the first case decides."""
    return _CASES[claim.quantity](claim)


def _cell(claim: Claim, shape: tuple[int, int] = SMALL, **changes: Any) -> Cell:
    """The claim's cell. `changes`: weight_dtype, compute_dtype, attn_implementation, double_quant,
    kbit_preparation, checkpointing, rank, target_modules, method."""
    method = changes.get("method") or claim.method or "lora"
    parts: dict[str, Any] = {}
    if method in ("lora", "qlora"):
        parts["adapter"] = Adapter(
            rank=changes.get("rank") or claim.rank or RANK,
            target_modules=changes.get("target_modules") or claim.target_modules or TARGETS,
        )
    if method == "qlora":
        parts["quantization"] = Quantization(
            double_quant=changes.get("double_quant", True),
            kbit_preparation=changes.get("kbit_preparation", True),
        )
    model = Model(
        name=claim.model or EXPONENT_MODEL,
        weight_dtype=changes.get("weight_dtype", "bf16"),
        compute_dtype=changes.get("compute_dtype", "bf16"),
        attn_implementation=changes.get("attn_implementation", "sdpa"),
    )
    train = Train(
        micro_batch_size=shape[0], gradient_checkpointing=changes.get("checkpointing", True)
    )
    data = Data(max_length=shape[1], packing=True)
    return Cell(method=method, model=model, data=data, train=train, **parts)


def _settings_text(claim: Claim, cell: Cell, shape: bool = True) -> str:
    """What was assumed, as far as the claim does not say it."""
    parts = []
    if cell.adapter is not None and claim.rank is None:
        parts.append(f"rank {cell.adapter.rank}")
    if cell.adapter is not None and claim.target_modules is None:
        parts.append(f"targets {cell.adapter.target_modules}")
    if cell.quantization is not None:
        preparation = "with" if cell.quantization.kbit_preparation else "without"
        nested = "with" if cell.quantization.double_quant else "without"
        parts.append(f"nf4 {nested} double quantization, {preparation} k-bit preparation")
    if shape and cell.train is not None and cell.data is not None:
        parts.append(f"micro batch {cell.train.micro_batch_size} × {cell.data.max_length} tokens")
        parts.append("checkpointing" if cell.train.gradient_checkpointing else "no checkpointing")
        parts.append(f"{cell.model.weight_dtype} weights")
        compute = cell.model.compute_dtype
        parts.append("no autocast" if compute == "fp32" else f"{compute} autocast")
        parts += ["AdamW", f"{cell.model.attn_implementation} attention"]
    return ", ".join(parts) or "nothing beyond the claim"


# --- counts


def _lora(claim: Claim, targets: Any = None) -> Cell:
    """The claim's cell at rank 16: counts of other ranks follow from it."""
    return _cell(claim, rank=RANK, target_modules=targets)


def counted(claim: Claim, prediction: Prediction, rank: int | None = None) -> tuple[int, int]:
    """(trainable, total) parameters at the claim's rank. LoRA has rank x (inputs + outputs)
    parameters on each layer (Hu et al., arXiv:2106.09685), so they go with the rank exactly."""
    trainable, total = _count(prediction)
    if prediction.cell.adapter is None:
        return trainable, total
    simulated = prediction.cell.adapter.rank
    scaled = trainable * (rank or claim.rank or RANK) // simulated
    return scaled, total - trainable + scaled


def _trainable(claim: Claim) -> list[Case]:
    cell = _lora(claim)
    text = _settings_text(claim, cell, shape=False)
    return [Case(text, (cell,), lambda p: counted(claim, p[0])[0])]


def _share(claim: Claim) -> list[Case]:
    def against_all(found: Sequence[Prediction]) -> float:
        trainable, total = counted(claim, found[0])
        return trainable / total

    def against_base(found: Sequence[Prediction]) -> float:
        trainable, total = counted(claim, found[0])
        return trainable / (total - trainable)

    cell = _lora(claim)
    return [
        Case("trainable over all parameters, the adapter's included", (cell,), against_all),
        Case("trainable over the base model's parameters", (cell,), against_base),
    ]


def _adapter_file(claim: Claim) -> list[Case]:
    """PEFT keeps the adapters of a half-precision base in fp32 (`autocast_adapter_dtype`) and
    saves them so; a safetensors file has a header of about 150 bytes a tensor besides."""
    wanted: list[tuple[int, Any]] = [(claim.rank or RANK, claim.target_modules or TARGETS)]
    ranks = (claim.rank,) if claim.rank else (8, 16, 64)
    named: tuple[Any, ...] = ("qv", "attention", "all-linear")
    targets = (claim.target_modules,) if claim.target_modules else named
    wanted += [pair for rank in ranks for name in targets if (pair := (rank, name)) not in wanted]
    return [
        _file_case(claim, rank, target, dtype)
        for dtype in ("fp32", "bf16")
        for rank, target in wanted
    ]


def _file_case(claim: Claim, rank: int, target: Any, dtype: str) -> Case:
    words = [] if claim.rank else [f"rank {rank}"]
    words += [] if claim.target_modules else [f"targets {target}"]
    words.append("saved in fp32, as PEFT does" if dtype == "fp32" else f"saved in {dtype}")
    return Case(
        ", ".join(words),
        (_lora(claim, target),),
        lambda p: counted(claim, p[0], rank)[0] * DTYPE_BYTES[dtype] / MB,
    )


def _count(prediction: Prediction) -> tuple[int, int]:
    assert prediction.trainable_parameters is not None
    assert prediction.total_parameters is not None
    return prediction.trainable_parameters, prediction.total_parameters


# --- memory


def _peak(claim: Claim) -> list[Case]:
    changes: dict[str, Any] = {}
    dtypes = dtypes_in(claim.note)
    if dtypes.get("everything") == "fp32":
        changes = {"weight_dtype": "fp32", "compute_dtype": "fp32"}
    found: list[Case] = []
    for shape in (SMALL, USUAL):
        cell = _cell(claim, shape, **changes)
        text = f"micro batch {shape[0]} × {shape[1]} tokens, all else the same"
        assuming = text if found else _settings_text(claim, cell)
        found.append(Case(assuming, (cell,), lambda p: _peak_bytes(p[0]) / GB))
    return found


def _peak_bytes(prediction: Prediction) -> int:
    assert prediction.memory.peak_allocated_bytes is not None
    return prediction.memory.peak_allocated_bytes


def _model_states(claim: Claim) -> list[Case]:
    cell = _cell(claim)
    dtypes = dtypes_in(claim.note)
    simulated = Case(
        f"weights, adapters, gradients and optimizer states of: {_settings_text(claim, cell)}",
        (cell,),
        lambda p: _states_bytes(p[0]) / GB,
    )
    if not {"weights", "gradients", "adam"} <= dtypes.keys() or claim.method != "full":
        return [simulated]
    widths = {name: DTYPE_BYTES[dtype] for name, dtype in dtypes.items()}
    each = widths["weights"] + widths["gradients"] + 2 * widths["adam"]
    assuming = ", ".join(f"{dtype} {name}" for name, dtype in dtypes.items())
    assuming = assuming.replace("adam", "Adam")
    counted = Case(
        f"{assuming}: {each} bytes for each of the model's parameters",
        (cell,),
        lambda p: _count(p[0])[0] * each / GB,
    )
    return [counted, simulated]


def _states_bytes(prediction: Prediction) -> int:
    """What stays whatever the batch is. Gradients are counted, as they may be gone at the peak."""
    cell = prediction.cell
    held = sum(prediction.memory.resident.get(name, 0) for name in STATES)
    trained = cell.model.weight_dtype if cell.method == "full" else "fp32"
    gradients = _count(prediction)[0] * DTYPE_BYTES[trained]
    return held + gradients + prediction.memory.by_category.get("optimizer_states", 0)


def _optimizer(claim: Claim) -> list[Case]:
    cell = _cell(claim, weight_dtype="fp32")
    return [
        Case(
            "AdamW, two fp32 states, of fp32 weights",
            (cell,),
            lambda p: p[0].memory.by_category.get("optimizer_states", 0) / GB,
        ),
        Case("two bf16 states, of bf16 weights", (cell,), lambda p: _count(p[0])[0] * 2 * 2 / GB),
    ]


def _base_weights(claim: Claim) -> list[Case]:
    cell = _cell(claim, kbit_preparation=False)
    prepared = _cell(claim)
    return [
        Case(
            f"as loaded: {_settings_text(claim, cell, shape=False)}, quantization constants "
            "and the parts that stay in bf16 included",
            (cell,),
            _held,
        ),
        Case("k-bit preparation, which makes embeddings and norms fp32", (prepared,), _held),
        Case(
            "every parameter in 4 bits, embeddings and head too, and no quantization constants",
            (cell,),
            lambda p: (_count(p[0])[1] - _count(p[0])[0]) / 2 / GB,
        ),
        Case(
            "every parameter in 8 bits",
            (cell,),
            lambda p: (_count(p[0])[1] - _count(p[0])[0]) / GB,
        ),
    ]


def _held(found: Sequence[Prediction]) -> float:
    names = ("weights", "quantized_weights", "quantization_state")
    return sum(found[0].memory.resident.get(name, 0) for name in names) / GB


def _double_quant(claim: Claim) -> list[Case]:
    cells = tuple(
        _cell(claim, method="qlora", double_quant=nested, kbit_preparation=False)
        for nested in (False, True)
    )
    return [Case("nf4, block 64, as loaded", cells, lambda p: _held(p[:1]) - _held(p[1:]))]


def _exponent(claim: Claim) -> list[Case]:
    return [_exponent_case(claim, "sdpa"), _exponent_case(claim, "eager")]


def _exponent_case(claim: Claim, attention: str) -> Case:
    cells = tuple(
        _cell(claim, (1, length), attn_implementation=attention, checkpointing=False)
        for length in LENGTHS
    )
    kernel = "sdpa, which is flash attention here" if attention == "sdpa" else "eager attention"
    lengths = ", ".join(map(str, LENGTHS))
    model = "" if claim.model else f"{EXPONENT_MODEL}, "
    method = (
        f": {model}{cells[0].method}, micro batch 1, no checkpointing; least-squares slope of "
        f"log(activation, logits and temporary bytes at the peak) on log(length) at {lengths}"
    )
    return Case(
        kernel + (method if attention == "sdpa" else ", all else the same"),
        cells,
        lambda found: log_slope(LENGTHS, [_activation_bytes(p) for p in found]),
    )


def _activation_bytes(prediction: Prediction) -> int:
    return sum(prediction.memory.by_category.get(name, 0) for name in OTHER)


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent k of the least-squares fit y = c x^k on logarithms."""
    logs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True)]
    mean_x, mean_y = (math.fsum(part) / len(logs) for part in zip(*logs, strict=True))
    over = math.fsum((a - mean_x) * (b - mean_y) for a, b in logs)
    return over / math.fsum((a - mean_x) ** 2 for a, _ in logs)


def dtypes_in(note: str) -> dict[str, str]:
    """`fp32 gradients` in a note as {'gradients': 'fp32'}; of weights, gradients, Adam and
    everything."""
    found = re.findall(r"\b(bf16|fp16|fp32) (weights|gradients|adam|everything)\b", note.lower())
    return {part: dtype for dtype, part in found}


_CASES: Mapping[str, Callable[[Claim], list[Case]]] = {
    "trainable_parameters": _trainable,
    "trainable_share": _share,
    "adapter_file_mb": _adapter_file,
    "model_states_gb": _model_states,
    "peak_gb": _peak,
    "optimizer_gb": _optimizer,
    "base_weights_gb": _base_weights,
    "double_quant_saving_gb": _double_quant,
    "activation_memory_exponent_in_sequence_length": _exponent,
}
