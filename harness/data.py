"""From a cell to rows that TRL trains on: `text`, `prompt`/`completion`, or `messages`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, load_dataset

from harness import hub, reference_text
from harness.packaged import cache_directory
from matrices.cell import Data
from matrices.errors import UserError, nearest
from matrices.fingerprint import refuse_hub_id_of_directory

PACKAGED = hub.PACKAGED_DATA
LOCAL_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(data: Data) -> Dataset:
    """The training rows under TRL's standard column names.

    Raises UserError when the data or a column is not there.
    """
    if data.source == PACKAGED:
        texts = [passage.text for passage in reference_text.training_passages()]
        rows = Dataset.from_dict({data.text_column: texts})
    elif not hub.is_hub_data(data):
        rows = _load_local(Path(data.source).expanduser())
    else:
        rows = _load_hub(data)
    if len(rows) == 0:
        raise UserError(f"{data.source} has no rows", key="data.source")
    if data.max_samples is not None:
        rows = rows.select(range(min(data.max_samples, len(rows))))
    return _standard_columns(rows, data)


def _load_local(path: Path) -> Dataset:
    reader = LOCAL_READERS.get(path.suffix)
    if reader is None:
        known = ", ".join(sorted(LOCAL_READERS))
        raise UserError(f"{path} is not one of {known}", key="data.source")
    if not path.is_file():
        raise UserError(f"{path} is not there", key="data.source")
    try:
        return load_dataset(
            reader, data_files=str(path), split="train", cache_dir=str(cache_directory() / "data")
        )
    except Exception as error:
        # The readers raise anything from JSONDecodeError to ArrowInvalid; the cause says it best.
        said = str(error.__cause__ or error).strip().splitlines()
        # Of a file without rows they say this, or raise a StopIteration without a word.
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
        # From a name that does not exist to no network; datasets' own first line tells which.
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{data.source!r} is neither {PACKAGED!r} nor a local file, and the hub does not give "
            f"it: {said[0]}",
            key="data.source",
        ) from error
    # Without the hub, datasets takes the newest copy it has, whatever revision is asked for.
    read = commit(rows)
    wanted = hub.known_commit(data.source, data.revision, "dataset")
    if read is not None and wanted is not None and read != wanted:
        raise UserError(
            f"the local copy of {data.source} is of commit {read[:12]}, and "
            f"{data.revision or 'main'} is {wanted[:12]}; download that one while the hub can be "
            "reached",
            key="data.revision",
        )
    return rows


def commit(rows: Dataset) -> str | None:
    """The hub commit that rows were read from: the directory datasets keeps them in has its name;
    none for other rows."""
    names = [Path(file["filename"]).parent.name for file in rows.cache_files]
    return names[0] if names and hub.COMMIT.fullmatch(names[0]) else None


def data_format(data: Data, columns: Sequence[str]) -> str:
    """`text`, `prompt-completion` or `chat`: the one asked for, else the first whose columns are
    there. Raises UserError, with the columns there are, when one is not."""
    needed = {
        "chat": (data.messages_column,),
        "prompt-completion": (data.prompt_column, data.completion_column),
        "text": (data.text_column,),
    }
    if data.format != "auto":
        for column in needed[data.format]:
            if column not in columns:
                raise UserError(
                    f"{column!r} is not a column of {data.source}, which has "
                    + ", ".join(columns)
                    + nearest(column, columns),
                    key=_column_setting(data, column),
                )
        return data.format
    for name, wanted in needed.items():
        if all(column in columns for column in wanted):
            return name
    raise UserError(
        f"{data.source} has the columns {', '.join(columns)}: none of "
        f"{data.messages_column!r}, {data.prompt_column!r} and {data.completion_column!r}, or "
        f"{data.text_column!r}; name them, e.g. text_column: {columns[0]}",
        key="data.text_column",
    )


def _column_setting(data: Data, column: str) -> str:
    for leaf in ("text_column", "prompt_column", "completion_column", "messages_column"):
        if getattr(data, leaf) == column:
            return f"data.{leaf}"
    return "data.format"


def _standard_columns(rows: Dataset, data: Data) -> Dataset:
    names = {
        "chat": {data.messages_column: "messages"},
        "prompt-completion": {data.prompt_column: "prompt", data.completion_column: "completion"},
        "text": {data.text_column: "text"},
    }[data_format(data, rows.column_names)]
    rows = rows.select_columns(list(names))
    return rows.rename_columns({old: new for old, new in names.items() if old != new})


def loss_arguments(data: Data, columns: Sequence[str]) -> dict[str, bool]:
    """TRL's two switches for where the loss is: never left to its own guess.

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


def provenance(data: Data, rows: Dataset) -> dict[str, str]:
    """Which rows were trained on: their number and the sha256 of their content in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(sorted(row.items())).encode())
    found = {"source": data.source, "rows": str(len(rows)), "sha256": digest.hexdigest()}
    if of_hub := commit(rows):
        found["commit"] = of_hub
    if data.source == PACKAGED:
        found["reference_sha256"] = reference_text.fingerprint()
    return found
