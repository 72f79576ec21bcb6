"""What all tests share: skips that count as failures where they must, and where the time went."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

GROUPS_SHOWN = 15
seconds: Counter[str] = Counter()


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_offline() -> Iterator[None]:
    """No hub look-ups: everything the tests need is packaged or made by them. Ctrl-C reaches the
    commands that are tested also where the shell started pytest with it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = dict(os.environ)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _signals_stay_open() -> Iterator[None]:
    """No test leaves stop signals blocked: every process started later would inherit that."""
    yield
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert not blocked & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """With TUNEBENCH_NO_SKIPS set, a test that is skipped without a `gpu` mark has failed."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    strict = os.environ.get("TUNEBENCH_NO_SKIPS") and item.get_closest_marker("gpu") is None
    if strict and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be skipped: {reason}"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of the process that prints the summary, whoever ran the test."""
    path = report.nodeid.partition("::")[0]
    folder = path.rpartition("/")[0]
    seconds[path if folder.endswith("integration") else folder] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds of each folder of unit tests and each file of integration tests, fixtures included.
    With several workers they add up to more than the clock shows."""
    terminalreporter.section(f"seconds by group, {sum(seconds.values()):.0f} in all")
    for group, took in seconds.most_common(GROUPS_SHOWN):
        terminalreporter.write_line(f"{took:7.1f}  {group}")


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[1]
