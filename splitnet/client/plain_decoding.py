"""The loop that generates one token after the other, for one text."""

from __future__ import annotations

from typing import Protocol

import torch

from splitnet.client.cache import RemoteCache
from splitnet.client.text import Text


class Model(Protocol):
    """A causal LM with a cache on the peers."""

    def prefill(self, input_ids: torch.Tensor, cache: RemoteCache) -> torch.Tensor:
        """The logits after `[1, seq]` new tokens, `[vocabulary]`."""
        ...

    def step(self, input_ids: torch.Tensor, cache: RemoteCache) -> torch.Tensor:
        """The same of one token."""
        ...


def generate_plainly(model: Model, text: Text, cache: RemoteCache) -> torch.Tensor:
    """Goes on with a text until it is finished; returns it, `[1, seq]`.

    Raises:
        SplitnetError: as a call of the model.
    """
    while not text.finished:
        unseen = text.ids(cache.remote.columns)
        call = model.step if unseen.shape[1] == 1 else model.prefill
        text.choose(call(unseen, cache))
    text.end()
    return text.ids()
