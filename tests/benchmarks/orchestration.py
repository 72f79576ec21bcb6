"""What an engine adds to a cell: `python tests/benchmarks/orchestration.py [CELLS]`.

Runs the same small cells one after another (one slot each: a SLURM node, a Ray node) by a loop of
recorded commands, by `tunebench run` on this machine, on a SLURM of one node and on a Ray of one
node, first one cell, then CELLS, and prints for each:

* one cell: the whole command;
* each further cell: (time of CELLS - time of one) / (CELLS - 1);
* of that, the cell itself, from the first to the last moment in its record;
* the rest is what the engine adds, imports included.

Not part of the tests: seconds depend on the machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/integration")]

from slurm_cluster import Cluster, cluster, missing, wait_for  # noqa: E402

from harness.ranks.launch_command import accelerate, command_of_record  # noqa: E402
from harness.records.reading import read_record  # noqa: E402

MATRIX = """\
name: cells
model: tiny-llama
data: {{source: python-reference, max_length: 32, max_samples: 40}}
train: {{steps: 4, warmup_steps: 1, micro_batch_size: 1}}
evaluate: {{tasks: [], sample_prompts: []}}
score_base: false
method: lora
rank: 4
axes:
  seed: {seeds}
"""


def run(
    directory: Path, seeds: list[int], options: list[str], environment: dict[str, str]
) -> float:
    """Seconds of one `tunebench run`, from the command to its end."""
    (directory / "cells.yaml").write_text(MATRIX.format(seeds=seeds))
    argv = [sys.executable, "-m", "launch.entry", "run", "cells.yaml", "--no-predict", *options]
    began = time.perf_counter()
    done = subprocess.run(
        argv, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - began


def own_seconds(directory: Path) -> float:
    """Of a cell, from the first to the last moment in its record; the median."""
    found = [read_record(path) for path in (directory / "results/cells").glob("*/record.json")]
    moments = [(record.started, record.ended) for record in found if record.ended]
    return statistics.median(
        (datetime.fromisoformat(str(end)) - datetime.fromisoformat(start)).total_seconds()
        for start, end in moments
    )


def engine(name: str, cells: int, go: Callable[[Path, list[int]], float]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        go(directory, [1000])  # caches, files in memory
        one = go(directory, [0])
        all_of_them = go(directory, list(range(1, cells + 1)))
        further = (all_of_them - one) / (cells - 1)
        own = own_seconds(directory)
    print(f"{name:12} {one:8.2f} {further:12.2f} {own:10.2f} {further - own:8.2f}", flush=True)


def by_hand(directory: Path, seeds: list[int]) -> float:
    """The loop that users come with: the recorded commands of cells that were run before."""
    environment = dict(os.environ)
    run(directory, seeds, [], environment)
    wanted = [
        command_of_record(record, path.parent, None, accelerate())
        for path in (directory / "results/cells").glob("*/record.json")
        if (record := read_record(path)).cell.seed in seeds
    ]
    began = time.perf_counter()
    for command in wanted:
        subprocess.run(command, cwd=directory, capture_output=True, check=True)
    return time.perf_counter() - began


def on_slurm(cells: int) -> None:
    if reason := missing():
        print(f"slurm: {reason}")
        return
    with tempfile.TemporaryDirectory() as place, cluster(Path(place)) as found:
        _one_node(found)
        environment = {**os.environ, **found.environment}
        engine("slurm", cells, lambda d, s: run(d, s, ["--on", "slurm"], environment))


def _one_node(found: Cluster) -> None:
    """Cells that run at the same time would hide what each costs."""
    found.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=one")
    wait_for(lambda: "drain" in found.run("sinfo", "-h", "-n", "n2", "-o", "%T"), what="drain")


def main(cells: int) -> None:
    print(f"{'seconds':12} {'one cell':>8} {'each further':>12} {'cell itself':>10} {'added':>8}")
    environment = dict(os.environ)
    engine("by hand", cells, by_hand)
    engine("local", cells, lambda d, s: run(d, s, [], environment))
    on_slurm(cells)
    ray = ["--on", "ray", "--address", "local"]
    engine("ray", cells, lambda d, s: run(d, s, ray, environment))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
