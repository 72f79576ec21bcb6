"""Claims that take a run: answered from pairs of measured cells that differ in one thing only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from harness.records.record import Record
from matrices.cell import Quantization
from reports.claims.language import (
    Answer,
    Claim,
    Reading,
    Verdict,
    figure_text,
    not_testable,
    range_text,
)
from reports.records.derived import quality_keys
from reports.records.load import Result, index
from reports.statistics.intervals import Estimate, NotComparable, mean_interval
from reports.tables import estimates
from reports.tables.captions import hardware_text, model_text
from reports.tables.groups import Group, differing, group, section_key

MeasuredFigure = Callable[[Group, Group], Iterator[Estimate]]
Test = Callable[[Group, Group], bool]
STORAGE = ("quantization.quant_type", "quantization.double_quant", "quantization.quant_storage")
CHECKPOINTING = ("train.gradient_checkpointing", "train.use_reentrant")
RANK, TARGETS = "adapter.rank", "adapter.target_modules"
# lm-eval's metrics that are shares of questions, so that a hundredth is a point.
ACCURACIES = ("acc", "acc_norm", "exact_match")


@dataclass(frozen=True)
class Comparison:
    """`pairs` says which two configurations are compared, the first against the second; they may
    differ in `axes` only. `exact` figures repeat to the byte; others need an interval."""

    pairs: Test
    axes: tuple[str, ...]
    figure: MeasuredFigure
    needs: str
    exact: bool = False


def measured(claim: Claim, results: Sequence[Result] | None) -> Answer:
    """The answer from records; not testable without the cells, or when the interval leaves the
    claim open."""
    comparison = COMPARISONS.get(claim.quantity)
    if comparison is None:
        return not_testable(
            claim,
            "no record holds it",
            "lm-eval scores of merged weights and of the same weights quantized again; records "
            "score adapters as they are saved",
        )
    if results is None:
        return not_testable(claim, "it takes a run", comparison.needs)
    found = list(_found(comparison, results))
    if not found:
        return not_testable(claim, "no two such cells in these results", comparison.needs)
    return _judged(claim, comparison, found)


@dataclass(frozen=True)
class _Pair:
    first: Group
    second: Group
    estimate: Estimate

    @property
    def record(self) -> Record:
        return self.first.measured[0].record

    @property
    def runs(self) -> int:
        """How many of the side that has fewer."""
        return min(len(self.first.measured), len(self.second.measured))

    def told(self) -> str:
        return f"{self.first.name} against {self.second.name}, {model_text(self.record)}"


def _found(comparison: Comparison, results: Sequence[Result]) -> Iterator[_Pair]:
    groups = [item for item in group(list(index(results).values())) if item.measured]
    for first in groups:
        for second in groups:
            same = _key(first) == _key(second) and first is not second
            if same and comparison.pairs(first, second) and _alike(comparison, first, second):
                try:
                    yield from (
                        _Pair(first, second, one) for one in comparison.figure(first, second)
                    )
                except NotComparable:
                    continue  # Different questions were asked: no pair.


def _key(item: Group) -> tuple[str, ...]:
    return section_key(item.results[0])


def _alike(comparison: Comparison, first: Group, second: Group) -> bool:
    return set(differing(first, second)) <= {"method", *comparison.axes}


def _judged(claim: Claim, comparison: Comparison, found: Sequence[_Pair]) -> Answer:
    overall = _overall(comparison, [pair.estimate for pair in found])
    texts = []
    if overall.low is not None and overall.high is not None:
        interval = range_text(overall.low, overall.high, claim.unit, ", ")
        figure = figure_text(overall.value, claim.unit)
        texts = [f"together {figure} [{interval}], n = {overall.n} {overall.over}"]
    open_ = _left_open(claim, comparison, found, overall)
    machines = dict.fromkeys(hardware_text(pair.record) for pair in found)
    notes = [*texts, f"measured on {'; '.join(machines)}", *_remarks(claim, found)]
    verdict: Verdict = "reproduced" if claim.accepts(overall.value) else "refuted"
    return Answer(
        claim=claim,
        verdict="not testable" if open_ else verdict,
        value=overall.value,
        reason=f"inconclusive: {open_}" if open_ else "",
        needs="more runs of these cells, with other seeds" if open_ else None,
        readings=[
            Reading(
                assuming=pair.told(),
                value=pair.estimate.value,
                agrees=claim.accepts(pair.estimate.value),
            )
            for pair in found
        ],
        notes=notes,
    )


def _left_open(
    claim: Claim, comparison: Comparison, found: Sequence[_Pair], overall: Estimate
) -> str:
    """Why these figures decide nothing; empty when they do. Times and scores differ from run to
    run, which no single pair of runs can show."""
    if not comparison.exact and len(found) == 1 and found[0].runs == 1:
        return "one pair of runs says nothing about others"
    if overall.low is None or overall.high is None:
        return "" if comparison.exact else f"no interval: {overall.note or 'one document'}"
    inside = claim.accepts(overall.low) and claim.accepts(overall.high)
    if inside or not _touches(claim, overall.low, overall.high):
        return ""
    return "what is claimed is neither the whole interval nor outside it"


def _remarks(claim: Claim, found: Sequence[_Pair]) -> list[str]:
    if claim.quantity == "double_quant_saving_bits_per_parameter":
        # Dettmers et al., QLoRA (arXiv:2305.14314), section 3: blocks of 64, nested ones of 256.
        bits = 32 / 64 - 8 / 64 - 32 / (64 * 256)
        return [
            f"the block constants alone save {bits:.3f} bits; a nested table of 1 KiB a layer "
            "takes some of it back, the more the smaller the layers"
        ]
    if claim.quantity == "base_weights_reduction":
        layers = {one: None for pair in found if (one := _layers_reduction(pair.first)) is not None}
        shares = " or ".join(figure_text(share, claim.unit, 0.001) for share in sorted(layers))
        text = f"of the layers stored in 4 bits alone, against 16 bits: {shares}"
        return [text] if shares else []
    return []


def _layers_reduction(item: Group) -> float | None:
    held = item.measured[0].record.memory.resident
    packed, state = held.get("quantized_weights"), held.get("quantization_state")
    # Two parameters a byte.
    return 1 - (packed + state) / (2 * 2 * packed) if packed and state else None


def _overall(comparison: Comparison, found: Sequence[Estimate]) -> Estimate:
    """Of several pairs the mean with an interval over pairs, no narrower than those of the pairs:
    they share documents. Of exact figures their range."""
    values = [estimate.value for estimate in found]
    if len(found) == 1:
        return found[0]
    if comparison.exact:
        mean = math.fsum(values) / len(values)
        return Estimate(mean, min(values), max(values), len(values), "pairs of cells")
    overall = mean_interval(values, "pairs of cells")
    lows = [estimate.low for estimate in found if estimate.low is not None]
    highs = [estimate.high for estimate in found if estimate.high is not None]
    if overall.low is None or overall.high is None or len(lows) < len(found):
        return overall
    low, high = min(overall.low, fmean(lows)), max(overall.high, fmean(highs))
    return replace(overall, low=low, high=high)


def _touches(claim: Claim, low: float, high: float) -> bool:
    """Whether any figure of the interval is what the claim says."""
    if claim.value is not None:
        return low <= claim.value + claim.tolerance and high >= claim.value - claim.tolerance
    floor, ceiling = claim.between or (claim.at_least, claim.at_most)
    return (ceiling is None or low <= ceiling) and (floor is None or high >= floor)


# --- which cells


def _method(first: str, second: str) -> Test:
    return lambda a, b: a.cell.method == first and b.cell.method == second


def _storages(a: Group, b: Group) -> tuple[Quantization | None, Quantization | None]:
    """The 4-bit settings of two trained cells; bases have a report of their own."""
    if a.cell.method != "qlora" or b.cell.method != "qlora":
        return None, None
    return a.cell.quantization, b.cell.quantization


def _double_quant(a: Group, b: Group) -> bool:
    mine, other = _storages(a, b)
    return bool(mine and other and mine.double_quant and not other.double_quant)


def _nf4_fp4(a: Group, b: Group) -> bool:
    mine, other = _storages(a, b)
    return bool(mine and other and mine.quant_type == "nf4" and other.quant_type == "fp4")


def _checkpointing(a: Group, b: Group) -> bool:
    mine, other = a.cell.train, b.cell.train
    if a.cell.method != b.cell.method or mine is None or other is None:
        return False
    return mine.gradient_checkpointing and not other.gradient_checkpointing


def _targets(a: Group, b: Group) -> bool:
    mine, other = a.cell.adapter, b.cell.adapter
    return bool(
        mine and other and a.cell.method == b.cell.method
        and mine.target_modules == "all-linear" and other.target_modules == "qv"
    )  # fmt: skip


def _higher_rank(a: Group, b: Group) -> bool:
    mine, other = a.cell.adapter, b.cell.adapter
    return bool(mine and other and a.cell.method == b.cell.method and mine.rank > other.rank)


# --- which figure


def _held(record: Record) -> int | None:
    names = ("weights", "quantized_weights", "quantization_state")
    held = [record.memory.resident.get(name, 0) for name in names]
    return sum(held) or None


def _reduction(quantized: Group, plain: Group) -> Iterator[Estimate]:
    """1 - bytes of the base in 4 bit / bytes in 16 bit; nothing for other plain weights."""
    mine, other = estimates.exact(quantized, _held), estimates.exact(plain, _held)
    if mine and other and plain.cell.model.weight_dtype != "fp32":
        yield Estimate(1 - mine.value / other.value, None, None, 1, "pairs of cells")


def _saved_bits(nested: Group, single: Group) -> Iterator[Estimate]:
    """Bits of quantization state that nesting saves, for each parameter stored in 4 bits."""
    state, packed = "quantization_state", "quantized_weights"
    mine, other = nested.measured[0].record.memory, single.measured[0].record.memory
    if mine.resident.get(packed) and state in mine.resident and state in other.resident:
        parameters = 2 * mine.resident[packed]
        saved = 8 * (other.resident[state] - mine.resident[state]) / parameters
        yield Estimate(saved, None, None, 1, "pairs of cells")


def _memory_saving(ours: Group, theirs: Group) -> Iterator[Estimate]:
    change = estimates.peak_change(ours, theirs)
    if change is not None:
        yield change.mapped(lambda ratio: -ratio)


def _relative_speed(ours: Group, theirs: Group) -> Iterator[Estimate]:
    """Steps per second, ours over theirs."""
    ratio = estimates.step_ratio(ours, theirs)
    if ratio is not None:
        yield ratio.mapped(lambda times: 1 / times)


def _slowdown(ours: Group, theirs: Group) -> Iterator[Estimate]:
    """How many fewer steps per second: 1 - ours / theirs."""
    for speed in _relative_speed(ours, theirs):
        yield speed.mapped(lambda ratio: 1 - ratio)


def _points(ours: Group, theirs: Group) -> Iterator[Estimate]:
    """Accuracy, ours minus theirs, in points, once for each task that has one."""
    tasks = [score for r in ours.measured for score in r.record.quality.tasks.values()]
    # What a group aggregates is not counted a second time.
    seen = {name for score in tasks for name in score.subtasks}
    for task, metric in quality_keys(result.record for result in ours.measured):
        if task not in seen and metric.partition(",")[0] in ACCURACIES:
            seen.add(task)
            gap = estimates.quality_difference(ours, theirs, task, metric)
            if gap is not None:
                yield gap.mapped(lambda share: 100 * share)


def _opposite(figure: MeasuredFigure) -> MeasuredFigure:
    return lambda first, second: (e.mapped(lambda value: -value) for e in figure(first, second))


def _per_doubling(ours: Group, theirs: Group) -> Iterator[Estimate]:
    mine, other = ours.cell.adapter, theirs.cell.adapter
    assert mine is not None
    assert other is not None
    doublings = math.log2(mine.rank / other.rank)
    for gap in _points(ours, theirs):
        yield gap.mapped(lambda points: points / doublings)


_LORA = "a lora and a qlora cell that are otherwise the same"
_TASKS = ", scored on a task with an accuracy"
_CHECKPOINTED = "a cell with gradient_checkpointing and the same without"
_NESTED = "a qlora cell with double_quant and the same without"
COMPARISONS: Mapping[str, Comparison] = {
    "base_weights_reduction": Comparison(
        _method("qlora", "lora"), STORAGE, _reduction, _LORA, exact=True
    ),
    "double_quant_saving_bits_per_parameter": Comparison(
        _double_quant, ("quantization.double_quant",), _saved_bits, _NESTED, exact=True
    ),
    "checkpointing_memory_saving": Comparison(
        _checkpointing, CHECKPOINTING, _memory_saving, _CHECKPOINTED, exact=True
    ),
    "qlora_over_lora_steps_per_second": Comparison(
        _method("qlora", "lora"), STORAGE, _relative_speed, _LORA
    ),
    "qlora_slowdown_versus_lora": Comparison(_method("qlora", "lora"), STORAGE, _slowdown, _LORA),
    "checkpointing_slowdown": Comparison(_checkpointing, CHECKPOINTING, _slowdown, _CHECKPOINTED),
    "double_quant_slowdown": Comparison(
        _double_quant, ("quantization.double_quant",), _slowdown, _NESTED
    ),
    "nf4_minus_fp4_quality": Comparison(
        _nf4_fp4, ("quantization.quant_type",), _points,
        "a qlora cell with nf4 and the same with fp4" + _TASKS,
    ),
    "lora_minus_qlora_quality_points": Comparison(
        _method("qlora", "lora"), STORAGE, _opposite(_points), _LORA + _TASKS
    ),
    "all_linear_minus_qv_quality_points": Comparison(
        _targets, (TARGETS,), _points, "a cell with all-linear and the same with qv" + _TASKS
    ),
    "quality_slope_in_log2_rank": Comparison(
        _higher_rank, (RANK,), _per_doubling, "the same cell at two ranks" + _TASKS
    ),
}  # fmt: skip
