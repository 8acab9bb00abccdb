"""Passes through the blocks over whole sequences, of which nothing is cached: for training, and for logits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from splitnet.blocks.adapters import Adapter, block_of
from splitnet.checkpoint.families import RopeLengths
from splitnet.errors import SplitnetError
from splitnet.hf.adapters import LocalAdapters, Prefixes
from splitnet.hf.parameters import check_context, check_positions, mask_of, reach_of
from splitnet.session.local import Blocks, LocalSpan
from splitnet.session.training import Passed, PassSession


class PassBlocks:
    """All blocks of a model, run by peers, or partly here. Gradients go through, to the input and to the adapter.

    Args:
        stages: what runs the model, in order: spans that are here, and ranges `[start, end)` that peers run.
        make_passes: makes the session for passes through such a range.
        adapters: what the blocks run with.
        max_positions: context length of the model, if it has one.
        ropes: which lengths of a text its rotary frequencies tell apart.
    """

    def __init__(
        self,
        stages: Sequence[LocalSpan | Blocks],
        make_passes: Callable[[Blocks], PassSession],
        adapters: LocalAdapters,
        max_positions: int | None,
        ropes: RopeLengths,
    ) -> None:
        self._stages = stages
        self._make_passes = make_passes
        self._adapters = adapters
        self._max_positions = max_positions
        self._ropes = ropes
        self._passes: dict[Blocks, PassSession] = {}
        self._passing = threading.RLock()

    def run(self, hidden: torch.Tensor, mask: Any, positions: Any, prefix: Prefixes) -> torch.Tensor:
        """The outputs of whole sequences, `[batch, seq, hidden]`: zero at padding, wherever that is.

        Args:
            mask, positions: what the caller has given for `attention_mask` and `position_ids`.
            prefix: keys and values before the first position; empty: none.

        Raises:
            UnsupportedParameter: the mask or the positions cannot be honoured.
            ContextTooLong: the sequences are longer than the model's context.
            AdapterError: the adapter does not fit the blocks.
            PeerLost, PeerFailed, PeerBusy, CoverageError: see `Session.step`.
        """
        batch, new, _ = hidden.shape
        check_context(new, self._max_positions)
        checked = mask_of(mask, batch, new)
        before = prefix[0][0].shape[1] if prefix else 0
        check_positions(positions, checked, 0, before)
        lengths = [int(length) for length in checked.sum(dim=1).tolist() if length]
        if not lengths:
            return torch.zeros_like(hidden)
        reach = reach_of(positions, before + new, self._ropes)
        parameters = self._adapters.parameters_for(prefix)
        where = checked.to(hidden.device)
        packed = hidden[where]
        for stage in self._stages:
            if isinstance(stage, LocalSpan):
                adapter = stage.fit(Adapter(parameters)) if parameters else None
                packed = stage.sequences(packed, lengths, adapter, reach)
            else:
                own = {name: tensor for name, tensor in parameters.items() if block_of(name) in range(*stage)}
                packed = _Pass.apply(self, stage, lengths, reach, tuple(own), packed, *own.values())
                assert isinstance(packed, torch.Tensor)
        output = torch.zeros_like(hidden)
        output[where] = packed.to(hidden.dtype)
        return output

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes sent and received since the last `close()`."""
        moved = [passes.traffic for passes in self._passes.values()]
        return sum(traffic.bytes_sent for traffic in moved), sum(traffic.bytes_received for traffic in moved)

    def close(self) -> None:
        """Frees what the peers keep."""
        with self._passing:
            for passes in self._passes.values():
                passes.close()
            self._passes = {}

    def go(
        self,
        blocks: Blocks,
        packed: torch.Tensor,
        lengths: list[int],
        parameters: dict[str, torch.Tensor],
        *,
        keep: bool,
        reach: int,
    ) -> tuple[torch.Tensor, Passed]:
        """See `PassSession.forward`."""
        with self._passing:
            if blocks not in self._passes:
                self._passes[blocks] = self._make_passes(blocks)
            adapter = self._adapters.adapter_of(parameters)
            return self._passes[blocks].forward(packed, lengths, adapter, keep=keep, reach=reach)

    def go_back(
        self, blocks: Blocks, batch: Passed, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `PassSession.backward`."""
        with self._passing:
            if blocks not in self._passes:
                raise SplitnetError("the model was closed before backward(): run it again")
            return self._passes[blocks].backward(batch, gradient)

    def forget(self, blocks: Blocks, batch: Passed) -> None:
        """See `PassSession.forget`."""
        if blocks in self._passes:
            self._passes[blocks].forget(batch)


class _Pass(torch.autograd.Function):
    """A pass through the blocks, with the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: PassBlocks,
        stage: Blocks,
        lengths: list[int],
        reach: int,
        names: tuple[str, ...],
        packed: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        keep = any(ctx.needs_input_grad)
        by_name = dict(zip(names, parameters, strict=True))
        output, batch = blocks.go(stage, packed.detach(), lengths, by_name, keep=keep, reach=reach)
        ctx.blocks, ctx.stage, ctx.names = blocks, stage, names
        ctx.devices = [parameter.device for parameter in parameters]  # outlines are on the CPU, wherever the model is
        ctx.batch = _Kept(blocks, stage, batch) if keep else None
        return output.to(packed.device, packed.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        if ctx.batch is None or ctx.batch.used:
            raise RuntimeError("gradients go back through the peers once: run the model again for another backward()")
        ctx.batch.used = True
        (gradient,) = grad_outputs
        by_input, by_name = ctx.blocks.go_back(ctx.stage, ctx.batch.passed, gradient)
        by_input = by_input.to(gradient.device, gradient.dtype)
        by_parameter = (by_name[name].to(device) for name, device in zip(ctx.names, ctx.devices, strict=True))
        return (None, None, None, None, None, by_input, *by_parameter)


class _Kept:
    """What the peers keep for a way back; if that never comes, they are told."""

    def __init__(self, blocks: PassBlocks, stage: Blocks, passed: Passed) -> None:
        self.passed = passed
        self.used = False
        self._blocks = blocks
        self._stage = stage

    def __del__(self) -> None:
        if not self.used:
            self._blocks.forget(self._stage, self.passed)
