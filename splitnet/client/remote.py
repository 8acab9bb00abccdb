"""The module that stands in a transformers model where its blocks were."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from splitnet.client.cache import ModelSession, RemoteCache
from splitnet.client.local_adapters import LocalAdapters, Prefixes
from splitnet.client.local_blocks import Blocks, LocalSpan
from splitnet.client.pass_session import Passed, PassSession
from splitnet.errors import ContextTooLong, SplitnetError
from splitnet.model.adapters import Adapter, block_of
from splitnet.net.messages import Part


@dataclass(slots=True)
class Call:
    """What one forward pass of the model was called with, as far as the blocks need it."""

    mask: torch.Tensor | None
    """`[batch, columns]`; None: no padding."""
    cache: RemoteCache | None
    keep: int
    """How many last positions the head looks at; 0: all."""
    prefix: Prefixes = ()
    only_sends: bool = False
    """The call ends as soon as its positions are under way."""
    awaited: Exchange | None = None
    """The call takes the output of an earlier one, whose positions were sent."""


@dataclass(slots=True)
class Exchange:
    """New positions that were sent through the blocks, and where their outputs belong."""

    cache: RemoteCache

    session: ModelSession
    under_way: Any
    """What the session awaits."""
    parts: list[Part]
    new_mask: torch.Tensor
    """`[batch, seq]`; False is padding."""
    past: int
    """Columns of the cache before."""
    received_at: float = 0.0
    """When the outputs were there, in seconds as `time.perf_counter` tells."""

    def abandon(self) -> None:
        """The outputs are awaited no longer."""
        self.session.abandon(self.under_way)


class _Sent(Exception):
    """Ends a call that only sends."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange


