"""The phases of a cell, or of one of its ranks, from loading to trained weights on disk."""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import device
from harness.data import dataset
from harness.measurement import Measurement
from harness.meters import losses, speed
from harness.meters.batches import CountingCollator
from harness.meters.memory import ledger as memory
from harness.meters.memory import shards
from harness.meters.steps import TOP_TENSORS, CounterSteps, MemorySteps, StepClock, read_phase
from harness.models import loading_info, model
from harness.ranks import process_group
from harness.records.memory import LiveTensor, PhaseMemory
from harness.records.part import TRAINING_PHASES, Phase
from harness.records.record import Record
from harness.system.files import TEMPORARY_PREFIX
from harness.train import (
    ObservedTrainer,
    TrainingSchedule,
    build_trainer,
    forward_restored,
    worst_case_rows,
)
from harness.verify import adapter, arguments, behaviour, checkpointing, verify
from matrices.cell import Cell, Train
from matrices.errors import UserError

# Adam creates its state in the first step, so the second step is the first complete one.
MEMORY_STEPS = 2
# Where the ranks save a full model that they trained in shards, for the process that scores it.
TRAINED_MODEL = f"{TEMPORARY_PREFIX}trained"


def load(measurement: Measurement) -> Any:
    """Load the base model, prepare it for k-bit training and attach the adapter."""
    record, cell = measurement.record, measurement.record.cell
    measurement.reporter.state.device = device.training_device_name()
    measurement.enter("load", cell.model.name)
    load_device = process_group.load_device(cell)
    ledger = memory.Ledger(load_device.type)
    device.reset_peaks()
    record.provenance.model = model.provenance(cell.model)
    started = time.perf_counter()
    loaded = model.load_base(cell, load_device)
    device.synchronize()
    record.speed.load_seconds = time.perf_counter() - started
    record.memory.phases["load"] = [read_phase()]
    record.provenance.unexpected_weights = loading_info.unexpected_weights(loaded)
    memory.tag_model(ledger, loaded)
    if cell.quantization is not None and cell.quantization.kbit_preparation and cell.train:
        measurement.enter("kbit_preparation")
        device.reset_peaks()
        ledger.enter_phase("kbit_preparation")
        with ledger:
            loaded = model.prepare_kbit(loaded, cell)
        _record_phase(record, "kbit_preparation", read_phase(), ledger.events)
    ledger.close()
    base_behaviour = behaviour.probe(loaded, cell)
    loaded = model.add_adapter(loaded, cell)
    record.verified = verify.verify_model(loaded, cell)
    behaviour.record_probe(record, base_behaviour, loaded)
    record.artifacts.trainable_parameters, record.artifacts.total_parameters = (
        model.count_parameters(loaded) if cell.train else (0, model.count_parameters(loaded)[1])
    )
    measurement.model_size = shards.on_all_ranks(loaded)
    measurement.reporter.state.whole_parameter_bytes = measurement.model_size.bytes
    return loaded


def reload_model(cell: Cell) -> Any:
    """Load as `load` does, without measuring."""
    loaded = model.load_base(cell, process_group.load_device(cell))
    return model.add_adapter(model.prepare_kbit(loaded, cell), cell)


def _record_phase(
    record: Record, phase: Phase, reading: PhaseMemory, events: list[memory.MemoryEvent]
) -> None:
    """Record a phase's counters together with its ledger figures."""
    peaks, ends = memory.phase_peaks(events), memory.phase_ends(events)
    reading.ledger_peak_bytes = peaks[phase].bytes if phase in peaks else None
    reading.ledger_end_bytes = ends.get(phase)
    record.memory.phases[phase] = [reading]


def load_rows(measurement: Measurement) -> Any:
    """The training rows; on several ranks each reads them all and trains on its own."""
    cell = measurement.record.cell
    assert cell.data is not None
    measurement.enter("data", cell.data.source)
    read = dataset.read_rows(cell.data)
    measurement.record.provenance.data = dataset.provenance(cell.data, read)
    return read.rows


