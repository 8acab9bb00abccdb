"""When the tokens of an answer come."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from splitnet.client.causal_lm import RemoteCausalLM


class Clock(BaseStreamer):
    """Notes when each new token came.

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


class _Until(StoppingCriteria):
    def __init__(self, is_done: Callable[[], bool]) -> None:
        self._is_done = is_done

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self._is_done(), dtype=torch.bool)


def generate(
    model: RemoteCausalLM,
    prompt: torch.Tensor,
    tokens: int,
    clock: Clock,
    until: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Greedy decoding of exactly `tokens` tokens, or until `until()` holds after one; the new ones."""
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        streamer=clock,
        stopping_criteria=StoppingCriteriaList([_Until(until)]),
    )
    return output[0, prompt.shape[1] :]
