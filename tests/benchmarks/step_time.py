"""What measuring costs: steps of a harness cell against those of a bare TRL script.

`python tests/benchmarks/step_time.py [PAIRS] [STEPS]` runs the two in turn, A B A B ..., each in a
process of its own, on the packaged model with one LoRA configuration, and prints the median step of
every run, the ratio of each pair, and what the step meter itself took. Not part of the tests:
seconds depend on the machine.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from harness.models.packaged import ensure_model  # noqa: E402
from harness.records.reading import read_record  # noqa: E402
from matrices.cell import Adapter, Cell, Data, Evaluate, Train  # noqa: E402

WARMUP = 2


def bare(model: Path, steps: int) -> float:
    options = {
        "rank": 8,
        "learning_rate": 2e-4,
        "warmup_steps": WARMUP,
        "max_length": 128,
        "max_samples": 200,
    }
    script = ROOT / "tests/integration/bare_trl.py"
    methods = json.dumps({"lora": options})
    command = [sys.executable, str(script), str(model), str(steps), methods]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return statistics.median(json.loads(done.stdout.splitlines()[-1])["seconds"][WARMUP:])


def harness(steps: int) -> tuple[float, float]:
    """Median step seconds, and the meter's own seconds per step."""
    cell = Cell(
        method="lora",
        adapter=Adapter(rank=8),
        data=Data(max_length=128, max_samples=200),
        train=Train(steps=steps, warmup_steps=WARMUP),
        evaluate=Evaluate(tasks=(), sample_prompts=()),
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "cell.json"
        path.write_text(cell.model_dump_json())
        command = [sys.executable, "-m", "harness.worker", str(path), scratch]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        speed = read_record(Path(scratch) / "record.json").speed
    return statistics.median(speed.step_seconds[WARMUP:]), (speed.meter_seconds or 0.0) / steps


def main(pairs: int, steps: int) -> None:
    model = ensure_model("smollm2-135m")
    ratios = []
    for number in range(1, pairs + 1):
        plain = bare(model, steps)
        measured, meter = harness(steps)
        ratios.append(measured / plain)
        print(
            f"pair {number}: bare {plain:.4f} s, harness {measured:.4f} s, "
            f"ratio {ratios[-1]:.4f}, meter {meter * 1000:.2f} ms a step",
            flush=True,
        )
    print(f"ratio: median {statistics.median(ratios):.4f}, {min(ratios):.4f} to {max(ratios):.4f}")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3] or (5, 20)))
