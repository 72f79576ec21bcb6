"""`reports/statistics/COVERAGE.md`: how often the intervals hold what they say, by simulation.

`python tests/benchmarks/interval_coverage.py > reports/statistics/COVERAGE.md` draws data whose
true figure is known, gives them to the functions that the tables use, and counts. It takes a few
minutes; the seeds are fixed.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from reports.statistics.comparisons import joint_confidence
from reports.statistics.intervals import Estimate
from reports.statistics.scores import Design, difference, score
from reports.statistics.step_times import step_ratio, step_seconds

DRAWS = 2000
# A document's score has variance 1. What a run adds to it, and what documents of a cluster share:
OWN_VARIANCE, SHARED = 0.3, 0.5
COVERED, ALARMS = (93.0, 97.0), (3.0, 7.0)
RUNS = Path(__file__).parents[1] / "data" / "mlperf_step_seconds.csv"


class Scored(NamedTuple):
    """Two equal systems scored on the same documents. `seed_variance` is that of a mean over the
    seeds, in units of what the documents leave uncertain in the difference of the two; `right` is
    the share of right answers, None for real values; `log_sd` that of the documents' lengths."""

    documents: int
    seeds: int = 1
    cluster: int = 1
    seed_variance: float = 0.0
    right: float | None = None
    log_sd: float = 0.0


class Shares(NamedTuple):
    """Per cent of the draws: intervals that hold the truth, false alarms, no interval."""

    covered: float
    alarms: float
    none: float = 0.0


def shares(found: Sequence[tuple[Estimate, float, Estimate, float]]) -> Shares:
    """Of pairs of a figure with its truth: the first is counted for coverage, the second, the
    comparison, for alarms."""
    known = [(one.low <= truth <= one.high) for one, truth, _, _ in found if one.low is not None]  # type: ignore[operator]
    alarms = [gap.low is not None and not gap.low <= null <= gap.high for _, _, gap, null in found]  # type: ignore[operator]
    covered = 100 * float(np.mean(known)) if known else math.nan
    return Shares(covered, 100 * float(np.mean(alarms)), 100 * (1 - len(known) / len(found)))


def scored(setting: Scored, draws: int = DRAWS, seed: int = 1) -> Shares:
    """Coverage of a system's score, and how often two equal systems differ."""
    random = np.random.default_rng(seed)
    return shares([_scored_once(setting, random) for _ in range(draws)])


