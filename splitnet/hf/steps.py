"""Steps through the blocks: new positions of rows whose keys and values the peers hold."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from splitnet.blocks.adapters import Adapter
from splitnet.checkpoint.families import RopeLengths
from splitnet.hf.adapters import LocalAdapters, Prefixes
from splitnet.hf.cache import ModelSession, RemoteCache, RemoteLayer
from splitnet.hf.parameters import check_context, check_positions, mask_of, reach_of
from splitnet.wire.messages import Chunk


@dataclass(slots=True)
class Exchange:
    """New positions that were sent through the blocks, and where their outputs belong."""

    cache: RemoteCache
    session: ModelSession
    under_way: Any
    """What the session awaits; None: no position was sent."""
    parts: list[Chunk]
    hidden: torch.Tensor
    """What was sent, `[batch, seq, hidden]`."""
    new_mask: torch.Tensor
    """`[batch, seq]`; False is padding."""
    past: int
    """Columns of the cache before."""

    def finish(self) -> torch.Tensor:
        """Waits for the outputs, `[batch, seq, hidden]`: zero at padding, and where none is wanted.

        Raises:
            PeerLost, PeerFailed, PeerBusy, CoverageError: see `Session.step`.
        """
        if self.under_way is None:
            return torch.zeros_like(self.hidden)
        began = time.perf_counter()
        returned = self.session.finish(self.under_way).to(self.hidden.device, self.hidden.dtype)
        self.cache.remote.waited_ms += (time.perf_counter() - began) * 1000
        if len(returned) == self.hidden.shape[0] * self.hidden.shape[1]:
            return returned.view(self.hidden.shape)
        wanted = self.new_mask.clone()
        if any(part.keep != part.length for part in self.parts):
            # Real positions counted from the right: the last `keep` of each row were returned.
            from_right = wanted.flip(1).cumsum(1).flip(1)
            rows = [row for row in range(len(wanted)) if bool(wanted[row].any())]
            for row, part in zip(rows, self.parts, strict=True):
                wanted[row] &= from_right[row] <= part.keep
        output = torch.zeros_like(self.hidden)
        output[wanted.to(self.hidden.device)] = returned
        return output

    def abandon(self) -> None:
        """The outputs are awaited no longer."""
        if self.under_way is not None:
            self.session.abandon(self.under_way)

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """Within, the cache has the columns of before: transformers counts positions from there."""
        layer = self.cache.remote
        columns, layer.columns = layer.columns, self.past
        try:
            yield
        finally:
            layer.columns = columns


class CachedBlocks:
    """All blocks of a model, run by peers that hold keys and values.

    Args:
        adapters: what the blocks run with.
        max_positions: context length of the model, if it has one.
        ropes: which lengths of a text its rotary frequencies tell apart.
    """

    def __init__(self, adapters: LocalAdapters, max_positions: int | None, ropes: RopeLengths) -> None:
        self.max_positions = max_positions
        self.ropes = ropes
        self._adapters = adapters

    def begin(self, cache: RemoteCache, hidden: torch.Tensor) -> Exchange:
        """Sends new positions `[batch, seq, hidden]`, none of which is padding, behind what the cache holds.

        They are computed as one by one: where rotary frequencies depend on the length, each has those of its own.

        Raises:
            ContextTooLong: the sequence is longer than the model's context.
            PeerLost, PeerFailed, PeerBusy, CoverageError: see `Session.step`.
        """
        layer = cache.remote
        mask = torch.ones(hidden.shape[0], layer.columns + hidden.shape[1], dtype=torch.bool)
        return self._begin(cache, hidden, mask, 0, layer.adapter, 0)

    def run(
        self,
        cache: RemoteCache,
        hidden: torch.Tensor,
        mask: Any,
        positions: Any,
        keep: int,
        prefix: Prefixes,
        length: int = 0,
    ) -> torch.Tensor:
        """The outputs of new positions, `[batch, seq, hidden]`; no gradient goes back through them.

        Args:
            mask, positions: what the caller has given for `attention_mask` and `position_ids`.
            keep: how many last positions are wanted; 0: all.
            prefix: keys and values before the first position; empty: none.
            length: of the text that they are a piece of, if there is more of it.

        Raises:
            UnsupportedParameter: the mask or the positions cannot be honoured.
            AdapterError: the adapter does not fit the blocks, or is not that of the cache.
            ContextTooLong, PeerLost, PeerFailed, PeerBusy, CoverageError: see `begin`.
        """
        layer, (batch, new, _) = cache.remote, hidden.shape
        past = layer.columns
        check_context(past + new, self.max_positions)
        checked = mask_of(mask, batch, past + new)
        before = prefix[0][0].shape[1] if prefix else 0
        check_positions(positions, checked, past, before)
        reach = reach_of(positions, before + past + new, self.ropes, before + length)
        parameters = {} if past else self._adapters.parameters_for(prefix)
        adapter = self._adapters.recent(layer.adapter, prefix) if past else self._adapters.adapter_of(parameters)
        with torch.no_grad():
            exchange = self._begin(cache, hidden, checked, keep, adapter, reach)
            try:
                output = exchange.finish()
            except BaseException:
                layer.columns = past
                raise
        if torch.is_grad_enabled():
            output = _NoBackward.apply(output, hidden, *parameters.values())
            assert isinstance(output, torch.Tensor)
        return output

    def _begin(
        self,
        cache: RemoteCache,
        hidden: torch.Tensor,
        mask: torch.Tensor,
        keep: int,
        adapter: Adapter | None,
        reach: int,
    ) -> Exchange:
        layer = cache.remote
        past = layer.columns
        check_context(mask.shape[1], self.max_positions)
        try:
            session, parts, forks = layer.begin_step(mask, keep, adapter)
            self._note_reach(layer, past, reach)
            new_mask = mask[:, past:]
            if all(part.length == hidden.shape[1] for part in parts):
                packed = hidden.reshape(-1, hidden.shape[-1])
            else:
                packed = hidden[new_mask.to(hidden.device)]
                parts = [part for part in parts if part.length]
            if all(part.length == 1 and layer.prefix_length + part.start + 1 >= reach for part in parts):
                reach = 0  # that is their own, so a replay may send many of them together
            under_way = session.begin(packed.detach(), parts, forks, reach=reach) if parts else None
        except BaseException:
            layer.columns = past
            raise
        return Exchange(cache, session, under_way, parts, hidden, new_mask, past)

    def _note_reach(self, layer: RemoteLayer, past: int, reach: int) -> None:
        """How many columns are as those of a text that begins with all of them."""
        if not past:
            layer.reach, layer.alike = reach, layer.columns
        elif layer.alike >= past and reach:
            layer.alike = layer.columns if reach == layer.reach else past
        elif layer.alike >= past:
            layer.alike = min(layer.columns, self.ropes.last(max(layer.reach, 1)))


class _NoBackward(torch.autograd.Function):
    """Marks where gradients end, as keys and values on the peers record none."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        raise NotImplementedError("gradients do not go through caches: call the model with use_cache=False to train")
