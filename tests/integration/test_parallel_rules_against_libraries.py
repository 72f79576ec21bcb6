"""What the rules about several devices say of torch, accelerate, DeepSpeed, TRL and bitsandbytes,
asked of them: one process is a process group too, and that is enough for most of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from matrices.cell import Optimizer
from matrices.parallelism import STRATEGIES
from matrices.rules.parallelism import TORCH_OPTIMIZERS

pytestmark = pytest.mark.slow

# A rank alone, in a process of its own: process groups cannot be left behind in pytest's.
ALONE = """
import os, sys, warnings
warnings.filterwarnings("ignore")
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
import socket
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
import torch
torch.distributed.init_process_group("gloo")
def attempt(name, what):
    try:
        print(name, "ok", what())
    except Exception as error:
        print(name, type(error).__name__, str(error).splitlines()[0])
"""


def alone(code: str, directory: Path, **variables: str) -> dict[str, str]:
    """What each attempt of the code came to, by its name."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE + code],
        cwd=directory,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    lines = (line.partition(" ") for line in done.stdout.splitlines())
    return {name: said for name, _, said in lines}


FSDP2 = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments
mesh = init_device_mesh("cpu", (1,))
def steps(name):
    layer = torch.nn.Linear(128, 64)
    fully_shard(layer, mesh=mesh)
    arguments = TrainingArguments(output_dir=".", optim=name, use_cpu=True, report_to=[])
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind(layer.parameters(), **options)
    for _ in range(2):
        layer(torch.ones(2, 128)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
for name in sys.argv[1:] or {names}:
    attempt(name, lambda: steps(name))
"""


def test_torchs_optimizers_alone_step_on_dtensors(tmp_path: Path) -> None:
    names = get_args(Optimizer)
    found = alone(FSDP2.replace("{names}", repr(names)), tmp_path)
    assert {name for name in names if found[name].startswith("ok")} == TORCH_OPTIMIZERS
    refusals = [said for name, said in found.items() if name not in TORCH_OPTIMIZERS]
    assert all("DTensor" in said or "sharding strategy" in said for said in refusals)


def test_adafactor_factors_no_vectors() -> None:
    from transformers import Adafactor

    shapes = {}
    for name, shape in (("matrix", (8, 8)), ("flat", (64,))):
        parameter = torch.nn.Parameter(torch.ones(shape))
        parameter.grad = torch.ones(shape)
        optimizer = Adafactor([parameter], lr=1e-3, relative_step=False, scale_parameter=False)
        optimizer.step()
        shapes[name] = {k for k in optimizer.state[parameter] if k.startswith("exp_avg_sq")}
    assert shapes == {
        "matrix": {"exp_avg_sq_row", "exp_avg_sq_col"},
        "flat": {"exp_avg_sq"},
    }


REENTRANT = """
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models
from accelerate.state import AcceleratorState
from trl import SFTConfig, SFTTrainer
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")),
    eos_token="b",
    pad_token="b",
)
rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 2, "labels": [[1, 2, 3, 4]] * 2})
def train(adapters, reentrant, **further):
    AcceleratorState._reset_state()
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=8,
            eos_token_id=1,
        )
    )
    if adapters:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    arguments = SFTConfig(
        output_dir=".",
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_steps=1,
        max_length=None,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        dataset_kwargs={"skip_prepare_dataset": True},
        **further,
    )
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return type(trainer.model_wrapped).__name__
for name, adapters, reentrant in (
    ("adapters-reentrant", True, True),
    ("adapters", True, False),
    ("full-reentrant", False, True),
):
    attempt(name, lambda: train(adapters, reentrant))
attempt("unused-not-found", lambda: train(True, True, ddp_find_unused_parameters=False))
"""


def test_ddp_refuses_reentrant_checkpointing_of_adapters_alone(tmp_path: Path) -> None:
    found = alone(REENTRANT, tmp_path)
    assert "Expected to mark a variable ready only once" in found["adapters-reentrant"]
    # Also: DDP in one process is DDP.
    assert found["adapters"] == "ok DistributedDataParallel"
    assert found["full-reentrant"] == "ok DistributedDataParallel"
    assert found["unused-not-found"] == "ok DistributedDataParallel"


def test_fsdp1_refuses_two_dtypes_in_one_unit_and_accelerates_cpu(tmp_path: Path) -> None:
    code = """
from torch.distributed.fsdp import FullyShardedDataParallel
def wrap(dtype, device):
    pair = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).to(dtype))
    FullyShardedDataParallel(pair, use_orig_params=True, device_id=torch.device(device))
