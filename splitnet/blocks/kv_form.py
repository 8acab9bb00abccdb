"""Keys and values in fewer bits than blocks compute in: as float16, or as codes with one scale per group of numbers.

Before encoding, a Hadamard matrix rotates the numbers of a head, which spreads the few large numbers that keys have
(Ashkboos et al., "QuaRot", arXiv:2404.00456). Queries rotated by the same matrix give the same products, and a sum of
rotated values is rotated back once. Codes of four bits are the best 16 levels for a normal distribution (Max,
"Quantizing for minimum distortion", 1960), which rotated numbers nearly have.

The first positions, to which heads attend whatever the text is (Xiao et al., "StreamingLLM", arXiv:2309.17453), and the
last positions are also held in full: see `SequenceCache`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from splitnet.errors import WeightsError
from splitnet.wire.kv_forms import KV_BITS

# The same numbers as in `native/step.h`.
SINKS = 4  # positions at the beginning of a row that are held in full besides their codes
WINDOW = 64  # positions up to and including the current one that attention reads in full, not as codes
# Positions that the ring holds in full: twice `WINDOW`, so that a crop of up to `WINDOW` positions leaves a full
# window.
RING = 128

AUTO = "auto"
KINDS = tuple(KV_BITS)
_VECTOR = 16  # the head size must be a multiple of this: compiled steps read 16 numbers at a time
_PIECE = 4096  # maximum positions that are decoded at once, to limit memory
# The positive levels; the negative levels mirror them.
_LEVELS = (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6180, 2.0690, 2.7326)


@dataclass(frozen=True)
class KVForm:
    """The format of the keys in a row; `values` is the format of the row's values. `bits` and `value_bits`: bits per
    number of keys and of values: 16 for float16, 8 or 4 for codes.

    Keys may have more bits than values, because errors of keys cost more: they change the attention weights of
    positions.
    """

    name: str
    bits: int
    value_bits: int

    @classmethod
    def of(cls, kind: str, dtype: torch.dtype) -> KVForm | None:
        """The format for one of `KINDS` in blocks that compute in `dtype`; None: keys and values stay in `dtype`.
        Raises WeightsError: the kind is unknown."""
        if kind not in KINDS:
            raise WeightsError(f"KV caches cannot be held as {kind!r}: use {', '.join(KINDS[:-1])} or {KINDS[-1]}")
        return cls(kind, *KV_BITS[kind]) if KV_BITS[kind][0] < 8 * dtype.itemsize else None

    @property
    def values(self) -> KVForm:
        return self if self.bits == self.value_bits else KVForm(self.name, self.value_bits, self.value_bits)

    @property
    def coded(self) -> bool:
        return self.bits < 16

    def group(self, size: int) -> int:
        """The number of consecutive numbers, in a head of `size`, that share a scale."""
        return min(_turned_together(size), 64 if self.bits == 8 else 32)

    def bytes_of(self, size: int) -> int:
        """Bytes of one head's key in one position. Raises WeightsError: heads of this size cannot be held in codes."""
        if not self.coded:
            return 2 * size
        if size % _VECTOR:
            raise WeightsError(
                f"keys and values of {size} numbers cannot be held as {self.name}, which takes a multiple of {_VECTOR}:"
                " use --kv float16"
            )
        return size * self.bits // 8 + 2 * (size // self.group(size))

    def encode(self, numbers: Tensor) -> Tensor:
        """Encodes numbers, `[..., size]`. For 16 bits the result is float16 of the same shape; otherwise the numbers
        are rotated, and the result is uint8 `[..., bytes_of(size)]`: the codes of a head, followed by the head's
        scales."""
        if not self.coded:
            return numbers.to(torch.float16)
        groups = numbers.float().unflatten(-1, (-1, self.group(numbers.shape[-1])))
        if self.bits == 8:
            scales = (groups.abs().amax(-1, keepdim=True) / 127).half()
            # An infinite or NaN scale makes its whole group NaN, so that errors show.
            codes = (groups / scales.float().clamp_(min=2.0**-24)).round_().clamp_(-127, 127).to(torch.int8).flatten(-2)
        else:
            levels, edges = _levels(groups.device)
            places = torch.bucketize(groups / groups.square().mean(-1, keepdim=True).sqrt_().clamp_(min=1e-30), edges)
            chosen = levels[places]
            scales = ((groups * chosen).sum(-1, keepdim=True) / chosen.square().sum(-1, keepdim=True)).half()
            lower, upper = places.to(torch.uint8).flatten(-2).chunk(2, dim=-1)
            codes = lower | (upper << 4)
        return torch.cat((codes.view(torch.uint8), scales.flatten(-2).view(torch.uint8)), -1)

    def decode(self, held: Tensor, size: int) -> Tensor:
        """Decodes a result of `encode` to float32 `[..., size]`, still rotated."""
        if not self.coded:
            return held.float()
        width = size * self.bits // 8
        scales = held[..., width:].contiguous().view(torch.float16).float()
        if self.bits == 8:
            numbers = held[..., :width].view(torch.int8).float()
        else:
            codes = held[..., :width]
            numbers = _levels(held.device)[0][torch.cat((codes & 15, codes >> 4), -1).int()]
        return (numbers.unflatten(-1, (-1, self.group(size))) * scales[..., None]).flatten(-2)

    def read_positions(self, held: Tensor, near: Tensor, since: int, start: int, new: Tensor) -> Tensor:
        """The first `start` positions, decoded and rotated back, followed by the `new` positions: `[1, heads,
        positions, size]` in the type of `new`. At most `_PIECE` positions are decoded at once.

        held: `[1, heads, capacity, ...]` of codes or float16.
        near: `[1, heads, SINKS + RING, size]`, rotated, in full: the first positions and the positions from `since` on.
        """
        read = new.new_empty((*new.shape[:2], start + new.shape[2], new.shape[3]))
        read[:, :, start:] = new
        for begin in range(0, start, _PIECE):
            last = min(begin + _PIECE, start)
            numbers = self.decode(held[:, :, begin:last], new.shape[3])
            if not begin:
                sinks = min(SINKS, last)
                numbers[:, :, :sinks] = near[:, :, :sinks]
            if (first := max(since, begin)) < last:
                numbers[:, :, first - begin :] = near[:, :, places_in_ring(first, last, near.device)]
            read[:, :, begin:last] = hadamard_rotated(numbers)
        return read

    def write_positions(self, held: Tensor, near: Tensor, start: int, numbers: Tensor) -> None:
        """Stores `numbers`, `[1, heads, positions, size]`, as the positions from `start` on; `read_positions` reads
        them."""
        end = start + numbers.shape[2]
        numbers = hadamard_rotated(numbers.float())
        first = max(start, end - RING)
        near[:, :, places_in_ring(first, end, near.device)] = numbers[:, :, first - start :].to(near.dtype)
        if start < SINKS:
            near[:, :, start : min(SINKS, end)] = numbers[:, :, : SINKS - start].to(near.dtype)
        held[:, :, start:end] = self.encode(numbers)


