"""Named starting points: the weakest layer above the defaults, so a matrix overrides any of it.

All three take optimizer steps of the same size (four sequences), so that their quality can be
compared; they differ in what they spend memory and time on.
"""

from __future__ import annotations

from typing import Any

# Values are as a user would write them; `settings.validate` checks them like a user's.
PRESETS: dict[str, dict[str, Any]] = {
    # Fits where little else does: 4-bit base with double quantization, 8-bit optimizer states that
    # may be paged out, activations recomputed, one sequence at a time.
    "low-memory": {
        "method": "qlora",
        "quantization.quant_type": "nf4",
        "quantization.double_quant": True,
        "adapter.rank": 8,
        "adapter.target_modules": "attention",
        "train.optimizer": "paged_adamw_8bit",
        "train.micro_batch_size": 1,
        "train.gradient_accumulation_steps": 4,
        "train.gradient_checkpointing": True,
    },
    # What most LoRA recipes do: an unquantized bf16 base, rank 16 on every linear layer.
    "balanced": {
        "method": "lora",
        "adapter.rank": 16,
        "adapter.target_modules": "all-linear",
        "train.optimizer": "adamw_torch",
        "train.micro_batch_size": 2,
        "train.gradient_accumulation_steps": 2,
        "train.gradient_checkpointing": False,
    },
    # Spends memory for quality: a large adapter on every linear layer, a gentler peak learning
    # rate with a cosine tail, nothing recomputed.
    "high-quality": {
        "method": "lora",
        "adapter.rank": 64,
        "adapter.target_modules": "all-linear",
        "train.optimizer": "adamw_torch",
        "train.learning_rate": 1.0e-4,
        "train.lr_scheduler_type": "cosine",
        "train.micro_batch_size": 4,
        "train.gradient_accumulation_steps": 1,
        "train.gradient_checkpointing": False,
    },
}
