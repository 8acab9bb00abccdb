"""What MLX stores: integers of 2 to 8 bits in uint32 words with a scale and a bias for each group, FP4 and FP8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from splitnet.checkpoint.families import FAMILIES, Family
from splitnet.checkpoint.quant.format import WEIGHT, Part, QuantizedFormat, Suffix, misfit, number_in, one_or_stacked
from splitnet.checkpoint.quant.scaled_floats import SCALE_KINDS
from splitnet.errors import UnsupportedModel
from splitnet.quant.stored import Codes, Kind, Layout, PackedTensor, unpack_words

_FLOATS: Mapping[str, Layout] = {
    "mxfp4": Layout(4, 32, Kind.E8M0, table="e2m1"),
    "mxfp8": Layout(8, 32, Kind.E8M0, table="e4m3"),
    "nvfp4": Layout(4, 16, Kind.FLOAT32, table="e2m1"),  # its scales are E4M3, for which there is no kind
}
"""Modes without biases."""


class Mlx(QuantizedFormat):
    """`weight` `[outputs, inputs * bits / 32]`, `scales` and `biases` `[outputs, groups]`: `code * scale + bias`.

    Bits and group stand in the config, for all layers or for one. Experts are stacked, gates and up projections apart.
    Source: MLX's `mx.quantize` and mlx-lm's `utils.py` (`quantize_model`, `load_model`).
    """

    suffixes = (
        *(Suffix(f".switch_mlp.gate_proj.{end}", ".experts.gate_up_proj", end) for end in (WEIGHT, "scales", "biases")),
        *(
            Suffix(f".switch_mlp.up_proj.{end}", ".experts.gate_up_proj", f"up {end}")
            for end in (WEIGHT, "scales", "biases")
        ),
        *(Suffix(f".switch_mlp.down_proj.{end}", ".experts.down_proj", end) for end in (WEIGHT, "scales", "biases")),
        Suffix(".scales", ".weight", "scales"),
        Suffix(".biases", ".weight", "biases"),
    )
    needed = frozenset({WEIGHT, "scales"})

    def __init__(self, settings: Mapping[str, Any], family: str) -> None:
        if not FAMILIES.get(family, Family()).mlx:
            raise UnsupportedModel(
                f"what MLX changes in checkpoints of the family {family!r} is not known here: take the original of "
                "this model, or a GGUF file"
            )
        self._settings = settings

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor:
        """See `QuantizedFormat.tensor`."""
        one = self._matrix(parts[WEIGHT], parts["scales"], parts.get("biases"), dtype)
        if not name.endswith(".experts.gate_up_proj"):
            return one
        up = self._matrix(parts["up " + WEIGHT], parts["up scales"], parts.get("up biases"), dtype)
        if one.shape != up.shape:
            raise misfit(parts["up " + WEIGHT], f"does not fit {parts[WEIGHT].name} ({list(parts[WEIGHT].shape)})")
        both: Any = torch.cat([one, up], dim=1)
        return both

    def _matrix(self, weight: Part, scales: Part, biases: Part | None, dtype: torch.dtype) -> PackedTensor:
        settings = self._settings.get(weight.name.removesuffix(".weight"), True)
        settings = self._settings if settings is True else settings
        mode, bits, group = (
            settings.get("mode", "affine"),
            number_in(settings, "bits"),
            number_in(settings, "group_size"),
        )
        *experts, outputs, words = weight.shape
        inputs = group * scales.shape[-1]
        packed = weight.dtype == torch.uint32 and len(experts) < 2 and 32 * words == bits * inputs
        if not packed or scales.shape[:-1] != (*experts, outputs) or group % 16:
            raise misfit(weight, f"and {scales.name} ({list(scales.shape)}) are not {bits} bits in groups of {group}")
        if mode == "affine":
            kind = SCALE_KINDS.get(scales.dtype, Kind.E8M0)
            if biases is None or (biases.shape, biases.dtype) != (scales.shape, scales.dtype) or kind is Kind.E8M0:
                raise misfit(scales, f"and its biases are not those of {weight.name} ({list(weight.shape)})")
            layout = Layout(bits, group, kind, kind)
        else:
            layout = _FLOATS.get(mode)
            if layout is None:
                raise UnsupportedModel(f"MLX's mode {mode!r} is not known: take a checkpoint in the mode 'affine'")
            if biases is not None or scales.dtype != torch.uint8 or (layout.bits, layout.group) != (bits, group):
                raise misfit(scales, f"is not what the mode {mode!r} has for {weight.name} ({list(weight.shape)})")

        def read(index: Any) -> Codes:
            stored = scales.read(index)
            if mode == "nvfp4":
                stored = stored.contiguous().view(torch.float8_e4m3fn).float()
            codes = unpack_words(weight.read(index), bits, inputs)
            return Codes(codes, stored, None if biases is None else biases.read(index))

        return one_or_stacked(layout, (*experts, outputs, inputs), read, dtype)
