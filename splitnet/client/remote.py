"""The module that stands in a transformers model where its blocks were."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from splitnet.client.cached_blocks import CachedBlocks
from splitnet.client.local_adapters import LocalAdapters, Prefixes
from splitnet.client.local_blocks import Blocks, LocalSpan
from splitnet.client.pass_blocks import PassBlocks
from splitnet.client.pass_session import PassSession


@dataclass(frozen=True, slots=True)
class Call:
    """What the blocks need to know of the call of the model that they are in."""

    keep: int = 0
    """How many last positions the head looks at; 0: all."""
    prefix: Prefixes = ()
    run: Callable[[torch.Tensor], torch.Tensor] | None = None
    """What runs the blocks, `[batch, seq, hidden]` in and out."""


class RemoteBlocks(nn.Module):
    """All blocks of a model, run by peers, or partly here.

    transformers calls it with hidden states alone, so all else stands around that call: see `calling`.

    Args:
        stages: what runs the model, in order: spans that are here, and ranges `[start, end)` that peers run.
        make_passes: makes the session for passes without a cache through such a range.
        max_positions: context length of the model, if it has one.
    """

    def __init__(
        self,
        stages: Sequence[LocalSpan | Blocks],
        make_passes: Callable[[Blocks], PassSession],
        max_positions: int | None,
    ) -> None:
        super().__init__()
        self.adapters = LocalAdapters()
        self.cached = CachedBlocks(self.adapters, max_positions)
        self.passes = PassBlocks(stages, make_passes, self.adapters, max_positions)
        self.local_spans = [(stage.start, stage.end) for stage in stages if isinstance(stage, LocalSpan)]
        self._local = threading.local()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Boundary activations in and out, `[batch, seq, hidden]`; see `CachedBlocks.run` and `PassBlocks.run`."""
        run = self.call.run
        assert run is not None, "the backbone calls the blocks"
        return run(hidden)

    @property
    def call(self) -> Call:
        """The one that the running thread is in."""
        return getattr(self._local, "call", _NO_CALL)

    @contextmanager
    def calling(self, **changes: Any) -> Iterator[None]:
        """Within, the running thread is in such a call; `changes` are those to the one around it."""
        outer = self.call
        self._local.call = replace(outer, **changes)
        try:
            yield
        finally:
            self._local.call = outer


_NO_CALL = Call()
