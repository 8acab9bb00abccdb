"""When the tokens of an answer come."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """Notes when each new token came, in seconds of `time.perf_counter`.

    Args:
        after: called after each with how many there are.
    """

    def __init__(self, after: Callable[[int], None] | None = None) -> None:
        self.times: list[float] = []
        self._after = after
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:  # transformers shows it first
            self._is_prompt = False
            return
        self.times.append(time.perf_counter())
        if self._after is not None:
            self._after(len(self.times))

    def end(self) -> None:
        pass

    @property
    def gaps_ms(self) -> list[float]:
        """From each token to the next."""
        return [(late - early) * 1000 for early, late in itertools.pairwise(self.times)]
