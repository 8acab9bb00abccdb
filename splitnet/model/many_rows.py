"""Products of many rows with held weights, as in a prefill: bound by arithmetic, not by what is read.

The weight is made anew, a part of its outputs at a time, which stays in a cache between its conversion and its use, and
torch multiplies each part with all rows. So a prefill takes as long as one of plain weights, and a few percent for the
conversion, whatever the weights are held as.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache

import torch
from torch.nn.functional import linear

from splitnet.model.kernels import has_fast_kernels

FLOATS_FROM = 64
"""Rows from which this is faster than splitnet's kernel for the form; so for those below."""

PLAIN_LOOPS_FROM = 24
"""The kernels for any CPU."""

TORCH_INT8_FROM = 48
TORCH_INT4_FROM = 128
"""torch's kernels."""

EXPERTS_FROM = 32
"""Rows of one expert, whose products in float32 by a kernel are slower from then on."""

_INT8_FROM = 32
_INTEGERS_FROM = 48
_OTHERS_FROM = 24
"""The kernels for CPUs with VNNI, where these multiply bfloat16 faster than float32. Others gain nothing."""

_PART = 2**20
_WHOLE = 64
"""Weights of a part, and what its outputs are a multiple of: mkldnn computes so many at a time."""


@cache
def type_for_many() -> torch.dtype:
    """In which type this CPU multiplies many rows faster: bfloat16 if it has instructions for it, else float32."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def int8_from() -> int:
    """Rows from which a weight with a scale for each output is made anew."""
    if not has_fast_kernels():
        return PLAIN_LOOPS_FROM
    return _INT8_FROM if type_for_many() == torch.bfloat16 else sys.maxsize


def type_of_codes(rows: torch.Tensor) -> torch.dtype:
    """In which type many rows are multiplied with codes in groups: none is rounded to less than it has."""
    return type_for_many() if rows.device.type == "cpu" and rows.dtype == torch.bfloat16 else rows.dtype


def codes_from(dtype: torch.dtype, *, integers: bool) -> int:
    """The same of codes in groups for which there is a fast kernel.

    Args:
        dtype: of the rows.
        integers: the kernel multiplies integers.
    """
    if dtype != torch.bfloat16 or type_for_many() != torch.bfloat16:
        return sys.maxsize
    return _INTEGERS_FROM if integers else _OTHERS_FROM


def outputs_at_a_time(inputs: int) -> int:
    """How many outputs of a weight a part shall have."""
    return max(1, _PART // (inputs * _WHOLE)) * _WHOLE


def multiply_by_parts(rows: torch.Tensor, outputs: int, parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """`[rows, inputs]` -> `[rows, outputs]`, in the type of `rows`.

    Args:
        parts: of the weight, one below the other, each `[some outputs, inputs]`, in the type in which to multiply; one
            is used before the next is asked for.
    """
    products = rows.new_empty(len(rows), outputs)
    begin = 0
    for part in parts:
        rows = rows.to(part.dtype)
        products[:, begin : begin + len(part)] = linear(rows, part)
        begin += len(part)
    return products
