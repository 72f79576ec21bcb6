"""Observers of training: one times the steps, others measure their memory and operations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from harness import device
from harness.meters import batches
from harness.meters.collectives import Collectives
from harness.meters.energy import Energy, EnergyMeter
from harness.meters.foreign_cpu import ForeignCpuMeter
from harness.meters.memory import ledger, shards
from harness.meters.rates import TokenCount
from harness.records.memory import PhaseMemory
from harness.records.ranks import Communication
from harness.train import Observer, StepFacts, inner_optimizer
from harness.verify.checkpointing import Recomputation

# The largest storages listed in a record.
TOP_TENSORS = 12


class Diverged(RuntimeError):
    """The loss of a step is not a finite number."""


class StepClock(Observer):
    """Times whole optimizer steps, data loading included: from the end of one to the end of the
    next. It synchronizes the device at step ends only. It stores unrounded losses, and what each
    step consisted of.

    `begin(optimizer)` is called when everything is prepared and before any clock runs.
    `report(step, loss, seconds)` is called between steps, outside every timed interval.
    """

    def __init__(
        self,
        warmup_steps: int,
        report: Callable[[int, float, float], None],
        begin: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self._warmup_steps = warmup_steps
        self._report = report
        self._begin = begin
        self._energy = EnergyMeter()
        self._foreign_cpu = ForeignCpuMeter()
        self._parts: list[Any] = []
        self._counted: list[Any] = []
        self._divisor: Any = None
        self._facts: StepFacts | None = None
        self._since = 0.0
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.counts: list[TokenCount] = []
        self.divisors: list[float | None] = []
        self.facts: list[StepFacts] = []
        self.meter_seconds = 0.0

    def train_begin(self, optimizer: Any) -> None:
        self._begin(optimizer)
        self._start_counters()
        device.synchronize()
        self._since = time.perf_counter()

    def micro_batch(self, inputs: dict[str, Any]) -> None:
        self._counted.append(batches.count_of(inputs))

    def micro_batch_end(self, loss: Any, divisor: Any = None) -> None:
        self._parts.append(loss)
        self._divisor = divisor

    def step_facts(self, facts: StepFacts) -> None:
        self._facts = facts

    def step_end(self, step: int) -> None:
        device.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        loss = self._store_step()
        if not math.isfinite(loss):
            unlabelled = "" if self.counts[-1].loss else ", and no token of it carries a label"
            raise Diverged(f"the loss of step {step} is {loss}{unlabelled}")
        self._report(step, loss, self.seconds[-1])
        if step == self._warmup_steps:
            self._start_counters()
        self._since = time.perf_counter()
        self.meter_seconds += self._since - now

    def _store_step(self) -> float:
        """Store what the step consisted of; returns its loss. No value is read from the device
        before this."""
        self.counts.append(batches.total(self._counted))
        self.divisors.append(_number(self._divisor))
        if self._facts is not None:
            norm = _number(self._facts.gradient_norm)
            self.facts.append(self._facts._replace(gradient_norm=norm))
        self.losses.append(sum(float(part) for part in self._parts))
        self._parts.clear()
        self._counted.clear()
        self._divisor = self._facts = None
        return self.losses[-1]

    def _start_counters(self) -> None:
        self._energy.start()
        self._foreign_cpu.start()

    def energy(self) -> Energy:
        """Joules over the timed steps."""
        return self._energy.stop()

    def foreign_cpu_share(self) -> float | None:
        """Share of the processor time that other processes used over the timed steps."""
        return self._foreign_cpu.share()


def _number(value: Any) -> float | None:
    """The value of a scalar tensor; a norm over shards is first reduced over all ranks."""
    if value is None:
        return None
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return float(whole)


class CounterSteps(Observer):
    """Reads torch's, NVML's and the host's peaks phase by phase over a few untimed steps."""

    def __init__(self) -> None:
        self._open: str | None = None
        self.readings: dict[str, PhaseMemory] = {}
        self.steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._close_phase()

    def phase(self, name: str) -> None:
        self._close_phase()
        device.reset_peaks()
        self._open = name

    def step_end(self, step: int) -> None:
        self.steps = step

    def _close_phase(self) -> None:
        if self._open is not None:
            old = self.readings.get(self._open, PhaseMemory())
            self.readings[self._open] = highest_figures(old, read_phase())
            self._open = None


