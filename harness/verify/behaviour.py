"""Check the behaviour of a loaded model on a few tokens: is it causal, are documents isolated, does
the adapter start at the base?

Gradients show whether one token's logits depend on another token: they are exactly zero where they
do not, in any dtype. A probe does not change the model. It takes two or three forwards of 16
tokens, before anything is measured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from harness import device
from harness.models.lora_layers import ADAPTER
from harness.models.mismatch import VerificationError
from harness.records.record import Record
from matrices.cell import Cell, Model
from matrices.errors import UserError

TOKENS = 16
# Largest difference between two models' logits, as root mean squares, that rounding explains.
TOLERANCE = 0.05
# Values of init_lora_weights, beside true, with which PEFT's adapter changes nothing at its start.
# PiSSA and OLoRA move a part of the base into the adapter; in 4 bit what remains is rounded anew.
STARTS_AT_BASE = ("gaussian", "orthogonal", "mica")
SPLITS_THE_BASE = ("pissa", "olora")


@dataclass
class BaseBehaviour:
    """The base model before it gets an adapter. `missing` says why a check was skipped."""

    logits: torch.Tensor | None = None
    causal: bool | None = None
    isolated: bool | None = None
    seconds: float = 0.0
    missing: dict[str, str] = field(default_factory=dict)


def probe(model: Any, cell: Cell) -> BaseBehaviour:
    """Probe the base model of a cell. Raises VerificationError when it is not causal."""
    began = time.perf_counter()
    seen = BaseBehaviour(isolated=False if _joins_documents(cell) else None)
    reason = _skip_reason(model)
    if reason:
        seen.missing = dict.fromkeys(("causal", "adapter_starts_at_base"), reason)
        if _separates_documents(cell):
            seen.missing["documents_isolated"] = reason
        return seen
    with _restored(model), _training_precision(model, cell):
        seen.logits, seen.causal = _causal(model)
        if seen.causal and _separates_documents(cell):
            seen.isolated = _isolated(model)
    device.release_cache()
    seen.seconds = time.perf_counter() - began
    if not seen.causal:
        raise VerificationError(
            f"{cell.model.name!r} is not a causal language model: a later token changes the logits "
            "of earlier ones; it would be trained on tokens that it sees"
        )
    return seen


def record_probe(record: Record, seen: BaseBehaviour, model: Any) -> None:
    """Record the results of the probe, and whether the adapter, if any, starts at the base. Raises
    VerificationError when it should and does not."""
    began = time.perf_counter()
    verified, cell = record.verified, record.cell
    verified.causal, verified.documents_isolated = seen.causal, seen.isolated
    if cell.adapter is not None and seen.logits is not None:
        if _starts_at_base(model.peft_config[ADAPTER], cell):
            _compare(model, seen.logits, cell)
            verified.adapter_starts_at_base = True
        else:
            said = "its initialisation makes the adapter differ from the base at its start"
            seen.missing["adapter_starts_at_base"] = said
    elif cell.adapter is None:
        seen.missing.pop("adapter_starts_at_base", None)
    record.speed.behaviour_seconds = seen.seconds + time.perf_counter() - began
    record.missing |= {f"verified.{name}": reason for name, reason in seen.missing.items()}


def _compare(model: Any, before: torch.Tensor, cell: Cell) -> None:
    with _restored(model), _training_precision(model, cell):
        after = _logits(model, _batch(model))[0].detach().float().cpu()
    device.release_cache()
    difference = float((after - before).square().mean().sqrt())
    scale = float((before - before.mean(-1, keepdim=True)).square().mean().sqrt())
    if not difference <= TOLERANCE * scale:
        raise VerificationError(
            f"the adapter changes the logits before it is trained, by {difference:.3g} of "
            f"{scale:.3g} (root mean squares): its init says that it starts at the base"
        )


def _starts_at_base(config: Any, cell: Cell) -> bool:
    if getattr(config, "kasa_config", None) is not None:
        return False  # it removes small parts of the base weights
    init = config.init_lora_weights
    if not isinstance(init, str):
        return init is True
    named = init.lower()
    return named in STARTS_AT_BASE or (
        named.startswith(SPLITS_THE_BASE) and cell.quantization is None
    )


def _joins_documents(cell: Cell) -> bool:
    """`wrapped` cuts a stream of all documents into rows, without a mark where one ends."""
    return cell.data is not None and cell.data.packing and cell.data.packing_strategy == "wrapped"


def _separates_documents(cell: Cell) -> bool:
    return cell.data is not None and cell.data.packing and cell.data.packing_strategy != "wrapped"


def _skip_reason(model: Any) -> str | None:
    """Why this model is not probed outside the training engine; None when it can be."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        return "not tried: the weights are divided among the ranks as soon as they are loaded"
    if next(model.parameters()).device.type != device.training_device().type:
        return "not tried: the weights are on the host until the engine takes them to its devices"
    return None


