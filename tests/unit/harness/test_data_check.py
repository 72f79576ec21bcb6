"""What the real preparation shows before a run: the first row that a template refuses, rows that
lose their loss, tokens and positions that the model does not have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import train
from harness.data import dataset
from harness.models import model as models
from harness.preflight import data_check
from harness.preflight.data_check import CHECKED_ROWS, check, prepare_rows, subject
from matrices.cell import Adapter, Cell, Data, Evaluate, Model, Train
from matrices.errors import UserError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "5"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
NO_MARKS = "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m['role'] }}"
    "{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
)
LONG = "x" * 100


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Callable[..., Model]:
    """A model directory without weights: tiny-llama's, with changes."""

    def make(config: dict[str, Any] | None = None, **tokenizer: Any) -> Model:
        place = tmp_path / "model"
        place.mkdir(exist_ok=True)
        for file in tiny_llama.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, place)
        if config:
            path = place / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if tokenizer:
            from transformers import AutoTokenizer

            changed = AutoTokenizer.from_pretrained(place)
            for name, value in tokenizer.items():
                if name == "add":
                    changed.add_tokens(value)
                else:
                    setattr(changed, name, value)
            changed.save_pretrained(place)
            if tokenizer.get("chat_template", "") is None:
                (place / "chat_template.jinja").unlink()
        return Model(name=str(place))

    return make


def written(place: Path, *rows: Any) -> str:
    path = place / "rows.jsonl"
    # Blank lines count: the row that is named is a line.
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


RIGHT: list[tuple[list[Any], dict[str, Any], dict[str, Any]]] = [
    ([chat(USER, ANSWER)] * 3, {}, {}),
    ([chat(USER, ANSWER)] * 3, {"completion_only_loss": True}, {}),
    ([chat(USER)], {}, {}),
    ([chat(USER, ANSWER)], {}, {"chat_template": NO_MARKS}),
    ([chat(USER, CALL)], {}, {"chat_template": WITH_TOOLS}),
    # Wrapped packing cuts no completion off.
    ([{"prompt": LONG, "completion": "y"}] * 3, {"completion_only_loss": True}, {}),
    # One row keeps its completion.
    (
        [{"prompt": LONG, "completion": "y"}, {"prompt": "x", "completion": "y"}],
        {"completion_only_loss": True, "packing": False},
        {},
    ),
    ([{"text": ""}, {"text": "a"}], {"packing": False}, {}),
    (
        [{"prompt": "a", "completion": ""}, {"prompt": "", "completion": "b"}],
        {"packing": False},
        {},
    ),
]


@pytest.mark.parametrize(("rows", "settings", "tokenizer"), RIGHT)
def test_what_can_be_trained_on_passes(
    rows: list[Any],
    settings: dict[str, Any],
    tokenizer: dict[str, Any],
    base: Callable[..., Model],
    tmp_path: Path,
) -> None:
    source = Data(source=written(tmp_path, *rows), max_length=64, **settings)
    check(source, base(**tokenizer), {})


CUT = {"completion_only_loss": True, "packing": False}
EMPTY = "column 'text' is empty in each of 2 rows"
LOST = "2 of 2 rows lose what is to be learnt (the completion) at 64 tokens"
WRONG: dict[str, tuple[list[Any], dict[str, Any], dict[str, Any], str, str]] = {
    "the template refuses a row": (
        [chat(USER, ANSWER), chat(USER, ANSWER), chat(USER, USER), chat(USER)],
        {},
        {"chat_template": STRICT},
        "data.source",
        "row 4: column 'messages': the chat template of * refuses it (TemplateError: roles must",
    ),
    "the template does not render a null": (
        [chat(USER, ANSWER), chat(USER, CALL)],
        {},
        {},
        "data.source",
        "row 3: column 'messages': the chat template of * refuses it (",
    ),
    "no template": (
        [chat(USER, ANSWER)],
        {},
        {"chat_template": None},
        "data.format",
        "has no chat template",
    ),
    "no marks": (
        [chat(USER, ANSWER)],
        {"completion_only_loss": True},
        {"chat_template": NO_MARKS},
        "data.completion_only_loss",
        "does not mark what the assistant says ({% generation %})",
    ),
    "no assistant turn": (
        [chat(USER, ANSWER), chat(USER)],
        {"completion_only_loss": True},
        {},
        "data.source",
        "row 3: column 'messages': has no assistant turn (roles: user)",
    ),
    "answers cut off": (
        [chat({"role": "user", "content": LONG}, ANSWER)] * 2,
        CUT,
        {},
        "data.max_length",
        LOST,
    ),
    "completions cut off": (
        [{"prompt": LONG, "completion": "y"}] * 2,
        CUT,
        {},
        "data.max_length",
        LOST,
    ),
    "completions cut off, packed": (
        [{"prompt": LONG, "completion": "y"}] * 2,
        {"completion_only_loss": True, "packing_strategy": "bfd"},
        {},
        "data.max_length",
        LOST,
    ),
    "no text": ([{"text": ""}, {"text": " "}], {"packing": False}, {}, "data.source", EMPTY),
    "no completions": (
        [{"prompt": "a", "completion": ""}] * 2,
        {},
        {},
        "data.source",
        "column 'completion' is empty in each of 2 rows",
    ),
    "no text, packed": ([{"text": ""}] * 2, {}, {}, "data.source", EMPTY),
    "an unknown token": (
        [{"text": "a"}, {"text": "a<|im_end|>"}],
        {},
        {"add": ["<|im_end|>"]},
        "model.name",
        "row 3: token '<|im_end|>' has id 259 and * has 259 embeddings",
    ),
    "an unknown pad token": (
        [{"text": "a"}],
        {"packing": False},
        {"pad_token": "[PAD]"},
        "model.name",
        "the pad token '[PAD]' of * has id 259 and the model has 259 embeddings",
    ),
    "neither pad nor eos": (
        [{"text": "a"}],
        {},
        {"pad_token": None, "eos_token": None},
        "model.name",
        "has neither a pad nor an eos token",
    ),
    "no eos": ([{"text": "a"}], {}, {"eos_token": None}, "model.name", "has no eos token"),
}


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_what_cannot_be_is_said_in_one_line(
    kind: str, base: Callable[..., Model], tmp_path: Path
) -> None:
    rows, settings, tokenizer, key, expected = WRONG[kind]
    source = Data(source=written(tmp_path, *rows), max_length=64, **settings)
    chosen = base(**tokenizer)
    with pytest.raises(UserError) as caught:
        check(source, chosen, {})
    assert expected.replace("*", chosen.name) in caught.value.message
    assert caught.value.key == key
    assert "\n" not in caught.value.message


