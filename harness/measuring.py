"""One cell, or one rank of it, from loading to trained weights on disk, measured on the way."""

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
from harness.records.record import TRAINING_PHASES, LiveTensor, Phase, PhaseMemory, Record
from harness.system.files import TEMPORARY_PREFIX
from harness.train import Course, ObservedTrainer, build_trainer, forward_restored, worst_case_rows
from harness.verify import adapter, arguments, behaviour, checkpointing, verify
from matrices.cell import Cell, Train
from matrices.errors import UserError

# Adam's state is made in the first step, so the second is the first whole one.
MEMORY_STEPS = 2
# A whole model that was trained in parts, for the process that scores it.
TRAINED = f"{TEMPORARY_PREFIX}trained"


def load(measurement: Measurement) -> Any:
    """Base weights where training takes them from, k-bit preparation done, adapter attached."""
    record, cell = measurement.record, measurement.record.cell
    measurement.reporter.state.device = device.training_device_name()
    measurement.enter("load", cell.model.name)
    place = process_group.load_device(cell)
    ledger = memory.Ledger(place.type)
    device.reset_peaks()
    record.provenance.model = model.provenance(cell.model)
    started = time.perf_counter()
    loaded = model.load_base(cell, place)
    device.synchronize()
    record.speed.load_seconds = time.perf_counter() - started
    record.memory.phases["load"] = [read_phase()]
    record.provenance.unexpected_weights = loading_info.unexpected(loaded)
    memory.tag_model(ledger, loaded)
    if cell.quantization is not None and cell.quantization.kbit_preparation and cell.train:
        measurement.enter("kbit_preparation")
        device.reset_peaks()
        ledger.enter_phase("kbit_preparation")
        with ledger:
            loaded = model.prepare_kbit(loaded, cell)
        _keep_phase(record, "kbit_preparation", read_phase(), ledger.events)
    ledger.close()
    seen = behaviour.look(loaded, cell)
    loaded = model.add_adapter(loaded, cell)
    record.verified = verify.verify_model(loaded, cell)
    behaviour.note(record, seen, loaded)
    record.artifacts.trainable_parameters, record.artifacts.total_parameters = (
        model.count_parameters(loaded) if cell.train else (0, model.count_parameters(loaded)[1])
    )
    measurement.whole = shards.on_all_ranks(loaded)
    measurement.reporter.state.whole_parameter_bytes = measurement.whole.bytes
    return loaded


def loaded_again(cell: Cell) -> Any:
    """As `load`, unmeasured."""
    loaded = model.load_base(cell, process_group.load_device(cell))
    return model.add_adapter(model.prepare_kbit(loaded, cell), cell)


def _keep_phase(
    record: Record, phase: Phase, reading: PhaseMemory, events: list[memory.MemoryEvent]
) -> None:
    """File a phase's counters together with its ledger figures."""
    peaks, ends = memory.phase_peaks(events), memory.phase_ends(events)
    reading.ledger_peak_bytes = peaks[phase].bytes if phase in peaks else None
    reading.ledger_end_bytes = ends.get(phase)
    record.memory.phases[phase] = [reading]


def rows_of(measurement: Measurement) -> Any:
    """The training rows; on several ranks each reads them all and trains on its own."""
    cell = measurement.record.cell
    assert cell.data is not None
    measurement.enter("data", cell.data.source)
    read = dataset.read(cell.data)
    measurement.record.provenance.data = dataset.provenance(cell.data, read)
    return read.rows


def memory_steps(measurement: Measurement, loaded: Any, tokenizer: Any) -> None:
    """The untimed steps: under the ledger, and on a GPU once more with nothing but the counters.

    An engine that shards the model keeps it: `loaded` is of no further use then.
    """
    record = measurement.record
    measurement.enter("memory_steps", "two full-length steps under the memory ledger, untimed")
    started = time.perf_counter()
    steps = MemorySteps(loaded, loaded.config.get_text_config().vocab_size)
    try:
        _full_length_steps(measurement, loaded, tokenizer, steps)
    finally:
        _keep_memory(record, steps)
        _keep_share(measurement, steps)
    checkpointing.demand_recomputed(steps.recomputation, record.cell)
    record.speed.flops_per_step = steps.flops_per_step
    if device.has_cuda():
        # A dispatch mode keeps autograd from adding gradients in place: torch's own counters would
        # read up to one activation's gradient more than a real step takes.
        counters = CounterSteps()
        again = loaded
        if process_group.takes_models_apart(record.cell):
            again = loaded_again(record.cell)
        _full_length_steps(measurement, again, tokenizer, counters)
        _keep_counters(record, counters)
    record.speed.memory_steps_seconds = time.perf_counter() - started


