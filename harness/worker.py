"""One cell, one process: `python -m harness.worker CELL.json OUTPUT_DIR` leaves a record there.

Imports the whole stack on purpose: a sweep's cells are forked from a server that has it loaded.
"""

from __future__ import annotations

import gc
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401
import lm_eval.evaluator
import lm_eval.models.huggingface  # noqa: F401
import peft
import torch  # noqa: F401
from transformers import AutoModelForCausalLM  # noqa: F401
from transformers.utils import logging as transformers_logging

from harness import data, device, evaluate, model, provenance, verify
from harness.job import Interrupted, Job
from harness.meters import memory, speed
from harness.meters.steps import TOP_TENSORS, CounterSteps, MemorySteps, StepClock, read_phase
from harness.record import (
    LiveTensor,
    Phase,
    PhaseMemory,
    Record,
    read_record,
)
from harness.train import Course, build_trainer, forward_restored, worst_case_rows
from matrices.cell import Cell
from matrices.errors import UserError

# Adam's state is made in the first step, so the second is the first whole one.
MEMORY_STEPS = 2


def run(cell_path: Path, output_dir: Path) -> int:
    """Measure the cell in `cell_path` and leave its record, samples and adapter in `output_dir`.

    Returns 0 when the record's status is ok and 1 when it is another; an exception here is a bug.
    """
    transformers_logging.disable_progress_bar()
    cell = Cell.model_validate_json(cell_path.read_text())
    output_dir.mkdir(parents=True, exist_ok=True)
    job = Job(_starting_record(cell, cell_path, output_dir), output_dir)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _measure(job)
    except (Exception, Interrupted, KeyboardInterrupt) as error:
        return job.fail(error)
    return job.finish("ok")


def _interrupt(number: int, _: Any) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name}")


def _starting_record(cell: Cell, cell_path: Path, output_dir: Path) -> Record:
    """The record the runner began, or a new one when started by hand."""
    begun = output_dir / "record.json"
    if begun.exists():
        return read_record(begun)
    if cell_path.resolve() != (output_dir / "cell.json").resolve():
        (output_dir / "cell.json").write_text(cell.model_dump_json(indent=1))
    command = provenance.worker_command(cell_path, output_dir, device.has_cuda())
    return provenance.new_record(cell, command)


def _measure(job: Job) -> None:
    cell = job.record.cell
    tokenizer = model.load_tokenizer(cell.model)
    loaded = _load(job)
    if cell.train is not None:
        scored = _train(job, loaded, tokenizer)
        del loaded
        if scored is None:
            _free()
            scored = _as_shipped(job)
    else:
        job.record.verified = verify.verify_model(loaded, cell)
        scored = loaded
    _evaluate(job, scored, tokenizer)


def _load(job: Job) -> Any:
    """Base weights on the device, k-bit preparation done, adapter attached."""
    record, cell = job.record, job.record.cell
    job.enter("load", cell.model.name)
    ledger = memory.Ledger(device.training_device().type)
    device.reset_peaks()
    started = time.perf_counter()
    loaded = model.load_base(cell)
    device.synchronize()
    record.speed.load_seconds = time.perf_counter() - started
    record.memory.phases["load"] = [read_phase()]
    record.provenance.model = model.provenance(cell.model, loaded)
    memory.tag_model(ledger, loaded)
    if cell.quantization is not None and cell.quantization.kbit_preparation and cell.train:
        job.enter("kbit_preparation")
        device.reset_peaks()
        ledger.enter_phase("kbit_preparation")
        with ledger:
            loaded = model.prepare_kbit(loaded, cell)
        _keep_phase(record, "kbit_preparation", read_phase(), ledger.events)
    ledger.close()
    loaded = model.add_adapter(loaded, cell)
    record.artifacts.trainable_parameters, record.artifacts.total_parameters = (
        model.count_parameters(loaded) if cell.train else (0, model.count_parameters(loaded)[1])
    )
    return loaded


