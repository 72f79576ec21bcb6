"""Groups, precision and the task index, against lm-eval itself."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.evaluation import evaluate, task_check, task_index
from harness.models.packaged import ensure_model
from matrices.cell import Evaluate, Model
from matrices.errors import UserError

DOCUMENTS = """
import datasets

def sums(count, **_):
    rows = [
        {"text": f"{n} and {n + count} make", "choices": [str(2 * n + count), str(n), "none"]}
        for n in range(count)
    ]
    return {"test": datasets.Dataset.from_list(rows)}
"""
TASK = """
task: sums_{count}
custom_dataset: !function sums.sums
dataset_kwargs: {{count: {count}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: brier_score}}, {{metric: f1}}]
metadata: {{version: 2.0}}
"""
GROUP = """
group: sums
task: [sums_5, {group: odd, task: [sums_9], aggregate_metric_list: [{metric: acc}]}]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
  - {metric: acc_norm, weight_by_size: false}
metadata: {version: 3.0}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Evaluate:
    """A group of a user's: a task, and a group of one task."""
    (tmp_path / "sums.py").write_text(DOCUMENTS)
    (tmp_path / "sums.yaml").write_text(GROUP)
    for count in (5, 9):
        (tmp_path / f"sums_{count}.yaml").write_text(TASK.format(count=count))
    return Evaluate(tasks=("sums", "python_reference_bpb"), include_path=str(tmp_path), limit=6)


@pytest.mark.slow
def test_groups_are_those_of_lm_eval_and_odd_metrics_keep_their_scores(
    recipe: Evaluate, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEBENCH_CACHE", str(cache))
    place = str(ensure_model("tiny-llama"))
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": place, "dtype": "bfloat16", "softmax_dtype": "float32"},
        tasks=list(recipe.tasks),
        batch_size=recipe.batch_size,
        device="cpu",
        limit=recipe.limit,
        task_manager=evaluate.task_manager(recipe),
        bootstrap_iters=0,
    )
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    ours = evaluate.score(model, AutoTokenizer.from_pretrained(place), recipe)
    assert list(ours.tasks)[:2] == ["sums::odd", "sums"]
    assert ours.tasks["sums"].subtasks == ["sums_5", "sums::odd"]
    assert ours.tasks["sums"].n == 11
    assert set(ours.tasks["sums"].metrics) == {"acc", "acc_norm"}
    assert set(ours.tasks["sums_5"].metrics) == {"acc", "acc_norm", "brier_score", "f1"}
    for task, score in ours.tasks.items():
        for metric, figure in score.metrics.items():
            assert figure.value == theirs["results"][task][f"{metric},none"], (task, metric)
    logged = ours.samples.groupby("task")["metric"].unique().map(set)
    assert logged["sums_5"] == {"acc", "acc_norm"}
    # Rounded to bf16 every value above 256 nats would be even.
    nats = ours.samples.query("metric == 'bits_per_byte'")["value"]
    assert (nats.abs() > 256).all()
    assert (nats % 2 != 0).all()
    assert ours.recipe is not None
    assert (ours.recipe.softmax_dtype, ours.recipe.logits_dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        (("sums", "sums_5"), "cannot score these tasks together: Duplicate task 'sums_5'"),
        (("sums_5", "unsafe"), "'unsafe' runs code that the model writes"),
        (("sums_5", "lost"), "cannot load 'lost'"),
    ],
)
def test_what_lm_eval_refuses_after_the_training_is_found_before(
    recipe: Evaluate, tasks: tuple[str, ...], told: str
) -> None:
    place = Path(str(recipe.include_path))
    unsafe = TASK.format(count=5).replace("sums_5", "unsafe") + "unsafe_code: true\n"
    (place / "unsafe.yaml").write_text(unsafe)
    lost = TASK.format(count=5).replace("sums_5", "lost").replace("sums.sums", "sums.absent")
    (place / "lost.yaml").write_text(lost)
    task_check.check_tasks(recipe)
    with pytest.raises(UserError, match=told) as caught:
        task_check.check_tasks(recipe.model_copy(update={"tasks": tasks}))
    assert caught.value.key == "evaluate.tasks"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("template", "asked"), [(None, True), (None, False), ("{{a}}", True)])
def test_a_chat_template_that_is_asked_for_is_there(
    monkeypatch: pytest.MonkeyPatch, template: str | None, asked: bool
) -> None:
    tokenizer = SimpleNamespace(chat_template=template)
    monkeypatch.setattr(task_check.model, "load_tokenizer", lambda chosen: tokenizer)
    recipe = Evaluate(apply_chat_template=asked)
    if asked and template is None:
        with pytest.raises(UserError, match="has no chat template"):
            task_check.check_chat_template(recipe, Model())
    else:
        task_check.check_chat_template(recipe, Model())


@pytest.mark.slow
def test_the_task_index_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read from the cache is what lm-eval has found; a user's task overrides its own."""
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "cache"))
    took = []
    found = []
    for _ in range(2):
        task_index.default_index.cache_clear()
        began = time.process_time()
        found.append(task_index.default_index())
        took.append(time.process_time() - began)
    made, kept = found
    assert took[1] < took[0] / 4
    assert {n: (e.kind, e.yaml_path, e.tags) for n, e in kept.items()} == {
        n: (e.kind, e.yaml_path, e.tags) for n, e in made.items()
    }
    mine = tmp_path / "arc_easy.yaml"
    mine.write_text("task: arc_easy\ndataset_path: json\n")
    (tmp_path / "mine").mkdir()
    mine = mine.rename(tmp_path / "mine" / mine.name)
    index = evaluate.task_manager(
        Evaluate(tasks=("arc_easy", "mmlu"), include_path=str(mine.parent))
    ).task_index
    assert index["arc_easy"].yaml_path == mine
    assert index["mmlu"].yaml_path == made["mmlu"].yaml_path
    [kept_file] = (tmp_path / "cache" / "task-index").iterdir()
    kept_file.write_text('{"broken')
    monkeypatch.setattr(task_index, "TaskManager", lambda: type("Stand", (), {"task_index": made}))
    task_index.default_index.cache_clear()
    assert task_index.default_index() == made
    assert len(kept_file.read_text()) > 1_000_000, "a broken file is made anew"
    task_index.default_index.cache_clear()
