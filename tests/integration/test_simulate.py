"""The simulating process, end to end: closed forms of what training holds, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.records.prediction import Prediction, Request
from matrices.catalogue.gpus import gpu
from matrices.cell import Adapter, Cell, Data, Model, Quantization, Train

pytestmark = pytest.mark.slow

HIDDEN, LAYERS, VOCABULARY, WIDTH, LENGTH = 256, 4, 1024, 512, 128
# All of llama's weights: embedding and head, q k v o, gate up down, two norms a layer, one more.
NORMS = (2 * LAYERS + 1) * HIDDEN
MATRICES = 2 * VOCABULARY * HIDDEN + LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * WIDTH)
PARAMETERS = MATRICES + NORMS
TRAINED_LAYERS = 7 * LAYERS
CUBLAS = 2 * 8_519_680  # two threads multiply: the program's and autograd's
# Rows of token ids and labels, int64, kept by the trainer from one step to the next.
BATCH = 2 * 8 * 2 * LENGTH

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def cell(config: Path, method: str, **sections: Any) -> Cell:
    train: dict[str, Any] = {"autocast": False, "gradient_checkpointing": True}
    return Cell(
        method=method,  # type: ignore[arg-type]
        model=Model(name="tiny", config=str(config), **sections.get("model", {})),
        data=Data(max_length=LENGTH),
        train=Train(**(train | sections.get("train", {}))),
        adapter=None if method == "full" else Adapter(**sections.get("adapter", {})),
        quantization=Quantization(**sections.get("quantization", {}))
        if method == "qlora"
        else None,
    )


def ask(request: Request, folder: Path, *before: str) -> list[Prediction]:
    """Answers in the order of the request; `before` is Python to be run first."""
    asked = folder / "request.json"
    asked.write_text(request.model_dump_json())
    code = "; ".join(
        [
            *before,
            "import runpy, sys",
            f"sys.argv = ['simulate', {str(asked)!r}]",
            "runpy.run_module('harness.simulate', run_name='__main__')",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for line in done.stdout.splitlines():
        answer = json.loads(line)
        text = json.dumps(answer["prediction"])
        found[answer["index"]] = Prediction.model_validate_json(text)
    assert sorted(found) == list(range(len(request.cells)))
    return [found[index] for index in range(len(request.cells))]


@pytest.fixture(scope="module")
def answers(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prediction]:
    """Every cell of this file in one process, which imports the stack once."""
    cells = {
        "full": cell(config, "full"),
        "full-sgd": cell(config, "full", train={"optimizer": "sgd"}),
        "full-fused": cell(config, "full", train={"optimizer": "adamw_torch_fused"}),
        "full-paged": cell(config, "full", train={"optimizer": "paged_adamw_32bit"}),
        "lora": cell(config, "lora", adapter={"rank": 8, "target_modules": "all-linear"}),
        "lora-seed": cell(
            config, "lora", adapter={"rank": 8, "target_modules": "all-linear"}
        ).model_copy(update={"seed": 7}),
        "nf4": cell(config, "qlora", quantization={"kbit_preparation": False}),
        "nf4-dq": cell(
            config, "qlora", quantization={"kbit_preparation": False, "double_quant": True}
        ),
        "unknown-type": cell(config, "full", model={"config_overrides": {"model_type": "lama"}}),
        "no-such-module": cell(config, "lora", adapter={"target_modules": ("c_attn",)}),
        "too-many-ranks": cell(config, "full").model_copy(
            update={"parallelism": "fsdp", "devices": 4096}
        ),
    }
    request = Request(
        cells=list(cells.values()),
        judge=[
            gpu("a100-80gb"),
            gpu("a100-80gb").model_copy(
                update={"name": "tiny-gpu", "memory_bytes": 40 * 2**20, "context_bytes": 0}
            ),
        ],
    )
    found = ask(request, tmp_path_factory.mktemp("answers"))
    return dict(zip(cells, found, strict=True))


def blocks(nbytes: int) -> int:
    return -(-nbytes // 512) * 512


def test_versions_and_engine_are_named(answers: dict[str, Prediction]) -> None:
    import torch
    import transformers

    found = answers["full"]
    assert found.engine == "fake-cuda"
    assert found.stack["transformers"] == transformers.__version__
    assert found.stack["torch"] == torch.__version__
    assert found.total_parameters == found.trainable_parameters == PARAMETERS


def test_full_fine_tuning_holds_weights_and_two_states(answers: dict[str, Prediction]) -> None:
    # bf16 throughout: 2 bytes a weight and 2 for each of Adam's moments; norms are 512 bytes.
    held = 6 * PARAMETERS
    steady = answers["full"].memory.steady_allocated_bytes
    assert steady is not None
    rest = steady - held - CUBLAS - BATCH
    # Adam's step counters are on the host; what is left are scalars and rotary tables.
    assert 0 <= rest < 32 * 512


def test_gradients_and_a_foreach_temporary_at_the_peak(answers: dict[str, Prediction]) -> None:
    memory = answers["full"].memory
    # Published for this path: weights, gradients, two moments and one temporary, 10 bytes.
    assert memory.by_phase["optimizer_step"] - CUBLAS - BATCH == pytest.approx(
        10 * PARAMETERS, abs=64 * 512
    )
    assert memory.by_category["workspaces"] == CUBLAS


def test_a_fused_step_needs_no_temporary(answers: dict[str, Prediction]) -> None:
    # Its step counters are on the device, a block for each of the 39 parameters.
    memory = answers["full-fused"].memory
    assert memory.by_phase["optimizer_step"] - CUBLAS - BATCH == pytest.approx(
        8 * PARAMETERS, abs=128 * 512
    )


def test_sgd_without_momentum_holds_weights_only(answers: dict[str, Prediction]) -> None:
    steady = answers["full-sgd"].memory.steady_allocated_bytes
    assert steady is not None
    assert 0 <= steady - 2 * PARAMETERS - CUBLAS - BATCH < 32 * 512


def test_paged_states_lie_outside_of_the_pool(answers: dict[str, Prediction]) -> None:
    memory = answers["full-paged"].memory
    # bitsandbytes pages states from 100,000 elements on: embedding, head, gate, up and down here.
    paged = 2 * VOCABULARY * HIDDEN + 3 * LAYERS * HIDDEN * WIDTH
    assert memory.outside_pool_bytes == 2 * 4 * paged
    assert memory.steady_allocated_bytes is not None
    inside = memory.steady_allocated_bytes - CUBLAS - BATCH - 2 * PARAMETERS
    assert inside == pytest.approx(2 * 4 * (PARAMETERS - paged), abs=64 * 512)


def test_lora_trains_adapters_in_fp32(answers: dict[str, Prediction]) -> None:
    found = answers["lora"]
    adapters = LAYERS * 8 * (4 * 2 * HIDDEN + 3 * (HIDDEN + WIDTH))
    assert found.trainable_parameters == adapters
    assert found.memory.by_category["adapters"] == 4 * adapters
    steady = found.memory.steady_allocated_bytes
    assert steady is not None
    assert 0 <= steady - 2 * PARAMETERS - 12 * adapters - CUBLAS - BATCH < 64 * 512


def test_a_seed_changes_nothing_and_is_not_simulated_again(answers: dict[str, Prediction]) -> None:
    one, other = answers["lora"], answers["lora-seed"]
    assert one.cell_id != other.cell_id
    assert one.memory == other.memory
    assert one.simulation_seconds == other.simulation_seconds


@pytest.mark.parametrize("double_quant", [False, True])
def test_four_bit_bytes(answers: dict[str, Prediction], double_quant: bool) -> None:
    found = answers["nf4-dq" if double_quant else "nf4"].memory
    shapes = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, WIDTH)] * 3
    packed = LAYERS * sum(rows * columns // 2 for rows, columns in shapes)
    assert found.resident["quantized_weights"] == packed
    state = 0
    for rows, columns in shapes * LAYERS:
        scales = rows * columns // 64
        state += 16 * 4  # the code of the 16 values
        if double_quant:
            # 8-bit scales, their fp32 offset, one fp32 scale for 256 of them, a code of 256.
            state += scales + 4 + 4 * -(-scales // 256) + 256 * 4
        else:
            state += 4 * scales
    assert found.resident["quantization_state"] == state


def test_verdicts(answers: dict[str, Prediction]) -> None:
    large, small = answers["full"].verdicts
    assert (large.outcome, small.outcome) == ("fits", "oom")
    assert small.oom is not None
    assert small.oom.reserved_bytes + small.oom.requested_bytes > small.capacity_bytes
    assert small.oom.phase in ("load", "forward", "backward", "optimizer_step")


def test_categories_add_up_to_the_peak(answers: dict[str, Prediction]) -> None:
    for found in answers.values():
        if found.status == "predicted":
            memory = found.memory
            assert sum(memory.by_category.values()) == memory.peak_allocated_bytes
            assert memory.peak_phase is not None
            assert memory.by_phase[memory.peak_phase] == memory.peak_allocated_bytes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unknown-type", ["config.json", "lama"]),
        ("no-such-module", ["c_attn", "adapter.target_modules", "q_proj"]),
        ("too-many-ranks", ["4096", "devices"]),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_a_line(
    answers: dict[str, Prediction], name: str, words: list[str]
) -> None:
    found = answers[name]
    assert found.status == "invalid"
    assert found.reason is not None
    assert "\n" not in found.reason
    for word in words:
        assert word in found.reason


def test_another_torch_falls_back_and_says_so(config: Path, tmp_path: Path) -> None:
    # A torch whose engine does not see the device that was made for it.
    other = "import torch; torch.accelerator.current_accelerator = lambda *_, **__: None"
    request = Request(cells=[cell(config, "lora")], judge=[gpu("rtx-4090")])
    [found] = ask(request, tmp_path, other)
    assert (found.status, found.engine) == ("predicted", "fake-cpu")
    assert found.margin is not None
    assert found.margin >= 0.05
    assert any("fake cuda device cannot be had" in said for said in found.assumptions)
