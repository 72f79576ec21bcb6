"""Figures of the page, as plotly figures. Text from records is escaped: plotly reads some HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.records.memory import CATEGORIES
from reports.records.load import Index, bases
from reports.statistics.intervals import Estimate, NotComparable
from reports.tables import estimates
from reports.tables.groups import Group, names
from reports.tables.metric_choice import metric_text, metrics_shown
from reports.tables.model import count
from reports.text import MIB

if TYPE_CHECKING:
    import plotly.graph_objects as go

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


class Drawing(NamedTuple):
    """A figure with the sentence that says how to read it."""

    title: str
    reading: str
    figure: go.Figure


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


def _layout(figure: go.Figure, x: str, y: str, height: int = 420, **more: Any) -> None:
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
        **more,
    )
    line = {"gridcolor": "#dddddd", "zeroline": False, "automargin": True, "title_font_size": 13}
    figure.update_xaxes(title_text=x, **line)
    figure.update_yaxes(title_text=y, **line)


def _bars(estimates_: Sequence[Estimate], scale: float = 1.0) -> dict[str, Any]:
    """Error bars of intervals that need not be symmetric; none where there is no interval."""
    up = [None if e.high is None else (e.high - e.value) * scale for e in estimates_]
    down = [None if e.low is None else (e.value - e.low) * scale for e in estimates_]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.5}


def _tradeoff(
    pairs: Sequence[tuple[Group, str]], newest: Index, task: str, metric: str
) -> Drawing | None:
    import plotly.graph_objects as go

    figure = go.Figure()
    for place, (item, label) in enumerate(pairs):
        peak, quality = estimates.peak_bytes(item), _quality(item, task, metric)
        if peak is None or quality is None:
            continue
        hover = f"{label}<br>{peak.value / MIB:,.1f} MiB<br>{quality.value:.4g}, {count(quality)}"
        figure.add_trace(
            go.Scatter(
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
    if not figure.data:
        return None
    base = bases(pairs[0][0].results[0], newest).get("untouched")
    score = base.record.quality.tasks.get(task) if base else None
    if score is not None and metric in score.metrics:
        figure.add_hline(
            y=score.metrics[metric].value,
            line={"dash": "dash", "color": "#888888", "width": 1},
            annotation_text="untouched base",
            annotation_position="top right",
        )
    _layout(figure, "peak memory, MiB", html.escape(metric_text(metric)), height=520)
    return Drawing(
        f"{task}: quality against peak memory",
        "Whiskers are 95 % intervals, over documents and, where there are several, over seeds.",
        figure,
    )


def _quality(item: Group, task: str, metric: str) -> Estimate | None:
    """The score; none where the table gives a reason instead."""
    try:
        return estimates.quality(item, task, metric)
    except NotComparable:
        return None


def _categories(pairs: Sequence[tuple[Group, str]]) -> Drawing | None:
    import plotly.graph_objects as go

    held = {
        label: item.measured[0].record.memory.by_category
        for item, label in pairs
        if item.measured and item.measured[0].record.memory.by_category
    }
    if not held:
        return None
    figure = go.Figure()
    for category in CATEGORIES:
        if any(category in one for one in held.values()):
            name = category.replace("_", " ")
            figure.add_trace(
                go.Bar(
                    y=list(held),
                    x=[one.get(category, 0) / MIB for one in held.values()],
                    orientation="h",
                    name=name,
                    marker={"color": CATEGORY_COLOURS[category]},
                    hovertemplate=f"%{{y}}<br>{name}: %{{x:,.1f}} MiB<extra></extra>",
                )
            )
    _layout(figure, "MiB at the training peak", "", _height(len(held)), barmode="stack")
    figure.update_yaxes(autorange="reversed")
    return Drawing(
        "What the memory is made of",
        "Live tensor bytes at the ledger's training peak, first seed of each configuration.",
        figure,
    )


def _height(rows: int) -> int:
    return 190 + 30 * rows


def _throughput(pairs: Sequence[tuple[Group, str]]) -> Drawing | None:
    import plotly.graph_objects as go

    found = [(item, label, estimates.tokens_per_second(item)) for item, label in pairs]
    known = [(item, label, rate) for item, label, rate in found if rate is not None]
    if not known:
        return None
    rates = [rate for _, _, rate in known]
    figure = go.Figure(
        go.Bar(
            y=[label for _, label, _ in known],
            x=[rate.value for rate in rates],
            error_x=_bars(rates),
            orientation="h",
            marker={"color": [METHOD_COLOURS[item.cell.method] for item, _, _ in known]},
            customdata=[count(rate) for rate in rates],
            hovertemplate="%{y}<br>%{x:,.1f} tokens/s, %{customdata}<extra></extra>",
        )
    )
    _layout(figure, "non-padding tokens per second", "", _height(len(known)))
    figure.update_yaxes(autorange="reversed")
    return Drawing(
        "Training speed",
        "Tokens over time, warm-up left out; whiskers are 95 % intervals over processes, "
        "or over the steps of a single one.",
        figure,
    )


def _losses(pairs: Sequence[tuple[Group, str]]) -> Drawing | None:
    import plotly.graph_objects as go

    figure = go.Figure()
    drawn = [pair for pair in pairs if any(r.record.quality.train_loss for r in pair[0].results)]
    for place, (item, label) in enumerate(drawn):
        curves = [r.record for r in item.results if r.record.quality.train_loss]
        for nth, record in enumerate(curves):
            ended = "" if record.status == "ok" else f", {record.status}"
            losses = record.quality.train_loss
            figure.add_trace(
                go.Scatter(
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
    if not figure.data:
        return None
    _layout(figure, "optimizer step", "training loss", height=520)
    return Drawing(
        "Training loss",
        "Mean loss of each step, one line per run; click a name to hide its lines.",
        figure,
    )
