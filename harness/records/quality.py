"""The quality of a record: lm-eval's scores, the training loss, sampled texts."""

from __future__ import annotations

from pydantic import Field

from harness.records.part import Part


class Metric(Part):
    value: float
    stderr: float | None = None


class TaskScore(Part):
    """One lm-eval task, or a group of them as lm-eval aggregates it; `version` is the task's,
    `hash` of its resolved configuration and its documents, so equal hashes mean equal questions."""

    metrics: dict[str, Metric]
    higher_is_better: dict[str, bool]
    n: int = Field(description="documents scored")
    num_fewshot: int | None = Field(0, description="none for a group whose tasks differ")
    version: str
    hash: str
    subtasks: list[str] = Field(
        default_factory=list, description="of a group: the tasks and groups it aggregates"
    )


class Recipe(Part):
    """How the log-likelihoods were taken: it may differ between two records of one cell."""

    softmax_dtype: str = Field(description="lm-eval's argument of this name")
    logits_dtype: str | None = Field(
        None, description="of the logits the model gave, which the softmax cannot make finer"
    )


class Generation(Part):
    prompt: str
    text: str


class Quality(Part):
    """lm-eval's scores of what was trained (or of the base, for a base cell)."""

    tasks: dict[str, TaskScore] = Field(default_factory=dict)
    train_loss: list[float | None] = Field(
        default_factory=list,
        description="loss of each optimizer step as the Trainer has it, unrounded: the mean over "
        "its predicted tokens unless verified.loss_normalization says otherwise; none without any",
    )
    generations: list[Generation] = Field(default_factory=list)
    samples_file: str | None = Field(
        None, description="parquet of per-document results, beside the record"
    )
    lm_eval_version: str | None = None
    recipe: Recipe | None = Field(
        None, description="none in older records: the softmax was taken in the logits' own dtype"
    )
