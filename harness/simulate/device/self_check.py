"""Self-check: whether the fake device works here, and the ledger counts a known number of bytes.

The fake device depends on memory layouts of torch that are not part of its interface; if one is
other than expected, the process may crash. So a child process tries it first, on a small problem
with a known answer.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.meters.memory.ledger import block_bytes
from harness.simulate.device import fake_cuda, torch_cuda
from harness.simulate.memory import replay
from harness.simulate.memory.allocator import Allocator
from harness.simulate.memory.ledger import SimulatedLedger
from harness.system.parent_death import end_with_parent
from matrices.catalogue.gpus import Gpu

WIDTH, ROWS = 256, 96


def problem(gpu: Gpu | None) -> str | None:
    """Why simulating on `gpu` (on fake CPU tensors without one) cannot be trusted here, or None."""
    return _in_child(lambda: _try(gpu))


def _in_child(attempt: Callable[[], None]) -> str | None:
    reading, writing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        end_with_parent(parent)
        os.close(reading)
        said = ""
        try:
            attempt()
        except Exception as error:
            # Whatever happens in there is the answer.
            said = f"{type(error).__name__}: {error}"
        os.write(writing, " ".join(said.split())[:1000].encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"the attempt died of {signal.Signals(os.WTERMSIG(status)).name}"
    return said or None


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
