"""Scores by lm-eval, in this process, with its per-document results kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from harness.evaluation.score_precision import SOFTMAX_DTYPE
from harness.records.quality import Generation, Metric, Recipe, TaskScore
from matrices.cell import Evaluate
from matrices.errors import UserError, nearest

SHIPPED_TASKS = Path(__file__).resolve().parent / "tasks"
SAMPLE_TOKENS = 24
# lm-eval logs these as (log-likelihood in nats, number of words or bytes).
WEIGHTED_METRICS = ("bits_per_byte", "byte_perplexity", "word_perplexity")


class Scores(NamedTuple):
    """`tasks` holds groups too, before their tasks. `samples`: one row per task, document and
    metric; see `sample_rows`. `missing`: metrics that are not numbers, with the reason."""

    tasks: dict[str, TaskScore]
    samples: pd.DataFrame
    recipe: Recipe | None
    missing: dict[str, str]


def task_manager(evaluate: Evaluate) -> Any:
    """An lm-eval index that knows the recipe's tasks.

    lm-eval's own thousands of tasks are left out when the shipped tasks and the user's cover the
    recipe. Raises UserError for a missing directory.
    """
    from harness.evaluation.task_index import manager

    paths = [str(SHIPPED_TASKS)]
    if evaluate.include_path is not None:
        if not Path(evaluate.include_path).is_dir():
            raise UserError(
                f"{evaluate.include_path} is not a directory", key="evaluate.include_path"
            )
        paths.append(evaluate.include_path)
    near = manager(paths, include_defaults=False)
    if all(name in near.task_index for name in evaluate.tasks):
        return near
    return manager(paths, include_defaults=True)


def unknown_tasks(evaluate: Evaluate) -> list[UserError]:
    """One error per task name that lm-eval does not know, with the nearest it does."""
    known = task_manager(evaluate).task_index
    return [
        UserError(f"lm-eval knows no task {name!r}{nearest(name, known)}", key="evaluate.tasks")
        for name in evaluate.tasks
        if name not in known
    ]


def score(model: Any, tokenizer: Any, evaluate: Evaluate) -> Scores:
    """lm-eval's own scores of `model`: the numbers `lm_eval --model hf` prints."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if not evaluate.tasks:
        return Scores({}, pd.DataFrame(), None, {})
    model.eval()
    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=evaluate.batch_size,
        softmax_dtype=SOFTMAX_DTYPE,
    )
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(evaluate.tasks),
        num_fewshot=evaluate.num_fewshot,
        limit=evaluate.limit,
        apply_chat_template=evaluate.apply_chat_template,
        task_manager=task_manager(evaluate),
        log_samples=True,
        # Intervals are made from the samples; bootstrapping here would only cost time.
        bootstrap_iters=1000,
    )
    frames = [sample_rows(task, rows) for task, rows in results["samples"].items()]
    recipe = Recipe(softmax_dtype=SOFTMAX_DTYPE, logits_dtype=_logits_dtype(lm))
    return Scores(
        task_scores(results),
        pd.concat(frames, ignore_index=True),
        recipe,
        non_numeric_metrics(results),
    )


def _logits_dtype(lm: Any) -> str:
    """The dtype of the logits that lm-eval's softmax receives, read from one token."""
    import torch

    logits = lm._model_call(torch.zeros((1, 1), dtype=torch.long, device=lm.device))
    return str(logits.dtype).removeprefix("torch.")


def task_scores(results: dict[str, Any]) -> dict[str, TaskScore]:
    """Every task, and before them the groups that lm-eval aggregates, by its own rule."""
    tasks = {task: _task_score(task, results) for task in results["samples"]}
    groups = {group: _group_score(group, results, tasks) for group in results.get("groups", {})}
    return groups | tasks


def non_numeric_metrics(results: dict[str, Any]) -> dict[str, str]:
    """Reasons for the metrics that lm-eval does not give as numbers, by their dotted names."""
    found = {}
    for task in results["samples"]:
        for name, filter_name, value in _metrics(results["results"][task]):
            if _as_float(value) is None:
                metric = _metric_name(name, filter_name)
                kind = type(value).__name__
                found[f"quality.{task}.{metric}"] = f"lm-eval gives no number but a {kind}"
    return found


def _task_score(task: str, results: dict[str, Any]) -> TaskScore:
    version = str(results["versions"].get(task))
    return TaskScore(
        n=int(results["n-samples"][task]["effective"]),
        num_fewshot=int(results["n-shot"].get(task) or 0),
        version=version,
        hash=task_hash(results["samples"][task], version),
        **_metric_values(task, results["results"][task], results),
    )


