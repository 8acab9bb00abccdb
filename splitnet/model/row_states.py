"""What the blocks of a span keep of one sequence besides keys and values: recurrent states, ends of convolutions.

A state stands for all positions before it, so it cannot be cut at a position. Earlier states are kept as copies, and a
rewind goes back to one of them; what lies between is computed again, by `splitnet.model.span.Span`, which has the row's
inputs. No tensor is written to once a pass has left it here, so copies and forks share memory.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

COPIES = 4
"""Earlier states that a row keeps: two of the last steps, and two that are farther apart."""

REACH = 64
"""Positions that the oldest copy stays behind at least, if the sequence is so long: windows of drafts lie within."""

SPACING = 32
"""Positions between copies while they come one by one; before several at once, such as drafts, one is made anyway."""

HELD_AT_ONCE = COPIES + 2
"""So many times its states a row takes at most: the present ones, those that a pass makes, and the copies."""


class StateLayer(LinearAttentionLayer):
    """transformers' states of one block, without writing to tensors that another copy may have."""

    def conv_state(self, index: int) -> torch.Tensor | None:
        """One that the caller may write to; None at the beginning of a sequence."""
        return self._own(self.conv_states, index)

    def recurrent_state(self, index: int) -> torch.Tensor | None:
        """As `conv_state`."""
        return self._own(self.recurrent_states, index)

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        self._own(self.conv_states, state_idx)
        return super().update_conv_state(conv_states, state_idx, conv_kernel_size, **kwargs)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        before = self.recurrent_states[state_idx]
        state = recurrent_states if before is None else recurrent_states.to(before.dtype)
        if state.untyped_storage().nbytes() > state.nbytes:
            state = state.clone()  # a part of a tensor would keep the whole of it in memory
        self.recurrent_states[state_idx] = state
        self.is_recurrent_states_initialized[state_idx] = True
        return state

    def forked(self) -> StateLayer:
        """One that goes on from here by itself."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict):
                setattr(other, name, dict(value))
        return other

    @property
    def nbytes(self) -> int:
        tensors = (*self.conv_states.values(), *self.recurrent_states.values())
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _own(self, states: dict[int, torch.Tensor | None], index: int) -> torch.Tensor | None:
        state = states[index] if self.has_previous_state[index] else None
        if state is not None:
            state = states[index] = state.clone()
        return state


@dataclass(frozen=True)
class _Copy:
    length: int
    layers: dict[int, StateLayer]


class RowStates:
    """The states of one row in all blocks of a span.

    Args:
        per_block: convolutions of a block, each with a state of its own.
    """

    def __init__(self, per_block: int) -> None:
        self._per_block = per_block
        self._layers: dict[int, StateLayer] = {}
        self._working: dict[int, StateLayer] = {}
        self._copies: list[_Copy] = []

    @property
    def blocks(self) -> frozenset[int]:
        """Those that keep states."""
        return frozenset(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the present states."""
        return sum(layer.nbytes for layer in self._layers.values())

    @property
    def lengths(self) -> tuple[int, ...]:
        """Where the copies were made."""
        return tuple(copied.length for copied in self._copies)

    def begin(self, start: int, count: int) -> None:
        """Before a pass of `count` positions from `start` on; what one that failed has left is forgotten."""
        self._working = {}
        newest = self._copies[-1].length if self._copies else 0
        if start > newest and (count > 1 or start - newest >= SPACING):
            self._copies.append(_Copy(start, self._layers))
            if len(self._copies) > COPIES:
                del self._copies[0 if self._copies[1].length <= start - REACH else 2]

    def layer(self, block: int) -> StateLayer:
        """The states of a block, for the pass that is running."""
        layer = self._working.get(block)
        if layer is None:
            present = self._layers.get(block)
            layer = self._working[block] = StateLayer(self._per_block) if present is None else present.forked()
        return layer

    def commit(self) -> None:
        """What the pass has made of the states is what they are now."""
        self._layers, self._working = {**self._layers, **self._working}, {}

    def rewind(self, length: int) -> int:
        """Goes back to the last copy at or before `length`, else to the beginning, and says where that is."""
        while self._copies and self._copies[-1].length > length:
            self._copies.pop()
        self._working = {}
        if not self._copies:
            self._layers = {}
            return 0
        self._layers = self._copies[-1].layers
        return self._copies[-1].length

    def fork(self) -> RowStates:
        """Independent of these from now on; what both have is in memory once."""
        other = RowStates(self._per_block)
        other._layers, other._copies = self._layers, list(self._copies)
        return other
