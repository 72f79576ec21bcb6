"""Self-check: whether the fake device works here, and the ledger counts a known number of bytes.

The fake device depends on memory layouts of torch that are not part of its interface; if one is
other than expected, the process may crash. So a child process tries it first, on a small problem
with a known answer.
"""

from __future__ import annotations

import os

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.meters.memory.ledger import block_bytes
from harness.simulate.device import fake_cuda, torch_cuda
from harness.simulate.memory import replay
from harness.simulate.memory.allocator import Allocator
from harness.simulate.memory.ledger import SimulatedLedger
from harness.system.child_process import fork_to_answer, signal_text
from matrices.catalogue.gpus import Gpu

WIDTH, ROWS = 256, 96


def problem(gpu: Gpu | None) -> str | None:
    """Why simulating on `gpu` (on fake CPU tensors without one) cannot be trusted here, or None."""
    child, reading = fork_to_answer(lambda: _said(gpu))
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"the attempt died of {signal_text(os.WTERMSIG(status))}"
    return said or None


def _said(gpu: Gpu | None) -> str:
    try:
        _try(gpu)
    except Exception as error:
        # Whatever happens in there is the answer.
        return " ".join(f"{type(error).__name__}: {error}".split())[:1000]
    return ""


def _try(gpu: Gpu | None) -> None:
    """A forward and a backward whose memory is known in closed form."""
    place = "cpu"
    if gpu is not None:
        place = "cuda"
        fake_cuda.enable()
        torch_cuda.patch(gpu)
    ledger = SimulatedLedger(place, workspace_bytes=0)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        weight = nn.Parameter(torch.empty(WIDTH, WIDTH, device=place, dtype=torch.bfloat16))
        rows = torch.empty(ROWS, WIDTH, device=place, dtype=torch.bfloat16)
        ledger.enter_phase("forward")
        with torch.autocast(place, dtype=torch.bfloat16):
            product = nn.functional.silu(rows @ weight)
        ledger.enter_phase("backward")
        product.sum().backward()
        if weight.grad is None or weight.grad.device.type != place:
            raise RuntimeError(f"the gradient of a {place} tensor is not there")
        del product
        found = replay.walk(ledger.events, Allocator() if gpu else None)
    held = 2 * block_bytes(WIDTH * WIDTH * 2) + block_bytes(ROWS * WIDTH * 2)
    if found.ends.get("backward") != held:
        raise RuntimeError(f"{found.ends.get('backward')} bytes are live where {held} should be")
    through = held - block_bytes(WIDTH * WIDTH * 2) + 2 * block_bytes(ROWS * WIDTH * 2)
    if found.ends.get("forward") != through:
        raise RuntimeError(
            f"{found.ends.get('forward')} bytes are live after a forward of {through}"
        )