def memory_steps(measurement: Measurement, loaded: Any, tokenizer: Any) -> None:
    """The untimed steps: under the memory ledger, and on a GPU again with the counters alone.

    An engine that shards the model keeps it: `loaded` cannot be used afterwards.
    """
    record = measurement.record
    measurement.enter("memory_steps", "two full-length steps under the memory ledger, untimed")
    started = time.perf_counter()
    steps = MemorySteps(loaded, loaded.config.get_text_config().vocab_size)
    try:
        _full_length_steps(measurement, loaded, tokenizer, steps)
    finally:
        _record_memory(record, steps)
        _record_shard(measurement, steps)
    checkpointing.verify_recomputation(steps.recomputation, record.cell)
    record.speed.flops_per_step = steps.flops_per_step
    if device.has_cuda():
        # Under a dispatch mode autograd does not add gradients in place: torch's counters would
        # read up to one activation's gradient more than in a real step.
        counters = CounterSteps()
        target = loaded
        if process_group.shards_model(record.cell):
            target = reload_model(record.cell)
        _full_length_steps(measurement, target, tokenizer, counters)
        _record_counters(record, counters)
    record.speed.memory_steps_seconds = time.perf_counter() - started


def _record_shard(measurement: Measurement, steps: MemorySteps) -> None:
    """Record this rank's share of the prepared model, and its collectives in a step."""
    state = measurement.reporter.state
    if steps.rank_size is not None and measurement.model_size is not None:
        state.parameter_bytes = steps.rank_size.bytes
        state.parameter_share = steps.rank_size.elements / measurement.model_size.elements
    if measurement.record.cell.is_distributed:
        state.communication = steps.communication


def _full_length_steps(
    measurement: Measurement, loaded: Any, tokenizer: Any, steps: CounterSteps
) -> None:
    """Two full-length steps at learning rate 0, which changes no weight (every supported optimizer
    scales its whole update by it). Their optimizer is discarded."""
    cell = measurement.record.cell
    schedule = TrainingSchedule(MEMORY_STEPS, 0.0, prepared=True)
    rows = worst_case_rows(cell, loaded.config.get_text_config().vocab_size, MEMORY_STEPS)
    with _temporary_directory(measurement) as scratch, forward_restored(loaded):
        trainer = build_trainer(
            cell, loaded, tokenizer, rows, schedule, output_dir=Path(scratch), observer=steps
        )
        measurement.record.memory.resident = memory.resident_bytes(loaded)
        measurement.record.memory.allocator_settings = device.allocator_settings()
        with steps:
            trainer.train()
        process_group.release_engine(trainer, cell)
    loaded.zero_grad(set_to_none=True)
    del trainer
    free_memory()


def _temporary_directory(measurement: Measurement) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(
        dir=measurement.output_dir, prefix=f"{TEMPORARY_PREFIX}scratch-"
    )


def _record_counters(record: Record, steps: CounterSteps) -> None:
    """Replace the counters read under the ledger by those read without it."""
    for phase in TRAINING_PHASES:
        reading = steps.readings[phase]
        [under_ledger] = record.memory.phases[phase]
        reading.ledger_peak_bytes = under_ledger.ledger_peak_bytes
        reading.ledger_end_bytes = under_ledger.ledger_end_bytes
        record.memory.phases[phase] = [reading]
    _choose_headline(record)


def _record_memory(record: Record, steps: MemorySteps) -> None:
    """Record what the memory steps measured, also after an error."""
    events = steps.ledger.events
    for phase in TRAINING_PHASES:
        if phase in steps.readings:
            _record_phase(record, phase, steps.readings[phase], events)
    found = memory.training_peak(events)
    if found is None:
        return
    phase, peak = found
    live = memory.live_at(events, peak.at)
    record.memory.by_category = memory.by_category(live)
    record.memory.top_tensors = [_live_tensor(storage) for storage in live[:TOP_TENSORS]]
    record.memory.ledger_peak_bytes = peak.bytes
    record.memory.ledger_peak_phase = phase
    record.memory.headline, record.memory.peak_bytes = "ledger", peak.bytes
    record.memory.peak_phase = phase
    _choose_headline(record)


def _choose_headline(record: Record) -> None:
    """torch's counter is the headline where there is one."""
    counted = {
        phase: rank.allocated_peak_bytes
        for phase in TRAINING_PHASES
        for rank in record.memory.phases.get(phase, [])
        if rank.allocated_peak_bytes is not None
    }
    if counted:
        highest = max(counted, key=lambda phase: counted[phase])
        record.memory.headline = "cuda_allocated"
        record.memory.peak_bytes = counted[highest]
        record.memory.peak_phase = highest


