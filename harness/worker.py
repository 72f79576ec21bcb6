"""One cell: `python -m harness.worker CELL.json OUTPUT_DIR` leaves a record there.

A cell on one device is one process. On several, each rank is one: all train, and the first, which
trains in a child of its own, scores what came out when that child and its engine are gone.

Imports the whole stack on purpose: a sweep's cells are forked from a server that has it loaded.
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

from harness import device, measuring
from harness.evaluation import evaluate
from harness.measurement import Measurement
from harness.meters import speed
from harness.meters.steps import read_phase
from harness.models import loading_info, model
from harness.ranks import gather_records, launch_command, process_group
from harness.records import provenance
from harness.records.record import Record, read_record
from harness.system import child_process, interrupts
from harness.system.interrupts import Interrupted
from harness.verify import identity
from matrices.cell import Cell
from matrices.errors import UserError


def run(cell_path: Path, output_dir: Path) -> int:
    """Measure the cell in `cell_path` and leave its record, samples and adapter in `output_dir`.

    Returns 0 when the record's status is ok and 1 when it is another; an exception here is a bug.
    """
    transformers_logging.disable_progress_bar()
    device.use_environments_threads()
    cell = Cell.model_validate_json(cell_path.read_text())
    output_dir.mkdir(parents=True, exist_ok=True)
    interrupts.raise_on_sigterm()
    if not cell.is_distributed:
        if _has_gpu():
            device.see_only(cell.devices)
        measurement = Measurement(_starting_record(cell, cell_path, output_dir), output_dir)
        return _to_its_end(measurement, _measure)
    if process_group.rank() > 0:
        return _train_a_rank(_own_record(cell), output_dir)
    return _train_and_score(_starting_record(cell, cell_path, output_dir), output_dir)


def _to_its_end(measurement: Measurement, work: Any) -> int:
    try:
        work(measurement)
    except (Exception, Interrupted, KeyboardInterrupt) as error:
        interrupts.caught()
        return measurement.fail(error)
    return measurement.finish("ok")


def _starting_record(cell: Cell, cell_path: Path, output_dir: Path) -> Record:
    """The record the runner began, or a new one when started by hand."""
    begun = output_dir / "record.json"
    if begun.exists():
        return read_record(begun)
    if cell_path.resolve() != (output_dir / "cell.json").resolve():
        (output_dir / "cell.json").write_text(cell.model_dump_json(indent=1))
        launch_command.copy_profile(cell_path.parent, output_dir)
    return _own_record(cell)


def _own_record(cell: Cell) -> Record:
    threads = provenance.cpu_threads()  # accelerate has set them as it was told
    return provenance.new_record(cell, launch_command.command(cell, _has_gpu(), threads))


def _has_gpu() -> bool:
    """Asked without CUDA, which must not be touched before a child is forked."""
    return provenance.gpu_in_use()


def _measure(measurement: Measurement) -> None:
    """A cell in this one process."""
    cell = measurement.record.cell
    measurement.enter("load", cell.model.name)
    identity.check(cell)
    tokenizer = model.load_tokenizer(cell.model)
    loaded = measuring.load(measurement)
    if cell.train is not None:
        rows = measuring.rows_of(measurement)
        measuring.memory_steps(measurement, loaded, tokenizer)
        trainer = measuring.timed_steps(measurement, loaded, tokenizer, rows)
        scored = loaded
        if cell.adapter is not None:
            measuring.save_adapter(measurement, loaded)
            scored = None
        del loaded, trainer
        if scored is None:
            measuring.free()
            scored = _as_shipped(measurement)
    else:
        scored = loaded
    _evaluate(measurement, scored, tokenizer)


def _train_a_rank(record: Record, output_dir: Path) -> int:
    """One rank of a cell on several devices, without the scoring."""
    measurement = Measurement(record, output_dir, process_group.rank(), process_group.world_size())
    return _to_its_end(measurement, _train_with_others)


def _train_with_others(measurement: Measurement) -> None:
    cell = measurement.record.cell
    measurement.enter("load", f"waiting for {process_group.world_size()} ranks")
    identity.check(cell)
    # Before the others are met: a packaged model may have to be made, which transformers would then
    # have the first rank alone write.
    tokenizer = model.load_tokenizer(cell.model)
    told = process_group.join(cell, measurement.output_dir)
    loaded = measuring.load(measurement)
    rows = measuring.rows_of(measurement)
    measuring.memory_steps(measurement, loaded, tokenizer)
    if process_group.takes_models_apart(cell):
        # An engine that has taken a model apart does not put it together again.
        del loaded
        measuring.free()
        loaded = measuring.loaded_again(cell)
    del told
    trainer = measuring.timed_steps(measurement, loaded, tokenizer, rows)
    measurement.enter("gather", "gathering what was trained")
    measuring.save_gathered(measurement, trainer)
    measurement.reporter.state.tokens = measurement.record.speed.tokens
    measurement.record.ranks = [measurement.reporter.state]
    measurement.save()
    process_group.wait_for_everyone()
    if measurement.rank == 0:
        gather_records.gather(
            measurement.record, process_group.other_records(measurement.output_dir, cell.devices)
        )


def _train_and_score(record: Record, output_dir: Path) -> int:
    """The first rank: train in a child, then score in this process, which no engine has touched."""
    path = output_dir / "record.json"
    try:
        code = process_group.in_child(lambda: _train_a_rank(record, output_dir))
    except (Interrupted, KeyboardInterrupt):
        interrupts.caught()
        return 1  # and the child has written down why
    if code < 0:
        # Whoever watches this process is to see how the training ended.
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    if code:
        return code
    process_group.forget()
    measurement = Measurement(read_record(path), output_dir, 0, record.cell.devices)
    measurement.record.ended = None
    return _to_its_end(measurement, _score_what_was_trained)


def _score_what_was_trained(measurement: Measurement) -> None:
    tokenizer = model.load_tokenizer(model.at_commit(measurement.record).model)
    try:
        _evaluate(measurement, _as_shipped(measurement), tokenizer)
    finally:
        shutil.rmtree(measurement.output_dir / measuring.TRAINED, ignore_errors=True)


def _as_shipped(measurement: Measurement) -> Any:
    """What a user of the result loads: a fresh base with the saved adapter on it, or the model."""
    cell = model.at_commit(measurement.record)
    measurement.enter("evaluation", "loading what was trained")
    if cell.adapter is None:
        return model.load_base(cell, directory=measurement.output_dir / measuring.TRAINED)
    identity.check(cell)
    base = model.load_base(cell)
    # PiSSA's fast decomposition takes the base apart with random numbers, as it did for training.
    set_seed(cell.seed)
    return loading_info.with_adapter(base, measurement.output_dir / "adapter")


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
        child_process.leave(ended)
    sys.exit(ended)
