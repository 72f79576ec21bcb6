"""What was verified on the loaded model, as a reader of `show` and of a table needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.records.record import Record
from harness.records.verified import MOSTLY_IN_4BIT, Verified, VerifiedAdapter


def share_text(share: float | None) -> str:
    return "" if share is None else f"{share:.1%} of the base model's weights"


def adapter_text(found: VerifiedAdapter | None) -> str:
    """The ranks and scalings that were found, and what differs from plain LoRA."""
    if found is None:
        return ""
    tokens = [f"{count} rows of {name}" for name, count in found.trained_tokens.items()]
    texts = {
        "rank": _by_value(found.ranks),
        "scaling": _by_value(found.scalings),
        "layers": _ranges(found.layers),
        "init": "" if found.init == "True" else found.init or "",
        "with a magnitude (DoRA)": str(found.dora or ""),
        "parameters": ", ".join(found.parameters),
        "trained copies of": ", ".join(found.modules_to_save),
        "trained tokens": ", ".join(tokens),
        "trained biases": str(found.trained_biases or ""),
    }
    return "; ".join(f"{name} {text}" for name, text in texts.items() if text)


def _by_value(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} on {count}" for value, count in counts.items())


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7` of sorted whole numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def behaviour_text(found: Verified) -> str:
    sees = {
        True: "documents in a row see nothing of each other",
        False: "documents in a row see each other",
        None: "",
    }
    texts = [
        "causal" if found.causal else "",
        "the adapter starts at the base" if found.adapter_starts_at_base else "",
        sees[found.documents_isolated],
    ]
    return "; ".join(each for each in texts if each)


def verified_caption(records: Sequence[Record]) -> str:
    """What the configurations alone do not tell about a table's rows."""
    shares = [r.verified.quantized_share for r in records if r.verified.quantized_share is not None]
    parts = []
    if shares and min(shares) < MOSTLY_IN_4BIT:
        low, high = min(shares), max(shares)
        share = f"{low:.0%}" if round(low, 2) == round(high, 2) else f"{low:.0%} to {high:.0%}"
        parts.append(f"In 4 bit under qlora: {share} of the weights; the rest is not converted.")
    if any(r.verified.documents_isolated is False for r in records):
        every = all(r.verified.documents_isolated is False for r in records if r.cell.train)
        rows = "all" if every else "some"
        parts.append(f"Documents that share a row see each other in {rows} runs.")
    return " ".join(parts)
