"""The best logits of a head, computed from a copy of the head in few bits and few rows of the head itself.

A product with the copy estimates every logit, with a bound on its error. The k rows with large estimates are computed
exactly, so the k-th largest logit is at least the least of them. Only rows whose estimate plus bound reaches this value
are then computed exactly: all others are less, whatever their logits are. This is the exact search for the maximum
inner product by bounds (Ram and Gray, KDD 2012; Teflioudi et al., "LEMP", SIGMOD 2015); that a cheap view of the head
finds the candidates is the idea of SVD-softmax (Shim et al., arXiv:1711.00741), whose candidates are not proven.

**The bound.** With `e` the difference of a row and its copy, `|e . h| <= |e * s| |h / s|` for any positive `s`
(Cauchy-Schwarz). It is tight for `s` near the square root of the usual size of each number of `h`, so a screen is made
from the sizes of states that the head has seen; other sizes make it slow, never wrong. To this come the rounding of
states to 16 bits in the kernel, and all roundings of both sums, whatever their order.

**The same bits.** Kernels compute outputs in blocks of four rows, each row in the same order, whatever the other rows
are. Rows that are gathered into blocks thus have the result of the whole product; a screen is only made if this holds
for some rows here.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from splitnet.quant.device import free_memory, milliseconds
from splitnet.quant.forms import outputs_at_a_time
from splitnet.quant.grouped import BlockQuantWeight, held_bytes
from splitnet.quant.native import BLOCK, multiply_floats, multiply_listed
from splitnet.quant.packed_tensor import CodeLayout, Codes, ScaleFormat

GROUP = 32
COPY = CodeLayout(5, GROUP, ScaleFormat.BFLOAT16, offset=16)
"""The copy. With one thread of an AMD EPYC, its product takes 0.26 of the time of bfloat16 for 151,936 words of 896.
With 4 bits it takes 0.20, but ten to fifty times as many rows of SmolLM2's head remain; with 6 bits and with 8 by rows,
0.35 and 0.47. Bounds of a low rank (64 to 256 of 576) exclude no row."""

MOST_SHARE = 0.25  # largest share of rows that are computed exactly; with more, the whole head is hardly slower
FASTER = 0.8  # largest time of the copy's product, as a share of the whole one's, with which a screen is made
_SPARE = 4  # free memory that a screen leaves, as a multiple of its own
_COMPARED = 64  # rows whose bits are compared when a screen is made
_LEAST_SIZE = 2.0**-10  # of a number of states, as a share of the largest, so that an unusual state has a finite bound
_ROUNDED_STATE = 2.0**-16.8  # half a step of the kernel's states, as a share of the largest number, and 7 % more
_ROUNDED_SUM = 2.0**-23  # twice the rounding of float32
_OPERATIONS = 128  # of a logit, besides one for each input
_ROUNDED_BOUND = 1 + 2.0**-10
_LOST = 2.0**-52  # more than what underflows; states with a smaller norm use the whole head
_LARGEST = 1e30  # larger bounds might overflow
_TEMPERATURE = 2.0**-20  # rounding of logits that are divided by a temperature
_PARTS = 1024, 64  # the least number of parts of the estimates, and parts for each wanted row

log = logging.getLogger(__name__)

Exact = Callable[[Tensor, Tensor], Tensor]
"""A state `[inputs]` and indices of outputs `[n]` -> their logits `[n]`, in the type of the state."""


class Screen:
    """The best logits of a weight `[outputs, inputs]`.

    copy: the weight in few bits. errors: `[outputs]`, the largest error of a logit by the copy, for states whose
    `|h / scales|` is 1; scales: `[inputs]`. roundings: `[outputs]`, the same of arithmetic, for states whose
    norm is 1. exact: the rows of the weight itself.
    """

    def __init__(self, copy: BlockQuantWeight, errors: Tensor, scales: Tensor, roundings: Tensor, exact: Exact) -> None:
        self.copy = copy
        self._errors, self._scales, self._roundings, self._exact = errors, scales, roundings, exact
        self._largest = float(errors.max()), float(roundings.max())

    @property
    def nbytes(self) -> int:
        return self.copy.tiles.nbytes + self._errors.nbytes + self._roundings.nbytes

    @classmethod
    def of(cls, weight: Tensor, sizes: Tensor) -> Screen | None:
        """A screen of a weight of `multiply_floats`, for states whose numbers have these usual sizes, `[inputs]`, a
        multiple of `GROUP`. None: not all numbers of the weight are finite, or the vocabulary is less than a block."""
        if len(weight) < BLOCK:
            return None
        usual = torch.nan_to_num(sizes.double().abs(), 0.0, 0.0, 0.0)
        scales = (usual / usual.max().clamp(min=1e-300)).clamp(min=_LEAST_SIZE).sqrt().float()
        inputs = len(sizes)
        rounded = _ROUNDED_SUM * (inputs + _OPERATIONS) + _ROUNDED_STATE * math.sqrt(inputs)
        codes: list[Codes] = []
        errors: list[Tensor] = []
        roundings: list[Tensor] = []
        for piece in weight.split(outputs_at_a_time(weight.shape[1])):
            some, error = _encode(piece.float())
            codes.append(some)
            errors.append((error * scales).norm(dim=1) * _ROUNDED_BOUND + _LOST)
            # The norm of a row whose numbers are the largest that the kernel multiplies.
            roundings.append(rounded * math.sqrt(GROUP) * (1 << COPY.bits) * some.scales.float().norm(dim=1))
        bounds = torch.cat(errors), scales, torch.cat(roundings)
        if not all(bool(each.isfinite().all()) for each in bounds):
            return None
        return cls(BlockQuantWeight.from_codes(COPY, codes, torch.device("cpu")), *bounds, exact_rows(weight))

    @classmethod
    def if_faster(cls, weight: Tensor, sizes: Tensor) -> Screen | None:
        """As `of`; None also if this machine has too little memory, if the product with the copy is hardly faster than
        the whole one, or if gathered rows have other bits."""
        cpu, inputs = torch.device("cpu"), len(sizes)
        if inputs % GROUP or held_bytes(COPY, *weight.shape) * _SPARE > free_memory(cpu):
            return None
        began = time.monotonic()
        screen = cls.of(weight, sizes)
        if screen is None:
            return None
        took_s = time.monotonic() - began
        state = torch.randn(1, inputs, generator=torch.Generator().manual_seed(0))
        some = torch.arange(0, len(weight), max(1, len(weight) // _COMPARED))
        some = torch.cat((some, torch.arange(len(weight) - BLOCK, len(weight))))
        same = torch.equal(exact_rows(weight)(state[0], some), multiply_floats(state, weight)[0, some])
        whole_ms = milliseconds(cpu, partial(multiply_floats, state, weight), 3)
        copy_ms = milliseconds(cpu, partial(screen.copy.multiply, state), 3)
        figures = screen.nbytes / 1e6, took_s, copy_ms, whole_ms, "" if same else "; gathered rows differ"
        log.info("a copy of the head has %.0f MB, made in %.1f s: %.2f ms in place of %.2f ms%s", *figures)
        return screen if same and copy_ms < FASTER * whole_ms else None

    def best_logits(self, state: Tensor, estimates: Tensor, count: int) -> Tensor | None:
        """The logits of a state `[inputs]`, `[outputs]` in its type, of which at least the `count` largest and those
        equal to the least of them are the head's, also after a division by a temperature; others may be -inf.

        estimates: `[outputs]`, the product of the state and `copy`. None: the bounds exclude too few rows.
        """
        numbers = state.float()
        reach, norm = (float(each.norm()) * _ROUNDED_BOUND for each in (numbers / self._scales, numbers))
        if not (norm > _LOST and reach * self._largest[0] + norm * self._largest[1] < _LARGEST):
            return None
        likely = _large(estimates, count)
        least = float(self._exact(state, likely).float().min())
        if not math.isfinite(least):
            return None
        kind = torch.finfo(state.dtype)
        least -= abs(least) * (kind.eps / 2 * _ROUNDED_BOUND + _TEMPERATURE) + kind.tiny * kind.eps + 1 / _LARGEST
        most = torch.add(estimates, self._errors, alpha=reach).add_(self._roundings, alpha=norm)
        kept = torch.from_numpy(np.flatnonzero(most.numpy() >= least))  # takes a fifth of the time of torch's
        if len(kept) > MOST_SHARE * len(estimates):
            return None
        logits = state.new_full((len(estimates),), -math.inf)
        logits[kept] = self._exact(state, kept)
        return logits


def _encode(weight: Tensor) -> tuple[Codes, Tensor]:
    """The codes of some rows, float32, and the differences of the rows and their copies."""
    most = COPY.offset
    groups = weight.unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / (most - 0.5)).clamp_(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    values = scales.float()[..., None]
    codes = (groups / values).round_().clamp_(-most, most - 1)
    error = (groups - codes * values).flatten(1)
    return Codes(codes.add_(most).to(torch.uint8).flatten(1), scales), error


def _large(estimates: Tensor, count: int) -> Tensor:
    """Indices of `count` large estimates: the largest of parts, which have few of the largest each, because a part is
    spread over the vocabulary: tokenizers number tokens by frequency."""
    parts = min(len(estimates), max(_PARTS[0], count * _PARTS[1]))
    size = len(estimates) // parts
    table = estimates[: size * parts].view(size, parts)
    chosen = table.amax(0).topk(min(count, parts)).indices
    return table[:, chosen].argmax(0) * parts + chosen


def exact_rows(weight: Tensor) -> Exact:
    """Computes rows of `multiply_floats` with a weight, with the same bits."""
    whole = len(weight) // BLOCK * BLOCK
    last = weight[whole:]  # kernels may sum rows outside a block in another order

    def rows_of(state: Tensor, indices: Tensor) -> Tensor:
        if not len(last):
            return multiply_listed(state, weight, indices)
        products, ends = multiply_listed(state, weight, indices), multiply_floats(state[None], last)[0]
        return torch.where(indices < whole, products, ends[(indices - whole).clamp(min=0)])

    return rows_of
