"""The lists that the command line prints in plain text: plans and outcomes of runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.records.prediction import Prediction, Verdict
from harness.records.record import Record
from harness.records.store import Entry
from launch.display.schedule import clock
from launch.planning.plan import Job
from reports.records.steps_text import data_text, loss_text
from reports.text import DASH, bytes_text, text_table


def counted(words: Iterable[str]) -> str:
    """`3 run, 1 keep`, the most frequent first."""
    return ", ".join(f"{count} {word}" for word, count in Counter(words).most_common())


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def plan_text(
    jobs: Sequence[Job], combinations: int, predictions: Mapping[str, Prediction] | None = None
) -> str:
    """Every cell with its identity, the action, the predicted peak with a verdict for each GPU, and
    the reason."""
    headers = ["cell", "action", "configuration", "why"]
    rows = [[job.cell.cell_id[:12], job.action, job.label, job.why] for job in jobs]
    found = predictions or {}
    gpus = list(dict.fromkeys(v.gpu for p in found.values() for v in p.verdicts))
    if found:
        headers[2:2] = ["predicted peak", *gpus]
        for job, row in zip(jobs, rows, strict=True):
            row[2:2] = _predicted(found.get(job.cell.cell_id), gpus)
    bases = sum(job.cell.method == "base" for job in jobs)
    counts = [
        plural(combinations, "combination"),
        plural(len(jobs) - bases, "distinct cell"),
        plural(bases, "base cell"),
    ]
    table = "\n".join(text_table([headers, *rows]))
    return f"{table}\n\n{', '.join(counts)}: {counted(job.action for job in jobs)}"


def _predicted(prediction: Prediction | None, gpus: Sequence[str]) -> list[str]:
    if prediction is None:
        return [DASH] * (1 + len(gpus))
    if prediction.status != "predicted":
        return [prediction.status, *[DASH] * len(gpus)]
    verdicts = {verdict.gpu: verdict_text(verdict) for verdict in prediction.verdicts}
    peak = bytes_text(prediction.memory.peak_allocated_bytes)
    return [peak, *(verdicts.get(gpu, DASH) for gpu in gpus)]


def verdict_text(verdict: Verdict) -> str:
    """`fits`, `fits, 2 retries`, or where it runs out of memory."""
    if verdict.outcome == "fits":
        return "fits"
    if verdict.outcome == "fits-after-retries":
        noun = "retry" if verdict.retries == 1 else "retries"
        return f"fits, {verdict.retries} {noun}"
    if verdict.oom is None:
        return "OOM"
    return f"OOM in {verdict.oom.phase.replace('_', ' ')}"


def duration_seconds(record: Record) -> float | None:
    """Seconds from start to end; None for a record without an end."""
    from datetime import datetime

    if record.ended is None:
        return None
    return (
        datetime.fromisoformat(record.ended) - datetime.fromisoformat(record.started)
    ).total_seconds()


def outcome_row(job: Job, entry: Entry | None) -> tuple[str, ...]:
    """cell, status, peak, tokens/s, time, configuration, and the record's directory or the
    reason."""
    if entry is None:
        return (job.cell.cell_id[:12], "not run", DASH, DASH, DASH, job.label, DASH)
    record = entry.record
    peak, tokens, taken = (
        record.memory.peak_bytes,
        record.speed.tokens_per_second,
        duration_seconds(record),
    )
    return (
        record.cell_id[:12],
        record.status,
        bytes_text(peak),
        f"{tokens.non_padding:,.0f}{'?' * bool(record.contaminated)}" if tokens else DASH,
        clock(taken) if taken is not None and record.status != "invalid" else DASH,
        job.label,
        record.reason if record.status != "ok" and record.reason else entry.directory.name,
    )


def outcome_text(jobs: Sequence[Job], entries: dict[str, Entry], results: Path) -> str:
    """The outcome of every cell of a run, and the next command."""
    rows = [outcome_row(job, entries.get(job.key)) for job in jobs]
    meters = {entry.record.memory.headline for entry in entries.values()}
    note = "\npeak is live tensor bytes by the ledger: no GPU here" if "ledger" in meters else ""
    if any(entry.record.contaminated for entry in entries.values()):
        note += "\n? in doubt: something else used its devices; `tunebench show` says what"
    records = [entry.record for entry in entries.values()]
    note += "".join(f"\n{text}" for text in (data_text(records), loss_text(records)) if text)
    headers = ("cell", "status", "peak", "tok/s", "time", "configuration", "record or reason")
    return (
        "\n".join(text_table([headers, *rows]))
        + f"\n\n{counted(row[1] for row in rows)}; records in {results}{note}"
        + f"\nnext: tunebench report {results}"
    )


def outcome_json(job: Job, entry: Entry | None) -> dict[str, Any]:
    return {
        "cell_id": job.cell.cell_id,
        "label": job.label,
        "status": entry.record.status if entry else None,
        "reason": entry.record.reason if entry else None,
        "attempt": entry.record.attempt if entry else None,
        "record": str(entry.directory / "record.json") if entry else None,
    }
