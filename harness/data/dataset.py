"""From a cell to rows that TRL trains on: `text`, `prompt`/`completion`, or `messages`."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from datasets import Dataset, load_dataset

from harness.data import local_files, python_reference
from harness.data import rows as data_rows
from harness.data.local_files import FIRST_ROWS, READERS, standardize_row
from harness.models.packaged import cache_directory
from harness.records import hub
from matrices.cell import Data
from matrices.errors import UserError, first_line
from matrices.files import data_format
from matrices.files.data_format import TEMPLATE_COLUMNS, RowLayout, layout_of
from matrices.files.fingerprint import refuse_hub_id_of_directory

PACKAGED = hub.PACKAGED_DATA
Rows = Iterator[tuple[int, dict[str, Any]]]


class TrainingRows(NamedTuple):
    """Rows under TRL's column names, their layout, and their hub commit, if any."""

    rows: Dataset
    layout: RowLayout
    commit: str | None = None


def read_rows(data: Data) -> TrainingRows:
    """The training rows.

    Raises UserError when the data or a column is missing, or a value cannot be trained on: with
    file, row, column and value.
    """
    if data.source == PACKAGED:
        texts = [passage.text for passage in python_reference.training_passages()]
        table = Dataset.from_dict({data.text_column: texts})
    elif hub.is_hub_data(data):
        table = _load_hub(data)
    else:
        path = _check_path(Path(data.source).expanduser())
        if READERS[path.suffix] == "json":
            return _read_json(path, data)
        table = _load_local(path, data)
    if len(table) == 0:
        raise UserError(f"{data.source} has no rows", key="data.source")
    hub_commit = commit(table)
    if data.max_samples is not None:
        table = table.select(range(min(data.max_samples, len(table))))
    layout = layout_of(data, table.column_names, table[0])
    rows = _standardize(table.select_columns(list(layout.columns)), layout, data.source)
    return TrainingRows(rows, layout, hub_commit)


def _check_path(path: Path) -> Path:
    if path.suffix not in READERS:
        known = ", ".join(sorted(READERS))
        raise UserError(f"{path} is not one of {known}", key="data.source")
    if not path.is_file():
        raise UserError(f"{path} is not there", key="data.source")
    return path


def _read_json(path: Path, data: Data) -> TrainingRows:
    """Read rows of JSON without datasets, which would turn texts that look like dates into times,
    read texts beside lists as JSON, and give each struct the keys of all others."""
    limit = min(FIRST_ROWS, data.max_samples or FIRST_ROWS)
    first = list(islice(local_files.json_rows(path), limit))
    layout = local_files.infer_layout(data, first)

    def rows() -> Rows:
        return islice(local_files.json_rows(path), data.max_samples)

    state = path.stat()
    identity = [str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino]
    return TrainingRows(
        _cached_rows(rows, layout, data.source, [*identity, data.max_samples]), layout
    )


def _load_local(path: Path, data: Data) -> Dataset:
    reader = READERS[path.suffix]
    try:
        return load_dataset(
            reader, data_files=str(path), split="train", cache_dir=str(_data_directory())
        )
    except Exception as error:
        if reader == "csv":
            # This names the row.
            local_files.check_csv(data)
        # The readers raise many types, JSONDecodeError to ArrowInvalid; the cause is the clearest.
        said = str(error.__cause__ or error).strip().splitlines()
        # For a file without rows they raise this, or a StopIteration without a message.
        if not said or "corresponds to no data" in said[0]:
            raise UserError(f"{path} has no rows", key="data.source") from error
        raise UserError(
            f"{path} cannot be read as {reader}: {said[0]}", key="data.source"
        ) from error


def _load_hub(data: Data) -> Dataset:
    refuse_hub_id_of_directory(data.source, "data.source")
    try:
        rows = load_dataset(data.source, data.config, split=data.split, revision=data.revision)
    except Exception as error:
        # An unknown name, no network...: the first line of datasets' message says which.
        raise UserError(
            f"{data.source!r} is neither {PACKAGED!r} nor a local file, and the hub does not give "
            f"it: {first_line(error)}",
            key="data.source",
        ) from error
    # Without the hub, datasets takes the newest copy it has, whatever revision is asked for.
    local_commit = commit(rows)
    wanted = hub.known_commit(data.source, data.revision, "dataset")
    if local_commit is not None and wanted is not None and local_commit != wanted:
        raise UserError(
            f"the local copy of {data.source} is of commit {local_commit[:12]}, and "
            f"{data.revision or 'main'} is {wanted[:12]}; download that one while the hub can be "
            "reached",
            key="data.revision",
        )
    return rows


def commit(rows: Dataset) -> str | None:
    """The hub commit that rows were read from, which is the name of their directory in datasets'
    cache; None for other rows."""
    names = [Path(file["filename"]).parent.name for file in rows.cache_files]
    return names[0] if names and hub.COMMIT.fullmatch(names[0]) else None