attempt("same", lambda: wrap(torch.float32, "cpu"))
attempt("other", lambda: wrap(torch.bfloat16, "cpu"))
from accelerate import PartialState
attempt("accelerate", lambda: wrap(torch.float32, PartialState(cpu=True).device))
"""
    found = alone(code, tmp_path)
    assert found["same"].startswith("ok")
    assert "Must flatten tensors with uniform dtype" in found["other"]
    assert not found["accelerate"].startswith("ok")


def test_fsdp1_shards_nothing_on_one_device(tmp_path: Path) -> None:
    code = """
from types import SimpleNamespace
from torch.distributed.fsdp import ShardingStrategy, _init_utils
def strategy():
    state = SimpleNamespace(
        rank=0, world_size=1, process_group=torch.distributed.group.WORLD
    )
    _init_utils._init_core_state(
        state, ShardingStrategy.FULL_SHARD, None, None, False, True, None, None
    )
    return state.sharding_strategy.name
attempt("strategy", strategy)
"""
    assert alone(code, tmp_path)["strategy"] == "ok NO_SHARD"


ZERO = """
import deepspeed
from harness.ranks import deepspeed_build
from transformers import get_polynomial_decay_schedule_with_warmup as schedule
deepspeed_build.load_host_collectives()
deepspeed.init_distributed(auto_mpi_discovery=False)
def config(stage):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
def dtype():
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        return torch.nn.Linear(4, 4, dtype=torch.bfloat16).weight.dtype
def polynomial(stage):
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    engine = deepspeed.initialize(model=layer, optimizer=optimizer, config=config(stage))
    return schedule(engine[1], 0, 10)
attempt("dtype", dtype)
for stage in (1, 2, 3):
    attempt(f"stage{stage}", lambda: polynomial(stage))
"""


def test_zero_3_reads_fp32_and_zero_optimizers_have_no_defaults(
    tmp_path: Path, extensions: Path
) -> None:
    found = alone(ZERO, tmp_path, TORCH_EXTENSIONS_DIR=str(extensions))
    assert found["dtype"] == "ok torch.float32"
    for stage in (1, 2, 3):
        assert "has no attribute 'defaults'" in found[f"stage{stage}"]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_mixed_precision_destroys_packed_bytes(stored: torch.dtype) -> None:
    """What DeepSpeed and FSDP2 do to every floating-point parameter, done to 4-bit weights."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    packed, state = quantize_4bit(weight, quant_type="nf4", quant_storage=stored)
    kept = dequantize_4bit(packed, state)
    cast = packed.to(torch.bfloat16).to(stored)
    assert not torch.equal(dequantize_4bit(cast, state), kept)
    packed, state = quantize_4bit(weight, quant_type="nf4", quant_storage=torch.bfloat16)
    assert torch.equal(dequantize_4bit(packed.to(torch.bfloat16), state), kept)


def test_accelerate_exchanges_optimizers_that_are_offloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import bitsandbytes
    from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed
    from deepspeed.ops import adam, lion

    made = []

    class Recorded:
        def __init__(self, groups: object, **options: object) -> None:
            made.append((type(self).__name__, options["adamw_mode"]))

    # Their kernels would be compiled.
    monkeypatch.setattr(adam, "DeepSpeedCPUAdam", type("Adam", (Recorded,), {}))
    monkeypatch.setattr(lion, "DeepSpeedCPULion", type("Lion", (Recorded,), {}))
    parameter = torch.nn.Parameter(torch.ones(4))
    for optimizer in (
        torch.optim.AdamW([parameter]),
        bitsandbytes.optim.Lion32bit([parameter]),
        torch.optim.SGD([parameter], lr=1.0),
        bitsandbytes.optim.AdamW8bit([parameter]),
    ):
        map_pytorch_optim_to_deepspeed(optimizer)
    # Adam with decoupled decay; Lion; and two that are neither what they were nor AdamW.
    assert made == [("Adam", True), ("Lion", False), ("Adam", False), ("Adam", False)]


def test_what_a_stage_of_zero_divides_is_deepspeeds_word() -> None:
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    # optimizer_states is 1, gradients 2, weights 3; each divides what those below it divide.
    names = {"optimizer_states": "optimizer", "gradients": "gradients", "weights": "parameters"}
    stages = {names[each.name]: each.value for each in config.ZeroStageEnum if each.name in names}
    for name, strategy in STRATEGIES.items():
        if strategy.zero_stage:
            divided = {what for what, stage in stages.items() if stage <= strategy.zero_stage}
            assert {*strategy.shards} == divided, name


def test_the_table_says_distributed_types_of_accelerate() -> None:
    from accelerate.utils import DistributedType

    known = {each.value for each in DistributedType}
    assert {each for s in STRATEGIES.values() for each in s.distributed_types} <= known
