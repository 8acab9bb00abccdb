"""Drafts by a small causal LM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from splitnet.blocks.kv_cache import OneSequence, SequenceCache, SequenceStates
from splitnet.checkpoint.families import family_of, keeps_states, states_per_block, unknown_states
from splitnet.drafts.drafter import Guess, shared
from splitnet.errors import SplitnetError


class DraftModel:
    """Greedy drafts by a small causal LM of transformers in this process, with the tokenizer of the large model.

    vocabulary: size of the large model's vocabulary. Raises SplitnetError: the draft model has another vocabulary, or
    keeps states that cannot be rewound.
    """

    priors = (0.6,)
    taps = ()

    def __init__(self, model: Any, vocabulary: int) -> None:
        config = model.config.get_text_config()
        if config.vocab_size != vocabulary:
            raise SplitnetError(
                f"the draft model has {config.vocab_size} tokens, the model {vocabulary}: "
                "use a draft model with the same tokenizer"
            )
        has_states = keeps_states(config)
        reason = family_of(config).refused or unknown_states(config)
        if reason:
            raise SplitnetError(
                f"models of the family {config.model_type!r} cannot draft, because rows of drafts cannot be rewound: "
                f"{reason}. Use one of another family, or prompt-lookup"
            )
        self._model = model
        self._text: list[int] = []
        self._cached: list[int] = []
        # For models with recurrent states, the row keeps the tokens, from which the states are computed again after a
        # rewind.
        self._row = SequenceCache(states=SequenceStates(states_per_block(config)) if has_states else None)
        self._one_by_one = has_states and family_of(config).one_by_one

    def begin_text(self, tokens: Sequence[int], features: torch.Tensor | None = None) -> None:
        self._text = list(tokens)

    def observe_token(self, token: int, features: torch.Tensor | None = None) -> None:
        self._text.append(token)

    @torch.inference_mode()
    def draft_tokens(self, pending: Sequence[int]) -> Iterator[Guess]:
        known = [*self._text, *pending]
        self._keep_common(known)
        given = known[len(self._cached) :]
        while True:
            logits = self._logits(torch.tensor(given, device=self._model.device))
            self._cached += given
            given = [int(logits[0, -1].argmax())]
            yield Guess(given[0], 0)

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[1, 1, vocabulary]` after new tokens `[count]`."""
        to_run = self._row.begin_pass(ids[:, None])[:, 0]
        pieces = to_run.split(1) if self._one_by_one and self._row.computed else [to_run]
        logits = torch.empty(0)
        for piece in pieces:
            cache = OneSequence(self._row)
            logits = self._model(input_ids=piece[None], cache=cache, use_cache=True, logits_to_keep=1).logits
            self._row.set_computed(self._row.computed + len(piece))
        self._row.advance(len(ids))
        return logits

    def _keep_common(self, known: Sequence[int]) -> None:
        """Crops the cache to the common prefix with the text, and leaves at least one token to run."""
        same = min(shared(self._cached, known), len(known) - 1)
        if same < len(self._cached):
            self._row.crop(same)
            del self._cached[same:]
