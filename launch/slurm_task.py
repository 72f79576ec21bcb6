"""The former name of `launch.engines.slurm.task`, for jobs of an older version in the queue."""

from __future__ import annotations

from launch.engines.slurm.task import *  # noqa: F403
