"""What the simulator's op cache saves, and that it changes no figure.

`python tests/benchmarks/op_cache.py` predicts every shipped architecture with few layers (full,
LoRA and QLoRA in turn), with the cache and without it, and compares whole predictions. `--layers
all` keeps each model's depth. Prints the seconds of both; exits with 1 if a prediction differs.
Takes minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from harness.records.prediction import Prediction, Request  # noqa: E402
from matrices.catalogue.gpus import gpu  # noqa: E402
from matrices.catalogue.models import (  # noqa: E402
    architecture_names,
    architecture_path,
    key_of,
    plain_config,
)
from matrices.cell import Adapter, Cell, Data, Model, Quantization, Train  # noqa: E402

METHODS = ("full", "lora", "qlora")


def cells(layers: int | None, names: Sequence[str]) -> list[Cell]:
    """One small cell per architecture; every third has the same method and checkpointing."""
    made = []
    for at, (name, method) in enumerate(zip(architecture_names(), itertools.cycle(METHODS))):
        path = architecture_path(name)
        if path is None or (names and name not in names):
            continue
        depth = key_of(plain_config(path), "num_hidden_layers") or "num_hidden_layers"
        made.append(
            Cell(
                method=method,  # type: ignore[arg-type]
                model=Model(name=name, config_overrides={} if layers is None else {depth: layers}),
                data=Data(max_length=128),
                train=Train(gradient_checkpointing=at % 2 == 0),
                adapter=None if method == "full" else Adapter(),
                quantization=Quantization() if method == "qlora" else None,
            )
        )
    return made


def predictions(request: Request, cached: bool) -> list[Prediction]:
    """Answers in the order of the request, from a simulator of its own."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "request.json")
        asked.write_text(request.model_dump_json())
        code = (
            f"import harness.simulate.memory.ledger as l; l.cached = {cached}; import runpy, sys; "
            f"sys.argv = ['simulate', {str(asked)!r}]; "
            "runpy.run_module('harness.simulate', run_name='__main__')"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    answers.sort(key=lambda answer: int(answer["index"]))
    return [Prediction.model_validate_json(json.dumps(each["prediction"])) for each in answers]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="4", help="layers of every model, or `all`")
    parser.add_argument("architectures", nargs="*", help="none: all")
    asked = parser.parse_args(arguments)
    layers = None if asked.layers == "all" else int(asked.layers)
    request = Request(
        cells=cells(layers, asked.architectures), judge=[gpu("a100-80gb")], self_check=False
    )
    plain, cached = predictions(request, False), predictions(request, True)
    differing = 0
    totals = [0.0, 0.0]
    for cell, one, other in zip(request.cells, plain, cached, strict=True):
        seconds = one.simulation_seconds or 0.0, other.simulation_seconds or 0.0
        totals = [total + each for total, each in zip(totals, seconds, strict=True)]
        one.simulation_seconds = other.simulation_seconds = None
        same = one == other
        differing += not same
        verdict = f"{'equal' if same else 'DIFFERS'} ({one.status}, {other.status})"
        print(
            f"{cell.model.name:24} {cell.method:6} {one.memory.peak_allocated_bytes or 0:>16,} B  "
            f"{seconds[0]:6.2f} s without, {seconds[1]:6.2f} s with  {verdict}"
        )
    print(f"{len(plain)} cells: {totals[0]:.1f} s without, {totals[1]:.1f} s with the cache")
    print(f"{differing} differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