def _keep_phase(
    record: Record, phase: Phase, reading: PhaseMemory, events: list[memory.Event]
) -> None:
    """File a phase's counters together with its ledger figures."""
    peaks, ends = memory.phase_peaks(events), memory.phase_ends(events)
    reading.ledger_peak_bytes = peaks[phase].bytes if phase in peaks else None
    reading.ledger_end_bytes = ends.get(phase)
    record.memory.phases[phase] = [reading]


def _train(job: Job, loaded: Any, tokenizer: Any) -> Any:
    """Memory steps, then timed steps, then the adapter saved.

    Returns the trained model when it can be scored as it is (full fine-tuning), else None.
    """
    cell = job.record.cell
    assert cell.data is not None
    job.enter("data", cell.data.source)
    rows = data.load_rows(cell.data)
    job.record.provenance.data = data.provenance(cell.data, rows)
    with tempfile.TemporaryDirectory(dir=job.output_dir, prefix=".scratch-") as scratch:
        _memory_steps(job, loaded, tokenizer, Path(scratch))
        _timed_steps(job, loaded, tokenizer, rows, Path(scratch))
    if cell.adapter is None:
        return loaded
    _save_adapter(job, loaded)
    return None


def _memory_steps(job: Job, loaded: Any, tokenizer: Any, scratch: Path) -> None:
    """The untimed steps: under the ledger, and on a GPU once more with nothing but the counters."""
    record = job.record
    job.enter("memory_steps", "two full-length steps under the memory ledger, untimed")
    started = time.perf_counter()
    steps = MemorySteps(loaded, loaded.config.get_text_config().vocab_size)
    try:
        _full_length_steps(job, loaded, tokenizer, scratch, steps)
    finally:
        _keep_memory(record, steps)
    record.speed.flops_per_step = steps.flops_per_step
    if device.has_cuda():
        # A dispatch mode keeps autograd from adding gradients in place: torch's own counters would
        # read up to one activation's gradient more than a real step takes.
        counters = CounterSteps()
        _full_length_steps(job, loaded, tokenizer, scratch, counters)
        _keep_counters(record, counters)
    record.speed.memory_steps_seconds = time.perf_counter() - started


def _full_length_steps(
    job: Job, loaded: Any, tokenizer: Any, scratch: Path, steps: CounterSteps
) -> None:
    """Two full-length steps at learning rate 0, which leaves the weights as they are (every
    optimizer offered scales its whole update by it); their optimizer is thrown away."""
    cell = job.record.cell
    course = Course(MEMORY_STEPS, 0.0, prepared=True)
    rows = worst_case_rows(cell, loaded.config.get_text_config().vocab_size, MEMORY_STEPS)
    with forward_restored(loaded):
        trainer = build_trainer(
            cell, loaded, tokenizer, rows, course, output_dir=scratch, observer=steps
        )
        job.record.memory.resident = memory.resident_bytes(loaded)
        job.record.memory.allocator_settings = device.allocator_settings()
        with steps:
            trainer.train()
    loaded.zero_grad(set_to_none=True)
    del trainer
    _free()


def _keep_counters(record: Record, steps: CounterSteps) -> None:
    """Counters read without the ledger stand in for those read under it."""
    for phase in memory.TRAINING_PHASES:
        reading = steps.readings[phase]
        [under_ledger] = record.memory.phases[phase]  # type: ignore[index]
        reading.ledger_peak_bytes = under_ledger.ledger_peak_bytes
        reading.ledger_end_bytes = under_ledger.ledger_end_bytes
        record.memory.phases[phase] = [reading]  # type: ignore[index]
    _prefer_counters(record)


def _keep_memory(record: Record, steps: MemorySteps) -> None:
    """What the memory steps found, also when they ended in an error."""
    events = steps.ledger.events
    for phase in memory.TRAINING_PHASES:
        if phase in steps.readings:
            _keep_phase(record, phase, steps.readings[phase], events)  # type: ignore[arg-type]
    found = memory.training_peak(events)
    if found is None:
        return
    phase, peak = found
    live = memory.live_at(events, peak.at)
    record.memory.by_category = memory.by_category(live)
    record.memory.top_tensors = [_live_tensor(storage) for storage in live[:TOP_TENSORS]]
    record.memory.headline, record.memory.peak_bytes = "ledger", peak.bytes
    record.memory.peak_phase = phase  # type: ignore[assignment]
    _prefer_counters(record)


