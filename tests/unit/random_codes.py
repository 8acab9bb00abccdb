"""Random weights in the codes of quantized checkpoints."""

from __future__ import annotations

import torch

from splitnet.checkpoint.gguf.file import BLOCK_TYPES
from splitnet.quant.packed_tensor import STEPS_GROUP, CodeLayout, Codes, ScaleFormat, StoredMatrix

LAYOUTS = {
    **{kind.name: block.layout for kind, block in BLOCK_TYPES.items()},
    "NVFP4": CodeLayout(4, 16, ScaleFormat.FLOAT32, table="e2m1"),
    "NF4": CodeLayout(4, 64, ScaleFormat.FLOAT32, table="nf4"),
    "FP8 in blocks": CodeLayout(8, 128, ScaleFormat.FLOAT32, table="e4m3"),
    "FP8 by output": CodeLayout(8, 0, ScaleFormat.BFLOAT16, table="e4m3"),
    "FP8 e5m2": CodeLayout(8, 32, ScaleFormat.E8M0, table="e5m2"),
    "GPTQ": CodeLayout(4, 128, ScaleFormat.FLOAT16, ScaleFormat.CODES),
    "GPTQ in 8 bits": CodeLayout(8, 128, ScaleFormat.FLOAT16, ScaleFormat.CODES),
    "int8 by output": CodeLayout(8, 0, ScaleFormat.BFLOAT16, offset=128),
    "int4 by output": CodeLayout(4, 0, ScaleFormat.FLOAT32, ScaleFormat.CODES, offset=8),
    "int4": CodeLayout(4, 32, ScaleFormat.BFLOAT16, ScaleFormat.BFLOAT16, offset=8),
    "int2": CodeLayout(2, 64, ScaleFormat.FLOAT32, ScaleFormat.FLOAT16, offset=2),
    "int6": CodeLayout(6, 64, ScaleFormat.BFLOAT16, ScaleFormat.CODES),
}
"""Layouts of published formats, and others."""


def codes_of(layout: CodeLayout, outputs: int, inputs: int, seed: int) -> Codes:
    """Random codes of a layout."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    def floats(count: int, dtype: torch.dtype) -> torch.Tensor:
        return (torch.randn(outputs, count, generator=generator) * 0.1).to(dtype)

    groups = -(-inputs // layout.group) if layout.group else 1
    units = -(-inputs // STEPS_GROUP)
    signed = layout.zero is not ScaleFormat.STEPS
    largest = 15 if layout.bits == 2 else 63

    def numbers(kind: ScaleFormat) -> torch.Tensor | None:
        if kind is ScaleFormat.NONE:
            return None
        if kind is ScaleFormat.STEPS:
            if signed:
                return integers(-128, 128, outputs, groups, dtype=torch.int8)
            return integers(0, largest + 1, outputs, groups)
        if kind is ScaleFormat.E8M0:
            return integers(110, 130, outputs, groups)
        if kind is ScaleFormat.CODES:
            return integers(0, 1 << layout.bits, outputs, groups)
        return floats(groups, {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(kind.value, torch.float32))

    codes = integers(0, 1 << layout.bits, outputs, inputs)
    if layout.table == "e4m3":
        codes[codes & 127 == 127] = 3  # These codes are NaN.
    if layout.table == "e5m2":
        codes[codes & 124 == 124] = 3
    scales = numbers(layout.scale)
    assert scales is not None
    steps = [
        floats(units, torch.float16) * 0.1 if kind is ScaleFormat.STEPS else None
        for kind in (layout.scale, layout.zero)
    ]
    return Codes(codes, scales, numbers(layout.zero), *steps)


def matrix_of(layout: CodeLayout, outputs: int, inputs: int, seed: int) -> StoredMatrix:
    codes = codes_of(layout, outputs, inputs, seed)
    return StoredMatrix(layout, (outputs, inputs), lambda: codes)
