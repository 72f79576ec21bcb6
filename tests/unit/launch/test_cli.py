"""The command line as a user meets it: surface, speed, errors and exit codes."""

from __future__ import annotations

import atexit
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from harness.records.provenance import new_record, now
from harness.records.store import Store, record_key
from harness.system.child_process import fork
from launch import entry
from launch.cli import app
from launch.commands.console import EXIT_INCOMPLETE
from launch.commands.run import exit_code
from launch.display.tables import counted, outcome_row
from launch.planning.plan import Job
from matrices.cell import Adapter, Cell, Data, Train
from reports.text import text_table

MATRIX = """\
name: small
question: Does it plan?
model: tiny-llama
train: {steps: 6, warmup_steps: 2}
axes:
  method: [full, lora]
  rank: [4, 8]
"""


def tunebench(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run it in a fork of this process, which has imported it, in a directory that is not the
    checkout. `test_entry` starts it from nothing."""
    words = ["tunebench", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:

        def command() -> int:
            atexit._clear()  # what pytest does at its end is not for its forks
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = words
            os.chdir(cwd or "/")
            entry.main()

        _, status = os.waitpid(fork(command), 0)
        out.seek(0)
        err.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(MATRIX)
    return path


def planned(matrix: Path, *extra: str) -> str:
    return tunebench("plan", matrix, "--no-predict", "--json", *extra, cwd=matrix.parent).stdout


def options(command: str) -> set[str]:
    group = typer.main.get_command(app)
    found = group.commands[command].params  # type: ignore[attr-defined]
    return {name for each in found for name in (*each.opts, *each.secondary_opts)}


def test_the_surface_changes_on_purpose_only() -> None:
    group = typer.main.get_command(app)
    sweep = {"matrix", "--results", "--set", "--seeds", "--retry", "--no-predict", "--json"}
    simulated = {"--gpus-file", "--stack", "--set", "--no-self-check", "--workers", "--json"}
    expected = {
        "plan": sweep | {"--gpu", "--gpus-file", "--check"},
        "run": sweep
        | {"--timeout", "--phase-timeout", "--skip-predicted-oom", "--on"}
        | {"--side-by-side", "--exclusive", "--allow-busy"}
        | {"--partition", "--time", "--account", "--qos", "--constraint", "--gres"}
        | {"--cpus-per-task", "--mem", "--requeues", "--address", "--resource"},
        "profiles": {"name", "--json"},
        "status": {"target", "--results", "--set", "--seeds", "--json"},
        "predict": simulated | {"matrix", "--gpu", "--seeds", "--records", "--explain", "--engine"},
        "fit": simulated
        | {"--model", "--gpu", "--count", "--max-length", "--method", "--parallelism"}
        | {"--longest", "--no-longest"},
        "calibration": {"results", "--json"},
        "claims": {"file", "results", "--format", "--stack", "--no-self-check", "--workers"}
        | {"--json"},
        "report": {"results", "--table", "--format", "--page", "--output", "--baseline"}
        | {"--metric"},
        "show": {"cell", "--results", "--json"},
        "rerun": {
            "record",
            "--timeout",
            "--phase-timeout",
            "--trust-remote-code",
            "--no-predict",
        },
        "doctor": {"--network", "--json"},
        "matrices": {"--json"},
    }
    assert {name: options(name) for name in group.commands} == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "command",
    [
        "", "predict", "fit", "plan", "run", "report", "calibration", "claims", "show", "rerun",
        "doctor", "matrices", "profiles", "status",
    ],
)  # fmt: skip
def test_help_teaches_by_example(command: str) -> None:
    done = CliRunner().invoke(app, [*command.split(), "--help"])
    assert done.exit_code == 0
    assert f"tunebench {command or 'run'}" in done.stdout.split("Usage:")[1].split("\n", 1)[1]


def _children_seconds() -> float:
    """Processor time: that of the clock is also what else the machine is doing."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick_and_light() -> None:
    began = _children_seconds()
    subprocess.run(
        [sys.executable, "-m", "launch.entry", "--help"], stdout=subprocess.DEVNULL, check=True
    )
    assert _children_seconds() - began < 0.5
    heavy = (
        "import sys, launch.cli; print({'torch', 'pandas', 'rich', 'plotly'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_version() -> None:
    done = tunebench("--version")
    assert (done.returncode, done.stdout) == (0, "tunebench 0.1.0\n")


def test_plan_shows_cells_and_reasons_and_writes_nothing(matrix: Path) -> None:
    done = tunebench(
        "plan",
        matrix,
        "--no-predict",
        "--seeds",
        2,
        "--set",
        "compute_dtype=fp16",
        cwd=matrix.parent,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "small: Does it plan?"
    assert len([line for line in lines if " invalid " in line]) == 6
    assert "fp16-needs-gpu: " in done.stdout
    assert lines[-1] == "8 combinations, 6 distinct cells, 0 base cells: 6 invalid"
    assert sorted(matrix.parent.iterdir()) == [matrix]


def test_plan_for_machines(matrix: Path) -> None:
    done = tunebench("plan", matrix, "--no-predict", "--json", cwd=matrix.parent)
    jobs = json.loads(done.stdout)
    assert [job["cell"]["method"] for job in jobs] == ["base", "full", "lora", "lora"]
    assert {job["action"] for job in jobs} == {"run"}
    for job in jobs:
        assert Cell.model_validate_json(json.dumps(job["cell"])).cell_id == job["cell_id"]


def test_plan_keeps_what_is_there_and_retries_what_failed(matrix: Path) -> None:
    cells = [
        Cell.model_validate_json(json.dumps(job["cell"])) for job in json.loads(planned(matrix))
    ]
    store = Store(matrix.parent / "results" / "small")
    store.prepare()
    for cell, status in ((cells[1], "ok"), (cells[2], "failed"), (cells[3], "oom")):
        record = new_record(cell, []).model_copy(update={"status": status, "ended": now()})
        key = record_key(record.cell_id, record.stack_id)
        store.publish(store.start(lambda _, __, record=record: record, key), record)

    def actions(*extra: str) -> list[str]:
        return [job["action"] for job in json.loads(planned(matrix, *extra))]

    assert actions() == ["run", "keep", "retry", "keep"]
    assert actions("--retry", "oom") == ["run", "keep", "retry", "retry"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "quickstrat"], "did you mean 'quickstart'"),
        (["plan", "{}", "--set", "ranks=8"], "rank"),
        (["plan", "{}", "--retry", "failled"], "did you mean 'failed'"),
        (["plan", "{}", "--gpu", "rtx-409"], "did you mean 'rtx-4090'"),
        (["run", "{}", "--no-predict", "--skip-predicted-oom"], "--no-predict"),
        (["predict", "{}", "--stack", "no/such"], "no such directory or interpreter"),
        (["predict", "{}", "--engine", "cuda"], "did you mean 'fake-cuda'"),
        (["predict", "{}", "--gpus-file", "nowhere.yaml"], "nowhere.yaml"),
        (["fit", "--model", "lama-3.1-8b", "--gpu", "t4"], "did you mean 'llama-3.1-8b'"),
        (["fit", "--model", "no/such.json", "--gpu", "t4"], "no such file"),
        (["fit", "--model", "llama-3.1-8b", "--gpu", "t5"], "no GPU is called 't5'"),
        (["fit", "--model", "gpt2", "--gpu", "t4", "--method", "lorra"], "did you mean 'lora'"),
        (["fit", "--model", "gpt2", "--gpu", "t4", "--set", "ranks=4"], "rank"),
        (["fit", "--model", "gpt2", "--gpu", "t4", "--set", "rank=[4,8]"], "single values"),
        (["fit", "--model", "gpt2", "--gpu", "t4", "--parallelism", "ddp"], "over 1 GPU"),
        (["calibration", "nowhere"], "nowhere: no such results directory"),
        (["run", "{}", "--results", "/proc/results"], "choose another directory with --results"),
        (["report", "nowhere"], "nowhere: no such results directory"),
        (["show", "abc", "--results", "nowhere"], "nowhere: no such results directory"),
        (["show", "no/such"], "no record here"),
        (["rerun", "nowhere"], "no record here"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    matrix: Path, arguments: list[str], said: str
) -> None:
    words = [str(matrix) if word == "{}" else word for word in arguments]
    done = tunebench(*words, cwd=matrix.parent)
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("tunebench: error: ")
    assert said in line
    assert sorted(matrix.parent.iterdir()) == [matrix]


@pytest.mark.parametrize("arguments", [["plan"], ["run", "x", "--seeds", "0"], ["fly"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert tunebench(*arguments).returncode == 2


def test_a_bug_shows_its_traceback(matrix: Path) -> None:
    code = (
        "import launch.planning.plan, launch.entry, sys\n"
        "launch.planning.plan.refusals = lambda *a: 1 / 0\n"
        f"sys.argv = ['tunebench', 'plan', {str(matrix)!r}]\n"
        "launch.entry.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_matrices_lists_every_shipped_one_with_its_question(tmp_path: Path) -> None:
    done = tunebench("matrices", "--json", cwd=tmp_path)
    found = {entry["name"]: entry["question"] for entry in json.loads(done.stdout)}
    assert "quickstart" in found
    assert all(question.endswith("?") for question in found.values())
    for name in found:
        assert tunebench("plan", name, "--no-predict", cwd=tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_doctor_tells_what_runs_and_why_not_the_rest() -> None:
    found = json.loads(tunebench("doctor", "--json").stdout)
    by_name = {finding["name"]: finding for finding in found}
    for method in ("full", "lora", "qlora"):
        assert by_name[f"method: {method}"]["state"] == "ok"
    flash = by_name["model.attn_implementation: flash_attention_2"]
    assert (flash["state"], bool(flash["detail"])) == ("no", True)
    assert "network" not in {finding["topic"] for finding in found}
    assert by_name["torch"]["detail"]
    assert by_name["local"]["state"] == "ok"
    assert {"--on slurm", "--on ray"} <= by_name.keys()
    assert by_name["parallelism: ddp"]["state"] == ("ok" if (os.cpu_count() or 1) > 1 else "no")


def entry_with(status: str) -> object:
    class Entry:
        record = new_record(Cell(method="base"), []).model_copy(update={"status": status})
        directory = Path("results/x")

    return Entry()


@pytest.mark.parametrize(
    ("statuses", "signal", "code"),
    [
        (["ok", "oom", "timeout", "diverged", "invalid"], None, 0),
        (["ok", "failed"], None, EXIT_INCOMPLETE),
        (["ok", "interrupted"], None, EXIT_INCOMPLETE),
        (["ok", "interrupted"], 2, 130),
        ([], 15, 143),
    ],
)
def test_exit_codes_of_a_run(statuses: list[str], signal: int | None, code: int) -> None:
    entries = {str(index): entry_with(status) for index, status in enumerate(statuses)}
    assert exit_code(entries, signal) == code  # type: ignore[arg-type]


def test_what_was_not_measured_is_a_dash() -> None:
    cell = Cell(method="lora", adapter=Adapter(), data=Data(), train=Train())
    job = Job(cell, "k", "lora r16", "run", "", 0, None)
    assert outcome_row(job, None)[1:] == ("not run", "–", "–", "–", "lora r16", "–")
    row = outcome_row(job, entry_with("failed"))  # type: ignore[arg-type]
    assert row[1:5] == ("failed", "–", "–", "–")


def test_columns_are_aligned_and_counts_sorted() -> None:
    assert text_table([("a", "b"), ("xyz", "1"), ("é", "22")]) == ["a    b", "xyz  1", "é    22"]
    assert counted(["keep", "run", "run"]) == "2 run, 1 keep"
