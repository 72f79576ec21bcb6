"""`python-reference`: what is held out is never trained on, checked from the raw topics."""

from __future__ import annotations

import hashlib
from pydoc_data.topics import topics as raw_topics

import pytest

from harness.data import python_reference

HELD_OUT = {key for key in raw_topics if int(hashlib.sha256(key.encode()).hexdigest(), 16) % 5 == 0}


def runs_of_13(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[at : at + 13]) for at in range(len(words) - 12)}


@pytest.fixture(scope="module")
def training() -> list[python_reference.Passage]:
    return python_reference.training_passages()


def test_a_fifth_of_the_topics_is_held_out(training: list[python_reference.Passage]) -> None:
    found = {
        topic.key for topic in python_reference.topics() if python_reference.held_out(topic.key)
    }
    assert found == HELD_OUT
    assert len(raw_topics) / 8 < len(HELD_OUT) < len(raw_topics) / 3
    assert {passage.topic for passage in training}.isdisjoint(HELD_OUT)


def test_no_run_of_13_words_is_shared(training: list[python_reference.Passage]) -> None:
    """Over whole texts, across paragraphs, the titles included."""
    kept = set().union(*(runs_of_13(raw_topics[key]) for key in HELD_OUT))
    assert len(kept) > 5_000
    shared = {p.topic: runs_of_13(p.text) & kept for p in training if runs_of_13(p.text) & kept}
    assert shared == {}


def test_most_of_the_training_topics_stay(training: list[python_reference.Passage]) -> None:
    """The rule takes out what is quoted, not the reference."""
    characters = sum(len(passage.text) for passage in training)
    everything = sum(len(text) for key, text in raw_topics.items() if key not in HELD_OUT)
    assert characters > 0.6 * everything
    assert len({passage.topic for passage in training}) > 0.8 * (len(raw_topics) - len(HELD_OUT))


def test_passages_are_the_topics_own_words_in_order() -> None:
    for topic in python_reference.topics():
        passages = python_reference.passages(topic, characters=500)
        assert "\n\n".join(p.text for p in passages) == "\n\n".join(topic.paragraphs)
        assert topic.title == raw_topics[topic.key].split("\n")[0].strip()
        for passage in passages:
            # Only a paragraph that is longer by itself stands longer.
            assert len(passage.text) <= 500 or passage.text in topic.paragraphs


@pytest.mark.parametrize(("per_topic", "longest", "shortest"), [(2, 1000, 200), (4, 240, 120)])
def test_held_out_passages_respect_their_lengths(
    per_topic: int, longest: int, shortest: int
) -> None:
    found = python_reference.held_out_passages(per_topic, longest, shortest)
    counts = {key: sum(passage.topic == key for passage in found) for key in HELD_OUT}
    assert max(counts.values()) == per_topic
    assert len(found) > len(HELD_OUT)
    for passage in found:
        assert 0 < len(passage.text) <= longest
        assert " ".join(passage.text.split()) in " ".join(raw_topics[passage.topic].split())
    # A paragraph cut at a line end may fall below the shortest; none may become a crumb.
    assert min(len(passage.text) for passage in found) >= shortest / 2


def test_topic_questions_hold_the_right_title_and_never_change() -> None:
    passages = python_reference.held_out_passages(1, 240, 120)
    answers = []
    for passage in passages:
        titles, answer = python_reference.topic_question(passage)
        assert titles[answer] == passage.title
        assert len(set(titles)) == len(titles) == 4
        assert (titles, answer) == python_reference.topic_question(passage)
        answers.append(answer)
    assert len(set(answers)) > 1, "the right answer must not always stand in the same place"


def test_word_runs() -> None:
    assert python_reference.word_runs("a b c d", 3) == {("a", "b", "c"), ("b", "c", "d")}
    assert python_reference.word_runs("a b", 3) == {("a", "b")}