def _prefer_counters(record: Record) -> None:
    """Where torch counts the device's memory, its peak is the headline."""
    counted = {
        phase: rank.allocated_peak_bytes
        for phase in memory.TRAINING_PHASES
        for rank in record.memory.phases.get(phase, [])  # type: ignore[call-overload]
        if rank.allocated_peak_bytes is not None
    }
    if counted:
        highest = max(counted, key=lambda phase: counted[phase])
        record.memory.headline = "cuda_allocated"
        record.memory.peak_bytes = counted[highest]
        record.memory.peak_phase = highest  # type: ignore[assignment]


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


def _timed_steps(job: Job, loaded: Any, tokenizer: Any, rows: Any, scratch: Path) -> None:
    record, cell, train = job.record, job.record.cell, job.record.cell.train
    assert train is not None
    job.enter("train", "preparing the data")
    warmup = speed.warmup_steps(train)

    def report(step: int, loss: float, seconds: float) -> None:
        done = speed.tokens_so_far(trainer.counted.counts, train, step)
        figures = {"loss": loss, "tokens_per_second": done / seconds}
        if job.progress(step=step, steps=train.steps, **figures):
            # A killed worker leaves the steps until here.
            speed.fill(record, clock, trainer.counted.counts)
            job.save()

    clock = StepClock(warmup, report)
    course = Course(train.steps, train.learning_rate)
    with forward_restored(loaded):
        trainer = build_trainer(
            cell, loaded, tokenizer, rows, course, output_dir=scratch, observer=clock
        )
        record.verified = verify.verify_model(loaded, cell)
        trainer.create_optimizer()
        record.verified.optimizer, record.verified.substitutions = verify.verify_optimizer(
            trainer.optimizer, train.optimizer
        )
        job.save()
        device.reset_peaks()
        started = time.perf_counter()
        try:
            trainer.train()
        finally:
            record.speed.train_seconds = time.perf_counter() - started
            speed.fill(record, clock, trainer.counted.counts)
    record.memory.host_peak_rss_bytes = device.host_peak_rss_bytes()
    speed.note_device_peak(record)
    loaded.zero_grad(set_to_none=True)


def _save_adapter(job: Job, loaded: Any) -> None:
    directory = job.output_dir / "adapter"
    loaded.save_pretrained(directory)
    files = list(directory.glob("adapter_model.*"))
    job.record.artifacts.adapter_path = directory.name
    job.record.artifacts.adapter_bytes = sum(file.stat().st_size for file in files)


def _as_shipped(job: Job) -> Any:
    """A fresh base with the saved adapter on it: what a user of the adapter loads."""
    job.enter("evaluation", "loading the base and the saved adapter")
    base = model.load_base(job.record.cell)
    return peft.PeftModel.from_pretrained(base, job.output_dir / "adapter")


def _evaluate(job: Job, scored: Any, tokenizer: Any) -> None:
    record, recipe = job.record, job.record.cell.evaluate
    job.enter("evaluation", ", ".join(recipe.tasks))
    device.reset_peaks()
    started = time.perf_counter()
    scores = evaluate.score(scored, tokenizer, recipe)
    record.speed.evaluation_seconds = time.perf_counter() - started
    record.quality.tasks = scores.tasks
    record.quality.lm_eval_version = provenance.version("lm-eval")
    if len(scores.samples):
        scores.samples.to_parquet(job.output_dir / "samples.parquet", index=False)
        record.quality.samples_file = "samples.parquet"
    job.save()
    record.quality.generations = evaluate.generate(scored, tokenizer, recipe.sample_prompts)
    record.memory.phases["evaluation"] = [read_phase()]
    speed.explain_missing(record)


def _free() -> None:
    gc.collect()
    device.release_cache()


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m harness.worker CELL.json OUTPUT_DIR", file=sys.stderr)
        return 2
    cell_path, output_dir = (Path(argument) for argument in arguments)
    try:
        return run(cell_path, output_dir)
    except UserError as error:
        print(f"tunebench: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
