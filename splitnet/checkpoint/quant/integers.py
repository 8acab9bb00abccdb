"""Formats that store integers of few bits, or codes of a table, with a scale for each group of inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from splitnet.checkpoint.families import FAMILIES, Family
from splitnet.checkpoint.quant.format import (
    DESCRIPTION_BYTES,
    WEIGHT,
    Numbers,
    Part,
    QuantizedFormat,
    Suffix,
    by_group,
    codes_or_numbers,
    misfit,
    number_in,
    of_weight,
    one_or_stacked,
)
from splitnet.checkpoint.quant.scaled_floats import SCALE_KINDS
from splitnet.errors import UnsupportedModel
from splitnet.quant.packed_tensor import (
    TABLES,
    CodeLayout,
    Codes,
    PackedTensor,
    ScaleFormat,
    StoredMatrix,
    in_order,
    layout_bits,
    signed_codes,
    spread,
    unpack_nibbles,
    unpack_words,
)

_WORD = 32
_GPTQ_SUFFIXES = of_weight("qweight=codes qzeros=zeros scales=scales g_idx=groups")
_LIKE_GEMM = ("gemm", "exllama", "exllamav2")
"""Kernels whose weights AutoAWQ packs in the same way (`awq/modules/linear/exllama.py` unpacks them at the start)."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of eight, in each four bits of a word, lowest bits first
_MLX_FLOATS: Mapping[str, CodeLayout] = {
    "mxfp4": CodeLayout(4, 32, ScaleFormat.E8M0, table="e2m1"),
    "mxfp8": CodeLayout(8, 32, ScaleFormat.E8M0, table="e4m3"),
    "nvfp4": CodeLayout(4, 16, ScaleFormat.FLOAT32, table="e2m1"),  # its scales are E4M3, which has no `ScaleFormat`
}
"""Modes of MLX without biases."""
_MLX_PARTS = (WEIGHT, "scales", "biases")


