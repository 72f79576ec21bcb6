"""The old name of `launch.engines.slurm.task`, for jobs that an older version left in the queue."""

from __future__ import annotations

from launch.engines.slurm.task import *  # noqa: F403
