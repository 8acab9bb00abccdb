"""The formats of compressed-tensors, in which vLLM's and Red Hat's checkpoints, and Kimi K2's int4, are published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from splitnet.checkpoint.quant.format import (
    WEIGHT,
    Numbers,
    Part,
    QuantizedFormat,
    by_group,
    codes_or_numbers,
    misfit,
    number_in,
    of_weight,
)
from splitnet.checkpoint.quant.scaled_floats import FP8_TABLES, SCALE_KINDS, nvfp4_weight, scaled_weight
from splitnet.errors import UnsupportedModel
from splitnet.limits import Patterns
from splitnet.quant.packed_tensor import (
    CodeLayout,
    Codes,
    PackedTensor,
    ScaleFormat,
    in_order,
    layout_bits,
    signed_codes,
    unpack_words,
)

_FORMATS = {
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized"),
    *("mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision"),
}


class CompressedTensors(QuantizedFormat):
    """`compressed-tensors`: integers packed into int32, int8, FP8, NVFP4, MXFP4 and MXFP8.

    Source: the package `compressed_tensors`: `compressors/` for the tensors, `quantization/quant_config.py` and
    `utils/match.py` for the assignment of weights to groups of the config.
    """

    suffixes = of_weight(
        "weight_packed=packed weight_scale=scale weight_zero_point=zero weight_shape=shape "
        "weight_global_scale=global_scale weight_g_idx=groups"
    )
    needed = frozenset({"scale"})
    left = (
        *(".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point"),
        *(".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point"),
    )

    def __init__(self, settings: Mapping[str, Any]) -> None:
        groups: Mapping[str, Mapping[str, Any]] = settings.get("config_groups") or {}
        self._groups = [group for group in groups.values() if isinstance(group, Mapping)]
        patterns = Patterns("the config")
        self._targets = [_Targets(group.get("targets") or (), patterns) for group in self._groups]
        given = (settings.get("format"), *(group.get("format") for group in self._groups))
        names = {str(name) for name in given if name}
        names -= {"dense"} if len(names) > 1 else set()
        if unknown := sorted(names - _FORMATS):
            raise UnsupportedModel(
                f"the format {unknown[0]!r} of compressed-tensors is not known: take a checkpoint in another format, "
                "such as 'pack-quantized' or 'float-quantized'"
            )
        sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
        if sparse != "dense":
            raise UnsupportedModel(f"weights stored sparse ({sparse!r}) are not known: take a dense checkpoint")
        if (settings.get("transform_config") or {}).get("config_groups"):
            raise UnsupportedModel(
                "the checkpoint transforms activations while it runs ('transform_config'), which is not known here: "
                "take a checkpoint without this config"
            )

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor | Numbers:
        settings = self._settings_of(name.removesuffix(".weight"))
        packed = parts.get("packed")
        if packed is None:
            if WEIGHT not in parts:
                raise misfit(parts["scale"], "is in the checkpoint without its weight")
            return self._unpacked(parts, settings, dtype)
        if WEIGHT in parts:
            raise misfit(packed, "is in the checkpoint beside the weight that it packs")
        if packed.dtype == torch.int32:
            return _integers(parts, settings, dtype)
        if packed.dtype != torch.uint8 or number_in(settings, "num_bits") != 4 or settings.get("type") != "float":
            raise misfit(packed, "is packed in a way that is not known")
        if "global_scale" in parts:
            return nvfp4_weight(packed, parts["scale"], parts["global_scale"], dtype, divide=True)
        return scaled_weight(packed, parts["scale"], dtype, packed_fp4=True)

    def _unpacked(
        self, parts: Mapping[str, Part], settings: Mapping[str, Any], dtype: torch.dtype
    ) -> PackedTensor | Numbers:
        weight, zero = parts[WEIGHT], parts.get("zero")
        if weight.dtype not in (*FP8_TABLES, torch.int8):
            raise misfit(weight, "has scales, and is stored neither in FP8 nor in int8")
        if settings.get("symmetric", True) or weight.dtype in FP8_TABLES:
            zero = None
        elif zero is None:
            raise misfit(weight, "is not symmetric, and has no zero points")
        order = parts.get("groups")
        if order is not None and not _in_order(order.read(...), weight.shape[-1], settings.get("group_size")):
            raise misfit(order, "permutes inputs ('actorder'), which is known for packed weights only")
        block = settings.get("block_structure")
        if settings.get("strategy") in ("group", "channel"):
            block = (1, number_in(settings, "group_size") if settings["strategy"] == "group" else weight.shape[-1])
        return scaled_weight(weight, parts["scale"], dtype, block=block, zero=zero)

    def _settings_of(self, module: str) -> Mapping[str, Any]:
        """The config's settings for the weights of a layer."""
        found = self._groups if len(self._groups) == 1 else self._groups_about(module)
        weights = [group.get("weights") or {} for group in found]
        if not weights or not weights[0] or any(other != weights[0] for other in weights):
            raise UnsupportedModel(
                f"the config does not say clearly how {module} is quantized ({len(found)} groups apply to it): take "
                "another checkpoint of this model"
            )
        return weights[0]

    def _groups_about(self, module: str) -> list[Mapping[str, Any]]:
        both = list(zip(self._groups, self._targets, strict=True))
        # A target that names no layer is a class of layers, such as "Linear", which the names of layers do not show.
        named = [group for group, targets in both if targets.names_layer(module)]
        return named or [group for group, targets in both if targets.classes]


