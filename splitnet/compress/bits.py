"""Distributes bits over the weights of a block, within a mean.

Weights whose layers read the same input are one part, with the same bits, because other programs join these layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from splitnet.compress.rounding import BITS, Compression, round_to_nearest


def bits_of_weights(
    parts: Sequence[Mapping[str, Tensor]], how: Compression, outputs: Callable[[], Tensor]
) -> dict[str, int]:
    """The bits of each weight, by its name.

    A whole number of bits is that of all weights. Otherwise the sum of the errors of the block's outputs is smallest,
    each measured with one part rounded to nearest and the others in floats. The error of a position is relative to its
    output, because some positions have outputs that are a thousand times as large, and the next block norms them. No
    weight has fewer bits than the whole number below the mean: two layers of 2 and 4 bits lose more than two of 3.

    Args:
        parts: the weights of each part, `[outputs, inputs]` each, by their names.
        outputs: computes outputs of the block with the weights as they are.
    """
    if how.uniform:
        return {name: int(how.bits) for part in parts for name in part}
    exact = outputs()
    lengths = exact.square().sum(-1, keepdim=True).clamp_(min=torch.finfo(exact.dtype).tiny)
    errors: list[dict[int, float]] = []
    for part in parts:
        floats = {name: weight.clone() for name, weight in part.items()}
        errors.append({})
        for bits in (int(how.bits), *(more for more in BITS if more > how.bits)):
            for name, weight in floats.items():
                part[name].copy_(round_to_nearest(weight, bits, how.group).to_floats())
            errors[-1][bits] = float(((outputs() - exact).square_() / lengths).sum())
        for name, weight in floats.items():
            part[name].copy_(weight)
    sizes = [sum(weight.numel() for weight in part.values()) for part in parts]
    chosen = best_bits(sizes, errors, how.bits)
    return {name: bits for part, bits in zip(parts, chosen, strict=True) for name in part}


def best_bits(sizes: Sequence[int], errors: Sequence[Mapping[int, float]], mean: float) -> tuple[int, ...]:
    """The bits of each part with the smallest sum of errors, of at most `mean` bits per weight.

    Args:
        sizes: weights of each part.
        errors: of each part, by the bits of its weights.
        mean: at least the smallest number of bits.
    """
    best: list[tuple[float, float, tuple[int, ...]]] = [(0, 0.0, ())]  # bits in all, error, bits of the parts before
    room = mean * sum(sizes)
    for size, by_bits in zip(sizes, errors, strict=True):
        found = sorted(
            (used + size * bits, error + more, (*chosen, bits))
            for used, error, chosen in best
            for bits, more in by_bits.items()
        )
        best, least = [], torch.inf
        for used, error, chosen in found:
            if used <= room and (error < least or not best):
                best.append((used, error, chosen))
                least = error
    return best[-1][2]
