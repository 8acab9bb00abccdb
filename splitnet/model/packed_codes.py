"""Codes of few bits out of the bytes and words that checkpoints pack them into."""

from __future__ import annotations

import torch


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes that stand one after the other in each row of int32 words, lowest bits first; a code may span two words.

    This is how compressed-tensors (`compressors/pack_quantized/helpers.py`) and GPTQ pack.

    Args:
        words: `[rows, words]`, int32.
        bits: 1 to 8.
        count: codes in a row; what follows is padding.

    Returns:
        `[rows, count]`, uint8.
    """
    stored = words.contiguous().view(torch.uint8)  # little endian: the lowest bits are in the first byte
    if bits == 8:
        return stored[:, :count].clone()
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return (stored.unsqueeze(2) >> shifts).bitwise_and_(mask).flatten(1)[:, :count].contiguous()
    padded = torch.nn.functional.pad(stored, (0, 1)).to(torch.int16)
    begin = torch.arange(count) * bits
    first = begin // 8
    pairs = padded[:, first] | (padded[:, first + 1] << 8)
    return (pairs.int() >> (begin % 8).int()).bitwise_and_(mask).to(torch.uint8)


def unpack_nibbles(stored: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    """`[..., bytes]`, uint8 -> `[..., 2 * bytes]`, uint8: two codes of 4 bits per byte."""
    halves = (stored & 15, stored >> 4)
    return torch.stack(halves[::-1] if high_first else halves, dim=-1).flatten(-2)


def signed_codes(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed integers of some bits -> codes, uint8, of which `2^(bits - 1)` stands for zero."""
    return (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def in_order(index: torch.Tensor, inputs: int, group: int) -> bool:
    """Whether an index of groups says of each input that it is of the group that it stands in."""
    return index.shape == (inputs,) and torch.equal(index.long(), torch.arange(inputs) // group)


def layout_bits(bits: int) -> int:
    """Bits of the `Layout` that holds codes of so many bits."""
    return next(held for held in (2, 3, 4, 5, 6, 8) if held >= bits)
