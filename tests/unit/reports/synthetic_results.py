"""A results directory as a sweep of full, LoRA and QLoRA leaves it, with plausible figures.

Run as a script it fills the directory given: for looking at reports by eye.
"""

from __future__ import annotations

import itertools
import math
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.records.memory import LiveTensor, Memory, PhaseMemory
from harness.records.part import Status
from harness.records.quality import Generation, Metric, Quality, TaskScore
from harness.records.ranks import Failure
from harness.records.record import Artifacts, Record
from harness.records.speed import Speed, Tokens
from harness.records.stack import Hardware, Stack
from harness.records.verified import Verified
from matrices.cell import Adapter, Cell, Data, Quantization, Train, base_cells, label

MIB = 2**20
STACK_ID = "5" * 64
DOCUMENTS = 60
TOKENS_PER_STEP = 2 * 256
PACKAGES = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0", "lm-eval": "0.4.13"}
CPU = Hardware(cpu="AMD EPYC 7B13", cpu_count=2, host_memory_bytes=24 * 2**30)
# Median step seconds, peak MiB, bits per byte, accuracy.
FIGURES: dict[str, tuple[float, float, float, float]] = {
    "base": (0.0, 0.0, 1.32, 0.40),
    "base nf4": (0.0, 0.0, 1.41, 0.37),
    "base nf4+dq": (0.0, 0.0, 1.42, 0.37),
    "base fp4": (0.0, 0.0, 1.49, 0.34),
    "full": (1.62, 1834.5, 1.05, 0.48),
    "lora": (1.18, 905.0, 1.13, 0.45),
    "qlora nf4": (1.55, 742.0, 1.18, 0.43),
    "qlora nf4+dq": (1.58, 734.5, 1.19, 0.42),
    "qlora fp4": (1.52, 742.0, 1.24, 0.41),
}


def key_of(cell: Cell) -> str:
    """The entry of FIGURES for a cell."""
    words = label(cell).split()
    return " ".join(words[:2]) if cell.quantization else words[0]


def trained(method: str, seed: int = 0, **settings: Any) -> Cell:
    """A full, lora or qlora cell; `settings` are leaves of any section but model and evaluate."""
    sections: dict[str, Any] = {"data": Data, "train": Train}
    if method != "full":
        sections["adapter"] = Adapter
    if method == "qlora":
        sections["quantization"] = Quantization
    parts = {}
    for name, section in sections.items():
        own = {key: settings.pop(key) for key in list(settings) if key in section.model_fields}
        parts[name] = section(**own)
    assert not settings, settings
    return Cell(method=method, seed=seed, **parts)  # type: ignore[arg-type]


def scores(cell: Cell) -> tuple[Quality, pd.DataFrame]:
    """Per-document results, and the scores they add up to."""
    _, _, bits, accuracy = FIGURES[key_of(cell)]
    common = np.random.default_rng(7)
    lengths = common.integers(400, 2000, DOCUMENTS).astype(float)
    hardness = common.normal(0, 0.15, DOCUMENTS)
    own = np.random.default_rng(zlib.crc32(f"{label(cell)} {cell.seed}".encode()))
    nats = -(bits + hardness + own.normal(0, 0.01, DOCUMENTS)) * lengths * math.log(2)
    right = (common.random(DOCUMENTS) + own.normal(0, 0.03, DOCUMENTS) < accuracy).astype(float)
    rows = [
        ("python_reference_bpb", "bits_per_byte", nats, lengths),
        ("python_reference_topic", "acc", right, np.ones(DOCUMENTS)),
    ]
    frames, tasks = [], {}
    for task, metric, values, weights in rows:
        hashes = [f"{task}-{place}" for place in range(DOCUMENTS)]
        frames.append(
            pd.DataFrame(
                {
                    "task": task, "metric": metric, "doc_id": range(DOCUMENTS),
                    "doc_hash": hashes, "value": values, "weight": weights,
                }
            )
        )  # fmt: skip
        higher = metric == "acc"
        value = values.mean() if higher else -values.sum() / weights.sum() / math.log(2)
        stderr = float(values.std(ddof=1) / math.sqrt(DOCUMENTS)) if higher else None
        tasks[task] = TaskScore(
            metrics={metric: Metric(value=float(value), stderr=stderr)},
            higher_is_better={metric: higher},
            n=DOCUMENTS,
            version="1.0",
            hash=f"hash-of-{task}",
        )
    losses = [2.9 - 0.02 * step + 0.05 * float(own.normal()) for step in range(40)]
    quality = Quality(
        tasks=tasks,
        train_loss=[] if cell.method == "base" else losses,
        generations=[Generation(prompt="The with statement is used to", text=" wrap a block.")],
        samples_file="samples.parquet",
        lm_eval_version="0.4.13",
    )
    return quality, pd.concat(frames, ignore_index=True)


