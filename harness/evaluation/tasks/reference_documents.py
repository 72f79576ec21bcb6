"""Documents of the shipped lm-eval tasks; named by their YAML as `custom_dataset`."""

from __future__ import annotations

from typing import Any

import datasets

from harness.data import python_reference


def held_out_text(per_topic: int, characters: int, **_: Any) -> dict[str, datasets.Dataset]:
    """Split `test`: `topic` and `text` of held-out passages."""
    found = python_reference.held_out_passages(per_topic, characters)
    rows = [{"topic": passage.topic, "text": passage.text} for passage in found]
    return {"test": datasets.Dataset.from_list(rows)}


def topic_questions(per_topic: int, characters: int, **_: Any) -> dict[str, datasets.Dataset]:
    """Split `test`: `passage`, `choices` (titles) and `answer` (index of the right title)."""
    rows = []
    for passage in python_reference.held_out_passages(per_topic, characters, shortest=120):
        titles, answer = python_reference.topic_question(passage)
        rows.append({"passage": passage.text, "choices": titles, "answer": answer})
    return {"test": datasets.Dataset.from_list(rows)}
