"""What a run would do about each cell, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.records import provenance
from harness.records.provenance import new_record
from harness.records.quality import Quality, Recipe, TaskScore
from harness.records.record import Record
from harness.records.store import Entry, record_key
from launch.planning.plan import RETRIED, decide, plan_jobs, retried_statuses
from matrices.cell import Adapter, Cell, Data, Model, Quantization, Train, base_cells
from matrices.errors import UserError


def lora(**changes: Any) -> Cell:
    parts = {"method": "lora", "adapter": Adapter(), "data": Data(), "train": Train()}
    return Cell(**(parts | changes))


def entry(cell: Cell, status: str, attempt: int = 1, reason: str | None = None) -> Entry:
    record = new_record(cell, [], attempt)
    changes = {"status": status, "reason": reason, "ended": "2026-01-02T03:04:05.000+00:00"}
    return Entry(Path(f"r{attempt}"), record.model_copy(update=changes))


def present(*entries: Entry) -> dict[str, Entry]:
    return {record_key(e.record.cell_id, e.record.stack_id): e for e in entries}


@pytest.mark.parametrize("status", ["ok", "oom", "timeout", "diverged"])
def test_results_are_kept(status: str) -> None:
    record = entry(lora(), status).record
    assert decide(record, "", RETRIED) == ("keep", f"{status} since 2026-01-02T03:04Z")


@pytest.mark.parametrize("status", ["failed", "interrupted", "skipped", "invalid"])
def test_what_is_no_result_is_retried(status: str) -> None:
    record = entry(lora(), status, attempt=3, reason="because").record
    assert decide(record, "", RETRIED) == ("retry", f"attempt 3 was {status} (because)")


def test_invalid_never_blocks_and_a_result_outlives_a_refusal() -> None:
    invalid, ok = entry(lora(), "invalid").record, entry(lora(), "ok").record
    assert decide(invalid, "", RETRIED)[0] == "retry"
    assert decide(invalid, "no", RETRIED) == ("invalid", "no")
    assert decide(ok, "no", RETRIED)[0] == "keep"
    assert decide(None, "no", RETRIED) == ("invalid", "no")
    assert decide(None, "", RETRIED)[0] == "run"


def scored(cell: Cell, recipe: Recipe | None) -> Entry:
    score = TaskScore(metrics={}, higher_is_better={}, n=1, version="1", hash="a")
    found = entry(cell, "ok")
    quality = Quality(tasks={"t": score}, recipe=recipe)
    return Entry(found.directory, found.record.model_copy(update={"quality": quality}))


def test_a_base_scored_in_another_precision_is_scored_again_for_cells_to_run() -> None:
    [base] = base_cells(lora()).values()
    old, now = None, Recipe(softmax_dtype="float32")

    def actions(*entries: Entry) -> list[str]:
        return [job.action for job in plan_jobs([lora(), lora(seed=1)], present(*entries))]

    assert actions(scored(base, old)) == ["retry", "run", "run"]
    assert actions(scored(base, now)) == ["keep", "run", "run"]
    measured = (scored(lora(), old), scored(lora(seed=1), old))
    assert actions(scored(base, old), *measured) == ["keep", "keep", "keep"]
    assert actions(scored(base, old), measured[0]) == ["retry", "keep", "run"]
    [again, *_] = plan_jobs([lora()], present(scored(base, old)))
    assert again.why == "log-likelihoods in bfloat16; cells are scored in float32 now"
    # In fp32 it was float32 before the argument was given.
    single = lora(model=Model(weight_dtype="fp32"))
    [base] = base_cells(single).values()
    assert plan_jobs([single], present(scored(base, old)))[0].action == "keep"


def test_retry_adds_statuses_and_refuses_other_words() -> None:
    assert retried_statuses(None) == RETRIED
    assert retried_statuses("oom, timeout") == RETRIED | {"oom", "timeout"}
    assert decide(entry(lora(), "oom").record, "", retried_statuses("oom"))[0] == "retry"
    with pytest.raises(UserError, match="did you mean 'timeout'"):
        retried_statuses("oom,timeot")
    with pytest.raises(UserError):
        retried_statuses("predicted")


def test_bases_come_first_once_and_only_for_cells_that_can_run() -> None:
    nf4 = lora(method="qlora", quantization=Quantization())
    flash = Model(name="other", attn_implementation="flash_attention_2")
    cells = [lora(), lora(adapter=Adapter(rank=4)), nf4, lora(model=flash)]
    jobs = plan_jobs(cells, {})
    assert [job.cell.method for job in jobs] == ["base", "base", "lora", "lora", "qlora", "lora"]
    assert [job.cell.quantization is not None for job in jobs[:2]] == [False, True]
    assert [job.action for job in jobs] == ["run"] * 5 + ["invalid"]
    assert jobs[-1].why.startswith("flash-attention-needs-gpu: ")
    assert [job.cell.method for job in plan_jobs(cells, {}, score_base=False)] == [
        "lora",
        "lora",
        "qlora",
        "lora",
    ]


def test_records_of_another_stack_are_not_this_ones() -> None:
    cell = lora()
    record: Record = entry(cell, "ok").record
    packages = record.stack.packages | {"torch": "1.0"}
    stack = record.stack.model_copy(update={"packages": packages})
    other = record.model_copy(update={"stack": stack})
    jobs = plan_jobs([cell], present(Entry(Path("x"), other)), score_base=False)
    assert [job.action for job in jobs] == ["run"]
    # One made before a cell's own use was its identity has another id, and counts.
    older = record.model_copy(update={"stack_id": "f" * 64, "attempt": 4})
    [job] = plan_jobs([cell], present(Entry(Path("x"), older)), score_base=False)
    assert (job.action, job.known_attempt) == ("keep", 0)
    [cored] = plan_jobs([cell], present(Entry(Path("x"), older)), cores=lambda _: 1000)[-1:]
    assert cored.key != job.key


def test_what_is_there_is_kept_with_its_place() -> None:
    cell = lora()
    found = entry(cell, "ok", attempt=2)
    [job] = plan_jobs([cell], present(found), score_base=False)
    assert (job.action, job.entry, job.known_attempt) == ("keep", found, 2)
    assert job.key == f"{cell.cell_id[:12]}-{found.record.stack_id[:8]}"


def test_ten_thousand_cells_are_planned_in_seconds() -> None:
    import time

    cells = [lora(seed=seed) for seed in range(10_000)]
    provenance.stack()
    # Of this process alone, whatever else the machine does.
    began = time.process_time()
    assert len(plan_jobs(cells, {})) == 10_001
    assert time.process_time() - began < 15
