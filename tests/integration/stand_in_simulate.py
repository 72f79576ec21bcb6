"""The simulating process's protocol, with figures that a test can foretell and no simulation.

`python -m stand_in_simulate`, with a request on each line of standard input. What it does is told
by each cell's seed. The peak of a cell is BASE_BYTES and TOKEN_BYTES for every token of its micro
batch.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import sys
import time
from pathlib import Path

from harness.records.prediction import (
    PredictedMemory,
    PredictedOutOfMemory,
    PredictedSpeed,
    Prediction,
    Request,
    Verdict,
)
from matrices.catalogue.gpus import Gpu
from matrices.cell import Cell

OK, INVALID, DIES, HANGS, CHATTY = range(5)
BASE_BYTES = 8 * 2**30
TOKEN_BYTES = 2**20
# Method to what of BASE_BYTES the model and its states take.
SHARE = {"full": 4.0, "lora": 1.0, "qlora": 0.5}


def peak_bytes(cell: Cell) -> int:
    assert cell.train is not None
    assert cell.data is not None
    tokens = cell.train.micro_batch_size * cell.data.max_length
    return int(BASE_BYTES * SHARE[cell.method]) + TOKEN_BYTES * tokens


def verdict(peak: int, gpu: Gpu) -> Verdict:
    fits = peak <= gpu.capacity_bytes
    oom = PredictedOutOfMemory(
        phase="backward", op="aten.mm", module="lm_head",
        requested_bytes=1, allocated_bytes=2, reserved_bytes=3,
    )  # fmt: skip
    return Verdict(
        gpu=gpu.name,
        capacity_bytes=gpu.capacity_bytes,
        context_bytes=gpu.context_bytes,
        outcome="fits" if fits else "oom",
        oom=None if fits else oom,
    )


def prediction(cell: Cell, request: Request) -> Prediction:
    known = {"cell_id": cell.cell_id, "cell": cell, "stack": stack()}
    if cell.seed == INVALID:
        return Prediction(**known, status="invalid", reason="as the test asked")
    peak = peak_bytes(cell)
    return Prediction(
        **known,
        status="predicted",
        engine=request.engine or "fake-cuda",
        margin=0.001,
        device=request.gpu.name if request.gpu else "a100-80gb",
        memory=PredictedMemory(
            peak_allocated_bytes=peak,
            steady_allocated_bytes=BASE_BYTES,
            peak_reserved_bytes=peak + 2**21,
            peak_phase="backward",
            by_phase={"load": BASE_BYTES, "forward": peak - 1, "backward": peak},
            by_category={"weights": BASE_BYTES, "activations": peak - BASE_BYTES},
        ),
        verdicts=[verdict(peak, gpu) for gpu in request.judge],
        speed=PredictedSpeed(floor_seconds=0.5, gpu=request.gpu.name if request.gpu else None),
        assumptions=["no padding"],
    )


def stack() -> dict[str, str]:
    """The versions an import would find, and which harness is running."""
    names = ("torch", "transformers", "peft")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"harness": str(Path(sys.modules["harness"].__file__ or "").resolve())}


def answer_all(request: Request) -> None:
    # Answers may come in any order.
    for index in reversed(range(len(request.cells))):
        cell = request.cells[index]
        if cell.seed == CHATTY:
            print("a library greets on standard output", flush=True)
            print("and complains on standard error", file=sys.stderr, flush=True)
        if cell.seed == DIES:
            print("RuntimeError: no such internals", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if cell.seed == HANGS:
            if os.fork() == 0:
                Path(os.environ["STAND_IN_PIDS"]).write_text(f"{os.getppid()} {os.getpid()}")
            time.sleep(60)
            os._exit(1)
        answer = prediction(cell, request).model_dump(mode="json")
        print(json.dumps({"index": index, "prediction": answer}), flush=True)


if __name__ == "__main__":
    for line in sys.stdin:
        answer_all(Request.model_validate_json(line))
