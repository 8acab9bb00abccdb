"""The parts of a step: cutting them into smaller steps, and which of their positions come back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from splitnet.net.messages import Part


def cut_into_steps(parts: Sequence[Part], limit: int) -> list[list[Part]]:
    """Parts in steps of at most `limit` positions. What comes back are still the last `keep` of each whole part."""
    steps: list[list[Part]] = [[]]
    room = limit
    for row, start, length, keep in parts:
        begun = 0
        while begun < length:
            if not room:
                steps.append([])
                room = limit
            taken = min(room, length - begun)
            kept = max(0, min(taken, begun + taken - (length - keep)))
            steps[-1].append(Part(row, start + begun, taken, kept))
            begun += taken
            room -= taken
    return steps


def keeping_all(parts: Sequence[Part]) -> list[Part]:
    """The same positions, of which all come back: other blocks need them."""
    return [part._replace(keep=part.length) for part in parts]


def kept_positions(output: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """What comes back of the output of all positions, `[positions, hidden]`."""
    pieces = output.split([part.length for part in parts])
    return torch.cat([piece[part.length - part.keep :] for piece, part in zip(pieces, parts, strict=True)])
