"""Where drafts of the next tokens come from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import Cache, DynamicCache

from scheduler.averages import MovingAverage
from splitnet.errors import SplitnetError
from splitnet.model.families import ONE_BY_ONE, keeps_states, states_per_block
from splitnet.model.kv_cache import OneRow, RowCache
from splitnet.model.row_states import RowStates

SHARE = 0.2
"""Weight of the latest draft in the average of its time."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next.

    tokens: none if there is nothing to guess from. kind: drafts of one kind are accepted about equally often.
    """

    tokens: list[int]
    kind: int = 0


class Drafter(Protocol):
    """Guesses how a text goes on; follows one text at a time."""

    @property
    def priors(self) -> Sequence[float]:
        """By kind: how often a drafted token is accepted, as long as nothing is known of the text."""
        ...

    @property
    def draft_ms(self) -> float:
        """Ms per token; 0 if that does not count, so that a draft may be made just to see whether it would be right."""
        ...

    def begin(self, tokens: Sequence[int]) -> None:
        """A new text, which begins with these tokens."""
        ...

    def observe(self, token: int) -> None:
        """The text goes on with `token`."""
        ...

    def draft(self, pending: Sequence[int], count: int) -> Draft:
        """At most `count` tokens that may follow the text and `pending`, which was drafted before."""
        ...


class DraftModel:
    """A small model with the same tokens, in this process, always takes what it finds likeliest.

    Args:
        model: a causal LM of transformers, whose cache can be cropped, or whose states are rewound here.
        vocabulary: how many tokens the large model knows.

    Raises:
        SplitnetError: it knows other tokens, or keeps states that nobody can rewind.
    """

    priors = (0.6,)

    def __init__(self, model: Any, vocabulary: int) -> None:
        if model.config.get_text_config().vocab_size != vocabulary:
            raise SplitnetError(
                f"the draft model knows {model.config.get_text_config().vocab_size} tokens, the model {vocabulary}: "
                "use a draft model with the same tokenizer"
            )
        config = model.config.get_text_config()
        has_states = keeps_states(config)
        if not has_states and getattr(model, "_is_stateful", False):
            raise SplitnetError(
                f"draft models of the family {config.model_type!r} keep states that cannot be rewound: use one of "
                "another family, or prompt-lookup"
            )
        self._draft_ms = MovingAverage(SHARE, 1.0)
        self._model = model
        self._text: list[int] = []
        self._cached: list[int] = []
        self._cache = DynamicCache()  # of full layers, which can always be cropped
        self._row = RowCache(states=RowStates(states_per_block(config))) if has_states else None
        """In its place where blocks keep states; it has the tokens as what came in."""
        self._one_by_one = has_states and config.model_type in ONE_BY_ONE

    @property
    def draft_ms(self) -> float:
        return self._draft_ms.value

    def begin(self, tokens: Sequence[int]) -> None:
        self._text = list(tokens)

    def observe(self, token: int) -> None:
        self._text.append(token)

    @torch.inference_mode()
    def draft(self, pending: Sequence[int], count: int) -> Draft:
        known = [*self._text, *pending]
        self._keep_common(known)
        drafted: list[int] = []
        given = known[len(self._cached) :]
        began = time.perf_counter()
        while len(drafted) < count:
            logits = self._logits(torch.tensor(given, device=self._model.device))
            self._cached += given
            given = [int(logits[0, -1].argmax())]
            drafted += given
            if len(drafted) == 1:
                began = time.perf_counter()  # the first may come after a prefill
        if count > 1:
            self._draft_ms.add((time.perf_counter() - began) * 1000 / (count - 1))
        return Draft(drafted)

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        """`[1, 1, vocabulary]`, after new tokens `[count]`."""
        if self._row is None:
            return self._run(ids, self._cache)
        to_run = self._row.begin_pass(ids[:, None])[:, 0]
        pieces = to_run.split(1) if self._one_by_one and self._row.computed else [to_run]
        logits = torch.empty(0)
        for piece in pieces:
            logits = self._run(piece, OneRow(self._row))
            self._row.caught_up(self._row.computed + len(piece))
        self._row.advance(len(ids))
        return logits

    def _run(self, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        return self._model(input_ids=ids[None], cache=cache, use_cache=True, logits_to_keep=1).logits

    def _keep_common(self, known: Sequence[int]) -> None:
        """Crops the cache to what it shares with the text, less one token to go on from."""
        most = min(len(self._cached), len(known) - 1)
        same = next((index for index in range(most) if self._cached[index] != known[index]), most)
        if same < len(self._cached):
            if self._row is None:
                self._cache.crop(same - len(self._cached))
            else:
                self._row.crop(same)
            del self._cached[same:]
