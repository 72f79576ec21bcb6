"""The first module that the fork server imports: it makes that process what workers are forked
from. Nothing else imports it."""

from __future__ import annotations

import os
import signal

from harness.system.parent_death import end_with_parent
from launch.processes.stop_signals import STOP_SIGNALS

# What a terminal, `timeout` and (SIGUSR2) SLURM send to all processes of a group.
GROUP_SIGNALS = (*STOP_SIGNALS, *(s for s in signal.Signals if s.name == "SIGUSR2"))
# Names the runner in the server's environment.
RUNNER = "TUNEBENCH_RUNNER_PID"


def settle() -> None:
    """End with the runner, also while importing, and live on when the whole group is signalled: the
    runner is to learn how its workers ended."""
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # They were blocked for the moment until here.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
    end_with_parent(int(os.environ.pop(RUNNER)))


if RUNNER in os.environ:
    settle()