class Gptq(QuantizedFormat):
    """`gptq`: `qweight` `[inputs * bits / 32, outputs]`, `qzeros` `[groups, outputs * bits / 32]`, `scales`, `g_idx`.

    Bits and group follow from the shapes, because layers may differ in them. Source: transformers' `GPTQConfig` for the
    settings; AutoGPTQ and GPTQModel (`nn_modules/qlinear`) for the packing. The format `gptq` stores zeros minus one,
    `gptq_v2` the zeros themselves.
    """

    suffixes = _GPTQ_SUFFIXES
    needed = frozenset({"codes", "zeros", "scales"})

    def __init__(self, settings: Mapping[str, Any]) -> None:
        name = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
        if name not in ("gptq", "gptq_v2"):
            raise UnsupportedModel(f"the GPTQ format {name!r} is not known: take a checkpoint in the format 'gptq'")
        self._less_one = 1 if name == "gptq" else 0
        self._symmetric = bool(settings.get("sym", False))
        self._permuted = bool(settings.get("desc_act", False))

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor | Numbers:
        words, zeros, scales, index = parts["codes"], parts["zeros"], parts["scales"], parts.get("groups")
        if {words.dtype, zeros.dtype} != {torch.int32} or {len(p.shape) for p in (words, zeros, scales)} != {2}:
            raise misfit(words, "is not packed as GPTQ packs")
        groups, outputs = scales.shape
        bits = _WORD * zeros.shape[1] // outputs
        inputs = _WORD * words.shape[0] // bits if bits else 0
        fits = bits in range(1, 9) and words.shape[1] == outputs and zeros.shape == (groups, outputs * bits // _WORD)
        if not fits or scales.dtype not in SCALE_KINDS or inputs % groups:
            raise misfit(words, f"does not fit its scales ({list(scales.shape)}) and zeros ({list(zeros.shape)})")
        group = inputs // groups
        middle = 1 << (bits - 1)

        def read_with_zeros() -> Codes:
            codes = unpack_words(words.read(...).T, bits, inputs)
            found = (unpack_words(zeros.read(...), bits, outputs) + self._less_one) & ((1 << bits) - 1)
            return Codes(codes, scales.read(...).T.contiguous(), found.T.contiguous())

        permuted = self._permuted and groups > 1
        if permuted and (index is None or index.shape != (inputs,)):
            raise misfit(index or words, f"does not assign each of {inputs} inputs to a group ('g_idx')")
        if permuted and index is not None and not in_order(index.read(...), inputs, group):

            def numbers() -> torch.Tensor:
                of = index.read(...).long()
                if bool((of < 0).any() | (of >= groups).any()):
                    raise misfit(index, f"assigns inputs to other groups than its {groups} groups")
                return by_group(read_with_zeros(), of)

            return Numbers((outputs, inputs), dtype, numbers, "its groups are of permuted inputs ('desc_act')")

        def read(every: Any) -> Codes:
            made = read_with_zeros()
            if self._symmetric and not (made.zeros is not None and bool((made.zeros == middle).all())):
                raise misfit(zeros, "has zeros, and the config says that weights are symmetric")
            if index is not None and not in_order(index.read(...), inputs, group):
                raise misfit(index, "permutes inputs, and the config says that they are in order ('desc_act')")
            return Codes(made.codes, made.scales) if self._symmetric else made

        kind, wide = SCALE_KINDS[scales.dtype], group if groups > 1 else 0
        zero, offset = (ScaleFormat.NONE, middle) if self._symmetric else (ScaleFormat.CODES, 0)
        return codes_or_numbers(
            CodeLayout(layout_bits(bits), wide, kind, zero, offset=offset), (outputs, inputs), read, dtype
        )


class Awq(QuantizedFormat):
    """`awq`, in the packing `gemm`: `qweight` `[inputs, outputs / 8]`, `qzeros` `[groups, outputs / 8]`, `scales`.

    Source: transformers' `AwqConfig` for the settings; AutoAWQ (`awq/utils/packing_utils.py`) for the packing: eight
    columns in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7.
    """

    suffixes = _GPTQ_SUFFIXES[:3]
    needed = frozenset({"codes", "zeros", "scales"})

    def __init__(self, settings: Mapping[str, Any]) -> None:
        name = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if name not in _LIKE_GEMM:
            raise UnsupportedModel(f"the AWQ packing {name!r} is not known: take a checkpoint in the packing 'gemm'")
        if settings.get("bits", settings.get("w_bit", 4)) != 4 or not settings.get("zero_point", True):
            raise UnsupportedModel(
                "only AWQ with 4 bits and zero points is known ('bits', 'zero_point'): take such a checkpoint"
            )

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor | Numbers:
        words, zeros, scales = parts["codes"], parts["zeros"], parts["scales"]
        if {words.dtype, zeros.dtype} != {torch.int32} or {len(p.shape) for p in (words, zeros, scales)} != {2}:
            raise misfit(words, "is not packed as AWQ packs")
        groups, outputs = scales.shape
        inputs = words.shape[0]
        fits = 8 * words.shape[1] == outputs and zeros.shape == (groups, words.shape[1]) and inputs % groups == 0
        if not fits or scales.dtype not in SCALE_KINDS:
            raise misfit(words, f"does not fit its scales ({list(scales.shape)}) and zeros ({list(zeros.shape)})")
        order = torch.tensor(_AWQ_ORDER).argsort()

        def columns(part: Part) -> torch.Tensor:
            stored = unpack_words(part.read(...), 4, outputs)
            return stored.view(len(stored), -1, 8)[:, :, order].reshape(len(stored), outputs).T.contiguous()

        def read(index: Any) -> Codes:
            return Codes(columns(words), scales.read(...).T.contiguous(), columns(zeros))

        wide = inputs // groups if groups > 1 else 0
        layout = CodeLayout(4, wide, SCALE_KINDS[scales.dtype], ScaleFormat.CODES)
        return codes_or_numbers(layout, (outputs, inputs), read, dtype)


def auto_round(settings: Mapping[str, Any]) -> QuantizedFormat:
    """`auto-round`, which packs as GPTQ or AWQ (`packing_format`); `extra_config` has settings of single layers.
    Source: vLLM's `AutoRoundConfig`. Bits and groups follow from the shapes."""
    packing = str(settings.get("packing_format") or "").removeprefix("auto_round:")
    if packing not in ("auto_gptq", "auto_awq") or settings.get("data_type", "int") != "int":
        raise UnsupportedModel(
            f"AutoRound's packing {packing!r} of {settings.get('data_type', 'int')!r} is not known: take a checkpoint "
            "in the packing 'auto_round:auto_gptq' or 'auto_round:auto_awq'"
        )
    if packing == "auto_awq":
        return Awq({"bits": settings.get("bits", 4)})
    single = (settings.get("extra_config") or {}).values()
    return Gptq({"sym": settings.get("sym", False) and all(one.get("sym", True) for one in single)})


class Nf4(QuantizedFormat):
    """4 bits of the type `nf4`: codes of the whole weight in blocks; the higher bits of a byte have the first of its
    two codes.

    Source: transformers' `quantizer_bnb_4bit.py` for the names; bitsandbytes' `functional.py` (`QuantState.from_dict`,
    `dequantize_4bit`) for their meaning. Maxima of blocks may be quantized, too ("nested").
    """

    suffixes = of_weight(
        "weight.absmax=maxima weight.quant_map=table weight.nested_absmax=nested_maxima "
        "weight.nested_quant_map=nested_table weight.quant_state.bitsandbytes__nf4=state "
        "weight.quant_state.bitsandbytes__fp4=state"
    )
    needed = frozenset({WEIGHT, "maxima", "table", "state"})

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor | Numbers:
        weight, maxima = parts[WEIGHT], parts["maxima"]
        if parts["state"].nbytes > DESCRIPTION_BYTES:
            raise misfit(parts["state"], "is longer than a description of a weight")
        state = json.loads(bytes(parts["state"].read(...).tolist()))
        if state.get("quant_type") != "nf4":
            raise misfit(weight, f"is of the 4-bit type {state.get('quant_type')!r}, of which only 'nf4' is known")
        outputs, inputs = (number_in({"shape": size}, "shape") for size in state["shape"])
        block = number_in(state, "blocksize")
        count = outputs * inputs
        if 2 * weight.nbytes != count or maxima.shape != (-(-count // block),):
            raise misfit(weight, f"does not hold {outputs} x {inputs} codes of 4 bits in blocks of {block}")

        nested = {"nested_maxima", "nested_table"} & parts.keys()
        wide, offset = 0, 0.0
        if nested or maxima.dtype == torch.uint8:
            wide, offset = number_in(state, "nested_blocksize"), float(state["nested_offset"])
            many = -(-maxima.shape[0] // wide)
            shapes = [parts[role].shape for role in ("nested_maxima", "nested_table")]
            if maxima.dtype != torch.uint8 or shapes != [(many,), (256,)]:
                raise misfit(maxima, "does not fit its own scales ('nested')")

        def scales() -> torch.Tensor:
            stored = maxima.read(...)
            if not nested:
                return stored.float()
            values = parts["nested_table"].read(...)[stored.long()]
            of_block = spread(parts["nested_maxima"].read(...), wide, len(stored), dim=0)
            return values * of_block + offset

        def codes() -> torch.Tensor:
            table = parts["table"].read(...).float()
            if table.shape != (16,) or not torch.allclose(table, TABLES["nf4"], atol=1e-6):
                raise misfit(parts["table"], "is not the table of NF4")
            return unpack_nibbles(weight.read(...).flatten().view(torch.uint8), high_first=True)

        if inputs % block == 0:

            def read() -> Codes:
                return Codes(codes().view(outputs, inputs), scales().view(outputs, -1))

            layout = CodeLayout(4, block, ScaleFormat.FLOAT32, table="nf4")
            return PackedTensor.of(StoredMatrix(layout, (outputs, inputs), read), dtype)

        def numbers() -> torch.Tensor:
            of_each = spread(scales(), block, count, dim=0)
            return (TABLES["nf4"][codes().long()] * of_each).view(outputs, inputs)

        return Numbers((outputs, inputs), dtype, numbers, "its blocks extend beyond one output")


class Int8(QuantizedFormat):
    """8 bits: int8, where 127 means the largest magnitude of the output (`SCB`). Source: transformers'
    `quantizer_bnb_8bit.py` for the names; bitsandbytes' `int8_vectorwise_dequant`."""

    suffixes = of_weight("SCB=maxima weight_format=order")
    needed = frozenset({WEIGHT, "maxima"})

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor:
        weight, maxima = parts[WEIGHT], parts["maxima"]
        if weight.dtype != torch.int8 or len(weight.shape) != 2 or maxima.shape != weight.shape[:1]:
            raise misfit(weight, "is not int8 with a maximum for each output")
        outputs, inputs = weight.shape

        def read() -> Codes:
            if "order" in parts and int(parts["order"].read(...)):
                raise misfit(parts["order"], "says that rows are not in order")
            return Codes(signed_codes(weight.read(...), 8), maxima.read(...).float().view(outputs, 1) / 127)

        return PackedTensor.of(
            StoredMatrix(CodeLayout(8, 0, ScaleFormat.FLOAT32, offset=128), (outputs, inputs), read), dtype
        )


class Mlx(QuantizedFormat):
    """`weight` `[outputs, inputs * bits / 32]`, `scales` and `biases` `[outputs, groups]`: `code * scale + bias`.

    The config gives bits and group, for all layers or for one. Experts are stacked, with separate gates and up
    projections. Source: MLX's `mx.quantize` and mlx-lm's `utils.py` (`quantize_model`, `load_model`).
    """

    suffixes = (
        *(Suffix(f".switch_mlp.gate_proj.{end}", ".experts.gate_up_proj", end) for end in _MLX_PARTS),
        *(Suffix(f".switch_mlp.up_proj.{end}", ".experts.gate_up_proj", f"up {end}") for end in _MLX_PARTS),
        *(Suffix(f".switch_mlp.down_proj.{end}", ".experts.down_proj", end) for end in _MLX_PARTS),
        *of_weight("scales=scales biases=biases"),
    )
    needed = frozenset({WEIGHT, "scales"})

    def __init__(self, settings: Mapping[str, Any], family: str) -> None:
        if not FAMILIES.get(family, Family()).mlx:
            raise UnsupportedModel(
                f"the changes that MLX makes to the family {family!r} are not known here: take the original of "
                "this model, or a GGUF file"
            )
        self._settings = settings

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor:
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
        mode = settings.get("mode", "affine")
        bits, group = number_in(settings, "bits"), number_in(settings, "group_size")
        *experts, outputs, words = weight.shape
        inputs = group * scales.shape[-1]
        packed = weight.dtype == torch.uint32 and len(experts) < 2 and 32 * words == bits * inputs
        if not packed or scales.shape[:-1] != (*experts, outputs) or group % 16:
            raise misfit(weight, f"and {scales.name} ({list(scales.shape)}) are not {bits} bits in groups of {group}")
        if mode == "affine":
            kind = SCALE_KINDS.get(scales.dtype, ScaleFormat.E8M0)
            if (
                biases is None
                or (biases.shape, biases.dtype) != (scales.shape, scales.dtype)
                or kind is ScaleFormat.E8M0
            ):
                raise misfit(scales, f"and its biases are not those of {weight.name} ({list(weight.shape)})")
            layout = CodeLayout(bits, group, kind, kind)
        else:
            layout = _MLX_FLOATS.get(mode)
            if layout is None:
                raise UnsupportedModel(f"MLX's mode {mode!r} is not known: take a checkpoint in the mode 'affine'")
            if biases is not None or scales.dtype != torch.uint8 or (layout.bits, layout.group) != (bits, group):
                raise misfit(scales, f"does not fit the mode {mode!r} for {weight.name} ({list(weight.shape)})")

        def read(index: Any) -> Codes:
            stored = scales.read(index)
            if mode == "nvfp4":
                stored = stored.contiguous().view(torch.float8_e4m3fn).float()
            codes = unpack_words(weight.read(index), bits, inputs)
            return Codes(codes, stored, None if biases is None else biases.read(index))

        return one_or_stacked(layout, (*experts, outputs, inputs), read, dtype)
