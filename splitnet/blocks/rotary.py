"""Rotary embeddings: how families rotate heads, and ropes whose frequencies depend on the length of a sequence."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import partial
from itertools import product
from typing import Any, Self

import torch
from torch import Tensor, nn

from splitnet.checkpoint.rope_lengths import RopeLengths

MAX_AXES = 8  # axes of a rotary position that are tried; families have three or four


class CosineLayout(Enum):
    """How a family gives the cosines and sines of pairs of numbers."""

    TWICE = "one of each pair, and the same numbers again"
    ONCE = "one of each pair"
    SIDE_BY_SIDE = "two of each pair"


class PairLayout(IntEnum):
    """Where the two numbers of a pair lie in a head."""

    APART = 0  # half of the rotated numbers lie between them
    ADJACENT = 1  # side by side
    PARTED = 2  # side by side before the rotation, apart after it


@dataclass(frozen=True)
class RopeLayout:
    """How a family rotates the first numbers of heads by cosines and sines; `sines_first`: the family gives the sines
    first."""

    cosine_layout: CosineLayout = CosineLayout.TWICE
    pair_layout: PairLayout = PairLayout.APART
    sines_first: bool = False

    @classmethod
    def from_attention(
        cls, attention: Any, size: int, rope: nn.Module, width: int, kind: tuple[str, ...] = ()
    ) -> Self | None:
        """Finds the rotation by a trial of the rotary function in the family's module; None: the function does
        something else. `size`, `width`: of a head, and of hidden states. `rope` gives cosines and sines for hidden
        states, positions and `kind`."""
        module = sys.modules[type(attention).__module__]
        interleaved = getattr(getattr(attention, "config", None), "rope_interleave", False)
        names = ("apply_rotary_pos_emb_interleave",) if interleaved else ("apply_rotary_pos_emb", "apply_rotary_emb")
        own: Any = next((getattr(module, name) for name in names if hasattr(module, name)), None)
        device = next((buffer.device for buffer in rope.buffers()), torch.device("cpu"))
        if own is None or device.type == "meta":  # a tensor on the meta device has no values
            return None
        hidden, positions = torch.zeros(1, 3, width, dtype=torch.float32), torch.tensor([[0, 2, 30]])
        turns = rope(hidden.to(device), positions.to(device), *kind)
        if isinstance(turns, Tensor):
            turned, turns = turns, (turns.real, turns.imag)
            own = partial(_by_complex, own, turned)
        sines_first = bool(turns[0][0, 0].norm() < turns[1][0, 0].norm())  # at position 0 the cosine is 1
        cosines, sines = turns[::-1] if sines_first else turns
        noise = torch.Generator().manual_seed(0)
        heads = torch.randn(1, 2, 3, size, generator=noise, dtype=torch.float32).to(device)
        # Some functions take only the numbers that they rotate, others the whole head.
        for most in (size, cosines.shape[-1], 2 * cosines.shape[-1]):
            given = heads[..., :most]
            found = _rotated_by(own, given, cosines, sines)
            if found is None:
                continue
            for way in product(CosineLayout, PairLayout):
                likely = cls(*way, sines_first)
                halves = likely.halves(turns)
                if 2 * halves[0].shape[-1] <= given.shape[-1] and torch.allclose(
                    likely._rotate(given, *halves), found, atol=1e-4
                ):
                    return likely
        return None

    def halves(self, turns: tuple[Tensor, Tensor] | Tensor) -> tuple[Tensor, Tensor]:
        """The family's cosines and sines, which may be complex numbers, as one cosine and one sine of each pair."""
        if isinstance(turns, Tensor):
            turns = turns.real, turns.imag
        cosines, sines = turns[::-1] if self.sines_first else turns
        if self.cosine_layout is CosineLayout.SIDE_BY_SIDE:
            return cosines[..., ::2], sines[..., ::2]
        many = cosines.shape[-1] // (2 if self.cosine_layout is CosineLayout.TWICE else 1)
        return cosines[..., :many], sines[..., :many]

    def halves_suffice(self, rope: Any, width: int) -> bool:
        """Whether both numbers of each pair have the same cosine and sine where the axes of a position differ. `width`:
        of hidden states."""
        if self.cosine_layout is CosineLayout.ONCE or (axes := axes_of(rope, width)) == 1:
            return True
        device = rope.inv_freq.device
        positions = (torch.arange(3) + 5 * torch.arange(axes)[:, None, None]).to(device)
        turns = rope(torch.zeros(1, 3, width, dtype=torch.float32, device=device), positions)
        side_by_side = self.cosine_layout is CosineLayout.SIDE_BY_SIDE
        both = [each.unflatten(-1, (-1, 2) if side_by_side else (2, -1)) for each in turns]
        return all(torch.equal(*each.unbind(-1 if side_by_side else -2)) for each in both)

    def _rotate(self, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        many = 2 * cosines.shape[-1]
        turned, rest = heads.split([many, heads.shape[-1] - many], dim=-1)
        apart = self.pair_layout is PairLayout.APART
        first, second = turned.unflatten(-1, (2, -1) if apart else (-1, 2)).unbind(-2 if apart else -1)
        both = (first * cosines - second * sines, second * cosines + first * sines)
        pairs = torch.stack(both, dim=-1 if self.pair_layout is PairLayout.ADJACENT else -2)
        return torch.cat((pairs.flatten(-2), rest), dim=-1)


def _by_complex(own: Any, turns: Tensor, queries: Tensor, keys: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
    """Calls the function of a family whose cosines and sines are complex numbers, such as DeepSeek-V2."""
    return own(queries, keys, turns)


def _rotated_by(own: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor | None:
    """Calls a family's function for `[1, heads, positions, size]`; None: it does not take these arguments."""
    with suppress(TypeError, RuntimeError):
        return own(heads, heads, cosines, sines)[0]
    with suppress(TypeError, RuntimeError):  # GPT-J takes one tensor, with its positions first
        return own(heads.transpose(1, 2), sines, cosines).transpose(1, 2)
    return None


def axes_of(rope: Any, hidden_size: int) -> int:
    """Most axes of the positions that a rotary embedding takes, found by a trial; 1 without one. An embedding for one
    axis raises an error for more axes, or gives turns of another shape."""
    for axes in range(MAX_AXES, 1, -1):
        with suppress(Exception):  # a family's code raises errors of many types
            device = rope.inv_freq.device
            states, positions = torch.zeros(1, 2, hidden_size, device=device), torch.tensor([[3, 4]], device=device)
            turns, expected = rope(states, positions.expand(axes, 1, -1)), rope(states, positions)
            if all(map(torch.equal, turns, expected)):
                return axes
    return 1


class LengthDependentRopes:
    """The length-dependent ropes of a backbone. Their modules keep the frequencies, so one sequence passes at a time.
    Thread-safe."""

    def __init__(self, backbone: nn.Module) -> None:
        config: Any = backbone.config
        self._lengths = RopeLengths(config)
        self.has_any: bool = self._lengths.frequencies_vary
        self._length = 0
        self._lock = threading.Lock()
        self._ropes: list[Any] = [each for each in backbone.modules() if self.has_any and hasattr(each, "rope_type")]
        for rope in self._ropes:
            rope.register_forward_pre_hook(self._lengthen, with_kwargs=True)
            rope.register_forward_hook(self._shorten)

    def count_same_frequencies(self, position: int, rope_length: int) -> int:
        """The number of positions from `position` on with the same frequencies. A position has the frequencies of a
        sequence that ends with it, or of `rope_length` positions if that is longer."""
        return self._lengths.last(max(rope_length, position + 1)) - position

    @contextmanager
    def one_sequence(self, length: int) -> Iterator[None]:
        """Runs a pass of one sequence with the frequencies of at least `length` positions, independent of earlier
        passes."""
        if not self.has_any:
            yield
            return
        with self._lock:
            for rope in self._ropes:
                _forget_length(rope)
            self._length = length
            yield

    def _lengthen(self, rope: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        """Appends a position, because a rope takes the length from the last position."""
        hidden, *others = given
        positions = named.pop("position_ids") if "position_ids" in named else others.pop(0)
        last = torch.full_like(positions[..., :1], self._length - 1)
        return (hidden, torch.cat((positions, last), dim=-1), *others), named

    def _shorten(self, rope: nn.Module, given: Any, turns: Any) -> Any:
        return turns[:, :-1] if isinstance(turns, Tensor) else tuple(each[:, :-1] for each in turns)


def _forget_length(rope: Any) -> None:
    """Resets dynamic ropes, which remember the longest sequence."""
    kinds = rope.rope_type if isinstance(rope.rope_type, dict) else {"": rope.rope_type}
    for layers, kind in kinds.items():
        prefix = f"{layers}_" if layers else ""
        if kind == "dynamic":
            frequencies = getattr(rope, f"{prefix}inv_freq")
            setattr(rope, f"{prefix}inv_freq", getattr(rope, f"{prefix}original_inv_freq").to(frequencies.device))
            setattr(rope, f"{prefix}max_seq_len_cached", rope.original_max_seq_len)
