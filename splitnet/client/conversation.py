"""A cache that outlives a call of `generate()`, and the tokens whose keys and values it holds."""

from __future__ import annotations

from typing import Any

import torch

from splitnet.client.cache import RemoteCache
from splitnet.client.local_adapters import LocalAdapters


class Conversation:
    """What `RemoteCausalLM.session()` keeps. What is not known to fit the next prompt is computed again.

    Args:
        cache: it is closed by the caller.
        adapters: those of the model.
    """

    def __init__(self, cache: RemoteCache, adapters: LocalAdapters) -> None:
        self.cache = cache
        self._adapters = adapters
        self._tokens: torch.Tensor | None = None
        self._padding: list[int] = []
        self._follows = False

    def resume(self, ids: torch.Tensor, mask: torch.Tensor | None, *, follows: bool) -> None:
        """Crops the cache to what it shares with the next prompt, less one token to go on from.

        Args:
            ids: `[rows, seq]`. mask: of the same shape; None: there is no padding.
            follows: whether rows of the cache will be those of the output, and all that they hold its tokens.
        """
        held, layer, before = self._tokens, self.cache.remote, self._padding
        padding = [0] * len(ids) if mask is None else [int(pad) for pad in (mask.cumsum(1) == 0).sum(1).tolist()]
        self._tokens, self._padding, self._follows = None, padding, follows
        columns = 0
        if (
            follows
            and held is not None
            and len(held) == layer.batch == len(ids)
            and self._adapters.current(layer.adapter) is layer.adapter
        ):
            rows = zip(held, before, ids, padding, strict=True)
            shared = [pad + _shared(old[pad_before : layer.columns], new[pad:]) for old, pad_before, new, pad in rows]
            columns = min(ids.shape[1] - 1, *shared)
        layer.rewind(columns, padding)

    def remember(self, tokens: torch.Tensor | None) -> None:
        """Takes in what was generated since `resume`, `[rows, seq]`; None: it is not known."""
        follows, self._follows = self._follows, False
        if tokens is None or not follows:
            self.forget()
        else:
            self._tokens = tokens

    def forget(self) -> None:
        """The next prompt begins anew."""
        self._tokens = None
        self.cache.remote.reset()


def tokens_of(output: Any) -> torch.Tensor:
    """Of what `generate()` returns."""
    return output if isinstance(output, torch.Tensor) else output.sequences


def _shared(held: torch.Tensor, new: torch.Tensor) -> int:
    """How many tokens two texts begin with in common."""
    length = min(len(held), len(new))
    same = held[:length] == new[:length].to(held.device)
    return length if bool(same.all()) else int(same.int().argmin())
