"""Step times: of one process an interval over its steps, of several an interval over processes.

Steps of one process are not independent (their lag-1 correlation reaches 0.64 on a busy machine),
and no number of steps shows how another process would run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median

from reports.statistics.intervals import (
    CONFIDENCE,
    Estimate,
    mean_interval,
    t_quantile,
    variance,
)

STEPS, PROCESSES = "steps", "processes"
# With fewer, batches of correlated steps are correlated themselves (COVERAGE.md).
FEWEST_STEPS = 32
FEWEST_BATCHES, MOST_BATCHES, STEPS_PER_BATCH = 4, 10, 25
ONE_PROCESS_EACH = "one process each"
FEW_STEPS = f"fewer than {FEWEST_STEPS} steps of one process"

Figure = Callable[[Sequence[float]], float]


def step_seconds(processes: Sequence[Sequence[float]], confidence: float = CONFIDENCE) -> Estimate:
    """Median step, in seconds; of several processes the mean of their medians.

    Each process is its timed steps in order. Raises ValueError without any step.
    """
    return _figure(median, processes, confidence)


def tokens_per_second(
    tokens: Sequence[float], processes: Sequence[Sequence[float]], confidence: float = CONFIDENCE
) -> Estimate:
    """Tokens over seconds, both summed over the timed steps; of several processes the mean of
    their rates. `tokens` has one total for each process.

    Within a process the amount per step is taken as fixed, which packed sequences make true.
    """
    if len(processes) > 1:
        rates = [n / math.fsum(s) for n, s in zip(tokens, processes, strict=True)]
        return mean_interval(rates, PROCESSES, confidence)
    per_step = tokens[0] / len(processes[0])
    seconds = _figure(fmean, processes, confidence)
    if seconds.low is not None and seconds.low <= 0:
        return Estimate(per_step / seconds.value, None, None, seconds.n, seconds.over)
    return seconds.mapped(lambda mean: per_step / mean)


def _figure(of: Figure, processes: Sequence[Sequence[float]], confidence: float) -> Estimate:
    if not processes or not all(processes):
        raise ValueError("no steps")
    if len(processes) > 1:
        return mean_interval([of(steps) for steps in processes], PROCESSES, confidence)
    return _of_one_process(of, processes[0], confidence)


def _of_one_process(of: Figure, steps: Sequence[float], confidence: float) -> Estimate:
    """The figure of all steps ± t(b-1) s / sqrt(b), s over the same figure of b batches of
    consecutive steps.

    Batch means (Schmeiser, Operations Research 30, 1982: few long batches lose little; Flyvbjerg
    and Petersen, J. Chem. Phys. 91, 1989); for the median, sectioning (Asmussen and Glynn,
    Stochastic Simulation, 2007, section III.5). Steps that fill no batch are left out of s.
    """
    n, value = len(steps), of(steps)
    if n < FEWEST_STEPS:
        return Estimate(value, None, None, n, STEPS, FEW_STEPS)
    batches = min(MOST_BATCHES, max(FEWEST_BATCHES, n // STEPS_PER_BATCH))
    size = n // batches
    rest = n - size * batches
    found = [of(steps[start : start + size]) for start in range(rest, n, size)]
    if min(found) == max(found):
        return Estimate(value, None, None, n, STEPS, f"{batches} of {batches} batches equal")
    half = t_quantile(batches - 1, confidence) * math.sqrt(variance(found) / batches)
    return Estimate(value, value - half, value + half, n, STEPS)


def step_ratio(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Median step of ours over theirs: the ratio of the geometric means over processes.

    Welch's interval on the log scale with Satterthwaite's degrees (Biometrika 34, 1947), so that
    a / b and b / a have reciprocal intervals; n is the smaller number of processes. No interval
    with one process on a side: its steps do not show how much processes differ.
    Raises ValueError without any step.
    """
    if not ours or not theirs or not all(ours) or not all(theirs):
        raise ValueError("no steps")
    logs = [[math.log(median(steps)) for steps in side] for side in (ours, theirs)]
    value = math.exp(fmean(logs[0]) - fmean(logs[1]))
    sizes = [len(side) for side in logs]
    n = min(sizes)
    if n < 2:
        note = ONE_PROCESS_EACH if max(sizes) == 1 else "one process on one side"
        return Estimate(value, None, None, n, PROCESSES, note)
    parts = [variance(side) / len(side) for side in logs]
    if sum(parts) == 0:
        return Estimate(value, None, None, n, PROCESSES, "all processes equal")
    below = sum(part**2 / (size - 1) for part, size in zip(parts, sizes, strict=True))
    factor = math.exp(t_quantile(sum(parts) ** 2 / below, confidence) * math.sqrt(sum(parts)))
    return Estimate(value, value / factor, value * factor, n, PROCESSES)
