"""Scores by lm-eval, in this process, with its per-document results kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from harness.record import Generation, Metric, TaskScore
from matrices.cell import Evaluate
from matrices.errors import UserError, nearest

SHIPPED_TASKS = Path(__file__).resolve().parent / "tasks"
SAMPLE_TOKENS = 24


class Scores(NamedTuple):
    """`samples`: one row per task, document and metric; see `sample_rows`."""

    tasks: dict[str, TaskScore]
    samples: pd.DataFrame


def task_manager(evaluate: Evaluate) -> Any:
    """An lm-eval index that knows the recipe's tasks.

    lm-eval's own thousands of task files take it 10 s and more to index, so they are left out when
    the shipped tasks and the user's cover the recipe. Raises UserError for a directory that is
    not there.
    """
    from lm_eval.tasks import TaskManager

    paths = [str(SHIPPED_TASKS)]
    if evaluate.include_path is not None:
        if not Path(evaluate.include_path).is_dir():
            raise UserError(
                f"{evaluate.include_path} is not a directory", key="evaluate.include_path"
            )
        paths.append(evaluate.include_path)
    near = TaskManager(include_path=paths, include_defaults=False)
    if all(name in near.task_index for name in evaluate.tasks):
        return near
    return TaskManager(include_path=paths)


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
        return Scores({}, pd.DataFrame())
    model.eval()
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=evaluate.batch_size),
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
    tasks = {task: _task_score(task, results) for task in results["samples"]}
    return Scores(tasks, pd.concat(frames, ignore_index=True))


def _task_score(task: str, results: dict[str, Any]) -> TaskScore:
    values = results["results"][task]
    metrics = {}
    for key, value in values.items():
        name, _, filter_name = key.partition(",")
        if not filter_name or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{name}_stderr,{filter_name}")
        metrics[_metric_name(name, filter_name)] = Metric(
            value=float(value), stderr=float(stderr) if isinstance(stderr, int | float) else None
        )
    better = results["higher_is_better"].get(task) or {}
    return TaskScore(
        metrics=metrics,
        higher_is_better={
            name: bool(better[name.partition(",")[0]])
            for name in metrics
            if better.get(name.partition(",")[0]) is not None
        },
        n=int(results["n-samples"][task]["effective"]),
        num_fewshot=int(results["n-shot"].get(task) or 0),
        version=str(results["versions"].get(task)),
        hash=task_hash(results["samples"][task], str(results["versions"].get(task))),
    )


def _metric_name(name: str, filter_name: str) -> str:
    return name if filter_name == "none" else f"{name},{filter_name}"


def task_hash(samples: list[dict[str, Any]], version: str) -> str:
    """sha256 of the task's version and of every document's prompt and target, in order: two
    scores with the same hash answered the same questions, asked the same way."""
    asked = [(s["doc_hash"], s["prompt_hash"], s["target_hash"], s["filter"]) for s in samples]
    return hashlib.sha256(json.dumps([version, asked]).encode()).hexdigest()


def sample_rows(task: str, samples: list[dict[str, Any]]) -> pd.DataFrame:
    """Columns `task, metric, doc_id, doc_hash, value, weight, target, response`.

    A weighted metric is logged by lm-eval as (log-likelihood in nats, weight): `value` and
    `weight`; any other has weight 1. `target` and `response` are JSON text.
    """
    rows = []
    for sample in samples:
        for metric in sample["metrics"]:
            raw = sample[metric]
            value, weight = raw if isinstance(raw, tuple | list) else (raw, 1.0)
            if not isinstance(value, int | float | bool):
                continue
            rows.append(
                {
                    "task": task,
                    "metric": _metric_name(metric, sample["filter"]),
                    "doc_id": int(sample["doc_id"]),
                    "doc_hash": sample["doc_hash"],
                    "value": float(value),
                    "weight": float(weight),
                    "target": json.dumps(sample["target"], default=str),
                    "response": json.dumps(sample["filtered_resps"], default=str),
                }
            )
    return pd.DataFrame(rows)


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
