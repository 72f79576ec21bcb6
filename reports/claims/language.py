"""Claims about fine-tuning that people have read somewhere, and what an answer to one looks like.

A claim is a number with what it takes to check it (`kind`). GB is 10**9 bytes and MB 10**6, as
most texts mean; an answer says where 2**30 would have made the difference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from matrices.cell import Method, TargetSet
from matrices.errors import UserError, nearest
from matrices.files import yaml_lines
from matrices.files.yaml_lines import Spot

Verdict = Literal["reproduced", "refuted", "not testable"]
ClaimKind = Literal["count", "predict", "measure", "price"]

# What each kind can be about, with the unit of its value.
QUANTITIES: dict[str, dict[str, str]] = {
    "count": {
        "trainable_parameters": "parameters",
        "trainable_share": "share",
        "adapter_file_mb": "MB",
    },
    "predict": {
        "model_states_gb": "GB",
        "peak_gb": "GB",
        "optimizer_gb": "GB",
        "base_weights_gb": "GB",
        "double_quant_saving_gb": "GB",
        "activation_memory_exponent_in_sequence_length": "exponent",
    },
    "measure": {
        "base_weights_reduction": "share",
        "double_quant_saving_bits_per_parameter": "bits",
        "checkpointing_memory_saving": "share",
        "qlora_over_lora_steps_per_second": "ratio",
        "qlora_slowdown_versus_lora": "share",
        "checkpointing_slowdown": "share",
        "double_quant_slowdown": "share",
        "nf4_minus_fp4_quality": "points",
        "lora_minus_qlora_quality_points": "points",
        "all_linear_minus_qv_quality_points": "points",
        "quality_slope_in_log2_rank": "points",
        "merged_minus_requantized_quality_points": "points",
    },
    "price": {"usd": "USD"},
}
BOUNDS = ("value", "at_most", "at_least", "between")
# Quantities of one cell: they mean nothing without the model.
NEEDS_MODEL = {
    name for kind in ("count", "predict") for name in QUANTITIES[kind]
} - {"activation_memory_exponent_in_sequence_length"}  # fmt: skip


class Claim(BaseModel):
    """One claim as it is written. `tolerance` is half of the last digit written, unless
    `rounding` says how far the value was rounded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    kind: ClaimKind
    quantity: str
    source: str = ""
    note: str = ""
    model: str | None = None
    method: Method | None = None
    rank: int | None = Field(None, ge=1)
    target_modules: TargetSet | tuple[str, ...] | None = None
    value: float | None = None
    rounding: float | None = Field(None, ge=0)
    at_most: float | None = None
    at_least: float | None = None
    between: tuple[float, float] | None = None
    hours: float | None = None
    usd_per_hour: float | None = None
    tolerance: float = 0.0

    @property
    def unit(self) -> str:
        return QUANTITIES[self.kind][self.quantity]

    def accepts(self, value: float) -> bool:
        """Whether a figure is what the claim says."""
        if self.value is not None:
            # Half of the last digit is a decimal that floats miss by a hair.
            return abs(value - self.value) <= self.tolerance * (1 + 1e-9)
        low, high = self.between or (self.at_least, self.at_most)
        return (low is None or value >= low) and (high is None or value <= high)

    def told(self) -> str:
        """What is claimed, in words."""
        if self.value is not None:
            return figure_text(self.value, self.unit, self.tolerance)
        if self.between is not None:
            low, high = (bound_text(bound, self.unit) for bound in self.between)
            return f"{_number(low)} to {high}"
        if self.at_most is not None:
            return f"at most {bound_text(self.at_most, self.unit)}"
        return f"at least {bound_text(self.at_least or 0.0, self.unit)}"


class Reading(BaseModel):
    """The figure under assumptions that the claim leaves open."""

    assuming: str
    value: float
    agrees: bool


class Answer(BaseModel):
    """`readings` begin with the one that decides; `needs` is what a test would take."""

    claim: Claim
    verdict: Verdict
    value: float | None = None
    reason: str = ""
    readings: list[Reading] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    needs: str | None = None


def not_testable(claim: Claim, reason: str, needs: str | None = None) -> Answer:
    return Answer(claim=claim, verdict="not testable", reason=reason, needs=needs)


def decided(claim: Claim, readings: Sequence[Reading], notes: Sequence[str] = ()) -> Answer:
    """The first reading's verdict; the others stand beside it."""
    first = readings[0]
    return Answer(
        claim=claim,
        verdict="reproduced" if first.agrees else "refuted",
        value=first.value,
        readings=list(readings),
        notes=list(notes),
    )


def priced(claim: Claim) -> Answer:
    """Hours times price per hour."""
    if claim.hours is None or claim.usd_per_hour is None:
        return not_testable(claim, "no hours or no usd_per_hour", "hours and usd_per_hour")
    value = claim.hours * claim.usd_per_hour
    assuming = f"{claim.hours:g} h at {claim.usd_per_hour:.2f} USD/h, both as the claim gives them"
    return decided(claim, [Reading(assuming=assuming, value=value, agrees=claim.accepts(value))])


