"""The ranks of a cell on several devices, as `tunebench show` lists them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness.records.part import PHASES
from harness.records.ranks import RankState
from harness.records.record import Record
from reports.records.derived import HEADLINE_FIELD, expected_share, rank_imbalance
from reports.text import DASH, bytes_text, printable, signed

# One rank says nothing that the rest of the record does not, unless it was left somewhere.
SOME = 2


def rank_rows(record: Record) -> list[tuple[str, ...]]:
    """A heading, then a row for each rank; empty for a cell of one process."""
    if len(record.ranks) < SOME:
        return []
    phases = [phase for phase in PHASES if _has(record, phase)]
    head = ("rank", "host", "device", "pid")
    rows = [(*head, *[phase.replace("_", " ") for phase in phases], "parameters", "tokens", "sent")]
    rows += [_row(record, state, phases) for state in sorted(record.ranks, key=_number)]
    return rows


def _number(state: RankState) -> int:
    return state.rank


def _row(record: Record, state: RankState, phases: Sequence[str]) -> tuple[str, ...]:
    return (
        str(state.rank),
        printable(state.host) or DASH,
        printable(state.device or DASH),
        str(state.pid or DASH),
        *[bytes_text(_peak(record, phase, state.rank)) for phase in phases],
        _parameters(state),
        DASH if state.tokens is None else f"{state.tokens.non_padding:,.0f}",
        _sent(state),
    )


def rank_facts(record: Record) -> list[str]:
    """What the ranks say together, and where each of them ended when it did not end well."""
    if len(record.ranks) < SOME:
        return []
    lines = []
    imbalance = rank_imbalance(record)
    if imbalance is not None:
        lines.append(
            f"largest training peak of a rank {signed(100 * imbalance, 1)} % over smallest"
        )
    lines += _shares(record)
    return lines + [line for state in record.ranks for line in _end(state)]


def _shares(record: Record) -> list[str]:
    expected = expected_share(record.cell)
    shares = [state.parameter_share for state in record.ranks if state.parameter_share is not None]
    if not shares:
        return []
    text = f"parameters expected on each rank: {100 * expected:.1f} % ({record.cell.parallelism})"
    # Not every parameter divides evenly, and small ones may be left whole.
    agrees = all(math.isclose(share, expected, rel_tol=0.1) for share in shares)
    return [text if agrees else f"{text}, and that is not what they hold"]


def _end(state: RankState) -> list[str]:
    if state.status in (None, "ok") and state.exit_code in (None, 0) and not state.stack_file:
        return []
    where = state.phase.replace("_", " ") if state.phase else "nowhere"
    text = f"rank {state.rank} ended in {where}"
    text += f", step {state.step}" if state.step is not None else ""
    texts = [state.status or "", f"exit code {state.exit_code}" if state.exit_code else ""]
    said = state.reason or (state.failure.message if state.failure else None)
    texts += [
        printable(said) if said else "",
        f"stacks in {state.stack_file}" * bool(state.stack_file),
    ]
    return [f"{text}: {'; '.join(part for part in texts if part)}"]


def _has(record: Record, phase: str) -> bool:
    return any(_peak(record, phase, state.rank) is not None for state in record.ranks)


def _peak(record: Record, phase: str, rank: int) -> int | None:
    field = HEADLINE_FIELD.get(record.memory.headline or "")
    parts: Sequence[object] = record.memory.phases.get(phase, [])  # type: ignore[call-overload]
    if field is None or rank >= len(parts):
        return None
    figure: int | None = getattr(parts[rank], field)
    return figure


def _parameters(state: RankState) -> str:
    if state.parameter_bytes is None:
        return DASH
    share = "" if state.parameter_share is None else f" ({100 * state.parameter_share:.1f} %)"
    return bytes_text(state.parameter_bytes) + share


def _sent(state: RankState) -> str:
    if state.communication is None:
        return DASH
    calls = sum(state.communication.calls.values())
    return f"{bytes_text(sum(state.communication.bytes.values()))} in {calls} calls"
