"""How a run trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Schedule(StrEnum):
    """How the learning rate goes on after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train.

    Attributes:
        batch_size: rows per step.
        accumulate: parts into which a step's rows are cut; less memory at the client, the same gradient.
        warmup_steps: steps in which the learning rate rises from 0.
        schedule: how it goes on to the last step; linear and cosine go to 0.
        clip: largest norm of a gradient; 0: any.
        zeroth_order: gradients from forward passes alone, see `estimate_gradients`; `directions` are for it.
        seed: of the order of the data, and of the directions.
    """

    steps: int
    learning_rate: float
    batch_size: int = 8
    accumulate: int = 1
    warmup_steps: int = 0
    schedule: Schedule = Schedule.LINEAR
    clip: float = 1.0
    weight_decay: float = 0.0
    zeroth_order: bool = False
    directions: int = 1
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """Of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        match self.schedule:
            case Schedule.LINEAR:
                return self.learning_rate * (1 - done)
            case Schedule.COSINE:
                return self.learning_rate * (1 + math.cos(math.pi * done)) / 2
            case Schedule.CONSTANT:
                return self.learning_rate
