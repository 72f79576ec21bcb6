"""The display on a terminal: redrawn lines at the bottom, finished cells above them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness.ranks.progress_file import Progress
from harness.records.prediction import Prediction
from harness.records.record import Record
from launch.display.schedule import (
    PredictionCount,
    Schedule,
    clock,
    describe,
    outcome,
    waiting_text,
)
from launch.planning.plan import Job
from matrices.files.text import visible

STYLES = {"ok": "green", "interrupted": "yellow", "invalid": "yellow"}
SEPARATOR = " · "
# On a narrow terminal the longest part keeps this many columns, and this many parts are kept.
LEAST_NAME = 12
LEAST_PARTS = 3
BAR_WIDTH = 24
# There is no bar when the words beside it would have fewer columns than this.
LEAST_BESIDE_BAR = 48


class TerminalDisplay:
    """One line for each running cell, then a line for what is waited for, for predictions and for
    the sweep. A thread redraws them four times a second."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.schedule = Schedule()
        self.running: dict[str, tuple[Job, Progress]] = {}
        self.activity: tuple[str, float] | None = None
        self.predictions: PredictionCount | None = None
        self.live: Live | None = None

    def message(self, text: str) -> None:
        self.console.print(Text(visible(text), style="dim"))

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[None]:
        self.activity = (text, time.monotonic())
        self._show()
        try:
            yield
        finally:
            self.activity = None
            self._show()

    @contextlib.contextmanager
    def predicting(self, total: int, last: str) -> Iterator[Callable[[Prediction], None]]:
        self.predictions = count = PredictionCount(total, last)
        self._show()
        try:
            yield count.add
        finally:
            self.predictions = None
            self._show()

    def begin(self, jobs: Sequence[Job]) -> None:
        self.schedule.begin(jobs)

    def cell_started(self, job: Job) -> None:
        self.schedule.start(job)
        self.schedule.position(job)
        self.update(job, Progress())

    def update(self, job: Job, progress: Progress) -> None:
        self.running[job.key] = (job, progress)
        self.activity = None
        self._show()

    def cell_finished(self, job: Job, record: Record, seconds: float) -> None:
        self._finished(job, record.status, outcome(record, seconds))
        self.schedule.end(job, seconds)
        self._show()

    def done_elsewhere(self, job: Job, record: Record) -> None:
        self._finished(job, record.status, [record.status, "measured by another runner"])
        self.schedule.end(job, None)
        self._show()

    def waiting(self, labels: Sequence[str], for_devices: bool = False) -> None:
        text = waiting_text(labels, for_devices)
        if self.activity is None or self.activity[0] != text:
            self.activity = (text, time.monotonic())
        self._show()

    def close(self) -> None:
        """Remove the live lines and show the terminal's cursor again."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _finished(self, job: Job, status: str, parts: Sequence[str]) -> None:
        self.running.pop(job.key, None)
        self.activity = None
        line = Text(visible(f"{self.schedule.position(job)} {job.label} · "))
        line.append(visible(parts[0]), style=STYLES.get(status, "red"))
        line.append(visible("".join(f" · {part}" for part in parts[1:])))
        self.console.print(line)

    def _show(self) -> None:
        if not (self.schedule.jobs or self.running or self.activity or self.predictions):
            self.close()
        elif self.live is None:
            # Results go to standard output as they are.
            self.live = Live(self, console=self.console, transient=True, redirect_stdout=False)
            self.live.start()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, max(1, console.height - 3)
        running = list(self.running.values())
        for job, progress in running[:height]:
            name = f"{self.schedule.position(job)} {job.label}"
            yield _line([name, *describe(progress), clock(self.schedule.elapsed(job))], width)
        if len(running) > height:
            yield _line([f"and {len(running) - height} more cells"], width)
        if (activity := self.activity) is not None:
            yield _line([activity[0], clock(time.monotonic() - activity[1])], width)
        if (count := self.predictions) is not None:
            yield _with_bar(count.done, count.total, count.parts(), width)
        elif (total := self.schedule.total) > 1:
            done = total - len(self.schedule.jobs)
            yield _with_bar(done, total, [f"{done}/{total} cells", self.schedule.eta()], width)


def _line(parts: Sequence[str], width: int) -> Text:
    """The parts on one line of `width` columns. When they are too wide, parts before the last are
    left out, then the longest is cut."""
    texts = [visible(" ".join(part.split())) for part in parts]
    while True:
        longest = max(range(len(texts)), key=lambda place: cell_len(texts[place]))
        beside = cell_len(SEPARATOR.join(texts)) - cell_len(texts[longest])
        if beside + LEAST_NAME <= width or len(texts) <= LEAST_PARTS:
            break
        texts.pop(-2)
    texts[longest] = _cut(texts[longest], max(LEAST_NAME, width - beside))
    return Text(_cut(SEPARATOR.join(texts), width), no_wrap=True)


def _cut(text: str, width: int) -> str:
    """The text in at most `width` columns, with an ellipsis when it is cut."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def _with_bar(done: int, total: int, parts: Sequence[str], width: int) -> Table | Text:
    if width < BAR_WIDTH + LEAST_BESIDE_BAR:
        return _line(parts, width)
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total, done, width=BAR_WIDTH)
    grid.add_row(bar, _line(parts, width - BAR_WIDTH - 1))
    return grid