class MemorySteps(CounterSteps):
    """Runs the memory ledger, the FLOP counter and the counter of collectives."""

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self._model = model
        self._optimizer: Any = None
        self._hooks: list[Any] = []
        self.recomputation = Recomputation(model)
        self.ledger = ledger.Ledger(device.training_device().type, vocabulary)
        self.operations = FlopCounter()
        self.collectives = Collectives()
        self.communication: Communication | None = None
        self.rank_size: shards.ParameterSize | None = None

    def __enter__(self) -> Self:
        ledger.tag_model(self.ledger, self._model)
        self._hooks = ledger.tag_gradients(self.ledger, self._model)
        self._hooks += ledger.track_modules(self.ledger, self._model)
        self._hooks += self.recomputation.hooks
        self.collectives.__enter__()
        self.operations.__enter__()
        self.ledger.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.ledger.__exit__(*exception)
        self.operations.__exit__(*exception)
        self.collectives.__exit__(*exception)
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exception)
        self._tag_optimizer()
        self.ledger.close()

    def train_begin(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        # Preparation has replaced the tagged parameters by shards.
        shards.tag(self.ledger, self._model)
        self.rank_size = shards.on_this_rank(self._model)

    def phase(self, name: str) -> None:
        super().phase(name)
        self.ledger.enter_phase(name)
        self.recomputation.backward = name == "backward"
        if name == "optimizer_step" and self._optimizer is not None:
            shards.tag_gradients(self.ledger, inner_optimizer(self._optimizer))

    def step_end(self, step: int) -> None:
        super().step_end(step)
        self._tag_optimizer()
        # Collectives before the first step are no part of a step.
        self.communication = self.collectives.communication
        self.collectives.clear()

    def _tag_optimizer(self) -> None:
        if self._optimizer is not None:
            ledger.tag_optimizer(self.ledger, inner_optimizer(self._optimizer))

    @property
    def flops_per_step(self) -> int | None:
        return self.operations.total // self.steps if self.steps else None


def read_phase() -> PhaseMemory:
    """The counters of `harness.device` since the last `reset_peaks`."""
    peaks = device.peaks()
    return PhaseMemory(
        allocated_peak_bytes=peaks.allocated_bytes,
        reserved_peak_bytes=peaks.reserved_bytes,
        process_bytes=device.process_bytes(),
        device_bytes=device.device_bytes(),
        host_peak_rss_bytes=device.host_peak_rss_bytes(),
    )


def highest_figures(one: PhaseMemory, other: PhaseMemory) -> PhaseMemory:
    """The higher value of each figure; a figure that only one reading has is kept."""
    first, second = one.model_dump(), other.model_dump()
    merged = {
        name: max((v for v in (first[name], second[name]) if v is not None), default=None)
        for name in first
    }
    return PhaseMemory(**merged)


class FlopCounter(TorchDispatchMode):
    """Counts executed floating point operations by torch's own formulas, as its `FlopCounterMode`
    does, but decomposes no op. `FlopCounterMode` decomposes ops without a formula
    (`silu_backward` becomes five ops with temporaries), so memory measured under it would differ
    from that of a real run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas = flop_formulas()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Ops on shards are counted as each rank computes them.
        if ledger.wraps_tensors(types):
            return NotImplemented
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=out))
        return out


def flop_formulas() -> dict[Any, Any]:
    """torch's formulas by op, each called as `formula(*args, **kwargs, out_val=out)`."""
    return flop_registry | _missing_formulas()


def _missing_formulas() -> dict[Any, Any]:
    """Formulas that torch lacks: for the CPU attention kernel, which computes the same products as
    the CUDA ones, for a `linear` that another op calls (bitsandbytes' product), and for the grouped
    matrix product of experts."""

    @shape_wrapper
    def linear(left: Any, weight: Any, *_: Any, **__: Any) -> int:
        return int(2 * math.prod(left) * weight[0])

    @shape_wrapper
    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    @shape_wrapper
    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    @shape_wrapper
    def grouped(left: Any, right: Any, *_: Any, **__: Any) -> int:
        # If only one side has a group dimension, the groups divide the rows of the other side.
        groups = left[0] if len(left) == len(right) == 3 else 1
        return int(2 * groups * left[-2] * left[-1] * right[-1])

    aten = torch.ops.aten
    return {
        aten.linear: linear,
        aten._grouped_mm: grouped,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