class RemoteBlocks(nn.Module):
    """All blocks of a model, run by peers, or partly here.

    Args:
        stages: what runs the model, in order: spans that are here, and ranges `[start, end)` that peers run.
        passes: makes the session for passes without a cache through such a range.
        max_positions: context length of the model, if it has one.
    """

    def __init__(
        self,
        stages: Sequence[LocalSpan | Blocks],
        passes: Callable[[Blocks], PassSession],
        max_positions: int | None,
    ) -> None:
        super().__init__()
        self.adapters = LocalAdapters()
        self._stages = stages
        self._make_passes = passes
        self._passes: dict[Blocks, PassSession] = {}
        self._passing = threading.RLock()
        self._max_positions = max_positions
        self._local = threading.local()

    @property
    def call(self) -> Call:
        """The call that the running thread is in; threads may use one model at the same time."""
        if not hasattr(self._local, "call"):
            self._local.call = Call(mask=None, cache=None, keep=0)
        return self._local.call

    @property
    def local_spans(self) -> list[Blocks]:
        """The blocks `[start, end)` that run here."""
        return [(stage.start, stage.end) for stage in self._stages if isinstance(stage, LocalSpan)]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Boundary activations in and out, `[batch, seq, hidden]`.

        Outputs at padding, and before the last positions when only those are wanted, are zero. Gradients flow through,
        to `hidden` and to the adapter, where there is no cache.

        Raises:
            ContextTooLong: the sequence is longer than the model's context.
            AdapterError: the adapter does not fit the blocks.
            PeerLost, PeerFailed, PeerBusy, CoverageError: see `Session.step`.
        """
        call = self.call
        if call.awaited is not None:
            return self._finish(call.awaited, hidden)
        batch, new, _ = hidden.shape
        past = call.cache.remote.columns if call.cache is not None else 0
        if self._max_positions is not None and past + new > self._max_positions:
            raise ContextTooLong(
                f"{past + new} positions are more than the model's context of {self._max_positions}: "
                "shorten the prompt or lower --max-new-tokens"
            )
        mask = call.mask
        if mask is None:
            mask = torch.ones(batch, past + new, dtype=torch.bool)
        elif mask.dim() != 2 or mask.shape != (batch, past + new):
            raise ValueError(f"the attention mask must be [batch, positions] = {[batch, past + new]}")
        mask = mask.to("cpu", torch.bool)
        parameters = self.adapters.parameters_for(call.prefix) if not past else {}
        if call.cache is None:
            return self._pass(hidden, mask, parameters)
        adapter = self.adapters.adapter_of(parameters)
        if adapter is not None:
            call.cache.remote.prefix_length = adapter.prefix_length
        try:
            session, parts, forks = call.cache.remote.begin_step(mask, call.keep)
            if not past:
                session.use_adapter(adapter)
            with torch.no_grad():
                exchange = self._begin(call.cache, session, hidden, mask, parts, forks, past)
                if call.only_sends:
                    raise _Sent(exchange)
                output = self._finish(exchange, hidden)
        except _Sent:
            raise
        except BaseException:
            call.cache.remote.columns = past
            raise
        if torch.is_grad_enabled():
            output = _NoBackward.apply(output, hidden, *parameters.values())
            assert isinstance(output, torch.Tensor)
        return output

    @contextmanager
    def generating(self, cache: RemoteCache) -> Iterator[None]:
        """Calls of the blocks within take new positions of a cache, none of which is padding."""
        self.call.cache = cache
        try:
            yield
        finally:
            self.call.cache = None

    @contextmanager
    def sending(self) -> Iterator[list[Exchange]]:
        """Calls of the model within send their new positions and end there, without an output.

        Yields:
            Takes in what was sent.
        """
        sent: list[Exchange] = []
        self.call.only_sends = True
        try:
            yield sent
        except _Sent as end:
            sent.append(end.exchange)
        finally:
            self.call.only_sends = False

    @contextmanager
    def receiving(self, exchange: Exchange) -> Iterator[None]:
        """A call of the model within, with the same positions as when they were sent, gives their output."""
        layer = exchange.cache.remote
        columns, layer.columns = layer.columns, exchange.past  # transformers counts positions from there
        self.call.awaited = exchange
        try:
            yield
        finally:
            self.call.awaited = None
            layer.columns = columns

    @property
    def passes_moved(self) -> tuple[int, int]:
        """Bytes sent and received by passes without a cache, since the last `close()`."""
        moved = [passes.traffic for passes in self._passes.values()]
        return sum(traffic.bytes_sent for traffic in moved), sum(traffic.bytes_received for traffic in moved)

    def close(self) -> None:
        """Frees what the peers keep for passes without a cache."""
        with self._passing:
            for passes in self._passes.values():
                passes.close()
            self._passes = {}

    def _pass(self, hidden: torch.Tensor, mask: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        """Whole sequences, of which nothing is cached: rows without padding, wherever it is."""
        lengths = [int(length) for length in mask.sum(dim=1).tolist() if length]
        where = mask.to(hidden.device)
        packed = hidden[where]
        for stage in self._stages:
            if isinstance(stage, LocalSpan):
                adapter = stage.fit(Adapter(parameters)) if parameters else None
                packed = stage.sequences(packed, lengths, adapter)
            else:
                own = {name: tensor for name, tensor in parameters.items() if block_of(name) in range(*stage)}
                packed = _Pass.apply(self, stage, lengths, tuple(own), packed, *own.values())
                assert isinstance(packed, torch.Tensor)
        output = torch.zeros_like(hidden)
        output[where] = packed.to(hidden.dtype)
        return output

    def run_pass(
        self,
        blocks: Blocks,
        packed: torch.Tensor,
        lengths: list[int],
        parameters: dict[str, torch.Tensor],
        *,
        keep: bool,
    ) -> tuple[torch.Tensor, Passed]:
        """See `PassSession.forward`."""
        with self._passing:
            if blocks not in self._passes:
                self._passes[blocks] = self._make_passes(blocks)
            return self._passes[blocks].forward(packed, lengths, self.adapters.adapter_of(parameters), keep=keep)

    def run_back(
        self, blocks: Blocks, batch: Passed, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `PassSession.backward`."""
        with self._passing:
            if blocks not in self._passes:
                raise SplitnetError("the model was closed before backward(): run it again")
            return self._passes[blocks].backward(batch, gradient)

    def run_forget(self, blocks: Blocks, batch: Passed) -> None:
        """See `PassSession.forget`."""
        if blocks in self._passes:
            self._passes[blocks].forget(batch)

    @staticmethod
    def _begin(
        cache: RemoteCache,
        session: ModelSession,
        hidden: torch.Tensor,
        mask: torch.Tensor,
        parts: list[Part],
        forks: Any,
        past: int,
    ) -> Exchange:
        new_mask = mask[:, past:]
        if all(part.length == hidden.shape[1] for part in parts):
            packed = hidden.reshape(-1, hidden.shape[-1])
        else:
            packed = hidden[new_mask.to(hidden.device)]
            parts = [part for part in parts if part.length]
        return Exchange(cache, session, session.begin(packed, parts, forks), parts, new_mask, past)

    @staticmethod
    def _finish(exchange: Exchange, hidden: torch.Tensor) -> torch.Tensor:
        parts, new_mask = exchange.parts, exchange.new_mask
        returned = exchange.session.finish(exchange.under_way).to(hidden.device, hidden.dtype)
        exchange.received_at = time.perf_counter()
        if len(returned) == hidden.shape[0] * hidden.shape[1]:
            return returned.view(hidden.shape)
        output = torch.zeros_like(hidden)
        wanted = new_mask.clone()
        kept = {part.row: part.keep for part in parts}
        if any(part.keep != part.length for part in parts):
            # Real positions counted from the right: the last `keep` of each row were returned.
            from_right = new_mask.flip(1).cumsum(1).flip(1)
            rows = [row for row in range(len(new_mask)) if bool(new_mask[row].any())]
            for row, part_keep in zip(rows, kept.values(), strict=True):
                wanted[row] &= from_right[row] <= part_keep
        output[wanted.to(hidden.device)] = returned
        return output


class _Pass(torch.autograd.Function):
    """A pass through the blocks, with the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: RemoteBlocks,
        stage: Blocks,
        lengths: list[int],
        names: tuple[str, ...],
        packed: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        keep = any(ctx.needs_input_grad)
        by_name = dict(zip(names, parameters, strict=True))
        output, batch = blocks.run_pass(stage, packed.detach(), lengths, by_name, keep=keep)
        ctx.blocks, ctx.stage, ctx.names = blocks, stage, names
        ctx.batch = _Kept(blocks, stage, batch) if keep else None
        return output.to(packed.device, packed.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        if ctx.batch is None or ctx.batch.used:
            raise RuntimeError("gradients go back through the peers once: run the model again for another backward()")
        ctx.batch.used = True
        (gradient,) = grad_outputs
        by_input, by_name = ctx.blocks.run_back(ctx.stage, ctx.batch.passed, gradient)
        by_input = by_input.to(gradient.device, gradient.dtype)
        return (None, None, None, None, by_input, *(by_name[name].to(gradient.device) for name in ctx.names))


class _Kept:
    """What the peers keep for a way back; if that never comes, they are told."""

    def __init__(self, blocks: RemoteBlocks, stage: Blocks, passed: Passed) -> None:
        self.passed = passed
        self.used = False
        self._blocks = blocks
        self._stage = stage

    def __del__(self) -> None:
        if not self.used:
            self._blocks.run_forget(self._stage, self.passed)


class _NoBackward(torch.autograd.Function):
    """Marks where gradients end, as keys and values on the peers record none."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        raise NotImplementedError("gradients do not go through caches: call the model with use_cache=False to train")
