"""Formats of small floats (or integers) with a scale for a tensor, a row or a block: FP8, FP4, int8."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from splitnet.checkpoint.quant.format import (
    WEIGHT,
    Numbers,
    Part,
    QuantizedFormat,
    Suffix,
    codes_or_numbers,
    misfit,
    number_in,
    of_weight,
    one_or_stacked,
)
from splitnet.errors import UnsupportedModel
from splitnet.quant.packed_tensor import (
    CodeLayout,
    Codes,
    PackedTensor,
    ScaleFormat,
    signed_codes,
    spread,
    unpack_nibbles,
)

FP8_TABLES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
SCALE_KINDS = {
    torch.float32: ScaleFormat.FLOAT32,
    torch.float16: ScaleFormat.FLOAT16,
    torch.bfloat16: ScaleFormat.BFLOAT16,
    torch.uint8: ScaleFormat.E8M0,
}
"""The `ScaleFormat` of scales, by their stored type. Scales that are powers of two (E8M0) have the type uint8 here,
even if the file names another type."""

_MXFP4_GROUP = 32
_ACTIVATIONS = (
    *(".input_scale", ".activation_scale", "_activation_scale", ".input_scale_ub", ".qscale_act"),
    *(".k_scale", ".v_scale", ".q_scale", ".output_scale"),
)


class FineGrainedFP8(QuantizedFormat):
    """`fp8` and `mxfp8`: a scale for each block (128 x 128 unless the config says otherwise) or for the whole weight.

    Source: transformers' `integrations/finegrained_fp8.py` (`Fp8Dequantize`) and `quantizer_finegrained_fp8.py`, also
    for the names `.scale` of DeepSeek-V4 and `.qscale_weight` of Mistral. The scheme of activations is ignored: they
    stay floats in splitnet.
    """

    suffixes = (
        Suffix("_scale_inv", "", "scale"),
        *of_weight("qscale_weight=scale weight_scale=scale"),
        Suffix("_scale", "", "scale", sure=False),
        Suffix(".scale", ".weight", "scale", sure=False),
    )
    needed = frozenset({WEIGHT, "scale"})
    left = _ACTIVATIONS

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._block = settings.get("weight_block_size", (128, 128))
        self._fp4 = settings.get("expert_dtype", "fp8") == "fp4"

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor | Numbers:
        weight = parts[WEIGHT]
        packed = self._fp4 and weight.dtype in (torch.int8, torch.uint8)
        if not packed and weight.dtype not in FP8_TABLES:
            raise misfit(weight, "has scales, and is not stored in FP8")
        # FP4 has a scale for each group of inputs of each output, not for each block
        block = None if packed else self._block
        return scaled_weight(weight, parts["scale"], dtype, block=block, packed_fp4=packed)


class FbgemmFP8(QuantizedFormat):
    """`fbgemm_fp8`: a scale for each output. Source: transformers' `integrations/fbgemm_fp8.py`. Experts of Llama 4 are
    stacked, `[experts, inputs, outputs]`."""

    suffixes = (*of_weight("weight_scale=scale"), Suffix("_proj_scale", "_proj", "scale"))
    needed = frozenset({WEIGHT, "scale"})
    left = _ACTIVATIONS

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor | Numbers:
        weight, scale = parts[WEIGHT], parts["scale"]
        if weight.dtype not in FP8_TABLES:
            raise misfit(weight, "has scales, and is not stored in FP8")
        if len(weight.shape) != 3:
            return scaled_weight(weight, scale, dtype)
        experts, inputs, outputs = weight.shape
        if sorted(scale.shape) != sorted((experts, outputs, 1)):
            raise misfit(scale, f"does not fit {weight.name} ({list(weight.shape)})")

        def read(expert: Any) -> Codes:
            codes = weight.read(expert).view(torch.uint8).T.contiguous()
            return Codes(codes, scale.read(expert).float().reshape(outputs, 1))

        layout = CodeLayout(8, 0, ScaleFormat.FLOAT32, table=FP8_TABLES[weight.dtype])
        return one_or_stacked(layout, (experts, outputs, inputs), read, dtype, transposed=True)


class Mxfp4(QuantizedFormat):
    """`mxfp4`: `NAME_blocks` `[experts, outputs, inputs / 32, 16]` and `NAME_scales` `[experts, outputs, inputs / 32]`.

    The parameter is `[experts, inputs, outputs]`; gates and up projections stay interleaved, as the model expects them.
    Source: transformers' `integrations/mxfp4.py` (`convert_moe_packed_tensors`).
    """

    suffixes = (Suffix("_blocks", "", "blocks"), Suffix("_scales", "", "scales"))
    needed = frozenset({"blocks", "scales"})

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor:
        blocks, scales = parts["blocks"], parts["scales"]
        fits = len(blocks.shape) == 4 and blocks.shape[-1] == _MXFP4_GROUP // 2 and blocks.shape[:-1] == scales.shape
        if not fits or {blocks.dtype, scales.dtype} != {torch.uint8}:
            raise misfit(blocks, f"and {scales.name} ({list(scales.shape)}, {scales.dtype}) are not MXFP4")
        experts, outputs, groups, _ = blocks.shape

        def read(expert: Any) -> Codes:
            return Codes(unpack_nibbles(blocks.read(expert)).flatten(1), scales.read(expert).clone())

        layout = CodeLayout(4, _MXFP4_GROUP, ScaleFormat.E8M0, table="e2m1")
        return one_or_stacked(layout, (experts, outputs, groups * _MXFP4_GROUP), read, dtype, transposed=True)


class ModelOpt(QuantizedFormat):
    """`modelopt`: FP8 with one scale, or NVFP4 whose scales are multiplied by another one (`weight_scale_2`).

    Source: NVIDIA's ModelOpt, `torch/quantization/qtensor/nvfp4_tensor.py`. The tensors of a weight show its format,
    because a checkpoint may mix both.
    """

    suffixes = of_weight("weight_scale=scale weight_scale_2=global_scale")
    needed = frozenset({WEIGHT, "scale"})
    left = (".input_scale", ".k_scale", ".v_scale", ".q_scale")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        algorithm = str(settings.get("quant_algo") or "").upper()
        if algorithm not in ("FP8", "NVFP4", "MIXED_PRECISION"):
            raise UnsupportedModel(
                f"the algorithm {algorithm!r} of ModelOpt is not known: take a checkpoint in FP8 or NVFP4"
            )

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor | Numbers:
        weight, scale = parts[WEIGHT], parts["scale"]
        if "global_scale" in parts:
            return nvfp4_weight(weight, scale, parts["global_scale"], dtype, divide=False)
        if weight.dtype not in FP8_TABLES:
            raise misfit(weight, "has scales, and is stored neither in FP8 nor in NVFP4")
        return scaled_weight(weight, scale, dtype)


def nvfp4_weight(packed: Part, scale: Part, whole: Part, dtype: torch.dtype, *, divide: bool) -> PackedTensor:
    """NVFP4: E2M1 codes, an FP8 scale for every 16 inputs, and a scale for the whole weight, by which the scales of
    groups are divided or multiplied. No `ScaleFormat` is FP8 times a number, so scales become float32: the weight takes
    6 bits per number."""
    *experts, outputs, half = packed.shape
    inputs = 2 * half
    fits = scale.dtype == torch.float8_e4m3fn and scale.shape == (*experts, outputs, inputs // 16) and inputs % 16 == 0
    if not fits or packed.dtype != torch.uint8:
        raise misfit(packed, f"and {scale.name} ({list(scale.shape)}, {scale.dtype}) are not NVFP4")
    if math.prod(whole.shape) not in (1, *experts):
        raise misfit(whole, f"is not one scale for all of {packed.name} ({list(packed.shape)})")

    def read(index: Any) -> Codes:
        of_all = whole.read(...).float().flatten()
        one = of_all[0] if len(of_all) == 1 else of_all[index]
        scales = scale.read(index).float()
        return Codes(unpack_nibbles(packed.read(index)), scales / one if divide else scales * one)

    return one_or_stacked(
        CodeLayout(4, 16, ScaleFormat.FLOAT32, table="e2m1"), (*experts, outputs, inputs), read, dtype
    )


def scaled_weight(
    weight: Part,
    scale: Part,
    dtype: torch.dtype,
    *,
    block: Sequence[int] | None = None,
    zero: Part | None = None,
    packed_fp4: bool = False,
) -> PackedTensor | Numbers:
    """A weight of FP8 or int8 numbers, or of FP4 numbers two to a byte, times its scales.

    Args:
        weight: `[outputs, inputs]` or `[experts, outputs, inputs]`.
        scale: one number, or one for each output (and expert), or one for each block.
        block: outputs and inputs of a block; None: the shape of the scales gives them.
        zero: for int8 weights, the int8 codes of zero, in the shape of the scales.
        packed_fp4: bytes hold two numbers each, the first in the lower bits.

    Raises UnsupportedModel if the types or shapes of `weight`, `scale` and `zero` do not fit together.
    """
    kind = SCALE_KINDS.get(scale.dtype)
    if kind is None or weight.dtype not in (*FP8_TABLES, torch.int8, torch.uint8):
        raise misfit(weight, f"and {scale.name} ({list(scale.shape)}, {scale.dtype}) are not a weight with its scales")
    if len(weight.shape) not in (2, 3):
        raise misfit(weight, "is neither a matrix nor a stack of matrices")
    *experts, outputs, inputs = weight.shape
    inputs = 2 * inputs if packed_fp4 else inputs
    high, wide = _block(weight, scale, (*experts, outputs, inputs), block)
    group = 0 if wide >= inputs else wide
    integers = not packed_fp4 and weight.dtype == torch.int8
    layout = CodeLayout(
        4 if packed_fp4 else 8,
        group,
        kind,
        ScaleFormat.CODES if zero is not None else ScaleFormat.NONE,
        table="e2m1" if packed_fp4 else FP8_TABLES.get(weight.dtype, ""),
        offset=128 if integers else 0,
    )
    groups = -(-inputs // wide)
    if zero is not None and (zero.dtype, zero.shape) != (torch.int8, scale.shape):
        raise misfit(zero, f"does not fit {scale.name} ({list(scale.shape)})")

    def of_outputs(part: Part, index: Any) -> torch.Tensor:
        """`[outputs, groups]`."""
        stored = part.read(index if _per_expert(part, weight) else ...)
        stored = stored.view(torch.uint8) if kind is ScaleFormat.E8M0 and part is scale else stored
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
    """Whether each expert of a stack has separate scales. One-dimensional scales are taken as scales of outputs if the
    numbers of experts and outputs are equal."""
    if len(weight.shape) != 3 or scale.shape[:1] != weight.shape[:1]:
        return False
    return len(scale.shape) > 1 or weight.shape[0] != weight.shape[1]
