"""`tests/benchmarks/ACCURACY.md`: predictions beside published measurements.

`python tests/benchmarks/accuracy.py --deepspeed DIR > tests/benchmarks/ACCURACY.md` predicts the
rows of `tests/data/published_measurements.csv` under the versions that were measured (pip installs
them into a cache) and under the current ones, and asks accelerate and DeepSpeed about the same
models. DIR has a DeepSpeed that need not be in this environment
(`pip install --no-deps --target DIR deepspeed einops hjson py-cpuinfo`). Takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import accuracy_text as text  # noqa: E402
import published  # noqa: E402

from launch.display.progress import display_for_stderr  # noqa: E402
from launch.predict.overlays import Overlay, overlay  # noqa: E402
from launch.predict.predict import PredictionOptions, predict  # noqa: E402

DATA = ROOT / "tests" / "data" / "published_measurements"
STACK = (
    "transformers==4.48.1,peft==0.13.2,accelerate==1.0.1,trl==0.13.0,tokenizers==0.21.4,"
    "huggingface_hub==0.36.0,bitsandbytes==0.43.3"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stack", default=STACK, help="directory or pins of the measured versions")
    parser.add_argument("--deepspeed", metavar="DIR", help="directory with a DeepSpeed")
    arguments = parser.parse_args()
    rows = published.read(DATA.with_suffix(".csv"))
    told = yaml.safe_load(DATA.with_suffix(".yaml").read_text())
    vocabulary = {name: entry["size"] for name, entry in told["vocabulary"].items()}
    cells = published.cells(rows, vocabulary)
    display = display_for_stderr()
    then = predict(
        cells, PredictionOptions(overlay=overlay(arguments.stack, display.message)), display
    )
    now = predict(cells, PredictionOptions(overlay=Overlay()), display)
    # DeepSpeed logs to standard output.
    with contextlib.redirect_stdout(sys.stderr):
        others = other_tools(rows, vocabulary, arguments.deepspeed)
    document = text.document(told, text.Compared.of(rows, then, now), others)
    print(document, end="")


def other_tools(
    rows: Sequence[published.Measurement], vocabulary: dict[str, int], deepspeed: str | None
) -> dict[tuple[str, int], dict[str, int]]:
    """Each tool's bytes by model and number of GPUs."""
    import estimators

    if deepspeed:
        sys.path.append(deepspeed)
    found: dict[tuple[str, int], dict[str, int]] = {}
    for row in rows:
        key = (row.model_id, row.devices)
        if key not in found:
            model = published.model(row.model_id, vocabulary.get(row.model_id))
            found[key] = {
                "accelerate, bf16": estimators.accelerate_bytes(model, "bfloat16"),
                "accelerate, fp32": estimators.accelerate_bytes(model, "float32"),
            }
            if deepspeed:
                found[key] |= estimators.deepspeed_bytes(model, row.devices)
    return found


if __name__ == "__main__":
    main()
