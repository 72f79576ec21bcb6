"""What TRL before 1.0 did to a model with adapters; a tokenizer for trainers that ask for one."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from matrices.cell import Cell


def tokenizer() -> Any:
    """The smallest tokenizer a trainer accepts. Rows are token ids, so it tokenizes nothing."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<pad>": 1, "</s>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
    )


def trl_before_1() -> bool:
    """Whether the stack's TRL prepared a model only when it attached the adapter itself."""
    trl = sys.modules.get("trl")
    version = getattr(trl, "__version__", "0")
    return int(version.split(".")[0]) < 1


def prepare(model: Any, cell: Cell) -> Any:
    """Do to a model with adapters what SFTTrainer before 1.0 did when given a `peft_config`."""
    if cell.train is None or cell.adapter is None or not trl_before_1():
        return model
    prepared = cell.quantization is not None and cell.quantization.kbit_preparation
    if cell.train.gradient_checkpointing and not prepared:
        model.enable_input_require_grads()
    autocast = cell.train.autocast and cell.model.compute_dtype == "bf16"
    if prepared and autocast:
        _heads_to_bf16(model)
    return model


def _heads_to_bf16(model: nn.Module) -> None:
    """TRL 0.7 to 0.2x, `peft_module_casting_to_bf16`: norms in fp32, embeddings and head not."""
    heads = ("lm_head", "embed_tokens", "wte", "wpe")
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) or "norm" in name:
            module.to(torch.float32)
        elif any(part in name for part in heads):
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dtype == torch.float32:
                module.to(torch.bfloat16)