def test_positions_and_arguments(base: Callable[..., Model], tmp_path: Path) -> None:
    source = Data(source=written(tmp_path, {"text": "a"}), max_length=129)
    check(source, base({"max_position_embeddings": 128}), {})
    chosen = base({"model_type": "gpt2", "max_position_embeddings": 128})
    with pytest.raises(UserError, match="129 and the model has 128 positions") as caught:
        check(source, chosen, {})
    assert caught.value.key == "data.max_length"
    with pytest.raises(UserError, match=r"pad_token.*'nothere'.*not found") as caught:
        check(source, base(), {"pad_token": "nothere"})
    assert caught.value.key == "train.sft_config"


def test_cutting_from_the_start_keeps_completions(
    base: Callable[..., Model], tmp_path: Path
) -> None:
    rows = [{"prompt": LONG, "completion": "y"}] * 2
    source = Data(source=written(tmp_path, *rows), max_length=64, **CUT)
    check(source, base(), {"truncation_mode": "keep_end"})


def test_tools_reach_the_template(base: Callable[..., Model], tmp_path: Path) -> None:
    source = written(tmp_path, chat(USER, ANSWER, tools=TOOLS), chat(USER, ANSWER))
    tokenizer = models.load_tokenizer(base(chat_template=WITH_TOOLS))
    rows = prepare_rows(dataset.read_rows(Data(source=source)).rows, tokenizer, {})
    by_hand = tokenizer.apply_chat_template([USER, ANSWER], tools=TOOLS, return_dict=True)
    plain = tokenizer.apply_chat_template([USER, ANSWER], return_dict=True)
    assert [row["input_ids"] for row in rows] == [by_hand["input_ids"], plain["input_ids"]]
    assert len(by_hand["input_ids"]) > len(plain["input_ids"]) + 50


def test_it_is_the_preparation_of_a_run(
    base: Callable[..., Model], tiny_llama: Path, tmp_path: Path
) -> None:
    rows = [chat(USER, {"role": "assistant", "content": "y" * at}) for at in range(1, 40, 3)]
    cell = Cell(
        model=Model(name="tiny-llama"),
        adapter=Adapter(),
        data=Data(source=written(tmp_path, *rows), max_length=40, **CUT),
        train=Train(steps=1, sft_config={"truncation_mode": "keep_end", "max_steps": 1}),
        evaluate=Evaluate(tasks=()),
    )
    assert cell.data is not None
    source, chosen, arguments = subject(cell) or (None, None, None)
    assert (source, chosen, arguments) == (cell.data, cell.model, {"truncation_mode": "keep_end"})
    loaded, tokenizer = models.load_base(cell), models.load_tokenizer(cell.model)
    read = dataset.read_rows(cell.data).rows
    trainer = train.build_trainer(
        cell,
        loaded,
        tokenizer,
        read,
        train.TrainingSchedule(1, 1e-4),
        output_dir=tmp_path / "out",
        observer=train.Observer(),
    )
    seen = prepare_rows(
        read,
        tokenizer,
        {**arguments, "assistant_only_loss": True, "max_length": 40, "packing": False},
    )
    assert list(seen) == list(trainer.train_dataset)
    # So much the same that the run finds it in the cache.
    assert seen._fingerprint == trainer.train_dataset._fingerprint


def test_which_rows_are_prepared(repository: Path) -> None:
    assert (
        f"more than\n{CHECKED_ROWS:,} the first half"
        in (repository / "matrices" / "REFERENCE.md").read_text()
    )
    assert data_check._checked_rows(5) == [0, 1, 2, 3, 4]
    assert data_check._checked_rows(CHECKED_ROWS) == list(range(CHECKED_ROWS))
    some = data_check._checked_rows(10 * CHECKED_ROWS)
    assert len(set(some)) == CHECKED_ROWS
    assert some == sorted(some)
    assert some[: CHECKED_ROWS // 2] == list(range(CHECKED_ROWS // 2))
    assert some[-1] > 9 * CHECKED_ROWS
    assert some == data_check._checked_rows(10 * CHECKED_ROWS)
