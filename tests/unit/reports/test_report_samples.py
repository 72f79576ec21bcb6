"""Pairing of per-document results."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import synthetic_results as made
from scipy import stats

from reports.records.load import Result, load_records
from reports.records.samples import difference, score
from reports.statistics.intervals import NotComparable

TASK, METRIC = "python_reference_bpb", "bits_per_byte"


def pair(root: Path, change: object = None) -> tuple[Result, Result]:
    """Full and lora; `change` is made to the samples of lora."""
    full, lora = (made.trained(method) for method in ("full", "lora"))
    made.write(root, made.record(full))
    samples = made.scores(lora)[1]
    made.write(root, made.record(lora), change(samples) if callable(change) else samples)
    by_method = {r.record.cell.method: r for r in load_records(root)}
    return by_method["lora"], by_method["full"]


def test_order_of_documents_does_not_matter(tmp_path: Path) -> None:
    plain = difference([pair(tmp_path / "a")], TASK, METRIC)
    shuffled = difference(
        [pair(tmp_path / "b", lambda s: s.sample(frac=1, random_state=1))], TASK, METRIC
    )
    assert shuffled.value == pytest.approx(plain.value)
    assert shuffled.low == pytest.approx(plain.low)


def test_other_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotComparable, match="documents of python_reference_bpb differ"):
        difference([pair(tmp_path, lambda s: s.assign(doc_hash=s["doc_hash"] + "x"))], TASK, METRIC)


def test_a_task_only_one_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotComparable, match="not scored for both"):
        difference([pair(tmp_path)], "hellaswag", "acc")


def test_samples_that_do_not_add_up_give_no_interval(tmp_path: Path) -> None:
    def wrong(samples: pd.DataFrame) -> pd.DataFrame:
        return samples.assign(value=samples["value"] * 1.01)

    lora, full = pair(tmp_path, wrong)
    found = difference([(lora, full)], TASK, METRIC)
    scores = [r.record.quality.tasks[TASK].metrics[METRIC].value for r in (lora, full)]
    assert found.value == scores[0] - scores[1]
    assert found.low is None


def test_seeds_scored_on_other_documents_have_no_mean(tmp_path: Path) -> None:
    for seed in (0, 1):
        samples = made.scores(made.trained("lora", seed))[1]
        changed = samples.assign(doc_hash=samples["doc_hash"] + f"of seed {seed}")
        made.write(tmp_path, made.record(made.trained("lora", seed)), changed)
    with pytest.raises(NotComparable, match="documents of python_reference_bpb differ"):
        score(load_records(tmp_path), TASK, METRIC)


def test_a_score_of_seeds_is_no_surer_than_its_documents(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        made.write(tmp_path, made.record(made.trained("lora", seed)))
    results = load_records(tmp_path)
    one, three = score(results[:1], TASK, METRIC), score(results, TASK, METRIC)
    assert one is not None
    assert three is not None
    assert (three.n, three.over) == (made.DOCUMENTS, "documents, 3 seeds")
    # The seeds of one method differ by 0.01 a document, documents by 0.15.
    widths = [each.high - each.low for each in (one, three)]  # type: ignore[operator]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)


def test_without_samples_the_standard_error_of_lm_eval(tmp_path: Path) -> None:
    record = made.record(made.trained("full"))
    record.quality.samples_file = None
    made.write(tmp_path, record)
    [result] = load_records(tmp_path)
    figure = record.quality.tasks["python_reference_topic"].metrics["acc"]
    found = score([result], "python_reference_topic", "acc")
    assert found is not None
    # The error tells that documents are right or wrong, so the interval is Wilson's.
    right = round(figure.value * made.DOCUMENTS)
    expected = stats.binomtest(right, made.DOCUMENTS).proportion_ci(method="wilson")
    assert (found.low, found.high) == (
        pytest.approx(expected.low, abs=1e-6),
        pytest.approx(expected.high, abs=1e-6),
    )
    assert "lm-eval's stderr" in found.over
    bare = score([result], TASK, METRIC)
    assert bare is not None
    assert (bare.low, bare.note) == (None, "no per-document results")