class _Targets:
    """The layers of a group of the config. `classes`: whether any target is a class of layers."""

    def __init__(self, targets: Iterable[str], patterns: Patterns) -> None:
        targets = list(targets)
        self._names = {target for target in targets if not target.startswith("re:")}
        self._patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
        self._match = patterns.match
        self.classes = any("." not in name for name in self._names)

    def names_layer(self, module: str) -> bool:
        """Whether a target names a layer, ignoring a prefix of its name in a multimodal checkpoint."""
        parts = module.split(".")
        rests = [".".join(parts[begin:]) for begin in range(len(parts))]
        if not self._names.isdisjoint(rests):
            return True
        return any(self._match(pattern, rest) for pattern in self._patterns for rest in rests)


def _integers(parts: Mapping[str, Part], settings: Mapping[str, Any], dtype: torch.dtype) -> PackedTensor | Numbers:
    """Weights of 1 to 8 bits in int32 words, with scales for groups, outputs or the whole weight."""
    packed, scale, zero = parts["packed"], parts["scale"], parts.get("zero")
    bits = number_in(settings, "num_bits")
    *experts, outputs, words = packed.shape
    if scale.dtype not in SCALE_KINDS or scale.dtype == torch.uint8 or bits not in range(1, 9):
        raise misfit(packed, f"and {scale.name} ({scale.dtype}) are not integers of {bits} bits with scales")
    grouped = settings.get("strategy") == "group"
    groups = scale.shape[-1] if grouped else 1
    wide = number_in(settings, "group_size") if grouped else 0
    inputs = groups * wide if grouped else 32 * words // bits
    one_scale = not grouped and scale.shape in ((), (1,), (1, 1))
    if -(-inputs * bits // 32) != words or not (one_scale or scale.shape == (*experts, outputs, groups)):
        raise misfit(scale, f"does not fit {packed.name} ({list(packed.shape)}, {bits} bits)")
    symmetric = settings.get("symmetric", True)
    offset = 1 << (bits - 1)
    if not symmetric:
        if zero is None:
            raise misfit(packed, "is not symmetric, and has no zero points")
        along = {torch.int32: -(-outputs * bits // 32), torch.int8: outputs}.get(zero.dtype)  # int32: packed
        one_zero = one_scale and (zero.dtype, zero.shape) == (torch.int8, scale.shape)
        if zero.shape != (*experts, along, groups) and not one_zero:
            raise misfit(zero, f"does not fit {packed.name} ({list(packed.shape)}, {bits} bits)")

    def read(index: Any) -> Codes:
        if "shape" in parts and parts["shape"].read(...).tolist() != [*experts, outputs, inputs]:
            raise misfit(packed, f"is of another shape than {outputs} x {inputs}, which is not known here")
        codes = unpack_words(packed.read(index), bits, inputs)
        scales = scale.read(...).reshape(1, 1).expand(outputs, 1) if one_scale else scale.read(index)
        return Codes(codes, scales.contiguous(), None if symmetric else zeros(index))

    def zeros(index: Any) -> torch.Tensor:
        assert zero is not None
        stored = zero.read(... if zero.shape == scale.shape and one_scale else index)
        if stored.dtype == torch.int32:  # packed along outputs
            return unpack_words(stored.T, bits, outputs).T.contiguous()
        return signed_codes(stored.reshape(-1, groups).expand(outputs, groups), bits)

    layout = CodeLayout(
        layout_bits(bits),
        0 if groups == 1 else wide,
        SCALE_KINDS[scale.dtype],
        ScaleFormat.NONE if symmetric else ScaleFormat.CODES,
        offset=offset,
    )
    shape = (*experts, outputs, inputs)
    order = parts.get("groups")
    if order is not None and groups > 1 and not _in_order(order.read(...), inputs, wide):

        def numbers() -> torch.Tensor:
            return by_group(read(...), order.read(...).long(), offset)

        return Numbers(shape, dtype, numbers, "its groups are of permuted inputs ('actorder')")
    return codes_or_numbers(layout, shape, read, dtype)


def _in_order(index: torch.Tensor, inputs: int, group: int | None) -> bool:
    """Whether consecutive inputs share a group. An index with negative numbers also means that they do."""
    return bool((index < 0).any()) or in_order(index, inputs, group or inputs)
