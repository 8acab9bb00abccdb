"""MXFP4 as gpt-oss is published in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from splitnet.model.packed_codes import unpack_nibbles
from splitnet.model.quantized_format import Part, QuantizedFormat, Suffix, misfit, one_or_stacked
from splitnet.model.stored import Codes, Kind, Layout, StoredTensor

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
