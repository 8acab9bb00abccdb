"""MXFP4 as gpt-oss is published in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from splitnet.checkpoint.quant.format import WEIGHT, Numbers, Part, QuantizedFormat, Suffix, misfit, one_or_stacked
from splitnet.checkpoint.quant.scaled_floats import FP8_TABLES, scaled_weight
from splitnet.errors import UnsupportedModel
from splitnet.quant.stored import Codes, Kind, Layout, StoredTensor, unpack_nibbles

GROUP = 32


class Mxfp4(QuantizedFormat):
    """`mxfp4`: `NAME_blocks` `[experts, outputs, inputs / 32, 16]` and `NAME_scales` `[experts, outputs, inputs / 32]`.

    The parameter is `[experts, inputs, outputs]`; gates and up projections stay interleaved, as the model expects them.
    Source: transformers' `integrations/mxfp4.py` (`convert_moe_packed_tensors`).
    """

    suffixes = (Suffix("_blocks", "", "blocks"), Suffix("_scales", "", "scales"))
    needed = frozenset({"blocks", "scales"})

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> StoredTensor:
        """See `QuantizedFormat.tensor`."""
        blocks, scales = parts["blocks"], parts["scales"]
        fits = len(blocks.shape) == 4 and blocks.shape[-1] == GROUP // 2 and blocks.shape[:-1] == scales.shape
        if not fits or {blocks.dtype, scales.dtype} != {torch.uint8}:
            raise misfit(blocks, f"and {scales.name} ({list(scales.shape)}, {scales.dtype}) are not MXFP4")
        experts, outputs, groups, _ = blocks.shape

        def read(expert: Any) -> Codes:
            return Codes(unpack_nibbles(blocks.read(expert)).flatten(1), scales.read(expert).clone())

        layout = Layout(4, GROUP, Kind.E8M0, table="e2m1")
        return one_or_stacked(layout, (experts, outputs, groups * GROUP), read, dtype, transposed=True)


class ModelOpt(QuantizedFormat):
    """`modelopt`: FP8 with one scale, or NVFP4 whose scales are multiplied by another one (`weight_scale_2`).

    Source: NVIDIA's ModelOpt, `torch/quantization/qtensor/nvfp4_tensor.py`. What a weight is, its tensors tell, as a
    checkpoint may mix both.
    """

    suffixes = (
        Suffix(".weight_scale", ".weight", "scale"),
        Suffix(".weight_scale_2", ".weight", "global scale"),
    )
    needed = frozenset({WEIGHT, "scale"})
    left = (".input_scale", ".k_scale", ".v_scale", ".q_scale")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        algorithm = str(settings.get("quant_algo") or "").upper()
        if algorithm not in ("FP8", "NVFP4", "MIXED_PRECISION"):
            raise UnsupportedModel(
                f"the algorithm {algorithm!r} of ModelOpt is not known: take a checkpoint in FP8 or NVFP4"
            )

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> StoredTensor | Numbers:
        """See `QuantizedFormat.tensor`."""
        weight, scale = parts[WEIGHT], parts["scale"]
        if "global scale" in parts:
            return nvfp4_weight(weight, scale, parts["global scale"], dtype, divide=False)
        if weight.dtype not in FP8_TABLES:
            raise misfit(weight, "has scales, and is stored neither in FP8 nor in NVFP4")
        return scaled_weight(weight, scale, dtype)


def nvfp4_weight(packed: Part, scale: Part, whole: Part, dtype: torch.dtype, *, divide: bool) -> StoredTensor:
    """NVFP4: E2M1 codes, an FP8 scale for every 16 inputs, and one for all by which scales are divided or multiplied.

    There is no kind of scales that are FP8 times a number, so they are float32: the weight is held in 6 bits.
    """
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

    return one_or_stacked(Layout(4, 16, Kind.FLOAT32, table="e2m1"), (*experts, outputs, inputs), read, dtype)
