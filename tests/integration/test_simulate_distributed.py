"""Several devices: what rank 0 holds between steps, against what each way of sharding promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.records.prediction import Prediction, Request
from harness.simulate.parallel import zero
from matrices.cell import Adapter, Cell, Data, Method, Model, Parallelism, Quantization, Train
from matrices.errors import UserError

pytestmark = pytest.mark.slow

HIDDEN, LAYERS, VOCABULARY, WIDTH, LENGTH = 256, 2, 1024, 512, 128
# All of llama's weights: embedding and head, q k v o, gate up down, two norms a layer, one more.
PARAMETERS = (
    2 * VOCABULARY * HIDDEN + LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * WIDTH + 2 * HIDDEN) + HIDDEN
)
CUBLAS = 2 * 8_519_680  # two threads multiply: the program's and autograd's
# Blocks of 512 bytes for a few hundred tensors, the rows of token ids, and scalars.
SMALL = 2**16
# torch hands out a free block whole when no more than this is left over.
UNSPLIT = 2**20

ZERO: tuple[tuple[Parallelism, int], ...] = (
    ("zero1", 2),
    ("zero1", 4),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3", 4),
    ("zero3-offload", 2),
)

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


def cell(path: Path, parallelism: Parallelism, devices: int, method: Method = "full") -> Cell:
    quantized = Quantization(quant_storage="bf16", kbit_preparation=False)
    return Cell(
        method=method,
        model=Model(name="tiny", config=str(path)),
        data=Data(max_length=LENGTH),
        train=Train(micro_batch_size=1, autocast=False),
        adapter=None if method == "full" else Adapter(rank=8),
        quantization=quantized if method == "qlora" else None,
        parallelism=parallelism,
        devices=devices,
    )


@pytest.fixture(scope="module")
def predicted(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, Parallelism, int], Prediction]:
    folder = tmp_path_factory.mktemp("several")
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG))
    full: list[tuple[Parallelism, int]] = [
        ("single", 1),
        ("ddp", 2),
        ("fsdp", 2),
        ("fsdp", 3),
        ("fsdp", 4),
        ("fsdp1", 2),
        ("fsdp", 2000),
        *ZERO,
    ]
    cells = [cell(path, kind, count) for kind, count in full]
    cells += [cell(path, kind, 2, "lora") for kind in ("fsdp", "fsdp1", "ddp")]
    cells += [cell(path, kind, 2, "qlora") for kind in ("fsdp", "fsdp1")]
    request = folder / "request.json"
    request.write_text(Request(cells=cells, self_check=False, workers=2).model_dump_json())
    done = subprocess.run(
        [sys.executable, "-m", "harness.simulate", str(request)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = {}
    for line in done.stdout.splitlines():
        made = Prediction.model_validate_json(json.dumps(json.loads(line)["prediction"]))
        found[made.cell.method, made.cell.parallelism, made.cell.devices] = made
    assert len(found) == len(cells)
    return found


Predicted = dict[tuple[str, Parallelism, int], Prediction]


def steady(predicted: Predicted, kind: Parallelism, devices: int, method: str = "full") -> int:
    made = predicted[method, kind, devices]
    assert made.status == "predicted", made.reason
    assert made.memory.steady_allocated_bytes is not None
    return made.memory.steady_allocated_bytes


def test_fsdp2_divides_parameters_and_adam_states(predicted: Predicted) -> None:
    """bf16: 2 bytes and two states of 2; gradients are gone between steps."""
    for devices in (2, 4):
        expected = 6 * PARAMETERS // devices + CUBLAS
        assert steady(predicted, "fsdp", devices) == pytest.approx(expected, abs=SMALL)


def test_fsdp2_gives_the_first_rank_the_larger_share(predicted: Predicted) -> None:
    """Rows that three ranks do not divide: ceil(rows / 3) of each weight are on rank 0."""
    third = (
        2 * -(-VOCABULARY // 3) * HIDDEN
        + LAYERS * (4 * -(-HIDDEN // 3) * HIDDEN + 2 * -(-WIDTH // 3) * HIDDEN)
        + LAYERS * -(-HIDDEN // 3) * WIDTH
        + (2 * LAYERS + 1) * -(-HIDDEN // 3)
    )
    assert third * 3 > PARAMETERS
    assert steady(predicted, "fsdp", 3) == pytest.approx(6 * third + CUBLAS, abs=SMALL)


def test_fsdp1_keeps_the_gradient_shard(predicted: Predicted) -> None:
    expected = 8 * PARAMETERS // 2 + CUBLAS
    assert steady(predicted, "fsdp1", 2) == pytest.approx(expected, abs=SMALL)


def test_ddp_adds_buckets_of_the_gradients(predicted: Predicted) -> None:
    added = steady(predicted, "ddp", 2) - steady(predicted, "single", 1)
    assert added == pytest.approx(2 * PARAMETERS, abs=SMALL)
    assert any("buckets" in said for said in predicted["full", "ddp", 2].modelled)


def test_adapters_in_ddp_add_their_own_gradients_only(predicted: Predicted) -> None:
    made = predicted["lora", "ddp", 2]
    trained = LAYERS * 4 * 2 * 8 * HIDDEN  # A and B of rank 8 on q, k, v, o
    assert made.trainable_parameters == trained
    # bf16 base; adapters, their two states and their buckets in fp32.
    expected = 2 * PARAMETERS + 16 * trained + CUBLAS
    assert steady(predicted, "ddp", 2, "lora") == pytest.approx(expected, abs=SMALL + UNSPLIT)


@pytest.mark.parametrize("kind", ["fsdp", "fsdp1"])
def test_four_bit_weights_are_divided_and_their_state_is_not(
    predicted: Predicted, kind: Parallelism
) -> None:
    linear = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * WIDTH)
    trained = LAYERS * 4 * 2 * 8 * HIDDEN
    packed, rest = linear // 2, 2 * (PARAMETERS - linear)
    # One fp32 absmax for 64 weights, and a code map of 16 fp32 values (512 bytes) a layer.
    state = 4 * linear // 64 + 7 * LAYERS * 512
    kept = 16 if kind == "fsdp1" else 12
    expected = (packed + rest + kept * trained) // 2 + state + CUBLAS
    assert steady(predicted, kind, 2, "qlora") == pytest.approx(expected, abs=2 * SMALL)


def test_ranks_are_listed_and_said_to_be_alike(predicted: Predicted) -> None:
    made = predicted["full", "fsdp", 4]
    assert [each.rank for each in made.per_rank] == [0, 1, 2, 3]
    assert any("alike" in said for said in made.modelled)


def test_more_ranks_than_rows_is_one_line(predicted: Predicted) -> None:
    made = predicted["full", "fsdp", 2000]
    assert made.status == "invalid"
    assert made.reason is not None
    assert "1024" in made.reason
    assert "\n" not in made.reason


def test_zero_without_deepspeed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None is how Python marks a module that must not be imported.
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="pip install deepspeed") as raised:
        zero.environment(cell(tmp_path, "zero1", 2))
    assert "\n" not in str(raised.value)


def test_zero_1_and_2_divide_what_the_optimizer_holds(predicted: Predicted) -> None:
    """fp32 copies and two Adam states, 12 bytes; the bf16 weights stay whole."""
    saved = steady(predicted, "zero1", 2) - steady(predicted, "zero1", 4)
    assert saved == pytest.approx(12 * PARAMETERS / 4, abs=SMALL + UNSPLIT)
    expected = 2 * PARAMETERS + 12 * PARAMETERS // 2 + CUBLAS
    for kind in ("zero1", "zero2"):
        assert steady(predicted, kind, 2) == pytest.approx(expected, abs=SMALL + UNSPLIT)


def test_zero_3_divides_weights_and_gradients_too(predicted: Predicted) -> None:
    """2 bytes of weights, 12 of the optimizer, and the fp32 gradients that stay in their buffer."""
    saved = steady(predicted, "zero3", 2) - steady(predicted, "zero3", 4)
    assert saved == pytest.approx(18 * PARAMETERS / 4, abs=SMALL + UNSPLIT)


def test_offload_moves_the_shards_to_the_host(predicted: Predicted) -> None:
    saved = steady(predicted, "zero3", 2) - steady(predicted, "zero3-offload", 2)
    assert saved == pytest.approx(18 * PARAMETERS / 2, abs=SMALL + 2 * UNSPLIT)
    rank = predicted["full", "zero3-offload", 2].per_rank[0]
    assert rank.host_bytes >= 18 * PARAMETERS // 2
    assert predicted["full", "zero3", 2].per_rank[0].host_bytes < SMALL