def _group_score(group: str, results: dict[str, Any], tasks: dict[str, TaskScore]) -> TaskScore:
    leaves = _leaves(group, results["group_subtasks"])
    version = str(results["versions"].get(group))
    asked = json.dumps([version, [(leaf, tasks[leaf].hash) for leaf in leaves]])
    return TaskScore(
        n=sum(tasks[leaf].n for leaf in leaves),
        num_fewshot=results["n-shot"].get(group),
        version=version,
        hash=hashlib.sha256(asked.encode()).hexdigest(),
        subtasks=list(results["group_subtasks"][group]),
        **_metric_values(group, results["groups"][group], results),
    )


def _leaves(group: str, subtasks: dict[str, list[str]]) -> list[str]:
    """The tasks of a group and of the groups in it."""
    return [
        leaf
        for child in subtasks[group]
        for leaf in (_leaves(child, subtasks) if child in subtasks else [child])
    ]


def _metric_values(task: str, values: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a task or group, and which way each is better."""
    metrics = {}
    better = {}
    directions = results["higher_is_better"].get(task) or {}
    for metric, filter_name, raw in _metrics(values):
        value = _as_float(raw)
        if value is None:
            continue
        stderr = _as_float(values.get(f"{metric}_stderr,{filter_name}"))
        name = _metric_name(metric, filter_name)
        metrics[name] = Metric(value=value, stderr=stderr)
        if directions.get(metric) is not None:
            better[name] = bool(directions[metric])
    return {"metrics": metrics, "higher_is_better": better}


def _metrics(values: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Name, filter and value of each metric among lm-eval's entries of a task."""
    for key, value in values.items():
        name, _, filter_name = key.partition(",")
        if filter_name and not name.endswith("_stderr"):
            yield name, filter_name, value


def _as_float(value: Any) -> float | None:
    """A number of Python, numpy or torch as a float; None for anything else."""
    if isinstance(value, int | float):
        return float(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return _as_float(value.item())
    return None


def _metric_name(name: str, filter_name: str) -> str:
    return name if filter_name == "none" else f"{name},{filter_name}"


def task_hash(samples: list[dict[str, Any]], version: str) -> str:
    """sha256 of the task's version and of every document's prompt and target, in order: two
    scores with the same hash are of the same prompts."""
    asked = [(s["doc_hash"], s["prompt_hash"], s["target_hash"], s["filter"]) for s in samples]
    return hashlib.sha256(json.dumps([version, asked]).encode()).hexdigest()


def sample_rows(task: str, samples: list[dict[str, Any]]) -> pd.DataFrame:
    """Columns `task, metric, doc_id, doc_hash, value, weight, target, response`.

    A weighted metric is logged by lm-eval as (log-likelihood in nats, weight): `value` and
    `weight`; any other has weight 1. A metric of which lm-eval logs something else than a number
    (an array, the pair that F1 is made of) has a score and no rows. `target` and `response` are
    JSON text.
    """
    rows = []
    for sample in samples:
        for metric in sample["metrics"]:
            found = _value_and_weight(metric, sample[metric])
            if found is None:
                continue
            value, weight = found
            rows.append(
                {
                    "task": task,
                    "metric": _metric_name(metric, sample["filter"]),
                    "doc_id": int(sample["doc_id"]),
                    "doc_hash": sample["doc_hash"],
                    "value": value,
                    "weight": weight,
                    "target": _json_text(sample["target"]),
                    "response": _json_text(sample["filtered_resps"]),
                }
            )
    return pd.DataFrame(rows)


def _value_and_weight(metric: str, logged: Any) -> tuple[float, float] | None:
    pair = (logged, 1.0)
    if metric in WEIGHTED_METRICS:
        if not isinstance(logged, tuple | list) or len(logged) != 2:
            return None
        pair = (logged[0], logged[1])
    value, weight = map(_as_float, pair)
    return None if value is None or weight is None else (value, weight)


def _json_text(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError):  # a key that is no text, a list that holds itself
        return json.dumps(str(value))


def generate(model: Any, tokenizer: Any, prompts: tuple[str, ...]) -> list[Generation]:
    """Greedy continuations of `SAMPLE_TOKENS` tokens; for reading, not for scoring."""
    import torch

    found = []
    model.eval()
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            ids = model.generate(
                **inputs,
                max_new_tokens=SAMPLE_TOKENS,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        continuation = tokenizer.decode(
            ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        found.append(Generation(prompt=prompt, text=continuation))
    return found
