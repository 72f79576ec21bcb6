"""DeepSpeed ZeRO on a fake device: accelerate's environment variables, and patches of DeepSpeed."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor

from harness.simulate.memory.ledger import SimulatedLedger
from matrices.cell import Cell
from matrices.errors import UserError

BUCKETS = (
    "DeepSpeed's buckets have its default sizes (reduce_bucket_size: 5e8 elements), which "
    "accelerate's launcher leaves as they are"
)


def environment(cell: Cell) -> dict[str, str]:
    """What `accelerate launch` sets for a ZeRO stage without a DeepSpeed file. The shipped profiles
    say the same in a file (and gather the weights when they are saved).

    Raises UserError if DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"{cell.parallelism} needs DeepSpeed, which is not installed: pip install deepspeed",
            key="parallelism",
        )
    stage = cell.strategy.zero_stage
    place = "cpu" if cell.strategy.offloads else "none"
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": place,
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": place,
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(stage == 3).lower(),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
    }


def tag_shards(ledger: SimulatedLedger, model: Any) -> None:
    """Tag whole parameters, and this rank's part of partitioned ones (`ds_tensor`)."""
    for name, parameter in model.named_parameters():
        kind = "adapters" if ".lora_" in name else "weights"
        if getattr(parameter, "quant_state", None) is not None:
            kind = "quantized_weights"
        for tensor in (parameter.data, getattr(parameter, "ds_tensor", None)):
            if tensor is not None and tensor.numel():
                ledger.tag(tensor, kind)


def tag_gradients(ledger: SimulatedLedger, optimizer: Any) -> None:
    """Tag the optimizer's fp32 copies of its part as optimizer states, and their gradients."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            ledger.tag(parameter.data, "optimizer_states")
            if parameter.grad is not None:
                ledger.tag(parameter.grad, "gradients")


def host_bytes() -> int:
    """Bytes of all live fake tensors in host memory; shared storages count once."""
    found = {}
    for each in gc.get_objects():
        if isinstance(each, FakeTensor) and each.device.type == "cpu":
            raw = each.untyped_storage()
            found[raw._cdata] = raw.nbytes()
    return sum(found.values())


@contextlib.contextmanager
def patched() -> Iterator[None]:
    with rank_comparisons_pass(), weights_are_partitioned_by_the_engine(), cpu_adam_is_adamw():
        yield


@contextlib.contextmanager
def rank_comparisons_pass() -> Iterator[None]:
    """Stage 3 gathers numbers from all ranks to compare them; a fake process group sends none."""
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator
    import deepspeed.runtime.zero.utils as utils

    with contextlib.ExitStack() as stack:
        for owner in (coordinator, utils):
            for name in ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks"):
                if hasattr(owner, name):
                    stack.enter_context(patch.object(owner, name, _no_comparison))
        yield


def _no_comparison(*_: Any, **__: Any) -> None:
    return None


@contextlib.contextmanager
def weights_are_partitioned_by_the_engine() -> Iterator[None]:
    """`from_pretrained` loads a stage 3 model under `deepspeed.zero.Init`, which partitions
    parameter by parameter. The simulated model is made before, so `deepspeed.initialize` partitions
    it so."""
    import deepspeed

    initialize = deepspeed.initialize

    def divided(*args: Any, model: Any, **kwargs: Any) -> Any:
        if any(each.device.type == "cpu" for each in model.parameters()):
            deepspeed.zero.Init(module=model, config_dict_or_path=kwargs["config_params"])
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = buffer.to("cuda")
        return initialize(*args, model=model, **kwargs)

    with patch.object(deepspeed, "initialize", divided):
        yield


class HostAdam(torch.optim.AdamW):
    """In place of DeepSpeedCPUAdam, without its compiled step: the same two fp32 states per
    parameter."""

    def __init__(self, params: Any, **options: Any) -> None:
        known = ("lr", "betas", "eps", "weight_decay")
        super().__init__(params, **{key: options[key] for key in known if key in options})


@contextlib.contextmanager
def cpu_adam_is_adamw() -> Iterator[None]:
    """If the optimizer is offloaded, accelerate uses DeepSpeed's CPU Adam, which is compiled at
    first use."""
    import deepspeed.ops.adam
    import deepspeed.runtime.zero.stage3 as stage3

    with contextlib.ExitStack() as stack:
        for owner in (deepspeed.ops.adam, stage3):
            stack.enter_context(patch.object(owner, "DeepSpeedCPUAdam", HostAdam))
        yield
