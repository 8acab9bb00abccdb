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

**The same bits.** Kernels compute outputs in blocks of four rows, each from its own rows
and in the same order, wherever the block is. Rows that are gathered into blocks thus have the result of the whole
product; a screen is only made if this holds for some rows here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from splitnet.quant.device import free_memory, milliseconds
from splitnet.quant.forms import FloatForm, WeightForm
from splitnet.quant.grouped import BlockQuantWeight, held_bytes
from splitnet.quant.native import has_kernel_for, multiply_floats
from splitnet.quant.packed_tensor import CodeLayout, Codes, ScaleFormat

GROUP = 32
COPY = CodeLayout(5, GROUP, ScaleFormat.BFLOAT16, offset=16)
"""The copy. On an AMD EPYC its product takes 0.26 of the time of bfloat16, with one thread. With 4 bits so many rows
remain that the whole takes longer; 6 or 8 bits take 0.35 and 0.47, to save rows that hardly count."""

BLOCK = 4  # rows that kernels for floats multiply together, as in `native/products.h`
MOST_SHARE = 0.25  # largest share of rows that are computed exactly; with more, the whole head is hardly slower
FASTER = 0.8  # largest time of the copy's product, as a share of the whole one's, with which a screen is made
_SPARE = 4  # free memory that a screen leaves, as a multiple of its own
_LEAST_SIZE = 2.0**-10  # of a number of states, as a share of the largest, so that an unusual state has a finite bound
_ROUNDED_STATE = 2.0**-16.8  # half a step of the kernel's states, as a share of the largest number, and 7 % more
_ROUNDED_SUM = 2.0**-23  # twice the rounding of float32
_OPERATIONS = 128  # of a logit, besides one for each input
_ROUNDED_BOUND = 1 + 2.0**-10
_LARGEST = 1e30  # larger bounds might overflow
_TEMPERATURE = 2.0**-20  # rounding of logits that are divided by a temperature
_BLOCKS_PER_ROW = 64  # parts of the estimates, for each wanted row, of which the largest are computed first

log = logging.getLogger(__name__)

Exact = Callable[[Tensor, Tensor], Tensor]
"""States `[1, inputs]` and indices of outputs `[n]` -> their logits `[n]`, in the type of the states."""


class Screen:
    """The best logits of a weight `[outputs, inputs]`.

    copy: the weight in few bits. bounds: `[outputs]`, the largest error of a logit for states whose `|h / scales|` is 1.
    scales: `[inputs]`, float64, at most 1. exact: the rows of the weight itself.
    """

    def __init__(self, copy: BlockQuantWeight, bounds: Tensor, scales: Tensor, exact: Exact) -> None:
        self.copy = copy
        self._bounds, self._scales, self._exact = bounds, scales, exact
        self._largest = float(bounds.max())

    @property
    def nbytes(self) -> int:
        return self.copy.tiles.nbytes + self._bounds.nbytes

    @classmethod
    def of(cls, weight: WeightForm, sizes: Tensor) -> Screen | None:
        """A screen for states whose numbers have these usual sizes, `[inputs]`.

        None: the weight has no kernel, or numbers that are not finite.
        """
        exact = exact_rows(weight)
        if exact is None or len(sizes) % GROUP:
            return None
        usual = torch.nan_to_num(sizes.double().abs(), 0.0, 0.0, 0.0)
        scales = (usual / usual.max().clamp(min=1e-300)).clamp(min=_LEAST_SIZE).sqrt()
        inputs = len(sizes)
        rounded = _ROUNDED_SUM * (inputs + _OPERATIONS) + _ROUNDED_STATE * math.sqrt(inputs)
        codes: list[Codes] = []
        bounds: list[Tensor] = []
        for piece in weight.pieces(torch.float32):
            some, error = _encode(piece)
            sums = math.sqrt(GROUP) * (1 << COPY.bits) * some.scales.float().norm(dim=1)  # bounds sums of |row| |copy|
            codes.append(some)
            bounds.append((error * scales.float()).norm(dim=1) * _ROUNDED_BOUND + rounded * sums)
        joined = torch.cat(bounds)
        if not bool(joined.isfinite().all()):
            return None
        return cls(BlockQuantWeight.from_codes(COPY, codes, torch.device("cpu")), joined, scales, exact)

    def best_logits(self, state: Tensor, estimates: Tensor, count: int) -> Tensor | None:
        """The logits of a state `[inputs]`, `[outputs]` in its type, of which at least the `count` largest and those
        equal to the least of them are the head's, also after a division by a temperature; others may be -inf.

        estimates: `[outputs]`, the product of the state and `copy`. None: the bounds exclude too few rows.
        """
        reach = float((state.double() / self._scales).norm()) * _ROUNDED_BOUND
        if not reach * self._largest < _LARGEST:
            return None
        likely = _large(estimates, count)
        least = float(self._exact(state[None], likely).float().min())
        if not math.isfinite(least):
            return None
        kind = torch.finfo(state.dtype)
        least -= abs(least) * (kind.eps / 2 * _ROUNDED_BOUND + _TEMPERATURE) + kind.tiny * kind.eps + 1 / _LARGEST
        kept = (torch.add(estimates, self._bounds, alpha=reach) >= least).nonzero()[:, 0]
        if len(kept) > MOST_SHARE * len(estimates):
            return None
        logits = state.new_full((len(estimates),), -math.inf)
        logits[kept] = self._exact(state[None], kept)
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
    """Indices of `count` large estimates: the largest of parts, because few of the largest are in the same part."""
    part = max(1, len(estimates) // (count * _BLOCKS_PER_ROW))
    parts = estimates[: len(estimates) // part * part].view(-1, part)
    chosen = parts.amax(1).topk(min(count, len(parts))).indices
    return chosen * part + parts[chosen].argmax(1)


def exact_rows(weight: WeightForm) -> Exact | None:
    """Computes rows of a product as the whole product does; None: the order of its operations is not known."""
    if isinstance(weight, FloatForm) and has_kernel_for(weight.weight):
        floats, outputs = weight.weight, len(weight.weight)
        whole = outputs // BLOCK * BLOCK
        last = torch.arange(whole, outputs)  # rows outside a block, which kernels may sum in another order

        def rows_of_floats(state: Tensor, indices: Tensor) -> Tensor:
            padding = -len(indices) % BLOCK
            blocks = torch.cat((indices.clamp(max=whole - 1), indices.new_zeros(padding), last))
            products = multiply_floats(state, floats.index_select(0, blocks))[0]  # faster than indexing
            ends = len(products) - len(last) + indices - whole
            places = torch.arange(len(indices))
            return products[torch.where(indices < whole, places, ends)]

        return rows_of_floats if whole else None
    return None