def in_full(near: Tensor, first: int, last: int) -> Tensor:
    """Positions `[first, last)` of the ring, rotated back, `[1, heads, positions, size]`."""
    return hadamard_rotated(near[:, :, places_in_ring(first, last, near.device)].float()).to(near.dtype)


def places_in_ring(first: int, last: int, device: torch.device) -> Tensor:
    """Indices of positions among those held in full, after the sinks."""
    return torch.arange(first, last, device=device) % RING + SINKS


def hadamard_rotated(numbers: Tensor) -> Tensor:
    """Multiplies `[..., size]`, float32, by a Hadamard matrix, in blocks of a power of two. Two calls restore the
    numbers."""
    block = _turned_together(numbers.shape[-1])
    return (numbers.unflatten(-1, (-1, block)) @ _hadamard(block, numbers.device)).flatten(-2)


def _turned_together(size: int) -> int:
    return size & -size  # the largest power of two that divides `size`


@cache
def _hadamard(size: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix * size**-0.5).to(device)


@cache
def _levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """The numbers of the four-bit codes, and the boundaries between them."""
    levels = torch.tensor([*(-level for level in reversed(_LEVELS)), *_LEVELS], dtype=torch.float32, device=device)
    return levels, (levels[1:] + levels[:-1]) / 2
