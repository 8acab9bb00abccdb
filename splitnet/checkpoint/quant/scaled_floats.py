"""Weights of which each is a small float (or integer) of its own, with a scale for a tensor, a row or a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from splitnet.checkpoint.quant.format import Numbers, Part, codes_or_numbers, misfit, number_in
from splitnet.quant.stored import Codes, Kind, Layout, StoredTensor, signed_codes, spread, unpack_nibbles

FP8_TABLES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
SCALE_KINDS = {
    torch.float32: Kind.FLOAT32,
    torch.float16: Kind.FLOAT16,
    torch.bfloat16: Kind.BFLOAT16,
    torch.uint8: Kind.E8M0,
}
"""Kind of scales by the type that they are stored in; powers of two are bytes here, whatever they are called."""


def scaled_weight(
    weight: Part,
    scale: Part,
    dtype: torch.dtype,
    *,
    block: Sequence[int] | None = None,
    zero: Part | None = None,
    packed_fp4: bool = False,
) -> StoredTensor | Numbers:
    """A weight of FP8 or int8 numbers, or of FP4 numbers two to a byte, times its scales.

    Args:
        weight: `[outputs, inputs]` or `[experts, outputs, inputs]`.
        scale: one number, or one for each output (and expert), or one for each block.
        block: outputs and inputs of a block; None: as many as there are scales for.
        zero: of int8: the value that stands for zero, int8 in the shape of the scales.
        packed_fp4: bytes hold two numbers each, the first in the lower bits.

    Raises:
        UnsupportedModel: their types or shapes do not fit.
    """
    kind = SCALE_KINDS.get(scale.dtype)
    if kind is None or weight.dtype not in (*FP8_TABLES, torch.int8, torch.uint8):
        raise misfit(weight, f"and {scale.name} ({list(scale.shape)}, {scale.dtype}) are no weight with scales")
    if len(weight.shape) not in (2, 3):
        raise misfit(weight, "is neither a matrix nor a stack of matrices")
    *experts, outputs, inputs = weight.shape
    inputs = 2 * inputs if packed_fp4 else inputs
    high, wide = _block(weight, scale, (*experts, outputs, inputs), block)
    group = 0 if wide >= inputs else wide
    integers = not packed_fp4 and weight.dtype == torch.int8
    layout = Layout(
        4 if packed_fp4 else 8,
        group,
        kind,
        Kind.CODES if zero is not None else Kind.NONE,
        table="e2m1" if packed_fp4 else FP8_TABLES.get(weight.dtype, ""),
        offset=128 if integers else 0,
    )
    groups = -(-inputs // wide)
    if zero is not None and (zero.dtype, zero.shape) != (torch.int8, scale.shape):
        raise misfit(zero, f"does not fit {scale.name} ({list(scale.shape)})")

    def of_outputs(part: Part, index: Any) -> torch.Tensor:
        """`[outputs, groups]`."""
        stored = part.read(index if _per_expert(part, weight) else ...)
        stored = stored.view(torch.uint8) if kind is Kind.E8M0 and part is scale else stored
        if stored.numel() == 1:
            return stored.reshape(1, 1).expand(outputs, groups)
        return spread(stored.reshape(-(-outputs // high), groups), high, outputs, dim=0)

    def read(index: Any) -> Codes:
        stored = weight.read(index)
        if packed_fp4:
            codes = unpack_nibbles(stored.view(torch.uint8))
        elif integers:
            codes = signed_codes(stored, 8)
        else:
            codes = stored.view(torch.uint8).clone()
        zeros = None if zero is None else signed_codes(of_outputs(zero, index), 8)
        return Codes(codes, of_outputs(scale, index).contiguous(), zeros)

    return codes_or_numbers(layout, (*experts, outputs, inputs), read, dtype)


def _block(weight: Part, scale: Part, shape: Sequence[int], block: Sequence[int] | None) -> tuple[int, int]:
    """Outputs and inputs that share a scale."""
    *_, outputs, inputs = shape
    grid = list(scale.shape)
    if _per_expert(scale, weight):
        grid = grid[1:]
    if all(size == 1 for size in grid):
        return outputs, inputs
    if grid in ([outputs], [outputs, 1]):
        return 1, inputs
    if block is not None:
        high, wide = (number_in({"block": size}, "block") for size in block)
        if [-(-outputs // high), -(-inputs // wide)] == grid:
            return high, wide
        raise misfit(scale, f"does not fit {weight.name} ({list(weight.shape)}) in blocks of {high} x {wide}")
    if len(grid) == 2 and all(grid) and outputs % grid[0] == 0 and inputs % grid[1] == 0:
        return outputs // grid[0], inputs // grid[1]
    raise misfit(scale, f"does not fit {weight.name} ({list(weight.shape)})")


def _per_expert(scale: Part, weight: Part) -> bool:
    """Whether each expert of a stack has scales of its own; what could be those of outputs is not."""
    if len(weight.shape) != 3 or scale.shape[:1] != weight.shape[:1]:
        return False
    return len(scale.shape) > 1 or weight.shape[0] != weight.shape[1]