def _keep_share(measurement: Measurement, steps: MemorySteps) -> None:
    """What this rank held once the model was prepared, and what it sent in a step."""
    state = measurement.reporter.state
    if steps.held is not None and measurement.whole is not None:
        state.parameter_bytes = steps.held.bytes
        state.parameter_share = steps.held.elements / measurement.whole.elements
    if measurement.record.cell.is_distributed:
        state.communication = steps.communication


def _full_length_steps(
    measurement: Measurement, loaded: Any, tokenizer: Any, steps: CounterSteps
) -> None:
    """Two full-length steps at learning rate 0, which leaves the weights as they are (every
    optimizer offered scales its whole update by it); their optimizer is thrown away."""
    cell = measurement.record.cell
    course = Course(MEMORY_STEPS, 0.0, prepared=True)
    rows = worst_case_rows(cell, loaded.config.get_text_config().vocab_size, MEMORY_STEPS)
    with _scratch(measurement) as scratch, forward_restored(loaded):
        trainer = build_trainer(
            cell, loaded, tokenizer, rows, course, output_dir=Path(scratch), observer=steps
        )
        measurement.record.memory.resident = memory.resident_bytes(loaded)
        measurement.record.memory.allocator_settings = device.allocator_settings()
        with steps:
            trainer.train()
        process_group.let_go(trainer, cell)
    loaded.zero_grad(set_to_none=True)
    del trainer
    free()


def _scratch(measurement: Measurement) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(
        dir=measurement.output_dir, prefix=f"{TEMPORARY_PREFIX}scratch-"
    )


def _keep_counters(record: Record, steps: CounterSteps) -> None:
    """Counters read without the ledger stand in for those read under it."""
    for phase in TRAINING_PHASES:
        reading = steps.readings[phase]
        [under_ledger] = record.memory.phases[phase]
        reading.ledger_peak_bytes = under_ledger.ledger_peak_bytes
        reading.ledger_end_bytes = under_ledger.ledger_end_bytes
        record.memory.phases[phase] = [reading]
    _prefer_counters(record)


def _keep_memory(record: Record, steps: MemorySteps) -> None:
    """What the memory steps found, also when they ended in an error."""
    events = steps.ledger.events
    for phase in TRAINING_PHASES:
        if phase in steps.readings:
            _keep_phase(record, phase, steps.readings[phase], events)
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
    _prefer_counters(record)


def _prefer_counters(record: Record) -> None:
    """Where torch counts the device's memory, its peak is the headline."""
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
    """The training that counts; returns its trainer, which has the engine the model is in."""
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
        verified.loss_terms = losses.further_terms(trainer)
        measurement.save()

    def report(step: int, loss: float, seconds: float) -> None:
        measurement.step(step)
        done = clock.counts[-1]
        rate = done.non_padding * cell.ranks / seconds
        figures = {"loss": loss if done.loss else None, "tokens_per_second": rate}
        if measurement.progress(step=step, steps=train.steps, **figures):
            measurement.save_steps(lambda: speed.fill(record, clock))

    clock = StepClock(speed.warmup_steps(train), report, begin)
    course = Course(train.steps, train.learning_rate)
    with _scratch(measurement) as scratch, forward_restored(loaded):
        trainer = build_trainer(
            cell, loaded, tokenizer, rows, course, output_dir=Path(scratch), observer=clock
        )
        record.verified.weight_dtypes = verify.verify_again(loaded, cell)
        record.verified.passed_through = arguments.seen(train.sft_config, trainer.args)
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
            speed.fill(record, clock)
    _demand_all_steps(trainer, len(clock.seconds), train)
    record.memory.host_peak_rss_bytes = device.host_peak_rss_bytes()
    speed.note_device_peak(record)
    loaded.zero_grad(set_to_none=True)
    return trainer


def _demand_all_steps(trainer: ObservedTrainer, taken: int, train: Train) -> None:
    """The Trainer ends without a word when its loader has no batch."""
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
    """Keep the adapter that this one process trained."""
    loaded.save_pretrained(measurement.output_dir / "adapter")
    _note_adapter(measurement)


def save_gathered(measurement: Measurement, trainer: ObservedTrainer) -> None:
    """Keep what several ranks trained, put together: the adapter, or the whole model for the
    process that scores it. All ranks call this; the first one writes."""
    adapted = measurement.record.cell.adapter is not None
    trainer.save_model(str(measurement.output_dir / ("adapter" if adapted else TRAINED)))
    if adapted and measurement.rank == 0:
        _note_adapter(measurement)


def _note_adapter(measurement: Measurement) -> None:
    directory = measurement.output_dir / "adapter"
    files = list(directory.glob("adapter_model.*"))
    measurement.record.artifacts.adapter_path = directory.name
    measurement.record.artifacts.adapter_bytes = sum(file.stat().st_size for file in files)


def free() -> None:
    gc.collect()
    device.release_cache()
