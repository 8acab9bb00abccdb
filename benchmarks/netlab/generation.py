"""Generates answers with an exact number of tokens, or until an event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.tools.bench.backends import Clock


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
    """Greedy decoding of exactly `tokens` tokens, or until `until()` is true after a token. Returns the new tokens."""
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=0,
        do_sample=False,
        speculate=None,
        streamer=clock,
        stopping_criteria=StoppingCriteriaList([_Until(until)]),
    )
    return output[0, prompt.shape[1] :]
