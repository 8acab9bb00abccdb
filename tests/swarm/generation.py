"""A prompt, options of generation, and actions during it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from scheduler.speculation import Window
from splitnet.drafts.draft_stats import DraftStats

GREEDY = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def prompt(length: int = 9, batch: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def force_window(monkeypatch: pytest.MonkeyPatch, window: Window) -> None:
    """Makes clients send drafts in the given windows, even if drafts are slower."""
    monkeypatch.setattr(DraftStats, "knows_steps", True)
    monkeypatch.setattr(DraftStats, "window", lambda *_: window)
    monkeypatch.setattr(
        DraftStats, "best_length", lambda _, guesses, __: sum(1 for _ in itertools.islice(guesses, window.length))
    )


class Collector(BaseStreamer):
    """Records the streamed tokens, and -1 at the end."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


class After(BaseStreamer):
    """Runs an action after a number of tokens."""

    def __init__(self, tokens: int, action: Callable[[], None]) -> None:
        self._left = tokens + 1  # The first call of `put` brings the prompt.
        self._action = action

    def put(self, value: torch.Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            self._action()

    def end(self) -> None:
        pass