def figure_text(value: float, unit: str, tolerance: float | None = None) -> str:
    """`16,777,216`, `98.0 GB`, `1.04 %`: as many digits as the tolerance asks for."""
    if unit == "parameters":
        return f"{value:,.0f}"
    suffix = {"share": " %", "ratio": "×", "exponent": ""}.get(unit, f" {unit}")
    scale = 100 if unit == "share" else 1
    decimals = 2
    if tolerance:
        exponent = Decimal(repr(tolerance * scale * 2)).normalize().adjusted()
        decimals = max(0, -int(exponent))
    return f"{value * scale:,.{decimals}f}{suffix}".replace("-", "−")


def range_text(low: float, high: float, unit: str, between: str = " to ") -> str:
    """`12.82 to 40.42 %`."""
    return f"{_number(figure_text(low, unit))}{between}{figure_text(high, unit)}"


def _number(text: str) -> str:
    return text.partition(" ")[0].removesuffix("×")


def bound_text(value: float, unit: str) -> str:
    """A bound with the digits it was written with."""
    scaled = value * 100 if unit == "share" else value
    exponent = Decimal(f"{scaled:g}").as_tuple().exponent
    digit = float(Decimal(1).scaleb(int(exponent)))
    return figure_text(value, unit, digit / (200 if unit == "share" else 2))


def read_claims(path: Path) -> list[Claim]:
    """The claims of a YAML file (`claims:` is the list). Raises UserError with file and line for
    an unknown kind, quantity or key, naming the nearest, and for a claim that says nothing."""
    top = yaml_lines.read(path)
    entries = top.value.get("claims") if isinstance(top.value, dict) else None
    if entries is None or not isinstance(entries.value, list) or not entries.value:
        raise UserError("a claims file is 'claims:' and a list under it", where=top.where)
    lines = path.read_text(encoding="utf-8").splitlines()
    claims = [_claim(entry, lines) for entry in entries.value]
    seen: dict[str, str] = {}
    for claim, entry in zip(claims, entries.value, strict=True):
        if claim.id in seen:
            raise UserError(
                f"{claim.id!r} is also the claim at {seen[claim.id]}; ids are unique",
                key="id",
                where=entry.where,
            )
        seen[claim.id] = entry.where
    return claims


def _claim(entry: Spot, lines: Sequence[str]) -> Claim:
    if not isinstance(entry.value, dict):
        raise UserError("a claim is a mapping: {id: ..., kind: ...}", where=entry.where)
    spots: dict[str, Spot] = entry.value
    for key, spot in spots.items():
        if key not in Claim.model_fields or key == "tolerance":
            raise UserError(
                f"no such key of a claim{nearest(key, Claim.model_fields)}",
                key=key,
                where=spot.where,
            )
    for key in ("id", "kind", "quantity"):
        if key not in spots:
            raise UserError("every claim has one", key=key, where=entry.where)
    _check_word(spots["kind"], "kind", QUANTITIES)
    _check_word(spots["quantity"], "quantity", QUANTITIES[spots["kind"].value])
    plain = {key: yaml_lines.plain(spot) for key, spot in spots.items()}
    try:
        claim = Claim.model_validate(plain | {"tolerance": _tolerance(spots, lines)})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise UserError(first["msg"], key=key, where=spots.get(key, entry).where) from error
    _check_bounds(claim, entry.where)
    return claim


def _check_word(spot: Spot, key: str, known: Any) -> None:
    if spot.value not in known:
        hint = nearest(spot.value, known) if isinstance(spot.value, str) else ""
        raise UserError(
            f"{spot.value!r} is none of {', '.join(known)}{hint}", key=key, where=spot.where
        )


def _check_bounds(claim: Claim, where: str) -> None:
    given = [name for name in BOUNDS if getattr(claim, name) is not None]
    if len(given) != 1:
        raise UserError(
            f"a claim says one of {', '.join(BOUNDS)}; this one {' and '.join(given) or 'none'}",
            key=claim.id,
            where=where,
        )
    if claim.quantity in NEEDS_MODEL and claim.model is None:
        raise UserError(f"{claim.quantity} is of a model; add model: NAME", where=where)


def _tolerance(spots: dict[str, Spot], lines: Sequence[str]) -> float:
    """Half of the last digit, as it stands in the file: 98.0 says more than 98."""
    if "rounding" in spots and isinstance(spots["rounding"].value, int | float):
        return float(spots["rounding"].value)
    if "value" not in spots:
        return 0.0
    line = lines[int(spots["value"].where.rpartition(":")[2]) - 1]
    written = re.search(r"\bvalue:\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)", line)
    if written is None:
        return 0.0
    exponent = Decimal(written[1]).as_tuple().exponent
    return float(Decimal(5).scaleb(int(exponent) - 1))
