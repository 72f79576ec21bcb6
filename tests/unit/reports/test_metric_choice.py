"""Which metrics a table shows: none is lost without a word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_results as made

from harness.records.quality import Metric, TaskScore
from harness.records.record import Record
from matrices.errors import UserError
from reports.records.load import load_records
from reports.records.samples import difference, score
from reports.statistics import scores
from reports.tables.build import build
from reports.tables.groups import group
from reports.tables.metric_choice import hidden_text, metrics_shown


def task(*metrics: str, subtasks: tuple[str, ...] = ()) -> TaskScore:
    return TaskScore(
        metrics={name: Metric(value=0.5) for name in metrics},
        higher_is_better={},
        n=4,
        version="1",
        hash="same",
        subtasks=list(subtasks),
    )


def scored(root: Path, tasks: dict[str, TaskScore]) -> Record:
    record = made.record(made.trained("full"))
    record.quality.tasks, record.quality.samples_file = tasks, None
    made.write(root, record)
    return record


def shown(root: Path, *chosen: str) -> tuple[list[str], list[str]]:
    pairs, hidden = metrics_shown(group(load_records(root)), chosen)
    return [f"{task}.{metric}" for task, metric in pairs], hidden


def test_a_metric_is_chosen_for_the_tasks_that_have_it(tmp_path: Path) -> None:
    scored(
        tmp_path,
        {
            "arc": task("acc", "acc_norm"),
            "gsm8k": task("exact_match,strict-match", "exact_match,flexible-extract"),
            "wiki": task("word_perplexity", "bits_per_byte"),
        },
    )
    usual = ["arc.acc", "gsm8k.exact_match,strict-match", "wiki.bits_per_byte"]
    hidden = ["arc acc norm", "gsm8k exact match (flexible-extract)", "wiki word perplexity"]
    assert shown(tmp_path) == (usual, hidden)
    assert shown(tmp_path, "acc_norm")[0] == ["arc.acc_norm", *usual[1:]]
    assert shown(tmp_path, "acc", "acc_norm")[0][:2] == ["arc.acc", "arc.acc_norm"]
    both = ["gsm8k.exact_match,strict-match", "gsm8k.exact_match,flexible-extract"]
    assert shown(tmp_path, "exact_match")[0][1:3] == both
    [table] = build(load_records(tmp_path), "methods", metrics=["acc_norm"])
    assert "arc.acc_norm" in [column.name for column in table.columns]
    assert "(--metric chooses): arc acc, " in " ".join(table.caption)
    with pytest.raises(UserError, match="did you mean 'acc_norm'") as caught:
        build(load_records(tmp_path), "methods", metrics=["accnorm"])
    assert caught.value.key == "--metric"


def test_a_group_stands_before_its_tasks_which_follow_when_all_fit(tmp_path: Path) -> None:
    small = {"sums": task("acc", subtasks=("one", "two")), "one": task("acc"), "two": task("acc")}
    leaves = [f"leaf{number}" for number in range(57)]
    scored(tmp_path / "small", small)
    assert shown(tmp_path / "small") == (["sums.acc", "one.acc", "two.acc"], [])
    parts = ("stem", "other")
    mmlu = {
        "mmlu": task("acc", subtasks=parts),
        "stem": task("acc", subtasks=tuple(leaves[:30])),
        "other": task("acc", subtasks=tuple(leaves[30:])),
        **{leaf: task("acc") for leaf in leaves},
    }
    scored(tmp_path / "large", mmlu)
    pairs, hidden = shown(tmp_path / "large")
    assert pairs == ["mmlu.acc", "stem.acc", "other.acc"]
    assert hidden == leaves
    assert "leaf5 and 51 more" in hidden_text(hidden)


def test_a_group_pairs_the_documents_of_its_tasks_and_counts_its_tasks(tmp_path: Path) -> None:
    """As lm-eval weights it by default: by the number of documents of each task. Documents of one
    task are a cluster."""
    values = {
        "full": [[1, 0, 1], [1, 1, 0, 0, 1], [1, 1, 1, 0]],
        "lora": [[1, 1, 1], [1, 0, 0, 1, 1], [0, 1, 1, 1]],
    }
    for method, answers in values.items():
        record = made.record(made.trained(method))
        names = ("one", "two", "three")
        record.quality.tasks = {
            "sums": task("acc", subtasks=names),
            **{name: task("acc") for name in names},
        }
        record.quality.tasks["sums"].metrics["acc"].value = sum(map(sum, answers)) / 12
        rows = [
            {"task": name, "metric": "acc", "doc_id": n, "doc_hash": str(n), "value": float(value)}
            for name, own in zip(names, answers, strict=True)
            for n, value in enumerate(own)
        ]
        made.write(tmp_path, record, pd.DataFrame(rows))
    lora, full = sorted(load_records(tmp_path), key=lambda r: r.record.cell.method, reverse=True)
    paired = difference([(lora, full)], "sums", "acc")
    assert paired.value == pytest.approx(1 / 12)
    flat = {method: np.concatenate(answers) for method, answers in values.items()}
    clusters = np.repeat(["one", "two", "three"], [3, 5, 4])
    for runs, found in (
        ([flat["full"]], score([full], "sums", "acc")),
        ([flat["lora"]], score([lora], "sums", "acc")),
    ):
        assert found == scores.score("acc", runs, scores.Design(np.ones(12), clusters.tolist()))
        assert found.over == "clusters, 12 documents"
        assert found.n == 3
