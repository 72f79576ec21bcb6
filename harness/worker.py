"""One cell: `python -m harness.worker CELL.json OUTPUT_DIR` writes its record there.

A cell on one device is one process. On several devices each rank is one process. All ranks train;
the first one trains in a child process, and scores the result after that child has ended.

This module imports the whole stack: a sweep's cells are forked from a server that has it loaded.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from harness.system import parent_death

    if os.environ.get(parent_death.VARIABLE):  # before the imports, which take many seconds
        parent_death.end_with_parent(os.getppid())

import bitsandbytes  # noqa: F401
import lm_eval.evaluator
import lm_eval.models.huggingface  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
from transformers import AutoModelForCausalLM, set_seed  # noqa: F401
from transformers.utils import logging as transformers_logging

from harness import device, phases
from harness.evaluation import evaluate
from harness.measurement import Measurement
from harness.meters import speed
from harness.meters.steps import read_phase
from harness.models import loading_info, model
from harness.ranks import gather_records, launch_command, process_group
from harness.records import provenance
from harness.records.reading import CELL, RECORD, read_record
from harness.records.record import Record
from harness.system import child_process, interrupts
from harness.system.interrupts import Interrupted
from harness.verify import identity
from matrices.cell import Cell
from matrices.errors import UserError


def run(cell_path: Path, output_dir: Path) -> int:
    """Measure the cell in `cell_path`; its record, samples and adapter go to `output_dir`.

    Returns 0 when the record's status is ok, else 1. It raises for bugs only.
    """
    transformers_logging.disable_progress_bar()
    device.set_threads_from_environment()
    cell = Cell.model_validate_json(cell_path.read_text())
    output_dir.mkdir(parents=True, exist_ok=True)
    interrupts.raise_on_sigterm()
    if not cell.is_distributed:
        # Not by CUDA, which must stay untouched until the child is forked.
        if provenance.uses_gpu_here():
            device.limit_visible_gpus(cell.devices)
        measurement = Measurement(_initial_record(cell, cell_path, output_dir), output_dir)
        return _run_and_record(measurement, _run_single_process)
    if process_group.rank() > 0:
        return _run_rank(_new_record(cell), output_dir)
    return _run_first_rank(_initial_record(cell, cell_path, output_dir), output_dir)


def _run_and_record(measurement: Measurement, work: Any) -> int:
    try:
        work(measurement)
    except (Exception, Interrupted, KeyboardInterrupt) as error:
        interrupts.stop_raising()
        return measurement.fail(error)
    return measurement.finish("ok")


def _initial_record(cell: Cell, cell_path: Path, output_dir: Path) -> Record:
    """The record that the runner began, or a new one when the worker was started by hand."""
    begun = output_dir / RECORD
    if begun.exists():
        return read_record(begun)
    if cell_path.resolve() != (output_dir / CELL).resolve():
        (output_dir / CELL).write_text(cell.model_dump_json(indent=1))
        launch_command.copy_profile(cell_path.parent, output_dir)
    return _new_record(cell)


def _new_record(cell: Cell) -> Record:
    gpu, threads = provenance.uses_gpu_here(), provenance.cpu_threads()
    return provenance.new_record(cell, launch_command.command(cell, gpu, threads))


def _run_single_process(measurement: Measurement) -> None:
    """Measure a cell in this process alone."""
    cell = measurement.record.cell
    measurement.enter("load", cell.model.name)
    identity.check(cell)
    tokenizer = model.load_tokenizer(cell.model)
    loaded = phases.load(measurement)
    if cell.train is not None:
        rows = phases.load_rows(measurement)
        phases.memory_steps(measurement, loaded, tokenizer)
        trainer = phases.timed_steps(measurement, loaded, tokenizer, rows)
        scored = loaded
        if cell.adapter is not None:
            phases.save_adapter(measurement, loaded)
            scored = None
        del loaded, trainer
        if scored is None:
            phases.free_memory()
            scored = _load_trained(measurement)
    else:
        scored = loaded
    _evaluate(measurement, scored, tokenizer)


def _run_rank(record: Record, output_dir: Path) -> int:
    """One rank of a cell on several devices, without the scoring."""
    measurement = Measurement(record, output_dir, process_group.rank(), process_group.world_size())
    return _run_and_record(measurement, _train_distributed)


def _train_distributed(measurement: Measurement) -> None:
    cell = measurement.record.cell
    measurement.enter("load", f"waiting for {process_group.world_size()} ranks")
    identity.check(cell)
    # Before the ranks join: a packaged model may have to be built first, and within a process group
    # transformers lets the first rank alone write files.
    tokenizer = model.load_tokenizer(cell.model)
    training_arguments = process_group.join(cell, measurement.output_dir)
    loaded = phases.load(measurement)
    rows = phases.load_rows(measurement)
    phases.memory_steps(measurement, loaded, tokenizer)
    if process_group.shards_model(cell):
        # An engine does not reassemble a model that it has sharded.
        del loaded
        phases.free_memory()
        loaded = phases.reload_model(cell)
    del training_arguments
    trainer = phases.timed_steps(measurement, loaded, tokenizer, rows)
    measurement.enter("gather", "gathering what was trained")
    phases.save_gathered(measurement, trainer)
    measurement.reporter.state.tokens = measurement.record.speed.tokens
    measurement.record.ranks = [measurement.reporter.state]
    measurement.save()
    process_group.wait_for_everyone()
    if measurement.rank == 0:
        gather_records.gather(
            measurement.record, process_group.other_records(measurement.output_dir, cell.devices)
        )


def _run_first_rank(record: Record, output_dir: Path) -> int:
    """The first rank: train in a child process, then score in this one, which has no engine."""
    path = output_dir / RECORD
    try:
        code = process_group.run_in_child(lambda: _run_rank(record, output_dir))
    except (Interrupted, KeyboardInterrupt):
        interrupts.stop_raising()
        return 1  # the child has recorded the reason
    if code < 0:
        # The runner learns from this exit how the training ended.
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    if code:
        return code
    process_group.clear_environment()
    measurement = Measurement(read_record(path), output_dir, 0, record.cell.devices)
    measurement.record.ended = None
    return _run_and_record(measurement, _score_trained)


def _score_trained(measurement: Measurement) -> None:
    tokenizer = model.load_tokenizer(model.cell_at_commit(measurement.record).model)
    try:
        _evaluate(measurement, _load_trained(measurement), tokenizer)
    finally:
        shutil.rmtree(measurement.output_dir / phases.TRAINED_MODEL, ignore_errors=True)


def _load_trained(measurement: Measurement) -> Any:
    """What a user would load: the base model with the saved adapter, or the trained model."""
    cell = model.cell_at_commit(measurement.record)
    measurement.enter("evaluation", "loading what was trained")
    if cell.adapter is None:
        return model.load_base(cell, directory=measurement.output_dir / phases.TRAINED_MODEL)
    identity.check(cell)
    base = model.load_base(cell)
    # PiSSA's fast decomposition of the base draws random numbers; they must be those of training.
    set_seed(cell.seed)
    return loading_info.load_adapter(base, measurement.output_dir / "adapter")


def _evaluate(measurement: Measurement, scored: Any, tokenizer: Any) -> None:
    record, recipe = measurement.record, measurement.record.cell.evaluate
    measurement.enter("evaluation", ", ".join(recipe.tasks))
    device.reset_peaks()
    started = time.perf_counter()
    scores = evaluate.score(scored, tokenizer, recipe)
    record.speed.evaluation_seconds = time.perf_counter() - started
    record.quality.tasks = scores.tasks
    record.quality.lm_eval_version = provenance.version("lm-eval")
    record.quality.recipe = scores.recipe
    record.missing |= scores.missing
    if len(scores.samples):
        scores.samples.to_parquet(measurement.output_dir / "samples.parquet", index=False)
        record.quality.samples_file = "samples.parquet"
    measurement.save()
    record.quality.generations = evaluate.generate(scored, tokenizer, recipe.sample_prompts)
    record.memory.phases["evaluation"] = [read_phase()]
    speed.explain_missing(record)


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
    ended = main(sys.argv[1:])
    if process_group.world_size() > 1:
        child_process.exit_now(ended)
    sys.exit(ended)
