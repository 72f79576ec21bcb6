"""`tunebench fit`: what is searched, and what each change saves when nothing fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.records.prediction import PredictedMemory, Prediction, Verdict
from launch.fit import fit as fitting
from launch.fit import memory_savings as changes
from launch.fit import search
from launch.fit.fit import (
    FitRequest,
    checked_methods,
    checked_parallelism,
    fit_json,
    model_settings,
    positions,
    templates,
)
from launch.fit.memory_savings import memory_savings
from launch.fit.text import fit_text, price_text
from launch.predict.predict import Predict
from matrices.catalogue import models
from matrices.catalogue.gpus import Gpu, gpu
from matrices.cell import Cell
from matrices.errors import UserError
from matrices.rules.adapt import spread_over

GIB = 2**30
T4, A100 = gpu("t4"), gpu("a100-80gb")
Peak = Callable[[Cell], int]


def tokens(cell: Cell) -> int:
    assert cell.train is not None
    assert cell.data is not None
    return cell.train.micro_batch_size * cell.data.max_length


def simple(cell: Cell) -> int:
    """16 GiB of weights (4 in 4 bit, 64 with full's states) and a MiB a token."""
    held = {"full": 64, "lora": 16, "qlora": 4}[cell.method] * GIB
    sharded = cell.devices if cell.parallelism == "fsdp" else 1
    return held // sharded + tokens(cell) * 2**20


def simulated(peak: Peak, judged: Gpu) -> Predict:
    return lambda cells: [_prediction(cell, peak(cell), judged) for cell in cells]


def _prediction(cell: Cell, peak: int, judged: Gpu) -> Prediction:
    verdict = Verdict(
        gpu=judged.name,
        capacity_bytes=judged.capacity_bytes,
        context_bytes=judged.context_bytes,
        outcome="fits" if peak <= judged.capacity_bytes else "oom",
    )
    memory = PredictedMemory(
        peak_allocated_bytes=peak,
        peak_phase="backward",
        by_category={"weights": peak - tokens(cell) * 2**20, "activations": tokens(cell) * 2**20},
    )
    return Prediction(
        cell_id=cell.cell_id,
        cell=cell,
        stack={"torch": "2.13.0"},
        status="predicted",
        engine="fake-cuda",
        device=judged.name,
        memory=memory,
        verdicts=[verdict],
    )


@pytest.fixture
def ask() -> Callable[..., fitting.FitResult]:
    def asked(request: FitRequest, peak: Peak = simple) -> fitting.FitResult:
        return fitting.fit(request, simulated(peak, request.gpu))

    return asked


def test_every_method_gets_its_largest_batch_and_longest_sequence(
    ask: Callable[..., fitting.FitResult],
) -> None:
    found = ask(FitRequest("llama-3.1-8b", A100))
    rows = {row.cell.method: row for row in found.rows}
    left = {method: A100.capacity_bytes // 2**20 - held * 1024
            for method, held in (("full", 64), ("lora", 16), ("qlora", 4))}  # fmt: skip
    for method, row in rows.items():
        assert row.micro_batch == left[method] // 2048
        assert row.longest == left[method] // 256 * 256
        assert search.fits(row.shown)
    assert found.max_length == 2048
    assert found.savings == []
    assert rows["full"].binds == ("weights", "backward")
    assert rows["qlora"].binds == ("activations", "backward")


def test_a_length_that_does_not_fit_still_says_what_would(ask: Callable[..., Any]) -> None:
    found = ask(FitRequest("llama-3.1-8b", A100, max_length=32_768, methods=("full",)))
    [row] = found.rows
    assert row.micro_batch is None
    assert row.longest == (A100.capacity_bytes // 2**20 - 64 * 1024) // 256 * 256
    assert "does not fit at 32768 tokens; fits at " in fit_text(found)


def test_several_gpus_are_shared_in_every_way_without_searching_lengths(
    ask: Callable[..., Any],
) -> None:
    found = ask(FitRequest("llama-3.1-8b", T4, count=2))
    ways = [(row.cell.method, row.cell.parallelism, row.cell.devices) for row in found.rows]
    assert ways == [
        (method, way, 2)
        for method in ("full", "lora", "qlora")
        for way in ("ddp", "fsdp", "zero2", "zero3")
    ]
    assert {row.longest for row in found.rows} == {None}
    quantized = {row.cell.parallelism: row.cell.quantization for row in found.rows[-4:]}
    stored = {way: held.quant_storage for way, held in quantized.items() if held is not None}
    assert stored == {"ddp": "uint8", "zero2": "uint8", "fsdp": "bf16", "zero3": "bf16"}


def test_nothing_fits_and_each_change_says_what_it_saves(ask: Callable[..., Any]) -> None:
    overrides = ("micro_batch_size=8", "gradient_checkpointing=false")
    request = FitRequest("llama-3.1-8b", T4, methods=("lora",), overrides=overrides, longest=False)
    found = ask(request)
    assert [row.micro_batch for row in found.rows] == [None]
    peaks = {
        saving.name: saving.prediction.memory.peak_allocated_bytes
        for saving in found.savings
        if saving.prediction is not None
    }
    assert list(peaks) == [
        "as asked", "qlora", "smaller micro batch", "shorter sequences", "gradient checkpointing",
        "lower rank", "fewer target modules", "8-bit or paged optimizer", "shard", "offload",
    ]  # fmt: skip
    # 16 + 16 GiB; 4 + 16; half the micro batch; half the length.
    assert [peaks[name] / GIB for name in list(peaks)[:4]] == [32, 20, 12, 8]
    savings = [saving.saving_bytes for saving in found.savings[:4]]
    assert savings == [None, 12 * GIB, 8 * GIB, 4 * GIB]
    fits = [saving.name for saving in found.savings if saving.fits]
    assert fits[0] == "smaller micro batch"
    text = fit_text(found)
    assert "first fits at: smaller micro batch" in text
    assert "micro batch 8 -> 4, accumulation 1 -> 2  <- fits" in text
    assert "does not fit: weights; try qlora" in text
    texts = fit_json(found)
    assert texts["rows"][0]["fits"] is False
    assert [rung["rung"] for rung in texts["ladder"]] == list(peaks)


def test_each_change_keeps_those_before_it(ask: Callable[..., Any]) -> None:
    cells = templates({"name": "llama-3.1-8b"}, 4096, ("target_modules=all-linear",))
    found = savings_with(simple, cells["lora"], cells["qlora"])
    texts = {saving.name: (saving.change, saving.why) for saving in found}
    assert texts["smaller micro batch"][0] == "micro batch 2 -> 1, accumulation 1 -> 2"
    assert texts["gradient checkpointing"] == ("", "it is on already")
    assert texts["lower rank"][0] == "rank 16 -> 8"
    assert texts["fewer target modules"][0] == "target_modules all-linear -> attention"
    assert texts["8-bit or paged optimizer"][0] == "optimizer adamw_torch -> paged_adamw_8bit"
    last = found[-1].prediction
    assert last is not None
    cell = last.cell
    assert cell.method == "qlora"
    assert cell.train is not None
    assert cell.adapter is not None
    assert cell.quantization is not None
    assert (cell.train.micro_batch_size, cell.train.gradient_accumulation_steps) == (1, 2)
    assert (cell.adapter.rank, cell.adapter.alpha) == (8, 16)
    assert (cell.parallelism, cell.devices) == ("zero3-offload", 2)
    assert cell.quantization.quant_storage == "bf16"


def test_a_change_that_is_not_possible_says_so() -> None:
    changes = ("rank=4", "target_modules=qv", "optimizer=adamw_8bit", "micro_batch_size=1")
    cells = templates({"name": "llama-3.1-8b"}, 128, changes)
    texts = {
        saving.name: saving.why for saving in savings_with(simple, cells["qlora"], cells["qlora"])
    }
    assert texts["qlora"] == "it is qlora already"
    assert texts["smaller micro batch"] == "the micro batch is 1 already"
    assert texts["shorter sequences"] == "sequences are 128 tokens already"
    assert texts["lower rank"] == "there is no rank to lower"
    assert texts["fewer target modules"] == "there are no fewer to name"
    assert texts["8-bit or paged optimizer"] == "adamw_8bit keeps little already"


def savings_with(peak: Peak, start: Cell, qlora: Cell) -> list[changes.MemorySaving]:
    return memory_savings(start, qlora, 1, simulated(peak, T4))


def test_odd_micro_batches_keep_at_least_their_sequences() -> None:
    cells = templates({"name": "llama-3.1-8b"}, 128, ("micro_batch_size=5",))
    found = savings_with(simple, cells["qlora"], cells["qlora"])
    assert found[2].change == "micro batch 5 -> 2, accumulation 1 -> 3"


def test_what_nobody_can_simulate_is_a_mistake_of_the_question() -> None:
    def refuse(cells: Sequence[Cell]) -> list[Prediction]:
        return [
            Prediction(
                cell_id=cell.cell_id, cell=cell, stack={}, status="invalid", reason="unheard of"
            )
            for cell in cells
        ]

    with pytest.raises(UserError, match="--model some/model: unheard of"):
        fitting.fit(FitRequest("some/model", T4), refuse)


def test_a_model_is_a_name_a_hub_id_or_a_config(tmp_path: Path) -> None:
    shipped = models.architecture_path("gpt2")
    assert shipped is not None
    config = tmp_path / "config.json"
    config.write_text(shipped.read_text())
    assert model_settings("gpt2") == {"name": "gpt2"}
    assert model_settings("some/model") == {"name": "some/model"}
    assert model_settings(str(config)) == {"config": str(config)}
    assert model_settings(str(tmp_path)) == {"config": str(config)}
    # GPT-2's published table of positions.
    assert positions({"name": "gpt2"}) == positions({"config": str(config)}) == 1024
    assert positions({"name": "some/model"}) is None
    for wrong in ("gtp2", "a/b/c", "./nowhere/config.json"):
        with pytest.raises(UserError):
            model_settings(wrong)


def test_the_length_follows_the_models_limit(ask: Callable[..., Any]) -> None:
    found = ask(FitRequest("gpt2", A100, methods=("lora",)))
    assert found.max_length == 1024
    [row] = found.rows
    assert row.longest == 1024
    assert row.length_capped


def test_words_are_checked() -> None:
    assert checked_methods([]) == ("full", "lora", "qlora")
    assert checked_methods(["qlora,lora", "qlora"]) == ("qlora", "lora")
    assert checked_parallelism([], 2) == ()
    assert checked_parallelism(["fsdp,zero3"], 2) == ("fsdp", "zero3")
    with pytest.raises(UserError, match="over 2 GPUs"):
        checked_parallelism(["single"], 2)


def test_spreading_keeps_what_is_not_sharded() -> None:
    cells = templates({"name": "gpt2"}, 128, ())
    spread = spread_over(cells["lora"], "fsdp", 4)
    assert spread.model_copy(update={"parallelism": "single", "devices": 1}) == cells["lora"]


def test_a_price_has_its_date() -> None:
    priced = T4.model_copy(update={"price_usd_per_hour": 0.5, "price_date": "2026-05-07"})
    assert price_text(priced, 2) == "price: 1.00 USD an hour for 2 x t4 on 2026-05-07"
    assert price_text(T4.model_copy(update={"price_usd_per_hour": None}), 2) == ""
