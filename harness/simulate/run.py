"""Simulate one cell: the harness's own training code on fake tensors, under the memory ledger."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.meters.memory import ledger as memory
from harness.models import model, quantization
from harness.models.model import count_parameters
from harness.preflight import adapter_check
from harness.simulate.batches import FakeBatches
from harness.simulate.libraries import attention, bitsandbytes_4bit, blank_model, kernels, old_trl
from harness.simulate.memory import replay
from harness.simulate.memory.allocator import Allocator
from harness.simulate.memory.ledger import SimulatedLedger
from harness.simulate.parallel import fake_ranks
from harness.simulate.step_time.roofline import Traffic, Work
from harness.train import (
    Observer,
    TrainingSchedule,
    build_trainer,
    inner_optimizer,
    worst_case_rows,
)
from harness.verify import behaviour
from matrices.catalogue.gpus import Gpu
from matrices.cell import Cell

STEPS = 2
# torch's default cuBLAS workspaces: `:4096:2:16:8`, and 32 MiB on Hopper (getChosenWorkspaceSize
# in aten/src/ATen/cuda/CublasHandlePool.cpp).
CUBLAS_BYTES = (2 * 4096 + 8 * 16) * 1024
CUBLAS_HOPPER_BYTES = 32 * 2**20


@dataclass
class Simulation:
    """Result of a simulation. `events` are the allocations and frees in order; `steady_at` is the
    number of events at the end of the last step; `paged_bytes` is managed memory, `host_bytes` the
    training state of rank 0 in host memory; `works` is what one step computes and moves."""

    events: list[memory.MemoryEvent]
    steady_at: int
    resident: dict[str, int]
    trainable_parameters: int
    total_parameters: int
    quantized_share: float | None
    paged_bytes: int
    workspace_bytes: int
    assumed: set[str]
    seconds: float
    works: list[Work]
    host_bytes: int = 0
    modelled: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def pooled(self) -> replay.Walk:
        """The events on a caching allocator that never runs out."""
        return replay.walk(self.events, Allocator(), self.steady_at)


class _LedgerObserver(Observer):
    """Reports phases, gradients and optimizer states of training to the ledger."""

    def __init__(
        self, ledger: SimulatedLedger, trained: Any, layout: fake_ranks.SimulatedRank
    ) -> None:
        self._ledger = ledger
        self._trained = trained
        self._layout = layout
        self._optimizer: Any = None
        self.hooks = memory.tag_gradients(ledger, trained) + memory.track_modules(ledger, trained)
        self.steady_at = 0
        # Counted in the last step only: the first one also makes the optimizer states.
        self.traffic = ledger.traffic = Traffic(ledger.device_type)
        attention.kernel_ran = self.traffic.note_kernel

    def train_begin(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._layout.begin(self._ledger, self._trained)

    def phase(self, name: str) -> None:
        self._ledger.enter_phase(name)
        if name == "optimizer_step":
            self._layout.step(self._ledger, inner_optimizer(self._optimizer))

    def step_end(self, step: int) -> None:
        memory.tag_optimizer(self._ledger, inner_optimizer(self._optimizer))
        self.steady_at = len(self._ledger.events)
        if step < STEPS:
            self.traffic.clear()


def cublas_bytes(gpu: Gpu) -> int:
    return CUBLAS_HOPPER_BYTES if gpu.compute_capability[0] == 9 else CUBLAS_BYTES


def kind(gpu: Gpu) -> tuple[int, bool]:
    """GPUs of one kind have equal cuBLAS workspaces, and flash attention or none: one simulation
    serves them all."""
    return cublas_bytes(gpu), gpu.compute_capability >= (8, 0)


def simulate(
    cell: Cell, gpu: Gpu | None, on_cuda: bool, paged: bitsandbytes_4bit.ManagedMemory
) -> Simulation:
    """Simulate two full-length steps of `cell` on `gpu`, or on this machine's CPU if it is None.

    `on_cuda`: torch was patched to have that GPU (patches.before_imports); otherwise fake CPU
    tensors are used. Raises UserError for a cell that cannot be built.
    """
    began = time.perf_counter()
    notes: list[str] = []
    if gpu is not None and not on_cuda and cell.model.attn_implementation == "flash_attention_2":
        cell = cell.model_copy(
            update={"model": cell.model.model_copy(update={"attn_implementation": "sdpa"})}
        )
        notes.append("flash_attention_2 exists on GPUs only: sdpa's CPU kernel stood in")
    bitsandbytes_4bit.forget()
    config = blank_model.model_config(cell.model)
    blank = blank_model.skeleton(cell, config)
    behaviour.refuse_encoder(blank, cell.model)
    if cell.adapter is not None:
        adapter_check.check(cell.adapter, blank, cell.quantization)
    workspace = cublas_bytes(gpu) if gpu is not None else 0
    ledger = SimulatedLedger("cuda" if on_cuda else "cpu", workspace)
    ledger.experts = blank_model.experts(config)
    ledger.scratch = dict(attention.SCRATCH)
    ledger.composites = kernels.composites()
    fake_ranks.check(cell, blank)
    with (
        tempfile.TemporaryDirectory() as scratch,
        fake_ranks.ranks(cell) as layout,
        FakeTensorMode(allow_non_fake_inputs=True),
        ledger,
    ):
        loaded, share = _load(ledger, blank, cell, layout.load_device)
        counted = count_parameters(loaded)
        steps, resident = _train(ledger, loaded, cell, layout, Path(scratch))
        host_bytes = layout.host_bytes()
        ledger.close()
    return Simulation(
        events=ledger.events,
        steady_at=steps.steady_at,
        resident=resident,
        trainable_parameters=counted[0],
        total_parameters=counted[1],
        quantized_share=share,
        paged_bytes=paged.nbytes,
        workspace_bytes=workspace,
        assumed=ledger.assumed,
        seconds=time.perf_counter() - began,
        works=steps.traffic.works(),
        host_bytes=host_bytes,
        modelled=layout.modelled,
        notes=notes + layout.assumptions,
    )


def _load(
    ledger: SimulatedLedger, blank: Any, cell: Cell, place: torch.device | None
) -> tuple[Any, float | None]:
    """The model with adapters, on the training device or on `place`; and the share of its base
    weights that is quantized, None without quantization."""
    loaded = blank_model.materialize(blank, place)
    share = (
        quantization.quantized_share(loaded.parameters()) if cell.quantization is not None else None
    )
    memory.tag_model(ledger, loaded)
    if cell.quantization is not None and cell.quantization.kbit_preparation:
        ledger.enter_phase("kbit_preparation")
        loaded = model.prepare_kbit(loaded, cell)
        ledger.enter_phase("load")
    loaded = model.add_adapter(loaded, cell)
    return old_trl.prepare(loaded, cell), share


def _train(
    ledger: SimulatedLedger,
    loaded: Any,
    cell: Cell,
    layout: fake_ranks.SimulatedRank,
    scratch: Path,
) -> tuple[_LedgerObserver, dict[str, int]]:
    vocabulary = loaded.config.get_text_config().vocab_size
    ledger.logit_widths.add(vocabulary)
    rows = worst_case_rows(cell, vocabulary, STEPS)
    observer = _LedgerObserver(ledger, loaded, layout)
    trainer = build_trainer(
        cell,
        loaded,
        old_trl.tokenizer(),
        rows,
        TrainingSchedule(STEPS, 0.0, prepared=True),
        output_dir=scratch,
        observer=observer,
    )
    trainer.data_collator = FakeBatches(trainer.data_collator, ledger)
    # Building the trainer may have exchanged parameters for others of its dtype.
    memory.tag_model(ledger, loaded)
    resident = memory.resident_bytes(loaded)
    trainer.train()
    return observer, resident