def _live_tensor(storage: memory.Storage) -> LiveTensor:
    return LiveTensor(
        bytes=storage.block,
        category=memory.category(storage),
        op=storage.op,
        shape=list(storage.shape),
        dtype=storage.dtype,
        module=storage.module,
        phase=storage.phase,
    )


def timed_steps(
    measurement: Measurement, loaded: Any, tokenizer: Any, rows: Any
) -> ObservedTrainer:
    """The timed training; returns its trainer, which has the engine with the model."""
    record, cell, train = measurement.record, measurement.record.cell, measurement.record.cell.train
    assert train is not None
    measurement.enter("train", "preparing the data")

    def begin(optimizer: Any) -> None:
        checkpointing.verify(loaded, cell)
        verified = record.verified
        verified.distributed_type, verified.world_size = process_group.verify(
            trainer.accelerator, cell
        )
        verified.optimizer, replaced = verify.verify_optimizer(optimizer, train.optimizer)
        verified.substitutions += [*replaced, *process_group.substitutions(cell)]
        arguments.verify_optimizer_arguments(train.sft_config, optimizer)
        verified.loss_terms = losses.extra_loss_terms(trainer)
        measurement.save()

    def report(step: int, loss: float, seconds: float) -> None:
        measurement.step(step)
        done = clock.counts[-1]
        rate = done.non_padding * cell.ranks / seconds
        figures = {"loss": loss if done.loss else None, "tokens_per_second": rate}
        if measurement.progress(step=step, steps=train.steps, **figures):
            measurement.save_steps(lambda: speed.fill_speed(record, clock))

    clock = StepClock(speed.warmup_steps(train), report, begin)
    schedule = TrainingSchedule(train.steps, train.learning_rate)
    with _temporary_directory(measurement) as scratch, forward_restored(loaded):
        trainer = build_trainer(
            cell, loaded, tokenizer, rows, schedule, output_dir=Path(scratch), observer=clock
        )
        record.verified.weight_dtypes = verify.verify_again(loaded, cell)
        record.verified.passed_through = arguments.verify_passed_through(
            train.sft_config, trainer.args
        )
        if cell.adapter is not None:
            record.verified.passed_through |= adapter.passed_through(loaded, cell.adapter)
        record.preparation = trainer.preparation
        trainer.data_collator = CountingCollator(trainer.data_collator)
        device.reset_peaks()
        started = time.perf_counter()
        try:
            trainer.train()
        finally:
            record.speed.train_seconds = time.perf_counter() - started
            speed.fill_speed(record, clock)
    _check_all_steps_ran(trainer, len(clock.seconds), train)
    record.memory.host_peak_rss_bytes = device.host_peak_rss_bytes()
    speed.record_device_peak(record)
    loaded.zero_grad(set_to_none=True)
    return trainer


def _check_all_steps_ran(trainer: ObservedTrainer, taken: int, train: Train) -> None:
    """Raise UserError when the Trainer ended early: it does so silently when its loader has no
    batch."""
    if taken == train.steps:
        return
    batches = len(trainer.get_train_dataloader())
    raise UserError(
        f"the Trainer ended after {taken} of {train.steps} steps: {len(trainer.train_dataset)} "
        f"sequences make {batches} batches of {train.micro_batch_size} on each rank "
        "(dataloader_drop_last leaves out one that is not full)",
        key="train.steps",
    )


def save_adapter(measurement: Measurement, loaded: Any) -> None:
    """Save the adapter that this process trained."""
    loaded.save_pretrained(measurement.output_dir / "adapter")
    _record_adapter(measurement)


def save_gathered(measurement: Measurement, trainer: ObservedTrainer) -> None:
    """Gather and save what the ranks trained: the adapter, or the full model for the process that
    scores it. All ranks call this; the first one writes."""
    adapted = measurement.record.cell.adapter is not None
    trainer.save_model(str(measurement.output_dir / ("adapter" if adapted else TRAINED_MODEL)))
    if adapted and measurement.rank == 0:
        _record_adapter(measurement)


def _record_adapter(measurement: Measurement) -> None:
    directory = measurement.output_dir / "adapter"
    files = list(directory.glob("adapter_model.*"))
    measurement.record.artifacts.adapter_path = directory.name
    measurement.record.artifacts.adapter_bytes = sum(file.stat().st_size for file in files)


def free_memory() -> None:
    gc.collect()
    device.release_cache()
