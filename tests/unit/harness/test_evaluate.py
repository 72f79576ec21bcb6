"""Scores from hand-made lm-eval results: identity of the questions, and rows per document."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np
import pytest

from harness.evaluation import evaluate
from harness.evaluation.evaluate import sample_rows, task_hash, unknown_tasks
from matrices.cell import Evaluate
from matrices.errors import UserError


def sample(doc: int, **changes: Any) -> dict[str, Any]:
    """One logged sample, with the keys lm-eval 0.4 writes."""
    return {
        "doc_id": doc,
        "doc_hash": f"doc{doc}",
        "prompt_hash": f"prompt{doc}",
        "target_hash": f"target{doc}",
        "filter": "none",
        "metrics": ["acc"],
        "target": 2,
        "filtered_resps": [(-1.5, False), (-0.5, True)],
        "acc": 1.0,
    } | changes


def test_the_hash_is_of_version_and_questions_in_order() -> None:
    asked = [["doc0", "prompt0", "target0", "none"], ["doc1", "prompt1", "target1", "none"]]
    expected = hashlib.sha256(json.dumps(["1.0", asked]).encode()).hexdigest()
    assert task_hash([sample(0), sample(1)], "1.0") == expected


def test_the_hash_does_not_see_answers() -> None:
    assert task_hash([sample(0)], "1") == task_hash(
        [sample(0, acc=0.0, filtered_resps=[], metrics=["acc", "acc_norm"])], "1"
    )


@pytest.mark.parametrize("key", ["doc_hash", "prompt_hash", "target_hash", "filter"])
def test_the_hash_sees_every_part_of_a_question(key: str) -> None:
    assert task_hash([sample(0)], "1") != task_hash([sample(0, **{key: "other"})], "1")


def test_the_hash_sees_version_order_and_number() -> None:
    one, other = sample(0), sample(1)
    hashes = {
        task_hash([one, other], "1"),
        task_hash([one, other], "2"),
        task_hash([other, one], "1"),
        task_hash([one], "1"),
    }
    assert len(hashes) == 4


def test_rows_of_plain_and_weighted_metrics() -> None:
    samples = [
        sample(0, metrics=["acc", "acc_norm"], acc=True, acc_norm=0.0),
        # lm-eval logs bits per byte as (log-likelihood in nats, bytes).
        sample(1, metrics=["bits_per_byte"], bits_per_byte=(-69.0, 40)),
        # An aggregate of text, which is no number.
        sample(2, metrics=["bleu", "acc"], bleu=("reference", "prediction"), acc=0),
    ]
    rows = sample_rows("task", samples)
    assert list(rows.columns) == [
        "task",
        "metric",
        "doc_id",
        "doc_hash",
        "value",
        "weight",
        "target",
        "response",
    ]
    assert rows[["metric", "doc_id", "doc_hash", "value", "weight"]].to_numpy().tolist() == [
        ["acc", 0, "doc0", 1.0, 1.0],
        ["acc_norm", 0, "doc0", 0.0, 1.0],
        ["bits_per_byte", 1, "doc1", -69.0, 40.0],
        ["acc", 2, "doc2", 0.0, 1.0],
    ]
    assert set(rows["task"]) == {"task"}
    assert json.loads(rows["target"][0]) == 2
    assert json.loads(rows["response"][0]) == [[-1.5, False], [-0.5, True]]


def test_bits_per_byte_from_rows_is_lm_evals() -> None:
    """-sum(nats) / sum(bytes) / ln 2, over the corpus and not a mean of documents."""
    from lm_eval.api.metrics import bits_per_byte

    pairs = [(-69.0, 40), (-7.0, 9)]
    name = "bits_per_byte"
    logged = [sample(n, metrics=[name], bits_per_byte=pair) for n, pair in enumerate(pairs)]
    rows = sample_rows("t", logged)
    ours = -rows["value"].sum() / rows["weight"].sum() / math.log(2)
    assert ours == pytest.approx(76 / 49 / math.log(2))
    assert ours == pytest.approx(bits_per_byte(pairs))


def test_rows_of_a_filter_are_named_by_it() -> None:
    rows = sample_rows("gsm8k", [sample(0, filter="strict-match", metrics=["exact"], exact=1.0)])
    assert rows["metric"].tolist() == ["exact,strict-match"]


@pytest.mark.parametrize(
    "logged",
    [
        (1, 0),  # gold and prediction, of which lm-eval makes F1 and MCC
        (2, np.array([0.2, 0.3, 0.5])),  # gold and probabilities: the Brier score
        [1.0, 2.0, 3.0],
        np.array([1.0, 2.0]),
        {"a": 1},
        (),
    ],
)
def test_what_is_logged_as_no_number_costs_its_rows_only(logged: Any) -> None:
    rows = sample_rows("t", [sample(0, metrics=["odd", "acc"], odd=logged)])
    assert rows["metric"].tolist() == ["acc"]


def test_numbers_of_numpy_and_odd_responses_have_rows() -> None:
    found = sample_rows(
        "t",
        [
            sample(0, metrics=["acc"], acc=np.float32(0.5)),
            sample(1, metrics=["acc"], acc=np.bool_(True), filtered_resps=[{(1, 2): "a tuple"}]),
        ],
    )
    assert found["value"].tolist() == [0.5, 1.0]
    assert [json.loads(text) for text in found["response"]][1] == "[{(1, 2): 'a tuple'}]"


def test_no_samples_no_rows() -> None:
    assert len(sample_rows("t", [])) == 0


def test_task_score_from_results() -> None:
    results = {
        "results": {
            "t": {
                "alias": "t",
                "acc,none": 0.25,
                "acc_stderr,none": 0.125,
                "ppl,none": 9,
                "ppl_stderr,none": "N/A",
                "exact,strict": 0.5,
                "exact_stderr,strict": 0.1,
            }
        },
        "higher_is_better": {"t": {"acc": True, "ppl": False, "exact": None}},
        "n-samples": {"t": {"original": 100, "effective": 8}},
        "n-shot": {"t": 5},
        "versions": {"t": 2.0},
        "samples": {"t": [sample(0)]},
    }
    found = evaluate._task_score("t", results)
    assert {name: (m.value, m.stderr) for name, m in found.metrics.items()} == {
        "acc": (0.25, 0.125),
        "ppl": (9.0, None),
        "exact,strict": (0.5, 0.1),
    }
    assert found.higher_is_better == {"acc": True, "ppl": False}
    assert (found.n, found.num_fewshot, found.version) == (8, 5, "2.0")
    assert found.hash == task_hash([sample(0)], "2.0")


def test_a_score_of_numpy_is_kept_and_an_array_is_told() -> None:
    results = {
        "results": {"t": {"f1,none": np.float32(0.5), "vector,none": np.array([0.1, 0.2])}},
        "higher_is_better": {"t": {"f1": True}},
        "n-samples": {"t": {"original": 1, "effective": 1}},
        "n-shot": {"t": 0},
        "versions": {"t": 1},
        "samples": {"t": [sample(0, metrics=["f1", "vector"], f1=(1, 1), vector=[1, 2, 3])]},
    }
    found = evaluate.task_scores(results)["t"]
    assert {name: metric.value for name, metric in found.metrics.items()} == {"f1": 0.5}
    assert evaluate.non_numeric_metrics(results) == {
        "quality.t.vector": "lm-eval gives no number but a ndarray"
    }


def test_no_tasks_no_scores() -> None:
    scores = evaluate.score(None, None, Evaluate(tasks=()))
    assert scores.tasks == {}
    assert len(scores.samples) == 0


def test_shipped_tasks_are_known() -> None:
    assert unknown_tasks(Evaluate()) == []


def test_an_include_path_that_is_not_there() -> None:
    with pytest.raises(UserError, match="is not a directory") as caught:
        evaluate.task_manager(Evaluate(include_path="/none/such"))
    assert caught.value.key == "evaluate.include_path"
