"""What all tests share: skips that count as failures where they must, and where the time went."""

from __future__ import annotations

import os
import resource
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

GROUPS_SHOWN = 20
seconds: Counter[str] = Counter()
processor: Counter[str] = Counter()
since = [0.0]


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


def processor_seconds() -> float:
    """Of this process and of its ended children. Fork servers, which nobody waits for, and what
    they have forked are not in it."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def pytest_runtest_logstart() -> None:
    since[0] = processor_seconds()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """With TUNEBENCH_NO_SKIPS set, a test that is skipped without a `gpu` mark has failed. A report
    knows the processor seconds since the one before it, those of ended children included."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    before, since[0] = since[0], processor_seconds()
    report.processor = since[0] - before
    strict = os.environ.get("TUNEBENCH_NO_SKIPS") and item.get_closest_marker("gpu") is None
    if strict and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be skipped: {reason}"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of the process that prints the summary, whoever ran the test."""
    path = report.nodeid.partition("::")[0]
    folder = path.rpartition("/")[0]
    group = path if folder.endswith("integration") else folder
    seconds[group] += report.duration
    processor[group] += getattr(report, "processor", 0.0)  # a worker that died tells nothing


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds of each folder of unit tests and each file of integration tests, fixtures included:
    of the clock, which with several workers add up to more than it shows, and of processors."""
    total, used = sum(seconds.values()), sum(processor.values())
    terminalreporter.section(f"seconds by group, {total:.0f} in all, {used:.0f} of processors")
    for group, took in seconds.most_common(GROUPS_SHOWN):
        terminalreporter.write_line(f"{took:7.1f} {processor[group]:7.1f}  {group}")


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[1]
