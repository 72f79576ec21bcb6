"""TRL's preparation of rows, without a model: template, tokens, masks, truncation, packing."""

from __future__ import annotations

import tempfile
import traceback
from typing import Any

from datasets import Dataset, disable_progress_bars
from trl import SFTConfig, SFTTrainer


def prepared(rows: Dataset, tokenizer: Any, arguments: dict[str, Any]) -> Dataset:
    """The rows as SFTTrainer makes them for training: through its own constructor, with a model
    of a few weights in the place of the real one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    disable_progress_bars()
    stand_in = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=max(len(tokenizer), 1),
            hidden_size=2,
            intermediate_size=2,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
            **arguments,
        )
        trainer = SFTTrainer(
            model=stand_in, args=config, train_dataset=rows, processing_class=tokenizer
        )
    return trainer.train_dataset


def is_about_rows(error: Exception) -> bool:
    """Whether `prepared` raised it while it went through the rows, not while it was set up."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name == "_prepare_dataset" for frame in frames)


def first_failure(
    rows: Dataset, tokenizer: Any, arguments: dict[str, Any]
) -> tuple[int, Exception]:
    """The place, from 0, of the first row that `prepared` does not take, and what it raises:
    found by halving, since datasets does not tell. The rows as a whole fail."""
    good, bad = 0, len(rows)
    said: Exception | None = None
    while said is None or bad - good > 1:
        tried = bad if said is None else (good + bad) // 2
        try:
            prepared(rows.select(range(tried)), tokenizer, arguments)
        except Exception as error:
            said, bad = error, tried
        else:
            good = tried
    return bad - 1, said
