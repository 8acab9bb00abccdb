"""The module that stands in a transformers model where its blocks were."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from splitnet.client.cache import RemoteCache
from splitnet.client.session import Session
from splitnet.errors import ContextTooLong
from splitnet.net.messages import Part


@dataclass(slots=True)
class Call:
    """What one forward pass of the model was called with, as far as the blocks need it."""

    mask: torch.Tensor | None
    """`[batch, columns]`; None: no padding."""
    cache: RemoteCache | None
    keep: int
    """How many last positions the head looks at; 0: all."""


class RemoteBlocks(nn.Module):
    """All blocks of a model, run by peers.

    Args:
        open_session: makes a session for a budget of positions.
        max_positions: context length of the model, if it has one.
    """

    def __init__(self, open_session: Any, max_positions: int | None) -> None:
        super().__init__()
        self._open_session = open_session
        self._max_positions = max_positions
        self._local = threading.local()

    @property
    def call(self) -> Call:
        """The call that the running thread is in; threads may use one model at the same time."""
        if not hasattr(self._local, "call"):
            self._local.call = Call(mask=None, cache=None, keep=0)
        return self._local.call

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Boundary activations in and out, `[batch, seq, hidden]`.

        Outputs at padding, and before the last positions when only those are wanted, are zero.

        Raises:
            ContextTooLong: the sequence is longer than the model's context.
            PeerLost, PeerFailed, PeerBusy, CoverageError: see `Session.step`.
        """
        if torch.is_grad_enabled() and hidden.requires_grad:
            output = _NoBackward.apply(hidden, self._run(hidden.detach()))
            assert isinstance(output, torch.Tensor)
            return output
        return self._run(hidden)

    def _run(self, hidden: torch.Tensor) -> torch.Tensor:
        call = self.call
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
        if call.cache is not None:
            try:
                session, parts, forks = call.cache.remote.begin_step(mask, call.keep)
                return self._exchange(session, hidden, mask[:, past:], parts, forks)
            except BaseException:
                call.cache.remote.columns = past
                raise
        counts = [int(length) for length in mask.sum(dim=1).tolist()]
        parts = [Part(row, 0, length, length) for row, length in enumerate(counts) if length]
        session = self._open_session(sum(counts))
        try:
            return self._exchange(session, hidden, mask, parts, None)
        finally:
            session.close()

    @staticmethod
    def _exchange(
        session: Session, hidden: torch.Tensor, new_mask: torch.Tensor, parts: list[Part], forks: Any
    ) -> torch.Tensor:
        if all(part.length == hidden.shape[1] for part in parts):
            packed = hidden.reshape(-1, hidden.shape[-1])
        else:
            packed = hidden[new_mask.to(hidden.device)]
            parts = [part for part in parts if part.length]
        returned = session.step(packed, parts, forks).to(hidden.device, hidden.dtype)
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


class _NoBackward(torch.autograd.Function):
    """Forward values of the peers, without a way back yet."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        raise NotImplementedError("this version of splitnet runs blocks forward only; gradients end at the head")
