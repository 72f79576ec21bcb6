"""Preflight of the data: TRL prepares the rows as for training, and the result is checked.

The prepared rows stay in datasets' cache, where the worker finds them: checking all rows costs a
sweep no extra time.
"""

from __future__ import annotations

import random
import tempfile
import traceback
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from trl import SFTConfig
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from harness.data import dataset, local_files
from harness.models import model
from harness.train import ObservedTrainer, Observer
from matrices.cell import Cell, Data, Model
from matrices.errors import UserError
from matrices.rules.models import positions_problem

# Up to here every row is prepared; of more, the first half of this number and as many at random.
# Values (nulls, types, messages) are checked in every row.
CHECKED_ROWS = 20_000
# Arguments of SFTConfig that change the preparation.
PREPARATION = (
    "chat_template_path",
    "dataset_num_proc",
    "eos_token",
    "pad_token",
    "pad_to_multiple_of",
    "truncation_mode",
)


def subject(cell: Cell) -> tuple[Data, Model, dict[str, Any]] | None:
    """The arguments of `check`: cells with equal ones share its result. None without training."""
    if cell.data is None or cell.train is None:
        return None
    given = cell.train.sft_config
    return cell.data, cell.model, {name: given[name] for name in PREPARATION if name in given}


def check(source: Data, base: Model, arguments: dict[str, Any]) -> None:
    """Raises UserError for data that this model cannot be trained on: the first bad row, counted
    from 1 (the line of a JSONL file), with its column, its value and what would be right."""
    _Check(source, base, arguments).run()


class _Check:
    """One source of rows for one tokenizer."""

    def __init__(self, source: Data, base: Model, arguments: dict[str, Any]) -> None:
        self.data = source
        self.model = base
        self.arguments = arguments
        path = Path(source.source).expanduser()
        if path.suffix == ".csv" and path.is_file():
            local_files.check_csv(source)
        rows, self.layout, _ = dataset.read_rows(source)
        self.loss = dataset.loss_arguments(source, rows.column_names)
        self.numbers = _checked_rows(len(rows))
        self.rows = rows.select(self.numbers)
        self.tokenizer = model.load_tokenizer(base)

    def run(self) -> None:
        self._check_special_tokens()
        config = _text_config(self.model)
        if said := positions_problem(config.to_dict(), self.data.max_length):
            raise UserError(said, key="data.max_length")
        self._check_text()
        whole = self._prepare(max_length=None, packing=False)
        whole = whole.select_columns(["input_ids", "labels"])
        self._check_token_ids(whole, config.vocab_size)
        self._prepare(
            max_length=self.data.max_length,
            packing=self.data.packing,
            packing_strategy=self.data.packing_strategy,
        )

    def _check_special_tokens(self) -> None:
        eos = self.arguments.get("eos_token") or self.tokenizer.eos_token
        pad = self.arguments.get("pad_token") or self.tokenizer.pad_token or eos
        lacks = "pad nor an eos" if pad is None else "eos" if eos is None else None
        if pad is None or (eos is None and not self.layout.conversational):
            kind = f"has neither a {lacks} token" if pad is None else f"has no {lacks} token"
            raise UserError(
                f"the tokenizer of {self.model.name} {kind}, and TRL ends rows with one and fills "
                "batches with the other; name one of its tokens, e.g. sft_config: "
                "{eos_token: </s>}",
                key="model.name",
            )
        if not self.layout.conversational or "chat_template_path" in self.arguments:
            return
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"{self.data.source} holds chat messages, but the tokenizer of {self.model.name} "
                "has no chat template",
                key="data.format",
            )
        if self.loss["assistant_only_loss"]:
            self._check_generation_markers()

    def _check_generation_markers(self) -> None:
        if has_generation_markers(self.tokenizer.chat_template):
            return
        try:
            # TRL has templates of its own for some models.
            get_training_chat_template(self.tokenizer)
        except ValueError as error:
            raise UserError(
                f"the chat template of {self.model.name} does not mark what the assistant says "
                "({% generation %}), so no loss can be kept to it; add the marks to the template, "
                "or set completion_only_loss: false",
                key="data.completion_only_loss",
            ) from error

    def _check_text(self) -> None:
        """Raise UserError when all texts are empty: TRL would train on the end token alone."""
        if self.layout.conversational:
            return
        learnt = "text" if self.layout.format == "text" else "completion"
        if not any(text.strip() for text in self.rows[learnt]):
            column = self.layout.columns[0 if learnt == "text" else 1]
            what = f"column {column!r} is empty in each of {len(self.numbers)} rows"
            raise UserError(f"{self.data.source}: {what}; give rows with text", key="data.source")

    def _prepare(self, **shape: Any) -> Dataset:
        arguments = self.loss | self.arguments | shape
        try:
            return prepare_rows(self.rows, self.tokenizer, arguments)
        except UserError as error:
            raise UserError(f"{self.data.source}: {error.message}", key=error.key) from error
        except Exception as error:
            if not is_about_rows(error):
                said = f"TRL refuses to prepare the data: {_typed_first_line(error)}"
                raise UserError(said, key="train.sft_config") from error
            raise self._refusal(*first_failure(self.rows, self.tokenizer, arguments)) from error

    def _refusal(self, index: int, error: Exception) -> UserError:
        row = self.rows[index]
        who = f"the chat template of {self.model.name}"
        if not self.layout.conversational:
            who = f"the tokenizer of {self.model.name}"
        what = f"{who} refuses it ({_typed_first_line(error)}); correct the row or remove it"
        roles = [message["role"] for message in row.get("messages", ())]
        if self.loss["assistant_only_loss"] and roles and "assistant" not in roles:
            what = (
                f"has no assistant turn (roles: {', '.join(roles)}), and completion_only_loss "
                "takes the loss of nothing else; add one or remove the row"
            )
        return self._row_error(index, f"column {self.layout.columns[0]!r}: {what}")

    def _row_error(self, index: int, what: str, key: str = "data.source") -> UserError:
        number = _row_number(self.data.source, self.numbers[index])
        return UserError(f"{self.data.source}: row {number}: {what}", key=key)

    def _check_token_ids(self, whole: Dataset, embeddings: int) -> None:
        pad = self.tokenizer.pad_token_id
        if pad is not None and pad >= embeddings and not self.data.packing:
            raise UserError(
                f"the pad token {self.tokenizer.pad_token!r} of {self.model.name} has id {pad} "
                f"and the model has {embeddings} embeddings; use the tokenizer that the model was "
                "trained with, or sft_config: {pad_token: ...}",
                key="model.name",
            )
        for index, row in enumerate(whole):
            highest = max(row["input_ids"], default=0)
            if highest >= embeddings:
                token = self.tokenizer.convert_ids_to_tokens(highest)
                what = (
                    f"token {token!r} has id {highest} and {self.model.name} has {embeddings} "
                    "embeddings; use the tokenizer that the model was trained with"
                )
                raise self._row_error(index, what, "model.name")


