"""Figures of the page, as JSON that plotly draws. Text from records is escaped: plotly reads HTML.

Traces are plain dictionaries: plotly's classes take a millisecond for each, and a large sweep has
thousands.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from harness.records.memory import CATEGORIES
from reports.records.load import Index, bases
from reports.statistics.intervals import Estimate, NotComparable
from reports.tables import estimates
from reports.tables.groups import Group, names
from reports.tables.metric_choice import metric_text, metrics_shown
from reports.tables.model import count
from reports.text import MIB

# Okabe and Ito's palette, told apart by colour-blind readers, without its black and yellow.
METHOD_COLOURS = {"full": "#0072b2", "lora": "#009e73", "qlora": "#d55e00", "base": "#888888"}
CATEGORY_COLOURS = dict(
    zip(
        CATEGORIES,
        ("#0072b2", "#56b4e9", "#8fd3ff", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#a07fc9",
         "#999999", "#c9c9c9"),
        strict=True,
    )
)  # fmt: skip
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a07fc9",
                "#7a7a00", "#999999", "#8b4513")  # fmt: skip
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "x", "hexagon")
LINES_HEIGHT = 520


class Drawing(NamedTuple):
    """A figure with the sentence that says how to read it."""

    title: str
    reading: str
    figure: dict[str, Any]
    height: int


def drawings(groups: Sequence[Group], newest: Index, metrics: Sequence[str] = ()) -> list[Drawing]:
    """The figures that these groups have data for; `metrics` are those chosen to be shown."""
    labels = [html.escape(name) for name in names(groups)]
    pairs = list(zip(groups, labels, strict=True))
    shown = metrics_shown(groups, metrics).pairs
    found = [
        *[_tradeoff(pairs, newest, task, metric) for task, metric in shown],
        _categories(pairs),
        _throughput(pairs),
        _losses(pairs),
    ]
    return [drawing for drawing in found if drawing is not None]


def _trace(kind: str, **settings: Any) -> dict[str, Any]:
    """A trace with its settings in the order of plotly's classes."""
    return {**_ordered(settings), "type": kind}


def _ordered(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _ordered(value[name]) for name in sorted(value)}


def _figure(
    traces: Sequence[dict[str, Any]],
    x: str,
    y: str,
    height: int,
    layout: Mapping[str, Any] = MappingProxyType({}),
    line: Mapping[str, Any] | None = None,
    reversed_y: bool = False,
) -> dict[str, Any]:
    """The figure with these traces, and with a horizontal line if there is one."""
    import plotly.graph_objects as go

    figure = go.Figure()
    if line is not None:
        figure.add_hline(**line)
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#333333"},
        legend={
            "orientation": "h",
            "traceorder": "normal",
            "x": 0,
            "y": 0,
            "yref": "container",
            "yanchor": "bottom",
        },
        **layout,
    )
    axis = {"gridcolor": "#dddddd", "zeroline": False, "automargin": True, "title_font_size": 13}
    figure.update_xaxes(title_text=x, **axis)
    figure.update_yaxes(title_text=y, **axis)
    if reversed_y:
        figure.update_yaxes(autorange="reversed")
    return {"data": list(traces), "layout": figure.to_dict()["layout"]}


def _bars(estimates_: Sequence[Estimate], scale: float = 1.0) -> dict[str, Any]:
    """Error bars of intervals that need not be symmetric; none where there is no interval."""
    up = [None if e.high is None else (e.high - e.value) * scale for e in estimates_]
    down = [None if e.low is None else (e.value - e.low) * scale for e in estimates_]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.5}


def _tradeoff(
    pairs: Sequence[tuple[Group, str]], newest: Index, task: str, metric: str
) -> Drawing | None:
    traces = []
    for place, (item, label) in enumerate(pairs):
        peak, quality = estimates.peak_bytes(item), _quality(item, task, metric)
        if peak is None or quality is None:
            continue
        hover = f"{label}<br>{peak.value / MIB:,.1f} MiB<br>{quality.value:.4g}, {count(quality)}"
        traces.append(
            _trace(
                "scatter",
                x=[peak.value / MIB],
                y=[quality.value],
                error_x=_bars([peak], 1 / MIB),
                error_y=_bars([quality]),
                mode="markers",
                name=label,
                marker={
                    "size": 11,
                    "symbol": SYMBOLS[place % len(SYMBOLS)],
                    "color": METHOD_COLOURS[item.cell.method],
                },
                hovertemplate=hover + "<extra></extra>",
            )
        )
    if not traces:
        return None
    line = None
    base = bases(pairs[0][0].results[0], newest).get("untouched")
    score = base.record.quality.tasks.get(task) if base else None
    if score is not None and metric in score.metrics:
        line = {
            "y": score.metrics[metric].value,
            "line": {"dash": "dash", "color": "#888888", "width": 1},
            "annotation_text": "untouched base",
            "annotation_position": "top right",
        }
    figure = _figure(
        traces, "peak memory, MiB", html.escape(metric_text(metric)), LINES_HEIGHT, line=line
    )
    return Drawing(
        f"{task}: quality against peak memory",
        "Whiskers are 95 % intervals, over documents and, where there are several, over seeds.",
        figure,
        LINES_HEIGHT,
    )


