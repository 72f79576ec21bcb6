"""Real cells on a tiny model, run once by the real command line, looked at by many tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.records.reading import read_record
from harness.records.record import Record

ROOT = Path(__file__).resolve().parents[2]
# One sweep through every axis that changes a run. Each included cell is named by its
# max_samples, a setting that changes nothing at these sizes.
SWEEP = """\
name: axes
question: Does every axis really change the run?
model: tiny-llama
data: {source: python-reference, max_length: 64, packing: true}
train: {steps: 6, warmup_steps: 2, micro_batch_size: 2, learning_rate: 2.0e-3}
evaluate: {tasks: [python_reference_bpb, python_reference_topic], limit: 8}
method: lora
rank: 4
max_samples: 402
include:
  - method: full
    max_samples: 401
  - method: qlora
    quant_type: nf4
    double_quant: true
    target_modules: attention
    max_samples: 403
  - method: qlora
    quant_type: nf4
    max_samples: 404
  - method: qlora
    quant_type: fp4
    max_samples: 405
  - method: qlora
    quant_type: fp4
    double_quant: true
    kbit_preparation: false
    max_samples: 406
  - method: lora
    rank: 2
    alpha: 3
    dropout: 0.1
    target_modules: qv
    lora_config: {use_rslora: true}
    max_samples: 407
  - method: lora
    target_modules: mlp
    gradient_checkpointing: true
    max_samples: 408
  - method: lora
    target_modules: all-linear
    gradient_accumulation_steps: 2
    max_samples: 409
  - method: full
    optimizer: adamw_8bit
    sft_config: {adam_beta1: 0.8, train_sampling_strategy: sequential}
    max_samples: 410
  - method: full
    optimizer: paged_adamw_8bit
    max_samples: 411
  - method: full
    optimizer: adafactor
    max_samples: 412
  - method: full
    weight_dtype: fp32
    compute_dtype: fp32
    attn_implementation: eager
    max_samples: 413
  - method: lora
    packing: false
    data.source: pairs.jsonl
    completion_only_loss: true
    max_samples: 11
  - method: lora
    packing: false
    data.source: chats.jsonl
    completion_only_loss: true
    max_samples: 12
  - method: lora
    packing_strategy: bfd
    target_modules: [q_proj, down_proj]
    max_samples: 416
  - method: full
    optimizer: sgd
    learning_rate: 1.0e+38
    max_grad_norm: 0.0
    max_samples: 417
  - method: lora
    compute_dtype: fp16
    max_samples: 418
  - method: lora
    lora_config: {bias: bais}
    max_samples: 419
  - method: lora
    target_modules: [q_porj]
    max_samples: 420
"""


class Ran(NamedTuple):
    """A finished command."""

    code: int
    out: str
    err: str


Command = Callable[..., Ran]


def shared(factory: pytest.TempPathFactory, name: str) -> Path:
    """A directory of all of pytest's workers. A whole cache cannot be shared: the runs of two
    workers would take turns at its devices."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return factory.mktemp(name)
    made = factory.getbasetemp().parent / name
    made.mkdir(exist_ok=True)
    return made


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of this worker's. The index of lm-eval's tasks, which takes 8 s, is made once for all."""
    own = tmp_path_factory.mktemp("cache")
    (own / "task-index").symlink_to(shared(tmp_path_factory, "task-index"))
    return own


@pytest.fixture(scope="session")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What DeepSpeed compiles, once for all of pytest's workers."""
    return shared(tmp_path_factory, "extensions")


@pytest.fixture(scope="session")
def environment(cache: Path, extensions: Path) -> dict[str, str]:
    return os.environ | {
        "TUNEBENCH_CACHE": str(cache),
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache / "huggingface"),
        # Two tests run side by side, and OpenMP's threads wait by spinning.
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def tunebench(environment: dict[str, str]) -> Command:
    """Run the command line in a directory, to its end."""

    def run(*arguments: str, cwd: Path, timeout: float = 600) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "launch.entry", *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


class Sweep(NamedTuple):
    """The sweep's directory, how the command ended, and its records by the cell's `max_samples`
    (base cells by `base` and their 4-bit format)."""

    directory: Path
    ran: Ran
    records: dict[object, Record]

    def path(self, name: object) -> Path:
        wanted = self.records[name]
        results = self.directory / "results"
        return next(results.rglob(f"{wanted.cell_id[:12]}-*/record.json")).parent


@pytest.fixture(scope="session")
def sweep(tunebench: Command, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    directory = tmp_path_factory.mktemp("sweep")
    (directory / "axes.yaml").write_text(SWEEP)
    pairs = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}."} for i in range(30)]
    (directory / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"what follows {i}?"},
                {"role": "assistant", "content": f"{i + 1} follows {i}."},
            ]
        }
        for i in range(30)
    ]
    (directory / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    ran = tunebench("run", "axes.yaml", cwd=directory)
    assert ran.code == 0, ran.err[-3000:]
    records = [read_record(path) for path in (directory / "results/axes").glob("*/record.json")]
    return Sweep(directory, ran, {_name(record): record for record in records})


def _name(record: Record) -> object:
    if record.cell.data is not None:
        return record.cell.data.max_samples
    quantization = record.cell.quantization
    if quantization is None:
        return "base"
    return f"base {quantization.quant_type} {quantization.double_quant}"
