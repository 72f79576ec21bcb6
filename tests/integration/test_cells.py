"""The spine end to end: real processes, a real (tiny) model, TRL, bitsandbytes and lm-eval."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, Command, Sweep

from harness.records.quality import Recipe
from harness.records.reading import read_record
from harness.records.record import Record
from matrices.cell import flatten

FAILING = {417: "diverged", 418: "invalid", 419: "invalid", 420: "invalid"}
TRAINED = [401, 402, 403, 404, 405, 406, 407, 408, 409, 410, 411, 412, 413, 11, 12, 416]
# Parameters of tiny-llama, from its config: embeddings and head 2*259*128; a layer's attention
# 2*128*128 + 2*128*64, its mlp 3*128*320, its norms 2*128; one last norm.
LINEAR = 3 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 320)
TOTAL = 2 * 259 * 128 + LINEAR + 3 * 2 * 128 + 128


def lora_parameters(rank: int, shapes: list[tuple[int, int]]) -> int:
    """r (in + out) for each adapted matrix of each of the three layers."""
    return 3 * sum(rank * (rows + columns) for rows, columns in shapes)


QV = [(128, 128), (64, 128)]
ATTENTION = [*QV, (64, 128), (128, 128)]
MLP = [(320, 128), (320, 128), (128, 320)]


def test_the_sweep_ends_with_the_status_each_cell_deserves(sweep: Sweep) -> None:
    assert sweep.ran.code == 0, sweep.ran.err[-2000:]
    found = {name: record.status for name, record in sweep.records.items()}
    bases = ["base", *(f"base {q} {d}" for q in ("nf4", "fp4") for d in (False, True))]
    assert found == dict.fromkeys([*TRAINED, *bases], "ok") | FAILING, sweep.ran.err[-2000:]


def test_an_impossible_cell_says_why(sweep: Sweep) -> None:
    assert "fp16" in (sweep.records[418].reason or "")
    assert sweep.records[418].memory.peak_bytes is None


def test_a_mistake_in_one_cell_leaves_the_others_to_run(sweep: Sweep) -> None:
    """Found before anything is imported, and only on the model."""
    assert 'bias: "bais" is not one of none, all' in (sweep.records[419].reason or "")
    assert "'q_porj' matches no layer" in (sweep.records[420].reason or "")
    said = [line for line in sweep.ran.err.splitlines() if "left out as invalid" in line]
    assert ["axes.yaml:" in line for line in said] == [True, True]
    assert all(line.count("1 of 20 cells") == 1 for line in said)


def test_what_is_passed_through_is_seen_and_recorded(sweep: Sweep) -> None:
    told = sweep.records[410].verified.passed_through
    assert {name: (each.held, each.default) for name, each in told.items()} == {
        "adam_beta1": (0.8, 0.9),
        "train_sampling_strategy": ("sequential", "random"),
    }
    assert sweep.records[407].verified.passed_through["use_rslora"].held is True
    assert sweep.records[401].verified.passed_through == {}


def test_a_diverged_cell_keeps_the_losses_until_then(sweep: Sweep) -> None:
    record = sweep.records[417]
    assert record.failure is not None
    assert record.failure.phase == "train"
    assert 0 < len(record.quality.train_loss) <= 6
    assert not math.isfinite(record.quality.train_loss[-1])
    assert record.memory.peak_bytes is not None


@pytest.mark.parametrize(
    ("name", "trainable"),
    [
        (401, TOTAL),
        (402, lora_parameters(4, ATTENTION)),
        (403, lora_parameters(4, ATTENTION)),
        (407, lora_parameters(2, QV)),
        (408, lora_parameters(4, MLP)),
        (409, lora_parameters(4, ATTENTION + MLP)),
        (416, lora_parameters(4, [(128, 128), (128, 320)])),
    ],
)
def test_trainable_parameters_are_the_closed_form(sweep: Sweep, name: int, trainable: int) -> None:
    assert sweep.records[name].artifacts.trainable_parameters == trainable


@pytest.mark.parametrize(("name", "double"), [(403, True), (404, False), (405, False), (406, True)])
def test_4bit_bytes_are_the_closed_form(sweep: Sweep, name: int, double: bool) -> None:
    record = sweep.records[name]
    assert record.memory.resident["quantized_weights"] == LINEAR // 2
    layers, blocks = 21, LINEAR // 64
    plain = 4 * blocks
    # Every matrix here has fewer than 256 blocks of 64 x 256 weights left over: ceil per matrix.
    sizes = [rows * columns // 64 for rows, columns in ATTENTION + MLP]
    nested = blocks + 3 * sum(4 * math.ceil(size / 256) for size in sizes) + layers * (4 + 1024)
    held = record.memory.resident["quantization_state"]
    assert held - (nested if double else plain) in (64, layers * 64), "one code table, or one each"
    assert record.verified.quantized_modules == layers


def test_each_axis_is_what_ran(sweep: Sweep) -> None:
    verified = {name: record.verified for name, record in sweep.records.items()}
    assert verified[405].quant_types == ["fp4"]
    assert verified[404].quant_types == ["nf4"]
    assert verified[416].adapter_modules == ["down_proj", "q_proj"]
    assert verified[413].attn_implementation == "eager"
    assert list(verified[413].weight_dtypes) == ["float32"]
    assert (verified[410].optimizer or "").startswith("bitsandbytes")
    assert (verified[412].optimizer or "").endswith("Adafactor")
    assert any("not paged" in said for said in verified[411].substitutions)
    assert "bfloat16" in verified[406].weight_dtypes, "no k-bit preparation: norms stay bf16"
    assert "float32" in verified[403].weight_dtypes, "k-bit preparation: norms in fp32"


def test_memory_moves_the_way_it_must(sweep: Sweep) -> None:
    memory = {name: record.memory for name, record in sweep.records.items()}
    states = {name: m.by_category.get("optimizer_states", 0) for name, m in memory.items()}
    assert states[410] < 0.6 * states[401], "8-bit Adam: one byte a state; bf16 Adam: two"
    phases = {
        name: {phase: ranks[0].ledger_peak_bytes for phase, ranks in m.phases.items()}
        for name, m in memory.items()
    }
    # The same adapters with and without recomputation: 408 stores less at the end of forward.
    live = {name: memory[name].phases["forward"][0].ledger_end_bytes or 0 for name in (408, 409)}
    assert live[408] < live[409]
    assert all(phases[n]["forward"] for n in TRAINED)
    for name in TRAINED:
        assert memory[name].headline == "ledger"
        assert memory[name].peak_bytes == max(
            phases[name][phase] or 0 for phase in ("forward", "backward", "optimizer_step")
        )
        assert sum(memory[name].by_category.values()) == memory[name].peak_bytes


def test_tokens_are_counted_by_kind(sweep: Sweep) -> None:
    packed, pairs = sweep.records[402].speed, sweep.records[11].speed
    assert packed.tokens is not None
    assert packed.tokens.all == packed.tokens.non_padding == 4 * 2 * 64
    assert packed.tokens.loss == 4 * 2 * 63, "the first token of a row predicts nothing"
    assert sum(packed.step_seconds[2:]) * packed.tokens_per_second.all == pytest.approx(512)
    assert pairs.tokens is not None
    assert pairs.tokens.loss < pairs.tokens.non_padding <= pairs.tokens.all
    # A completion ' 2i.' and its end of sequence: 4 or 5 bytes, each one token.
    assert 4 * 2 * 4 <= pairs.tokens.loss <= 4 * 2 * 6
    assert pairs.tflops_per_second is None
    assert "shorter" in sweep.records[11].missing["speed.tflops_per_second"]


BARE = {"full": 401, "lora": 402, "qlora": 403}


@pytest.fixture(scope="module")
def bare_losses(sweep: Sweep, cache: Path, environment: dict[str, str]) -> dict[str, list[float]]:
    """Of a bare TRL script, by method."""
    options = {"rank": 4, "learning_rate": 2.0e-3, "warmup_steps": 2, "max_length": 64}
    methods = {method: options | {"max_samples": name} for method, name in BARE.items()}
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests/integration/bare_trl.py"),
            str(cache / "models/tiny-llama"),
            "6",
            json.dumps(methods),
        ],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"method"')]
    return {each["method"]: each["losses"] for each in told}


@pytest.mark.slow
@pytest.mark.parametrize("method", BARE)
def test_losses_are_those_of_a_bare_trl_script(
    sweep: Sweep, bare_losses: dict[str, list[float]], method: str
) -> None:
    """To the last digit: neither the memory steps nor the meters touch the training."""
    assert sweep.records[BARE[method]].quality.train_loss == bare_losses[method]


@pytest.mark.slow
def test_scores_are_those_of_lm_evals_own_command_line(
    sweep: Sweep, cache: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """To the last digit, on the same adapter."""
    adapter = sweep.path(402) / "adapter"
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "lm_eval", "run", "--model", "hf"),
            "--model_args",
            f"pretrained={cache / 'models/tiny-llama'},peft={adapter},dtype=bfloat16,"
            "softmax_dtype=float32",
            *("--tasks", "python_reference_bpb,python_reference_topic"),
            *("--include_path", str(ROOT / "harness/evaluation/tasks")),
            *("--batch_size", "8", "--device", "cpu", "--limit", "8"),
            *("--output_path", str(tmp_path)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(next(tmp_path.rglob("results*.json")).read_text())["results"]
    ours = sweep.records[402].quality.tasks
    assert sweep.records[402].quality.recipe == Recipe(
        softmax_dtype="float32", logits_dtype="bfloat16"
    )
    assert (
        ours["python_reference_bpb"].metrics["bits_per_byte"].value
        == (theirs["python_reference_bpb"]["bits_per_byte,none"])
    )
    for metric in ("acc", "acc_norm"):
        score = ours["python_reference_topic"].metrics[metric]
        assert score.value == theirs["python_reference_topic"][f"{metric},none"]
        assert score.stderr == theirs["python_reference_topic"][f"{metric}_stderr,none"]


def test_samples_give_the_score_again(sweep: Sweep) -> None:
    for name in (401, 403, "base"):
        record = sweep.records[name]
        samples = pd.read_parquet(sweep.path(name) / "samples.parquet")
        bits = samples[samples.metric == "bits_per_byte"]
        score = record.quality.tasks["python_reference_bpb"]
        again = -bits.value.sum() / bits.weight.sum() / math.log(2)
        assert score.metrics["bits_per_byte"].value == pytest.approx(again, rel=1e-12)
        assert score.n == len(bits) == 8


def test_training_helps_on_topics_never_trained_on(sweep: Sweep) -> None:
    def bits(name: object) -> float:
        task = sweep.records[name].quality.tasks["python_reference_bpb"]
        return task.metrics["bits_per_byte"].value

    assert bits(401) < bits("base")


def test_records_are_complete_enough_to_rerun(sweep: Sweep) -> None:
    for record in sweep.records.values():
        assert record.stack.packages["transformers"]
        assert record.hardware.cpu
        assert record.command[-3] == "harness.worker"
        assert record.command[-2:] == ["cell.json", "by-hand"]
        assert not any(part.startswith("/") for part in record.command)
        assert record.ended is not None


def test_every_trained_record_carries_its_prediction_which_agrees(sweep: Sweep) -> None:
    """Predicted on fake CPU tensors before the run, measured by the ledger in it."""
    trained = [record for record in sweep.records.values() if record.cell.train is not None]
    assert trained
    for record in trained:
        if record.status != "ok":
            continue
        assert record.prediction is not None, record.missing
        assert record.prediction.engine == "fake-cpu"
        assert record.prediction.error is not None
        # bitsandbytes' 8-bit Lion keeps a code table that only the real one makes.
        assert abs(record.prediction.peak_allocated_bytes - record.memory.peak_bytes) <= 1024, (
            record.cell
        )
    for name in (401, 402, 403):
        told, found = sweep.records[name].prediction, sweep.records[name].memory
        assert told.peak_phase == found.peak_phase


def test_the_calibration_counts_every_predicted_cell(sweep: Sweep, tunebench: Command) -> None:
    told = json.loads(tunebench("calibration", "results/axes", "--json", cwd=sweep.directory).out)
    done = [r for r in sweep.records.values() if r.prediction and r.prediction.error is not None]
    counted: Counter[str] = Counter()
    for each in told:
        counted[each["method"]] += each["memory"]["n"]
    assert counted == {**Counter(record.cell.method for record in done), "all": len(done)}
    assert {each["model"] for each in told} == {"tiny-llama", "all"}


def test_the_same_command_again_runs_nothing(sweep: Sweep, tunebench: Command) -> None:
    before = {p: p.read_bytes() for p in (sweep.directory / "results").rglob("record.json")}
    plan = json.loads(
        tunebench("plan", "axes.yaml", "--no-predict", "--json", cwd=sweep.directory).out
    )
    # What only the model could tell is asked again.
    asked = {cell["cell_id"] for cell in plan if cell["action"] not in ("keep", "invalid")}
    assert asked == {sweep.records[420].cell_id}
    assert before == {p: p.read_bytes() for p in (sweep.directory / "results").rglob("record.json")}


@pytest.mark.slow
def test_the_recorded_command_gives_the_same_losses_and_scores(
    sweep: Sweep, tunebench: Command
) -> None:
    """`rerun` goes through `accelerate launch`; the forked worker and the one started by hand agree
    to the last digit."""
    first = sweep.records[403]
    ran = tunebench("rerun", "--no-predict", str(sweep.path(403)), cwd=sweep.directory)
    assert ran.code == 0, ran.err[-2000:]
    again = read_record(Path(ran.out.strip().splitlines()[-1]))
    assert again.attempt == 2
    assert again.quality.train_loss == first.quality.train_loss
    assert _scores(again) == _scores(first)
    assert again.memory.by_category == first.memory.by_category


def _scores(record: Record) -> dict[str, float]:
    return {
        f"{task}.{metric}": found.value
        for task, score in record.quality.tasks.items()
        for metric, found in score.metrics.items()
    }


def test_every_cell_differs_from_every_other_in_what_was_asked(sweep: Sweep) -> None:
    seen = [
        json.dumps(flatten(r.cell), default=str, sort_keys=True) for r in sweep.records.values()
    ]
    assert len(set(seen)) == len(seen)


@pytest.mark.slow
def test_no_memory_is_a_result(tunebench: Command, tmp_path: Path, cache: Path) -> None:
    """Under a limit on address space torch's own allocator refuses: status oom, with the phase and
    the bytes asked for, and everything known until then."""
    (tmp_path / "oom.yaml").write_text(
        "model: {name: tiny-llama, attn_implementation: eager}\nmethod: full\n"
        "data: {max_length: 2048, packing: true}\n"
        "train: {steps: 1, warmup_steps: 0, micro_batch_size: 128}\n"
        "evaluate: {tasks: [], sample_prompts: []}\n"
    )
    limited = (
        "import resource, sys; from launch.entry import main;"
        "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "run", "oom.yaml", "--no-predict"],
        cwd=tmp_path,
        env=os.environ | {"TUNEBENCH_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    records = [read_record(path) for path in tmp_path.rglob("record.json")]
    assert [r.status for r in records] == ["oom"], done.stderr[-2000:]
    failure = records[0].failure
    assert failure is not None
    assert failure.phase == "memory_steps"
    # The first eager attention's scores, in bf16: batch x heads x length x length.
    assert failure.requested_bytes == 128 * 4 * 2048 * 2048 * 2
    assert records[0].memory.by_category["weights"] > 0, "the ledger until then is kept"


@pytest.mark.slow
def test_a_local_model_directory_scores_as_the_packaged_model(
    sweep: Sweep, cache: Path, tunebench: Command, tmp_path: Path
) -> None:
    shutil.copytree(cache / "models/tiny-llama", tmp_path / "mine")
    (tmp_path / "local.yaml").write_text(
        "model: ./mine\nmethod: base\n"
        "evaluate: {tasks: [python_reference_bpb, python_reference_topic], limit: 8}\n"
    )
    ran = tunebench("run", "local.yaml", "--no-predict", cwd=tmp_path)
    assert ran.code == 0, ran.err
    [record] = [read_record(path) for path in (tmp_path / "results/local").glob("*/record.json")]
    assert record.cell.model.fingerprint
    assert record.quality.tasks == sweep.records["base"].quality.tasks


@pytest.mark.slow
def test_a_report_of_real_records(sweep: Sweep, tunebench: Command) -> None:
    ran = tunebench("report", "results/axes", "--output", "out", cwd=sweep.directory)
    assert ran.code == 0, ran.err
    names = {path.name for path in (sweep.directory / "out").iterdir()}
    assert names == {"records.parquet", "records.csv", "report.md", "report.html"}
    assert "diverged" in ran.out
    assert "fp16" in ran.out, "an impossible cell keeps its row and its reason"
    shown = tunebench("show", sweep.records[403].cell_id[:12], cwd=sweep.directory)
    assert "nf4" in shown.out
    assert "quantization state" in shown.out
