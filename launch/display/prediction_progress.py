"""What a person sees while predictions are made: a live line on a terminal, few lines elsewhere.

Everything here goes to standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from harness.records.prediction import Prediction
from launch.display.progress import LiveDisplay, clock, display_for_stderr
from matrices.cell import label
from reports.text import bytes_text

if TYPE_CHECKING:
    from rich.live import Live

QUIET_SECONDS = 5.0


class Show(Protocol):
    """Told what happens to a request, in the order it happens."""

    def message(self, text: str) -> None: ...
    def begin(self, total: int) -> None: ...
    def predicted(self, prediction: Prediction) -> None: ...
    def end(self) -> None: ...


def show_for_stderr() -> LiveShow | PlainShow:
    return LiveShow() if isinstance(display_for_stderr(), LiveDisplay) else PlainShow()


class Count:
    """How many cells are answered, and since when it runs."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.last = "importing the stack"
        self.began = time.monotonic()

    def begin(self, total: int) -> None:
        self.__init__()  # type: ignore[misc]
        self.total = total

    def add(self, prediction: Prediction) -> None:
        self.done += 1
        peak = prediction.memory.peak_allocated_bytes
        told = bytes_text(peak) if peak is not None else prediction.status
        train, data = prediction.cell.train, prediction.cell.data
        size = f" {train.micro_batch_size} x {data.max_length}" if train and data else ""
        self.last = f"{label(prediction.cell)}{size}: {told}"

    def text(self) -> str:
        elapsed = time.monotonic() - self.began
        return f"predicting {self.done}/{self.total} · {self.last} · {clock(elapsed)}"

    def summary(self) -> str:
        cells = "1 cell" if self.total == 1 else f"{self.total} cells"
        return f"simulated {cells} in {clock(time.monotonic() - self.began)}"


class PlainShow:
    """A line at the start and at the end, and one every few seconds in between."""

    def __init__(self) -> None:
        self.count = Count()
        self.written = 0.0

    def message(self, text: str) -> None:
        print(f"tunebench: {text}", file=sys.stderr, flush=True)
        self.written = time.monotonic()

    def begin(self, total: int) -> None:
        self.count.begin(total)
        self.message(self.count.text())

    def predicted(self, prediction: Prediction) -> None:
        self.count.add(prediction)
        if time.monotonic() - self.written > QUIET_SECONDS and self.count.done < self.count.total:
            self.message(self.count.text())

    def end(self) -> None:
        if self.count.total:
            self.message(self.count.summary())
            self.count.total = 0


class LiveShow:
    """One line, redrawn four times a second."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.count = Count()
        self.live: Live | None = None

    def message(self, text: str) -> None:
        from rich.text import Text

        self.console.print(Text(text, style="dim"))

    def begin(self, total: int) -> None:
        from rich.live import Live
        from rich.text import Text

        self.end()
        self.count.begin(total)
        self.live = Live(
            get_renderable=lambda: Text(self.count.text(), no_wrap=True, overflow="ellipsis"),
            console=self.console,
            transient=True,
        )
        self.live.start()

    def predicted(self, prediction: Prediction) -> None:
        self.count.add(prediction)

    def end(self) -> None:
        """Take the line away and give the terminal its cursor back."""
        if self.live is not None:
            self.live.stop()
            self.live = None


class Silent:
    """Shows nothing: for callers that show something of their own."""

    def message(self, text: str) -> None:
        """Nothing to show it on."""

    def begin(self, total: int) -> None:
        """Nothing to show it on."""

    def predicted(self, prediction: Prediction) -> None:
        """Nothing to show it on."""

    def end(self) -> None:
        """Nothing to put back."""


def failures(predictions: Sequence[Prediction]) -> list[str]:
    """The distinct reasons of those that failed."""
    reasons = (p.reason or "no reason given" for p in predictions if p.status == "failed")
    return list(dict.fromkeys(reasons))