def _scored_once(
    setting: Scored, random: np.random.Generator
) -> tuple[Estimate, float, Estimate, float]:
    n, seeds = setting.documents, setting.seeds
    between = setting.seed_variance * OWN_VARIANCE / (n // setting.cluster) if seeds > 1 else 0.0
    common = _effects(setting, 1, random)
    systems = [
        common
        + math.sqrt(OWN_VARIANCE) * _effects(setting, seeds, random)
        + math.sqrt(between) * random.standard_normal((seeds, 1))
        for _ in range(2)
    ]
    lengths = np.ones(n)
    if setting.log_sd:
        lengths = np.round(1 + 500 * np.exp(setting.log_sd * random.standard_normal(n)))
    clusters = np.arange(n) // setting.cluster if setting.cluster > 1 else None
    design = Design(lengths, None if clusters is None else clusters.tolist())
    metric, truth = "f1", 0.0
    if setting.right is not None:
        threshold = ndtri(setting.right) * math.sqrt(1 + OWN_VARIANCE + between)
        systems, truth = [(each < threshold).astype(float) for each in systems], setting.right
    elif setting.log_sd:
        metric = "bits_per_byte"
        systems = [-each * lengths * math.log(2) for each in systems]
    first, second = systems
    return score(metric, first, design), truth, difference(metric, first, second, design), 0.0


def _effects(setting: Scored, rows: int, random: np.random.Generator) -> np.ndarray:
    n, size = setting.documents, setting.cluster
    alone = random.standard_normal((rows, n))
    if size == 1:
        return alone
    shared = random.standard_normal((rows, n // size)).repeat(size, axis=1)
    return math.sqrt(SHARED) * shared + math.sqrt(1 - SHARED) * alone


class Stepped(NamedTuple):
    """Steps of one process: their number, the correlation of neighbours, and the share of steps
    that something slows by half."""

    steps: int
    correlation: float = 0.0
    slowed: float = 0.0


def stepped(setting: Stepped, draws: int = DRAWS, seed: int = 2) -> float:
    """Coverage, in per cent, of the median step of one process."""
    random = np.random.default_rng(seed)
    noise = random.standard_normal((draws, setting.steps))
    for step in range(1, setting.steps):
        rest = math.sqrt(1 - setting.correlation**2)
        noise[:, step] = setting.correlation * noise[:, step - 1] + rest * noise[:, step]
    slow = random.random(noise.shape) < setting.slowed
    # The slowed steps all lie above it.
    truth = 1 + 0.03 * ndtri(0.5 / (1 - setting.slowed))
    found = [
        step_seconds([steps]) for steps in (np.where(slow, 1.5, 1) * (1 + 0.03 * noise)).tolist()
    ]
    held = [one.low <= truth <= one.high for one in found if one.low is not None]  # type: ignore[operator]
    return 100 * float(np.mean(held))


class Processes(NamedTuple):
    """Two sides of so many processes, the spread (standard deviation) of each side's."""

    number: int
    spread: tuple[float, float] = (0.05, 0.05)


def processes(setting: Processes, draws: int = DRAWS, seed: int = 3) -> Shares:
    """Coverage of a side's step time, and false alarms of the ratio of two equal sides."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        sides = [
            [[time] for time in np.exp(s * random.standard_normal(setting.number))]
            for s in setting.spread
        ]
        mean = math.exp(setting.spread[0] ** 2 / 2)
        found.append((step_seconds(sides[0]), mean, step_ratio(*sides), 1.0))
    return shares(found)


def families(rows: int, joint: bool, draws: int = DRAWS // 2, seed: int = 4) -> float:
    """Per cent of tables in which any of `rows` equal systems differs from the baseline, at 50
    documents."""
    random = np.random.default_rng(seed)
    design, confidence = Design(np.ones(50)), joint_confidence(rows if joint else 1)
    alarms = 0
    for _ in range(draws):
        base, *others = random.standard_normal((rows + 1, 50))
        gaps = [difference("f1", [each], [base], design, confidence) for each in others]
        alarms += any(gap.low > 0 or gap.high < 0 for gap in gaps)  # type: ignore[operator]
    return 100 * alarms / draws


def real_systems() -> dict[tuple[str, str], list[float]]:
    """Seconds a step of ten runs of each of 26 systems, all with one job (MLPerf Training v5.0,
    llama2_70b_lora, results under Apache-2.0)."""
    found: dict[tuple[str, str], list[float]] = {}
    with RUNS.open() as lines:
        for row in csv.DictReader(lines):
            key = row["organisation"], row["system"]
            found.setdefault(key, []).append(float(row["step_seconds"]))
    return found


def real_alarms(number: int, draws: int = 100, seed: int = 5) -> float:
    """Per cent of false alarms when `number` runs of a system stand against as many of its own."""
    random = np.random.default_rng(seed)
    alarms = []
    for runs in real_systems().values():
        for _ in range(draws):
            picked = random.permutation(runs)[: 2 * number]
            sides = [[[time] for time in side] for side in (picked[:number], picked[number:])]
            ratio = step_ratio(*sides)
            alarms.append(ratio.low is not None and not ratio.low <= 1 <= ratio.high)  # type: ignore[operator]
    return 100 * float(np.mean(alarms))


def main() -> None:
    print("\n".join(document()))


def document() -> Iterator[str]:
    yield INTRODUCTION
    yield from table(
        "## Scores: documents, clusters and seeds",
        "Values|Documents|In clusters of|Seeds|Seed variance|Score: coverage|A/A: false alarms",
        _score_rows(),
    )
    yield from table(
        "## Bits per byte: documents of unequal length",
        "Documents|log-sd of lengths|Seeds|Score: coverage|A/A: false alarms|No interval",
        _length_rows(),
    )
    yield from table(
        "## Step time of one process: coverage of the median",
        "Steps|Correlation of neighbours|Slowed steps|Coverage",
        (
            (
                setting.steps,
                setting.correlation,
                f"{setting.slowed:.0%}",
                told(stepped(setting), COVERED),
            )
            for steps in (32, 36, 60, 100, 300)
            for setting in (
                Stepped(steps),
                Stepped(steps, 0.3),
                Stepped(steps, 0.64),
                Stepped(steps, 0.3, 0.1),
            )
        ),
    )
    yield from table(
        "## Step time of several processes",
        "Processes on each side|Spread of ours|Spread of theirs|Step time: coverage|"
        "A/A ratio: false alarms",
        _process_rows(),
    )
    yield from table(
        "## Real runs: equal systems against themselves",
        "Runs on each side|False alarms, 26 systems",
        ((number, told(real_alarms(number), ALARMS)) for number in (2, 3, 5)),
    )
    yield from table(
        "## Many rows against one baseline: any false alarm in a table",
        "Rows|Each interval alone|Held together",
        (
            (rows, f"{families(rows, False):.1f} %", told(families(rows, True), ALARMS))
            for rows in (1, 5, 20)
        ),
    )


def table(title: str, heading: str, rows: Iterator[tuple[object, ...]]) -> Iterator[str]:
    names = heading.split("|")
    yield from (title, "", f"| {' | '.join(names)} |", f"|{' ---: |' * len(names)}")
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"
    yield ""


def _score_rows() -> Iterator[tuple[object, ...]]:
    for right, values in ((None, "real"), (0.7, "70 % right")):
        for documents in (12, 50, 500):
            for cluster in (1, 6 if documents == 12 else 10):
                for seeds in (1, 3, 5):
                    for variance in (0.0, 1.0, 10.0) if seeds > 1 else (0.0,):
                        found = scored(Scored(documents, seeds, cluster, variance, right))
                        yield (
                            *(values, documents, cluster, seeds, variance),
                            *(told(found.covered, COVERED), told(found.alarms, ALARMS)),
                        )


def _length_rows() -> Iterator[tuple[object, ...]]:
    for documents in (12, 50, 500):
        for log_sd in (0.3, 0.8, 1.5):
            for seeds in (1, 3):
                found = scored(Scored(documents, seeds, seed_variance=1.0, log_sd=log_sd))
                yield (
                    *(documents, log_sd, seeds),
                    *(told(found.covered, COVERED), told(found.alarms, ALARMS)),
                    f"{found.none:.1f} %",
                )


def _process_rows() -> Iterator[tuple[object, ...]]:
    for number in (2, 3, 5, 10):
        for spread in ((0.01, 0.01), (0.05, 0.05), (0.05, 0.0125)):
            found = processes(Processes(number, spread))
            yield (
                *(number, *(f"{each:.2%}" for each in spread)),
                *(told(found.covered, COVERED), told(found.alarms, ALARMS)),
            )


def told(share: float, wanted: tuple[float, float]) -> str:
    """`95.1 %`, marked where it is below or above what is wanted."""
    mark = "" if wanted[0] <= share <= wanted[1] else " ▼" if share < wanted[0] else " ▲"
    return f"{share:.1f} %{mark}"


INTRODUCTION = f"""# How often the intervals hold

Written by `python tests/benchmarks/interval_coverage.py`. Each row is {DRAWS:,} simulated data sets
with a known answer, {DRAWS // 2:,} in the last table (its own error is up to 0.7 points).
Coverage: how often a 95 % interval holds the truth; wanted are
{COVERED[0]:.0f} to {COVERED[1]:.0f} %. A/A: two equal systems; a false alarm is an interval of
their difference without zero; wanted are {ALARMS[0]:.0f} to {ALARMS[1]:.0f} %. ▼ and ▲ mark what
lies below or above. Few false alarms and a coverage above 97 % are on the safe side: the interval
is wider than it need be.

A document's score has variance 1 over documents, and each run adds {OWN_VARIANCE} of its own;
documents of a cluster share half of both. The seed variance is that of the mean over seeds, in
units of what the documents leave uncertain in the difference. One seed covers its own mean only.

What lies outside, and why:

* Too wide: 12 documents in 2 clusters, and answers of 12 documents, of which too few differ for an
  alarm at 5 %. Seeds that add nothing (variance 0): the interval is never narrower than that of the
  documents, but wider where the seeds happen to differ. Two processes a side. Two seeds (not
  shown): the t of one degree of freedom is 12.7.
* A little too narrow: three seeds whose variance is several times that of the documents, up to 8 %
  of false alarms with answers; 32 to 36 steps of one process at a correlation of 0.64, 92 %.
"""

if __name__ == "__main__":
    main()