def memory(cell: Cell) -> Memory:
    """Ledger figures that add up to the peak."""
    peak = int(FIGURES[key_of(cell)][1] * MIB)
    if cell.adapter is not None:
        peak += cell.adapter.rank * 512 * 300
    shares = {"weights": 0.3, "activations": 0.45, "gradients": 0.1, "optimizer_states": 0.1}
    categories = {name: int(share * peak) for name, share in shares.items()}
    categories["logits_and_loss"] = peak - sum(categories.values())
    if cell.quantization is not None:
        held = categories.pop("weights")
        categories |= {
            "quantized_weights": held * 3 // 4,
            "quantization_state": held - held * 3 // 4,
        }
    phases = {"load": 0.3, "forward": 0.9, "backward": 1.0, "optimizer_step": 0.7}
    return Memory(
        headline="ledger",
        peak_bytes=peak,
        peak_phase="backward",
        phases={name: [PhaseMemory(ledger_peak_bytes=int(s * peak))] for name, s in phases.items()},  # type: ignore[misc]
        by_category=categories,
        resident={"weights": int(0.3 * peak)},
        top_tensors=[
            LiveTensor(
                bytes=50 * MIB, category="logits_and_loss", op="aten.mm", shape=[512, 49152],
                dtype="bfloat16", module="lm_head", phase="backward",
            )
        ],
        host_peak_rss_bytes=2 * peak,
    )  # fmt: skip


def speed(cell: Cell) -> Speed:
    """40 steps with a slow warm-up."""
    median = FIGURES[key_of(cell)][0]
    random = np.random.default_rng(zlib.crc32(label(cell).encode()) + cell.seed)
    steps = [median * (1 + 0.02 * abs(float(random.normal()))) for _ in range(40)]
    steps[0] *= 3
    timed = sorted(steps[4:])
    tokens = Tokens(all=36 * 512, non_padding=36 * 512, loss=36 * 510)
    total = sum(timed)
    rates = {name: count / total for name, count in tokens.model_dump().items()}
    return Speed(
        step_seconds=steps,
        warmup_steps=4,
        step_seconds_median=float(np.median(timed)),
        step_seconds_q1=float(np.quantile(timed, 0.25)),
        step_seconds_q3=float(np.quantile(timed, 0.75)),
        tokens=tokens,
        tokens_per_second=Tokens(**rates),
        samples_per_second=72 / total,
        flops_per_step=400_000_000_000,
        tflops_per_second=0.4 * 36 / total,
        load_seconds=2.5,
        train_seconds=sum(steps),
        evaluation_seconds=31.0,
    )


def record(cell: Cell, status: Status = "ok", **changes: Any) -> Record:
    """A record of this cell; only `ok` has every figure."""
    found = Record(
        cell_id=cell.cell_id,
        cell=cell,
        base_cell_ids={role: base.cell_id for role, base in base_cells(cell).items()},
        stack_id=STACK_ID,
        stack=Stack(python="3.11.9", packages=PACKAGES, commit="c0ffee" * 6, dirty=False),
        hardware=CPU,
        command=["tunebench", "cell", "cell.json", "--output", "results/one cell"],
        status=status,
        started="2026-01-02T03:04:05+00:00",
        ended="2026-01-02T03:14:05+00:00",
        missing={"speed.energy_joules": "no energy counter on this machine"},
    )
    if status == "ok":
        found.quality = scores(cell)[0]
        if cell.method != "base":
            found.memory, found.speed = memory(cell), speed(cell)
            rank = cell.adapter.rank if cell.adapter else None
            found.artifacts = Artifacts(
                trainable_parameters=rank * 57_600 if rank else 134_515_008,
                total_parameters=134_515_008 + (rank or 0) * 57_600,
                adapter_bytes=rank * 57_600 * 4 if rank else None,
            )
            found.verified = Verified(optimizer="AdamW", attn_implementation="sdpa")
    return found.model_copy(update=changes)


