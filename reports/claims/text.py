"""Answers to claims as a table in text or Markdown. Bytes of memory say that they are predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from reports.claims.language import Answer, Claim, Reading, figure_text
from reports.text import DASH, printable, text_table

ORDER = ("reproduced", "refuted", "not testable")
BASIS = {
    "count": "counted",
    "predict": "predicted",
    "measure": "measured",
    "price": "arithmetic",
}


def answers_text(answers: Sequence[Answer], stack: Mapping[str, str]) -> str:
    """Every claim on a line, with what was found under which assumptions below it."""
    rows = [
        (f"{answer.verdict:<12}", answer.claim.id, subject(answer.claim), found_text(answer))
        for answer in answers
    ]
    lines = []
    for answer, row in zip(answers, text_table(rows), strict=True):
        lines += [row, *(f"{'':14}{line}" for line in details(answer))]
    return "\n".join([*lines, "", *footer(answers, stack)])


def answers_markdown(answers: Sequence[Answer], stack: Mapping[str, str]) -> str:
    """The same as a pipe table."""
    rows = ["| Claim | Says | Verdict | Found | Under |", "| :--- | :--- | :--- | :--- | :--- |"]
    for answer in answers:
        cells = (
            f"`{answer.claim.id}`",
            subject(answer.claim),
            answer.verdict,
            found_text(answer),
            "<br>".join(details(answer)),
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*rows, "", *footer(answers, stack)])


def subject(claim: Claim) -> str:
    """`llama-2-7b full peak 28 GB`, or for a price `3 h at 6.00 USD/h: 18.00 USD`."""
    if claim.kind == "price":
        return f"{claim.hours or 0:g} h at {claim.usd_per_hour or 0:.2f} USD/h: {claim.told()}"
    target = claim.target_modules
    words = [
        claim.model or "",
        claim.method or "",
        f"r{claim.rank}" if claim.rank else "",
        "" if target is None else target if isinstance(target, str) else ",".join(target),
        claim.quantity.removesuffix("_gb").removesuffix("_mb").replace("_", " "),
        claim.told(),
    ]
    return printable(" ".join(word for word in words if word))


def found_text(answer: Answer) -> str:
    """The right number, and how it was had; a dash without one."""
    if answer.value is None:
        return DASH
    claim = answer.claim
    return f"{_value_text(claim, answer.value)} ({BASIS[claim.kind]})"


def _value_text(claim: Claim, value: float) -> str:
    """One digit more than the claim says, so that a near miss shows."""
    exact = claim.kind == "price"
    return figure_text(value, claim.unit, claim.tolerance / (1 if exact else 10))


def details(answer: Answer) -> list[str]:
    """Assumptions of the figure, other readings, remarks, and what a test would need."""
    claim = answer.claim
    lines = [answer.reason] if answer.reason else []
    for place, reading in enumerate(answer.readings):
        if place == 0 and claim.kind != "measure":
            lines.append(f"under: {reading.assuming}")
            continue
        value = _value_text(claim, reading.value)
        lines.append(f"{value}{_agreement(answer, reading)}: {reading.assuming}")
    lines += answer.notes
    lines += [f"needs: {answer.needs}"] if answer.needs else []
    return [printable(line) for line in lines]


def _agreement(answer: Answer, reading: Reading) -> str:
    """Said where it differs from the verdict; of measured pairs there is no first one."""
    if answer.claim.kind == "measure":
        return " (agrees)" if reading.agrees else ""
    if reading.agrees == answer.readings[0].agrees:
        return ""
    return " (agrees)" if reading.agrees else " (no longer agrees)"


def footer(answers: Sequence[Answer], stack: Mapping[str, str]) -> list[str]:
    """How many of each, and what the figures rest on."""
    counts = Counter[str](answer.verdict for answer in answers)
    kinds = {answer.claim.kind for answer in answers}
    total = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict])
    lines = [f"{len(answers)} claims: {total}."]
    if kinds & {"count", "predict"} and stack:
        versions = ", ".join(f"{name} {version}" for name, version in stack.items())
        lines.append(
            "Predicted by simulating the training step, parameters counted on the same model; "
            f"nothing of it was measured on a GPU. Executed: {versions}."
        )
    lines.append(
        "GB is 10^9 bytes, MB 10^6. A figure agrees when it is within half of the claim's last "
        "digit, or within the rounding the claim gives."
    )
    return lines
