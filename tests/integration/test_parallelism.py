"""Every kind of parallelism on two real ranks: the shipped matrix on the tiny model, less a few of
its cells, with one process beside it that does the same samples in each optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from harness.records.reading import read_record
from harness.records.record import Record

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# In fp32 the kinds do the same sums in another order: 1e-4 is a hundred times what that makes.
TOLERANCE = 1e-4
# TRL turns QLoRA's adapters to bf16; ZeRO trains fp32 copies of them, the others do not.
COPIES_TOLERANCE = 1e-3
SHARDED = ("fsdp", "zero3", "zero3-offload")
WHOLE = ("ddp", "zero1", "zero2")
METHODS = ("lora", "qlora", "full")
TYPES = {"ddp": "MULTI_CPU", "fsdp": "FSDP"}
# Kinds that differ little from another share the methods among them, for the time it takes.
ONCE = {"zero1": "full", "zero2": "lora", "zero3-offload": "qlora"}
CASES = [
    (method, kind)
    for kind in (*WHOLE, *SHARDED)
    for method in METHODS
    if ONCE.get(kind, method) == method
]


class Ran(NamedTuple):
    directory: Path
    record: Record


@pytest.fixture(scope="module")
def ran(tunebench, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Ran]:  # type: ignore[no-untyped-def]
    directory = tmp_path_factory.mktemp("parallelism")
    left_out = [
        f"  - {{method: {method}, parallelism: {kind}}}\n"
        for kind in ONCE
        for method in METHODS
        if (method, kind) not in CASES
    ]
    shipped = (ROOT / "matrices/parallelism.yaml").read_text()
    (directory / "parallelism.yaml").write_text(f"{shipped}exclude:\n{''.join(left_out)}")
    done = tunebench(
        *("run", "parallelism.yaml", "--set", "model.name=tiny-llama", "--no-predict"),
        # 18 sequences: the epoch ends with the fifth step, which has two of them.
        *("--set", "data.max_samples=2"),
        cwd=directory,
        timeout=1700,
    )
    assert done.code == 0, done.err[-3000:]
    assert "resource_tracker" not in done.err, "what ranks leave behind is no news"
    found = {}
    for path in (directory / "results/parallelism").glob("*/record.json"):
        record = read_record(path)
        if record.cell.method != "base":
            found[record.cell.method, record.cell.parallelism] = Ran(path.parent, record)
    return found


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_it_trains_as_one_process_does(
    ran: dict[tuple[str, str], Ran], method: str, kind: str
) -> None:
    alone, spread = ran[method, "single"].record, ran[method, kind].record
    assert (alone.status, spread.status) == ("ok", "ok"), spread.reason
    assert spread.verified.world_size == 2
    assert spread.verified.distributed_type == TYPES.get(kind, "DEEPSPEED")
    copies = method == "qlora" and kind.startswith("zero")
    tolerance = COPIES_TOLERANCE if copies else TOLERANCE
    assert spread.quality.train_loss == pytest.approx(alone.quality.train_loss, rel=tolerance)
    # The same samples, shared out and counted once, and the same step taken with them.
    assert spread.speed.tokens == alone.speed.tokens
    mine, other = spread.steps, alone.steps
    assert other.samples == [4, 4, 4, 4, 2, 4]
    for counted in ("samples", "micro_batches", "tokens_loss", "loss_divisor", "learning_rate"):
        assert getattr(mine, counted) == getattr(other, counted), counted
    # QLoRA's gradients are bf16, which has 8 bits.
    bits = 0.03 if method == "qlora" else 1e-3
    assert mine.gradient_norm == pytest.approx(other.gradient_norm, rel=bits)
    [task] = spread.quality.tasks
    found, wanted = (record.quality.tasks[task].metrics for record in (spread, alone))
    assert {name: metric.value for name, metric in found.items()} == pytest.approx(
        {name: metric.value for name, metric in wanted.items()}, rel=tolerance
    )


@pytest.mark.parametrize("method", METHODS)
def test_only_what_shards_parameters_halves_them(
    ran: dict[tuple[str, str], Ran], method: str
) -> None:
    for kind in (kind for each, kind in CASES if each == method):
        ranks = ran[method, kind].record.ranks
        assert [rank.rank for rank in ranks] == [0, 1]
        for rank in ranks:
            # Padding to equal parts is all that may come on top.
            share = 0.5 if kind in SHARDED else 1.0
            assert rank.parameter_share == pytest.approx(share, abs=0.002), (kind, rank)
            assert rank.parameter_bytes is not None
            assert rank.whole_parameter_bytes is not None
            if method != "qlora":  # whose adapters TRL turns to bf16
                # All in fp32: bytes tell the same.
                held = rank.parameter_bytes / rank.whole_parameter_bytes
                assert held == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize("kind", [kind for kind in (*WHOLE, *SHARDED) if kind != "zero1"])
def test_the_adapter_that_is_put_together_is_the_one_of_one_process(
    ran: dict[tuple[str, str], Ran], kind: str
) -> None:
    for method in (method for method, each in CASES if each == kind and method != "full"):
        wanted = load_file(ran[method, "single"].directory / "adapter/adapter_model.safetensors")
        found = load_file(ran[method, kind].directory / "adapter/adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            copies = method == "qlora" and kind.startswith("zero")
            torch.testing.assert_close(
                found[name].float(), tensor.float(), rtol=1e-2, atol=2e-3 if copies else 1e-4
            )


def test_ddp_sends_the_gradients_of_what_is_trained(ran: dict[tuple[str, str], Ran]) -> None:
    for method in METHODS:
        record = ran[method, "ddp"].record
        assert record.artifacts.trainable_parameters is not None
        # TRL turns QLoRA's adapters to bf16.
        each = 2 if method == "qlora" else 4
        gradients = each * record.artifacts.trainable_parameters
        for rank in record.ranks:
            assert rank.communication is not None
            sent = rank.communication.bytes["allreduce_"]
            # And a few numbers: the norm of the gradients, the number of tokens.
            assert gradients <= sent <= gradients + 4096


def test_each_rank_is_measured_by_phase(ran: dict[tuple[str, str], Ran]) -> None:
    for name, (directory, record) in ran.items():
        count = record.cell.ranks
        for phase in ("load", "forward", "backward", "optimizer_step"):
            assert len(record.memory.phases[phase]) == count, name  # type: ignore[index]
        peaks = [
            reading.ledger_peak_bytes
            for phase in ("forward", "backward", "optimizer_step")
            for reading in record.memory.phases[phase]  # type: ignore[index]
        ]
        assert record.memory.peak_bytes == max(peak for peak in peaks if peak is not None)
        assert len(record.memory.phases["evaluation"]) == 1
        assert not [*directory.rglob(".part-*")]


def test_the_recorded_command_does_it_again(  # type: ignore[no-untyped-def]
    ran: dict[tuple[str, str], Ran], tunebench
) -> None:
    first = ran["lora", "zero3"]
    done = tunebench("rerun", str(first.directory), "--no-predict", cwd=first.directory.parent)
    assert done.code == 0, done.err[-3000:]
    again = read_record(Path(done.out.strip()))
    assert again.attempt == 2
    assert again.quality.train_loss == pytest.approx(first.record.quality.train_loss, rel=1e-6)
    assert len(again.ranks) == 2
