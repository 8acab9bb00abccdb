"""Random weights in the codes of quantized checkpoints."""

from __future__ import annotations

import torch

from splitnet.checkpoint.gguf.file import BLOCK_TYPES
from splitnet.quant.stored import STEPS_GROUP, Codes, Kind, Layout, StoredMatrix

LAYOUTS = {
    **{kind.name: block.layout for kind, block in BLOCK_TYPES.items()},
    "NVFP4": Layout(4, 16, Kind.FLOAT32, table="e2m1"),
    "NF4": Layout(4, 64, Kind.FLOAT32, table="nf4"),
    "FP8 in blocks": Layout(8, 128, Kind.FLOAT32, table="e4m3"),
    "FP8 by output": Layout(8, 0, Kind.BFLOAT16, table="e4m3"),
    "FP8 e5m2": Layout(8, 32, Kind.E8M0, table="e5m2"),
    "GPTQ": Layout(4, 128, Kind.FLOAT16, Kind.CODES),
    "GPTQ in 8 bits": Layout(8, 128, Kind.FLOAT16, Kind.CODES),
    "int8 by output": Layout(8, 0, Kind.BFLOAT16, offset=128),
    "int4 by output": Layout(4, 0, Kind.FLOAT32, Kind.CODES, offset=8),
    "int4": Layout(4, 32, Kind.BFLOAT16, Kind.BFLOAT16, offset=8),
    "int2": Layout(2, 64, Kind.FLOAT32, Kind.FLOAT16, offset=2),
    "int6": Layout(6, 64, Kind.BFLOAT16, Kind.CODES),
}
"""Layouts of published formats, and others."""


def codes_of(layout: Layout, outputs: int, inputs: int, seed: int) -> Codes:
    """Random codes of a layout."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    def floats(count: int, dtype: torch.dtype) -> torch.Tensor:
        return (torch.randn(outputs, count, generator=generator) * 0.1).to(dtype)

    groups = -(-inputs // layout.group) if layout.group else 1
    units = -(-inputs // STEPS_GROUP)
    signed = layout.zero is not Kind.STEPS
    largest = 15 if layout.bits == 2 else 63

    def numbers(kind: Kind) -> torch.Tensor | None:
        if kind is Kind.NONE:
            return None
        if kind is Kind.STEPS:
            if signed:
                return integers(-128, 128, outputs, groups, dtype=torch.int8)
            return integers(0, largest + 1, outputs, groups)
        if kind is Kind.E8M0:
            return integers(110, 130, outputs, groups)
        if kind is Kind.CODES:
            return integers(0, 1 << layout.bits, outputs, groups)
        return floats(groups, {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(kind.value, torch.float32))

    codes = integers(0, 1 << layout.bits, outputs, inputs)
    if layout.table == "e4m3":
        codes[codes & 127 == 127] = 3  # These codes are not numbers.
    if layout.table == "e5m2":
        codes[codes & 124 == 124] = 3
    scales = numbers(layout.scale)
    assert scales is not None
    steps = [floats(units, torch.float16) * 0.1 if kind is Kind.STEPS else None for kind in (layout.scale, layout.zero)]
    return Codes(codes, scales, numbers(layout.zero), *steps)


def matrix_of(layout: Layout, outputs: int, inputs: int, seed: int) -> StoredMatrix:
    codes = codes_of(layout, outputs, inputs, seed)
    return StoredMatrix(layout, (outputs, inputs), lambda: codes)
