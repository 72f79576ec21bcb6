"""Cells with a problem: marked as invalid one by one, and all of them together."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.preflight.problems import Findings, Problem, group_cells
from launch.planning.invalid_cells import ProblemsFound, leave_out, mark_invalid
from launch.planning.plan import Job, Sweep, plan_jobs
from matrices.cell import Adapter, Cell, Data, Evaluate, Model, Train
from matrices.errors import UserError
from matrices.rules.machine import Machine

CPU = Machine(has_gpu=False, devices=2)
WRONG = UserError("no such data", key="data.source")


def lora(rank: int = 8, model: str = "a", tasks: tuple[str, ...] = ("t",)) -> Cell:
    return Cell(
        method="lora",
        model=Model(name=model),
        adapter=Adapter(rank=rank),
        data=Data(),
        train=Train(),
        evaluate=Evaluate(tasks=tasks),
    )


def planned(*cells: Cell) -> list[Job]:
    return plan_jobs(cells, {}, machine=CPU)


def actions(jobs: list[Job]) -> list[tuple[str, str]]:
    return [(job.cell.method, job.action) for job in jobs]


def test_only_the_cells_that_have_a_problem_are_refused_and_it_is_said_once() -> None:
    cells = [lora(4), lora(8), lora(16)]
    messages: list[str] = []
    sweep = Sweep(cells, Path(), locate=lambda key: f"m.yaml:{len(key)}")
    problem = Problem(WRONG, (cells[0].cell_id, cells[2].cell_id))
    jobs = leave_out(planned(*cells), [problem], messages.append, sweep)
    assert actions(jobs) == [
        ("base", "run"),
        ("lora", "invalid"),
        ("lora", "run"),
        ("lora", "invalid"),
    ]
    assert jobs[1].why == "data.source: no such data"
    assert messages == ["2 of 3 cells left out as invalid: m.yaml:11: data.source: no such data"]


def test_the_command_stops_when_no_cell_is_left_though_its_base_could_be_scored() -> None:
    cell = lora()
    with pytest.raises(ProblemsFound) as found:
        leave_out(planned(cell), [Problem(WRONG, (cell.cell_id,))], print)
    assert [str(error) for error in found.value.problems] == ["data.source: no such data"]


def test_a_base_that_the_matrix_names_is_a_cell_of_its_own() -> None:
    cell, base = lora(), Cell(method="base", model=Model(name="a"), evaluate=lora().evaluate)
    jobs = leave_out(planned(base, cell), [Problem(WRONG, (cell.cell_id,))], print)
    assert actions(jobs) == [("base", "run"), ("lora", "invalid")]


def test_a_base_goes_with_the_last_cell_that_is_judged_against_it() -> None:
    cells = [lora(model="a"), lora(model="b")]
    jobs = mark_invalid(planned(*cells), [Problem(WRONG, (cells[0].cell_id,))])
    assert [(job.cell.model.name, job.cell.method) for job in jobs] == [
        ("b", "base"),
        ("a", "lora"),
        ("b", "lora"),
    ]


def test_a_check_runs_once_for_the_cells_that_share_what_it_is_about() -> None:
    cells = [lora(4), lora(8), lora(4, tasks=()), Cell(method="base")]
    asked: list[int] = []

    def check(adapter: Adapter) -> str:
        asked.append(adapter.rank)
        if adapter.rank == 4:
            raise UserError("too low", key="adapter.rank")
        return "fine"

    found = Findings()
    answers = [
        found.check(c, check, one) for one, c in group_cells(cells, lambda cell: cell.adapter)
    ]
    assert (asked, answers) == ([4, 8], [None, "fine"])
    [problem] = found.problems
    assert problem.cells == (cells[0].cell_id, cells[2].cell_id)
    assert found.without(cells) == [cells[1], cells[3]]


def test_the_same_complaint_about_other_cells_is_one_problem() -> None:
    found = Findings()
    found.add([lora(4)], UserError("no"))
    found.add([lora(8), lora(4)], UserError("no"))
    [problem] = found.problems
    assert problem.cells == (lora(4).cell_id, lora(8).cell_id)