def _batch(model: Any) -> dict[str, torch.Tensor]:
    """A few tokens, spread over the vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = [(11 + 37 * at) % vocabulary for at in range(TOKENS)]
    row = torch.tensor([ids])
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def _packed(model: Any) -> dict[str, Any]:
    """Two documents in one row, as TRL's collator gives them."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    ids = _batch(model)["input_ids"][0].tolist()
    row = {"input_ids": ids, "labels": ids, "seq_lengths": [TOKENS // 2, TOKENS - TOKENS // 2]}
    batch = dict(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row]))
    batch.pop("labels")
    return batch


def _logits(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the one row, and the embeddings they were computed from."""
    kept: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        # Detached, so that gradients end here; the first call is that of the token ids.
        kept.append(output.detach().requires_grad_(True))
        return kept[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        place = next(model.parameters()).device
        on_device = {
            name: value.to(place) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        # As TRL calls it: with a cache, attention ignores the boundaries of documents.
        logits = model(**on_device, use_cache=False).logits
    finally:
        handle.remove()
    return logits[0], kept[0]


def _causal(model: Any) -> tuple[torch.Tensor, bool]:
    logits, embeddings = _logits(model, _batch(model))
    half = TOKENS // 2
    return logits.detach().float().cpu(), not _depends(logits[:half], embeddings, half, TOKENS)


def _isolated(model: Any) -> bool:
    logits, embeddings = _logits(model, _packed(model))
    half = TOKENS // 2
    return not _depends(logits[half:], embeddings, 0, half)


def _depends(logits: torch.Tensor, embeddings: torch.Tensor, first: int, last: int) -> bool:
    """Whether these logits depend on the embeddings of tokens `first` to `last`."""
    [gradient] = torch.autograd.grad(logits.float().logsumexp(-1).sum(), embeddings)
    return bool(gradient[0, first:last].ne(0).any())


@contextlib.contextmanager
def _training_precision(model: Any, cell: Cell) -> Iterator[None]:
    """Without dropout, in the dtype that training computes in."""
    train = cell.train
    autocast = train is not None and train.autocast and cell.model.compute_dtype != "fp32"
    with (
        torch.enable_grad(),
        torch.autocast(
            next(model.parameters()).device.type,
            dtype=device.DTYPES[cell.model.compute_dtype] if autocast else None,
            enabled=autocast,
        ),
    ):
        yield


@contextlib.contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Restore the modes of modules and the tensors of parameters: bitsandbytes casts the biases of
    4-bit layers in place at their first forward."""
    training = [module for module in model.modules() if module.training]
    data = [(parameter, parameter.data) for parameter in model.parameters()]
    devices = list(range(torch.cuda.device_count())) if device.has_cuda() else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
            for parameter, before in data:
                if parameter.data_ptr() != before.data_ptr() or parameter.dtype != before.dtype:
                    parameter.data = before


def refuse_encoder(skeleton: Any, chosen: Model) -> None:
    """Raise UserError for a model whose attention layers all declare that they are not causal. This
    needs no weights."""
    said = {bool(module.is_causal) for module in skeleton.modules() if hasattr(module, "is_causal")}
    if said == {False}:
        raise UserError(
            f"{chosen.name!r} is an encoder ({type(skeleton).__name__}): its tokens see later "
            "ones, so it cannot be trained as a causal language model; give a decoder",
            key="model.name",
        )
