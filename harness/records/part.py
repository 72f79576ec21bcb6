"""What every part of a record shares: its base class, and the names of statuses and phases."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Status = Literal[
    "ok", "predicted", "oom", "timeout", "failed", "diverged", "invalid", "skipped", "interrupted"
]


Phase = Literal["load", "kbit_preparation", "forward", "backward", "optimizer_step", "evaluation"]


PHASES: tuple[Phase, ...] = (
    "load",
    "kbit_preparation",
    "forward",
    "backward",
    "optimizer_step",
    "evaluation",
)


# Load and evaluation stand apart.
TRAINING_PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer_step")


class Part(BaseModel):
    # JSON has no NaN: a diverged loss is written as the string "NaN" and read back as a float.
    # Fields of a newer writer are kept, so that a record read and written again loses nothing.
    model_config = ConfigDict(extra="allow", ser_json_inf_nan="strings")