def _quality(item: Group, task: str, metric: str) -> Estimate | None:
    """The score; none where the table gives a reason instead."""
    try:
        return estimates.quality(item, task, metric)
    except NotComparable:
        return None


def _categories(pairs: Sequence[tuple[Group, str]]) -> Drawing | None:
    held = {
        label: item.measured[0].record.memory.by_category
        for item, label in pairs
        if item.measured and item.measured[0].record.memory.by_category
    }
    if not held:
        return None
    traces = []
    for category in CATEGORIES:
        if any(category in one for one in held.values()):
            name = category.replace("_", " ")
            traces.append(
                _trace(
                    "bar",
                    y=list(held),
                    x=[one.get(category, 0) / MIB for one in held.values()],
                    orientation="h",
                    name=name,
                    marker={"color": CATEGORY_COLOURS[category]},
                    hovertemplate=f"%{{y}}<br>{name}: %{{x:,.1f}} MiB<extra></extra>",
                )
            )
    height = _height(len(held))
    layout = {"barmode": "stack"}
    figure = _figure(traces, "MiB at the training peak", "", height, layout, reversed_y=True)
    return Drawing(
        "What the memory is made of",
        "Live tensor bytes at the ledger's training peak, first seed of each configuration.",
        figure,
        height,
    )


def _height(rows: int) -> int:
    return 190 + 30 * rows


def _throughput(pairs: Sequence[tuple[Group, str]]) -> Drawing | None:
    found = [(item, label, estimates.tokens_per_second(item)) for item, label in pairs]
    known = [(item, label, rate) for item, label, rate in found if rate is not None]
    if not known:
        return None
    rates = [rate for _, _, rate in known]
    bars = _trace(
        "bar",
        y=[label for _, label, _ in known],
        x=[rate.value for rate in rates],
        error_x=_bars(rates),
        orientation="h",
        marker={"color": [METHOD_COLOURS[item.cell.method] for item, _, _ in known]},
        customdata=[count(rate) for rate in rates],
        hovertemplate="%{y}<br>%{x:,.1f} tokens/s, %{customdata}<extra></extra>",
    )
    height = _height(len(known))
    figure = _figure([bars], "non-padding tokens per second", "", height, reversed_y=True)
    return Drawing(
        "Training speed",
        "Tokens over time, warm-up left out; whiskers are 95 % intervals over processes, "
        "or over the steps of a single one.",
        figure,
        height,
    )


def _losses(pairs: Sequence[tuple[Group, str]]) -> Drawing | None:
    traces = []
    drawn = [pair for pair in pairs if any(r.record.quality.train_loss for r in pair[0].results)]
    for place, (item, label) in enumerate(drawn):
        curves = [r.record for r in item.results if r.record.quality.train_loss]
        for nth, record in enumerate(curves):
            ended = "" if record.status == "ok" else f", {record.status}"
            losses = record.quality.train_loss
            traces.append(
                _trace(
                    "scatter",
                    x=list(range(1, len(losses) + 1)),
                    y=losses,
                    mode="lines",
                    name=label,
                    legendgroup=label,
                    showlegend=nth == 0,
                    line={"color": LINE_COLOURS[place % len(LINE_COLOURS)], "width": 1.3},
                    hovertemplate=f"{label}, seed {record.cell.seed}{ended}"
                    "<br>step %{x}: %{y:.4f}<extra></extra>",
                )
            )
    if not traces:
        return None
    figure = _figure(traces, "optimizer step", "training loss", LINES_HEIGHT)
    return Drawing(
        "Training loss",
        "Mean loss of each step, one line per run; click a name to hide its lines.",
        figure,
        LINES_HEIGHT,
    )