def _data_directory() -> Path:
    return cache_directory() / "data"


def _standardize(table: Dataset, layout: RowLayout, source: str) -> Dataset:
    """The table under TRL's column names; its values are unchanged where they are right already."""
    renamed = dict(zip(layout.columns, _standard_columns(layout), strict=False))
    plain = table.select_columns(list(renamed)).rename_columns(
        {old: new for old, new in renamed.items() if old != new}
    )
    if not layout.conversational and layout.format != "alpaca" and _is_all_text(plain):
        return plain

    def rows() -> Rows:
        return ((number, _drop_null_tool_keys(row)) for number, row in enumerate(table, 1))

    standard = (standardize_row(source, number, row, layout) for number, row in rows())
    if all(one == other for one, other in zip(standard, plain, strict=True)):
        return plain
    return _cached_rows(rows, layout, source, [table._fingerprint])


def _standard_columns(layout: RowLayout) -> tuple[str, ...]:
    if layout.format in ("prompt-completion", "alpaca"):
        return ("prompt", "completion")
    return ("messages",) if layout.conversational else ("text",)


def _is_all_text(table: Dataset) -> bool:
    columns = [table.data.column(name) for name in table.column_names]
    texts = (pyarrow.types.is_string, pyarrow.types.is_large_string)
    return all(
        column.null_count == 0 and any(is_text(column.type) for is_text in texts)
        for column in columns
    )


def _drop_null_tool_keys(row: dict[str, Any]) -> dict[str, Any]:
    """Remove null keys of tools: a table stores each tool with the keys of all tools."""
    return {**row, "tools": _without_nulls(row["tools"])} if "tools" in row else row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value


def _cached_rows(
    rows: Callable[[], Rows], layout: RowLayout, source: str, identity: Sequence[Any]
) -> Dataset:
    """The standard rows, written to the cache once for the same content and the same code."""
    code = [inspect.getsource(module) for module in (local_files, data_format, data_rows)]
    key = json.dumps([code, repr(layout), *identity])
    try:
        dataset = Dataset.from_generator(
            _encode,
            features=_features(layout),
            cache_dir=str(_data_directory()),
            gen_kwargs={"rows": rows, "layout": layout, "source": source},
            fingerprint=hashlib.sha256(key.encode()).hexdigest(),
        )
    except Exception as error:
        # datasets wraps what a generator raises.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise
    unused = [
        name for name in TEMPLATE_COLUMNS if name in dataset.column_names and not any(dataset[name])
    ]
    return dataset.remove_columns(unused)


def _encode(rows: Callable[[], Rows], layout: RowLayout, source: str) -> Iterator[dict[str, Any]]:
    for number, row in rows():
        standard = standardize_row(source, number, row, layout)
        if not layout.conversational:
            yield standard
            continue
        found: dict[str, Any] = {
            name: [json.dumps(message) for message in standard[name]]
            for name in _standard_columns(layout)
        }
        if "tools" in layout.columns:
            found["tools"] = standard.get("tools")
        if "chat_template_kwargs" in layout.columns:
            found["chat_template_kwargs"] = json.dumps(standard.get("chat_template_kwargs", {}))
        yield found


def _features(layout: RowLayout) -> Any:
    # Some stacks that are predicted have an older datasets without these; they read no rows.
    from datasets import Features, Json, List, Value

    held = List(Json()) if layout.conversational else Value("string")
    features: dict[str, Any] = dict.fromkeys(_standard_columns(layout), held)
    if "tools" in layout.columns:
        features["tools"] = Value("string")
    if "chat_template_kwargs" in layout.columns:
        features["chat_template_kwargs"] = Json()
    return Features(features)


def loss_arguments(data: Data, columns: Sequence[str]) -> dict[str, bool]:
    """TRL's two arguments that choose the tokens with a loss, both always given.

    Raises UserError when completion-only loss is asked of plain text.
    """
    if data.completion_only_loss and "text" in columns:
        raise UserError(
            "completion_only_loss needs prompt and completion columns or chat messages; "
            f"{data.source} is plain text",
            key="data.completion_only_loss",
        )
    return {
        "completion_only_loss": data.completion_only_loss and "prompt" in columns,
        "assistant_only_loss": data.completion_only_loss and "messages" in columns,
    }


def provenance(data: Data, training: TrainingRows) -> dict[str, str]:
    """Provenance of the training rows: their number, the sha256 of their content in order, the
    columns they were read from, and their format."""
    digest = hashlib.sha256()
    for row in training.rows:
        digest.update(repr(sorted(row.items())).encode())
    found = {
        "source": data.source,
        "rows": str(len(training.rows)),
        "sha256": digest.hexdigest(),
        "format": training.layout.format,
        "columns": ", ".join(training.layout.columns),
    }
    if training.commit is not None:
        found["commit"] = training.commit
    if data.source == PACKAGED:
        found["reference_sha256"] = python_reference.fingerprint()
    return found
