"""What other tools say about a model's training memory, from their own library functions.

They are given the same architecture without weights, so nothing is fetched.
"""

from __future__ import annotations

import torch

from harness.simulate.libraries.blank_model import model_config, skeleton
from matrices.cell import Cell, Model


def accelerate_bytes(model: Model, dtype: str) -> int:
    """What `accelerate estimate-memory --dtypes DTYPE` calls the peak of training with Adam: the
    largest of its four figures. As there the model is `AutoModel`'s, in fp32, without weights
    (`accelerate.commands.estimate`)."""
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModel

    with init_empty_weights():
        blank = AutoModel.from_config(model_config(model), dtype=torch.float32)
    total, _ = calculate_maximum_sizes(blank)
    return int(max(estimate_training_usage(total, dtype).values()))


def deepspeed_bytes(model: Model, gpus: int) -> dict[str, int]:
    """GPU bytes of `estimate_zero2_model_states_mem_needs` and of ZeRO-3's, without offload, for
    one node of `gpus`."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    blank = skeleton(Cell(method="full", model=model), model_config(model))
    total = sum(parameter.numel() for parameter in blank.parameters())
    # As `estimate_zero3_model_states_mem_needs_all_live` counts it: of modules' own parameters.
    largest = max(
        sum(own.numel() for own in module.parameters(recurse=False)) for module in blank.modules()
    )
    _, zero2 = estimate_zero2_model_states_mem_needs(
        total, num_gpus_per_node=gpus, num_nodes=1, cpu_offload=False
    )
    _, zero3, _ = estimate_zero3_model_states_mem_needs(
        total, largest, num_gpus_per_node=gpus, num_nodes=1, cpu_offload=False
    )
    return {"ZeRO-2": int(zero2), "ZeRO-3": int(zero3)}
