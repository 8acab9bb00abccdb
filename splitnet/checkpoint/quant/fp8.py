"""FP8 as DeepSeek, MiniMax, Qwen, Mistral and Meta publish it, and FP4 in the same checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from splitnet.checkpoint.quant.format import WEIGHT, Numbers, Part, QuantizedFormat, Suffix, misfit, one_or_stacked
from splitnet.checkpoint.quant.scaled_floats import FP8_TABLES, scaled_weight
from splitnet.quant.stored import Codes, Kind, Layout, StoredTensor

_ACTIVATIONS = (
    *(".input_scale", ".activation_scale", "_activation_scale", ".input_scale_ub", ".qscale_act"),
    *(".k_scale", ".v_scale", ".q_scale", ".output_scale"),
)


class FineGrainedFP8(QuantizedFormat):
    """`fp8` and `mxfp8`: a scale for each block (128 x 128 unless the config says otherwise) or for the whole weight.

    Source: transformers' `integrations/finegrained_fp8.py` (`Fp8Dequantize`) and `quantizer_finegrained_fp8.py`, which
    tells the names `.scale` of DeepSeek-V4 and `.qscale_weight` of Mistral. The scheme of activations is left: they
    stay floats here.
    """

    suffixes = (
        Suffix("_scale_inv", "", "scale"),
        Suffix(".qscale_weight", ".weight", "scale"),
        Suffix(".weight_scale", ".weight", "scale"),
        Suffix("_scale", "", "scale", sure=False),
        Suffix(".scale", ".weight", "scale", sure=False),
    )
    needed = frozenset({WEIGHT, "scale"})
    left = _ACTIVATIONS

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._block = settings.get("weight_block_size", (128, 128))
        self._fp4 = settings.get("expert_dtype", "fp8") == "fp4"

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> StoredTensor | Numbers:
        """See `QuantizedFormat.tensor`."""
        weight = parts[WEIGHT]
        packed = self._fp4 and weight.dtype in (torch.int8, torch.uint8)
        if not packed and weight.dtype not in FP8_TABLES:
            raise misfit(weight, "has scales, and is not stored in FP8")
        block = None if packed else self._block  # of FP4 each output has groups of its own
        return scaled_weight(weight, parts["scale"], dtype, block=block, packed_fp4=packed)


class FbgemmFP8(QuantizedFormat):
    """`fbgemm_fp8`: a scale for each output.

    Source: transformers' `integrations/fbgemm_fp8.py`. Experts of Llama 4 are stacked, `[experts, inputs, outputs]`.
    """

    suffixes = (Suffix(".weight_scale", ".weight", "scale"), Suffix("_proj_scale", "_proj", "scale"))
    needed = frozenset({WEIGHT, "scale"})
    left = _ACTIVATIONS

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> StoredTensor | Numbers:
        """See `QuantizedFormat.tensor`."""
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

        layout = Layout(8, 0, Kind.FLOAT32, table=FP8_TABLES[weight.dtype])
        return one_or_stacked(layout, (experts, outputs, inputs), read, dtype, transposed=True)