def write(root: Path, item: Record, samples: pd.DataFrame | None = None) -> Path:
    """Publish one record the way the store lays it out; gives the path of its file."""
    name = f"{item.cell_id[:12]}-{item.stack_id[:8]}" + (f".{item.attempt}" * (item.attempt > 1))
    directory = root / name
    directory.mkdir(parents=True)
    (directory / "record.json").write_text(item.to_json())
    if samples is None and item.quality.samples_file is not None:
        samples = scores(item.cell)[1]
    if samples is not None:
        samples.to_parquet(directory / "samples.parquet")
    return directory / "record.json"


def sweep() -> list[Record]:
    """The records of the whole sweep: bases, three methods, seeds, and everything that can fail."""
    cells = [trained("full", seed) for seed in (0, 1, 2)]
    for rank, targets in ((8, "qv"), (8, "attention"), (64, "attention")):
        cells += [trained("lora", seed, rank=rank, target_modules=targets) for seed in (0, 1, 2)]
    for quantization in ({}, {"double_quant": True}, {"quant_type": "fp4"}):
        cells += [trained("qlora", seed, rank=8, **quantization) for seed in (0, 1, 2)]
    bases: Mapping[str, Cell] = {b.cell_id: b for c in cells for b in base_cells(c).values()}
    records = [record(cell) for cell in [*bases.values(), *cells]]
    first = trained("lora", 0, rank=8)
    interrupted = record(first, "interrupted", reason="stopped by SIGTERM", phase="train")
    again = [item for item in records if item.cell == first]
    records = [item for item in records if item.cell != first]
    records += [interrupted, again[0].model_copy(update={"attempt": 2})]
    large = trained("lora", 0, rank=64, target_modules="all-linear")
    records += [
        record(large),
        record(
            large.model_copy(update={"seed": 1}), "oom", phase="backward",
            reason="out of memory: 23.1 GiB of 24 GiB were taken",
            failure=Failure(
                type="OutOfMemoryError", message="tried to allocate", phase="backward",
                requested_bytes=2 * 2**30,
            ),
        ),
        record(trained("qlora", 0, rank=64), "failed", reason="killed by signal 9", phase="train"),
        record(
            trained("lora", 0, rank=4096), "invalid",
            reason="rank 4096 is above the width of q_proj (576): rule rank-above-width",
        ),
        record(trained("full", 0, gradient_checkpointing=True)),
    ]  # fmt: skip
    return records


def large_sweep(count: int) -> Iterator[tuple[Record, bool]]:
    """`count` records: base models, then lora (full and qlora among it) of several ranks, target
    modules and seeds at ever more learning rates; a tenth of them failed. Whether each has a
    samples file: the base models and every tenth."""
    cells = itertools.islice(_large_cells(), count)
    for place, (base, cell) in enumerate(cells):
        if place % 10 == 7 and not base:
            yield (
                record(cell, "failed", reason=f"killed by signal {place % 3}", phase="train"),
                False,
            )
        else:
            yield record(cell), base or place % 10 == 0


def _large_cells() -> Iterator[tuple[bool, Cell]]:
    for cell in (trained("lora"), trained("qlora")):
        base = base_cells(cell)
        yield True, base["quantized" if cell.quantization else "untouched"]
    for step in itertools.count(1):
        rate = {"learning_rate": step * 1e-5}
        for seed in range(3):
            yield False, trained("full", seed, **rate)
        for method, rank, targets in itertools.product(
            ("lora", "qlora"), (8, 16, 64), ("qv", "attention")
        ):
            for seed in range(3):
                yield False, trained(method, seed, rank=rank, target_modules=targets, **rate)


def build_large(root: Path, count: int) -> Path:
    """Write `large_sweep`; gives the directory."""
    for item, with_samples in large_sweep(count):
        if not with_samples and item.quality.samples_file is not None:
            item.quality.samples_file = None
        write(root, item)
    return root


def build(root: Path) -> Path:
    """Write the sweep; gives the directory."""
    for item in sweep():
        write(root, item)
    working = root / ".running" / "abc.1-x"
    working.mkdir(parents=True)
    (working / "record.json").write_text("half a reco")
    return root


if __name__ == "__main__":
    build(Path(sys.argv[1]))
