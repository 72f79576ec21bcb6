"""The first module that the fork server imports. It sets the server's signal handlers and end."""

from __future__ import annotations

import os
import signal

from harness.system.parent_death import end_with_parent
from launch.processes.stop_signals import STOP_SIGNALS

# Signals that a terminal, `timeout` and (SIGUSR2) SLURM send to all processes of a group.
GROUP_SIGNALS = (*STOP_SIGNALS, *(s for s in signal.Signals if s.name == "SIGUSR2"))
# The variable with the pid of the runner.
RUNNER = "TUNEBENCH_RUNNER_PID"


def configure() -> None:
    """End with the runner, also while importing. Ignore signals to the whole group, so that the
    runner learns how its workers end."""
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # The runner has started this process with them blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
    end_with_parent(int(os.environ.pop(RUNNER)))


if RUNNER in os.environ:
    configure()
