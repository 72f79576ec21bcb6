"""`python-reference`: the Python language reference that every CPython carries, split by topic.

Held-out topics are never trained on. The reference quotes itself (the topic `specialnames`
contains all of `numeric-types`), so a training paragraph is dropped when it shares a run of
`OVERLAP_WORDS` words with a held-out topic: the contamination rule of GPT-3 (Brown et al. 2020,
appendix C, 13-grams).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

OVERLAP_WORDS = 13
PASSAGE_CHARACTERS = 1000
HELD_OUT_ONE_IN = 5


class Topic(NamedTuple):
    key: str
    title: str
    paragraphs: tuple[str, ...]


class Passage(NamedTuple):
    topic: str
    title: str
    text: str


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def held_out(key: str) -> bool:
    """Whether a topic is kept for evaluation; depends on its key alone, so it is the same
    whatever else a Python version's reference holds."""
    return _digest(key) % HELD_OUT_ONE_IN == 0


def topics() -> list[Topic]:
    """All topics in key order, the underlined title taken off the paragraphs."""
    from pydoc_data.topics import topics as texts

    found = []
    for key in sorted(texts):
        title, _, body = texts[key].partition("\n")
        body = body.lstrip("*=-\n")
        paragraphs = tuple(part.strip("\n") for part in body.split("\n\n") if part.strip())
        found.append(Topic(key, title.strip(), paragraphs))
    return found


def fingerprint() -> str:
    """sha256 of the whole reference: it differs between Python versions."""
    joined = "\0".join(f"{topic.key}\0{topic.title}\0{topic.paragraphs}" for topic in topics())
    return hashlib.sha256(joined.encode()).hexdigest()


def word_runs(text: str, length: int = OVERLAP_WORDS) -> set[tuple[str, ...]]:
    """Every run of `length` words; a shorter text is one run, itself."""
    words = text.split()
    return {tuple(words[i : i + length]) for i in range(max(1, len(words) - length + 1))}


def passages(topic: Topic, characters: int = PASSAGE_CHARACTERS) -> list[Passage]:
    """Consecutive paragraphs joined up to `characters`; a longer paragraph stands alone."""
    texts: list[str] = []
    for paragraph in topic.paragraphs:
        if texts and len(texts[-1]) + 2 + len(paragraph) <= characters:
            texts[-1] += "\n\n" + paragraph
        else:
            texts.append(paragraph)
    return [Passage(topic.key, topic.title, text) for text in texts]


def training_passages() -> list[Passage]:
    """Passages of the training topics, without what a held-out topic also says."""
    everything = topics()
    kept_out: set[tuple[str, ...]] = set()
    for topic in everything:
        if held_out(topic.key):
            for paragraph in topic.paragraphs:
                kept_out |= word_runs(paragraph)
    found = []
    for topic in everything:
        if not held_out(topic.key):
            clean = tuple(p for p in topic.paragraphs if not word_runs(p) & kept_out)
            found += passages(topic._replace(paragraphs=clean))
    return found


def held_out_passages(
    per_topic: int, characters: int = PASSAGE_CHARACTERS, shortest: int = 200
) -> list[Passage]:
    """Up to `per_topic` passages of each held-out topic that have at least `shortest` characters,
    cut to `characters` at a line end where one paragraph is longer.

    First the first of every topic, then the second of every topic, so that a run on the first N
    documents has seen as many topics as it can.
    """
    by_topic = [
        [p for p in passages(topic, characters) if len(p.text) >= shortest]
        for topic in topics()
        if held_out(topic.key)
    ]
    rounds = [texts[turn] for turn in range(per_topic) for texts in by_topic if turn < len(texts)]
    return [p._replace(text=_truncate(p.text, characters)) for p in rounds]


def _truncate(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    head = text[:characters]
    return head[: head.rfind("\n")] if "\n" in head else head


def topic_question(passage: Passage, choices: int = 4) -> tuple[list[str], int]:
    """Titles to choose from and the index of the right one; distractors and order depend on the
    passage alone."""
    others = sorted({t.title for t in topics()} - {passage.title})
    others.sort(key=lambda title: _digest(passage.text + "\0" + title))
    titles = [*others[: choices - 1], passage.title]
    titles.sort(key=lambda title: _digest(title + "\0" + passage.text))
    return titles, titles.index(passage.title)
