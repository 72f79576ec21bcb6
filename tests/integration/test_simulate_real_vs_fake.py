"""The ledger on real CPU tensors against the simulation on fake ones: the same cells, to the byte.

Real: the worker's own memory steps. Fake: the simulating process with the CPU engine. What differs
is named below, with its reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from bitsandbytes.optim import GlobalOptimManager
from conftest import ROOT

from harness.meters.memory.ledger import BLOCK_BYTES, block_bytes
from harness.models import packaged
from harness.records.prediction import Prediction, Request
from harness.records.record import Record
from matrices.cell import Adapter, Cell, Data, Model, Optimizer, Quantization, Train

# Made by the test: biases in 4-bit layers, experts in fused parameters, linear layers that
# transformers does not convert.
MADE = {"tiny-qwen2": "qwen2", "tiny-mixtral": "mixtral", "tiny-falcon": "falcon"}
SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# bitsandbytes makes an unsigned code table (256 floats) that Lion never uses and leaves it on the
# host, which here is the device; the simulation computes tables outside of its memory.
UNUSED_TABLE = 256 * 4
# The steady state is read when the last step is done; its batch and three scalars of the trainer's
# (losses and the norm of the gradient) are still held, which the real ledger, read when training
# has returned, does not see any more.
SCALARS = 3 * BLOCK_BYTES
PHASES = ("kbit_preparation", "forward", "backward", "optimizer_step")


def cell(method: str, **settings: Any) -> Cell:
    """Two rows of 64 tokens through tiny-llama; `settings` are leaves of any section."""
    sections: dict[str, Any] = {"model": Model, "data": Data, "train": Train}
    if method != "full":
        sections["adapter"] = Adapter
    if method == "qlora":
        sections["quantization"] = Quantization
    settings = {"name": "tiny-llama", "max_length": 64, "steps": 1} | settings
    parts = {}
    for name, section in sections.items():
        own = {key: settings.pop(key) for key in list(settings) if key in section.model_fields}
        parts[name] = section(**own)
    assert not settings, settings
    return Cell(method=method, **parts)  # type: ignore[arg-type]


CHECKPOINTING: dict[str, dict[str, bool]] = {
    "no checkpointing": {},
    "reentrant": {"gradient_checkpointing": True, "use_reentrant": True},
    "non-reentrant": {"gradient_checkpointing": True},
}
CELLS = {
    **{
        f"{method}, {name}": cell(method, **settings)
        for method in ("full", "lora", "qlora")
        for name, settings in CHECKPOINTING.items()
    },
    **{f"full, {name}": cell("full", optimizer=name) for name in get_args(Optimizer)[1:]},
    "full, fp32, eager": cell(
        "full", weight_dtype="fp32", compute_dtype="fp32", attn_implementation="eager"
    ),
    "lora, dropout, accumulation": cell(
        "lora", dropout=0.1, target_modules="all-linear", gradient_accumulation_steps=2
    ),
    "lora, no autocast": cell("lora", autocast=False),
    "lora, padded": cell("lora", packing=False),
    "lora, two sequences in a row": cell("lora", packing_strategy="bfd"),
    "lora, one sequence in a row": cell("lora", packing_strategy="bfd", micro_batch_size=1),
    "qlora, double quantization": cell("qlora", double_quant=True),
    "qlora, fp4, unprepared": cell(
        "qlora", quant_type="fp4", kbit_preparation=False, target_modules="mlp"
    ),
    "qlora, bf16 storage": cell("qlora", quant_storage="bf16", gradient_checkpointing=True),
    "qlora, biases": cell("qlora", name="tiny-qwen2", lora_config={"bias": "all"}),
    "qlora, experts": cell("qlora", name="tiny-mixtral"),
    "qlora, nothing converted": cell("qlora", name="tiny-falcon"),
    "lora, experts adapted": cell(
        "lora", name="tiny-mixtral", lora_config={"target_parameters": ["experts.down_proj"]}
    ),
    **{
        f"lora, {name}": cell("lora", lora_config=arguments)
        for name, arguments in {
            "patterns": {"rank_pattern": {"q_proj": 8}, "exclude_modules": ["k_proj"]},
            "one layer": {"layers_to_transform": [0], "use_rslora": True},
            "tokens": {"trainable_token_indices": [5, 6]},
            "head and embedding": {"modules_to_save": ["embed_tokens", "lm_head"]},
            "dora": {"use_dora": True},
            "pissa": {"init_lora_weights": "pissa"},
        }.items()
    },
    "lora, embedding adapted": cell("lora", target_modules=("embed_tokens", "q_proj")),
    "qlora, dora": cell("qlora", lora_config={"use_dora": True}),
    "qlora, head": cell("qlora", lora_config={"modules_to_save": ["lm_head"]}),
    "qlora, olora": cell("qlora", lora_config={"init_lora_weights": "olora"}),
}


@pytest.fixture(scope="module")
def cells(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cell]:
    """CELLS, with the models that are made here in their directories."""
    directory = tmp_path_factory.mktemp("models")
    for name, kind in MADE.items():
        heads = {} if kind == "falcon" else {"num_key_value_heads": 2}
        config = transformers.AutoConfig.for_model(kind, **SIZES, **heads)
        made = transformers.AutoModelForCausalLM.from_config(config)
        made.to(torch.bfloat16).save_pretrained(directory / name)
        tokenizer = packaged.ensure_model("tiny-llama") / "tokenizer.json"
        transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer), eos_token="</s>", pad_token="<pad>"
        ).save_pretrained(directory / name)
    return {
        name: each.model_copy(
            update={
                "model": each.model.model_copy(update={"name": str(directory / each.model.name)})
            }
        )
        if each.model.name in MADE
        else each
        for name, each in CELLS.items()
    }


@pytest.fixture(scope="module")
def predicted(
    environment: dict[str, str], cells: dict[str, Cell], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Prediction]:
    """By the cell's name, as the simulating process answers."""
    path = tmp_path_factory.mktemp("request") / "request.json"
    request = Request(cells=list(cells.values()), engine="fake-cpu", workers=2)
    path.write_text(request.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-m", "harness.simulate", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    names = list(CELLS)
    return {
        names[answer["index"]]: Prediction.model_validate_json(json.dumps(answer["prediction"]))
        for answer in answers
    }


@pytest.fixture(scope="module")
def workspace(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A directory to measure in, with the tiny model where the worker looks for it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TUNEBENCH_CACHE", "HF_HUB_OFFLINE", "HF_HOME"):
            patch.setenv(name, environment[name])
        yield tmp_path_factory.mktemp("measured")
    # transformers tells bitsandbytes' one manager which weights (by id) keep 32-bit states; a later
    # test's weights may get the same ids.
    GlobalOptimManager.get_instance().initialize()


def measure(wanted: Cell, directory: Path) -> Record:
    """Only the worker's untimed memory steps, on real tensors."""
    from harness import phases as cell_phases
    from harness.measurement import Measurement
    from harness.models import model
    from harness.records import provenance

    directory.mkdir()
    job = Measurement(provenance.new_record(wanted, []), directory)
    tokenizer = model.load_tokenizer(wanted.model)
    cell_phases.memory_steps(job, cell_phases.load(job), tokenizer)
    return job.record


def batch_bytes(of: Cell) -> int:
    """Ids, labels and mask (or positions), int64, of every micro batch of a step; packed sequences
    come with their bounds and their numbers, a block each."""
    assert of.train is not None
    assert of.data is not None
    rows = block_bytes(8 * of.train.micro_batch_size * of.data.max_length)
    bounds = 0 if of.data.packing_strategy == "wrapped" else 2 * BLOCK_BYTES
    return of.train.gradient_accumulation_steps * (3 * rows + bounds)


def without_table(name: str) -> int:
    return UNUSED_TABLE if "lion_8bit" in name else 0


@pytest.mark.parametrize("name", CELLS)
def test_a_fake_step_takes_the_bytes_of_a_real_one(
    name: str, predicted: dict[str, Prediction], cells: dict[str, Cell], workspace: Path
) -> None:
    told = predicted[name]
    assert told.status == "predicted", told.reason
    real = measure(cells[name], workspace / str(list(CELLS).index(name)))
    missing = without_table(name)
    phases = {
        phase: rank.ledger_peak_bytes - missing
        for phase, [rank] in real.memory.phases.items()
        if phase in PHASES and rank.ledger_peak_bytes is not None
    }
    assert {phase: told.memory.by_phase.get(phase) for phase in phases} == phases
    assert real.memory.peak_bytes is not None
    assert told.memory.peak_allocated_bytes == real.memory.peak_bytes - missing
    assert told.memory.peak_phase == real.memory.peak_phase
    assert told.memory.resident == real.memory.resident
    if not missing:
        assert told.memory.by_category == real.memory.by_category
    assert told.speed.flops_per_step == real.speed.flops_per_step
    [rank] = real.memory.phases["optimizer_step"]
    assert rank.ledger_end_bytes is not None
    still_held = batch_bytes(CELLS[name]) + SCALARS
    assert told.memory.steady_allocated_bytes == rank.ledger_end_bytes - missing + still_held
    assert told.trainable_parameters == real.artifacts.trainable_parameters
    assert told.total_parameters == real.artifacts.total_parameters
    assert told.quantized_share == real.verified.quantized_share
