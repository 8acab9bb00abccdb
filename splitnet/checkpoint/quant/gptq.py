"""GPTQ and AWQ: integers of few bits in int32 words, with a scale and a zero for each group of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from splitnet.checkpoint.quant.format import Numbers, Part, QuantizedFormat, Suffix, codes_or_numbers, misfit
from splitnet.checkpoint.quant.scaled_floats import SCALE_KINDS
from splitnet.errors import UnsupportedModel
from splitnet.quant.stored import Codes, Kind, Layout, PackedTensor, in_order, layout_bits, unpack_words

_WORD = 32
_SUFFIXES = (
    Suffix(".qweight", ".weight", "codes"),
    Suffix(".qzeros", ".weight", "zeros"),
    Suffix(".scales", ".weight", "scales"),
    Suffix(".g_idx", ".weight", "groups"),
)
_LIKE_GEMM = ("gemm", "exllama", "exllamav2")
"""Kernels for what AutoAWQ packs in the same way (`awq/modules/linear/exllama.py`: it is unpacked at the start)."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of eight that each four bits of a word hold, lowest first."""


class Gptq(QuantizedFormat):
    """`gptq`: `qweight` `[inputs * bits / 32, outputs]`, `qzeros` `[groups, outputs * bits / 32]`, `scales`, `g_idx`.

    Bits and group follow from the shapes, as they may differ between layers. Source: transformers' `GPTQConfig` for the
    settings; the packing is that of AutoGPTQ and GPTQModel (`nn_modules/qlinear`): the format `gptq` stores zeros less
    one, `gptq_v2` as they are.
    """

    suffixes = _SUFFIXES
    needed = frozenset({"codes", "zeros", "scales"})

    def __init__(self, settings: Mapping[str, Any]) -> None:
        name = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
        if name not in ("gptq", "gptq_v2"):
            raise UnsupportedModel(f"the GPTQ format {name!r} is not known: take a checkpoint in the format 'gptq'")
        self._less_one = 1 if name == "gptq" else 0
        self._symmetric = bool(settings.get("sym", False))
        self._permuted = bool(settings.get("desc_act", False))

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor | Numbers:
        """See `QuantizedFormat.tensor`."""
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
            found = unpack_words(zeros.read(...), bits, outputs)
            found = (found + self._less_one) & ((1 << bits) - 1)
            return Codes(codes, scales.read(...).T.contiguous(), found.T.contiguous())

        def read_symmetric(every: Any) -> Codes:
            made = read_with_zeros()
            assert made.zeros is not None
            if not bool((made.zeros == middle).all()):
                raise misfit(zeros, "has zeros, and the config says that weights are symmetric")
            check_order()
            return Codes(made.codes, made.scales)

        def read_plain(every: Any) -> Codes:
            check_order()
            return read_with_zeros()

        def check_order() -> None:
            if index is not None and not in_order(index.read(...), inputs, group):
                raise misfit(index, "permutes inputs, and the config says that they are in order ('desc_act')")

        kind = SCALE_KINDS[scales.dtype]
        held = layout_bits(bits)
        permuted = self._permuted and groups > 1
        if permuted and (index is None or index.shape != (inputs,)):
            raise misfit(index or words, f"does not say of which group each of {inputs} inputs is ('g_idx')")
        if permuted and index is not None and not in_order(index.read(...), inputs, group):

            def numbers() -> torch.Tensor:
                made = read_with_zeros()
                assert made.zeros is not None
                of = index.read(...).long()
                if bool((of < 0).any() | (of >= groups).any()):
                    raise misfit(index, f"is of other groups than {groups}")
                values = made.codes.float() - made.zeros.float()[:, of]
                return values * made.scales.float()[:, of]

            return Numbers((outputs, inputs), dtype, numbers, "its groups are of permuted inputs ('desc_act')")
        wide = group if groups > 1 else 0
        if self._symmetric:
            layout, read = Layout(held, wide, kind, offset=middle), read_symmetric
        else:
            layout, read = Layout(held, wide, kind, Kind.CODES), read_plain
        return codes_or_numbers(layout, (outputs, inputs), read, dtype)


class Awq(QuantizedFormat):
    """`awq`, in the packing `gemm`: `qweight` `[inputs, outputs / 8]`, `qzeros` `[groups, outputs / 8]`, `scales`.

    Source: transformers' `AwqConfig` for the settings; the packing is that of AutoAWQ (`awq/utils/packing_utils.py`):
    eight columns in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7.
    """

    suffixes = _SUFFIXES[:3]
    needed = frozenset({"codes", "zeros", "scales"})

    def __init__(self, settings: Mapping[str, Any]) -> None:
        name = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if name not in _LIKE_GEMM:
            raise UnsupportedModel(f"the AWQ packing {name!r} is not known: take a checkpoint in the packing 'gemm'")
        if settings.get("bits", settings.get("w_bit", 4)) != 4 or not settings.get("zero_point", True):
            raise UnsupportedModel(
                "of AWQ only 4 bits with zero points are known ('bits', 'zero_point'): take such a checkpoint"
            )

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor | Numbers:
        """See `QuantizedFormat.tensor`."""
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
        layout = Layout(4, wide, SCALE_KINDS[scales.dtype], Kind.CODES)
        return codes_or_numbers(layout, (outputs, inputs), read, dtype)


def auto_round(settings: Mapping[str, Any]) -> QuantizedFormat:
    """`auto-round`, which packs as GPTQ or AWQ does (`packing_format`); single layers may be as `extra_config` says.

    Source: vLLM's `AutoRoundConfig`. Bits and groups follow from the shapes.
    """
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