def prepare_rows(rows: Dataset, tokenizer: Any, arguments: dict[str, Any]) -> Dataset:
    """The rows as the trainer of a run prepares them, in its own constructor, with a tiny model
    instead of the real one. Raises what TRL raises, or UserError when no token has a loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    disable_progress_bars()
    stand_in = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=max(len(tokenizer), 1),
            hidden_size=2,
            intermediate_size=2,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
            **arguments,
        )
        trainer = ObservedTrainer(
            model=stand_in,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            observer=Observer(),
        )
    return trainer.train_dataset


def is_about_rows(error: Exception) -> bool:
    """Whether `prepare_rows` raised an error for a row, not for its arguments."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name == "_prepare_dataset" for frame in frames)


def first_failure(
    rows: Dataset, tokenizer: Any, arguments: dict[str, Any]
) -> tuple[int, Exception]:
    """The index of the first row that `prepare_rows` refuses, and the error. It bisects, since
    datasets does not name the row. The rows as a whole must fail."""
    good, bad = 0, len(rows)
    said: Exception | None = None
    while said is None or bad - good > 1:
        tried = bad if said is None else (good + bad) // 2
        try:
            prepare_rows(rows.select(range(tried)), tokenizer, arguments)
        except UserError:
            # These rows are accepted, but none of their tokens has a loss.
            good = tried
        except Exception as error:
            said, bad = error, tried
        else:
            good = tried
    return bad - 1, said


def _typed_first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _checked_rows(rows: int) -> list[int]:
    """Which rows are prepared, counted from 0."""
    if rows <= CHECKED_ROWS:
        return list(range(rows))
    half = CHECKED_ROWS // 2
    return [*range(half), *sorted(random.Random(0).sample(range(half, rows), half))]


def _row_number(source: str, index: int) -> int:
    """The number a user counts: a line of JSONL, else the place among the rows."""
    path = Path(source).expanduser()
    if local_files.READERS.get(path.suffix) != "json" or not path.is_file():
        return index + 1
    return next(islice(local_files.json_rows(path), index, None))[0]


def _text_config(base: Model) -> Any:
    from transformers import AutoConfig

    name, keywords = model.source(base)
    return AutoConfig.from_pretrained(name, **keywords).get_text_config()
