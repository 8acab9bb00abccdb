"""In which form a span holds the weights of its linear layers, and what it computes in: chosen by the device."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from splitnet.errors import WeightsError
from splitnet.quant.forms import INT4, INT8, FloatForm, ScaledForm, WeightForm, integer_codes
from splitnet.quant.grouped import BlockQuantWeight, held_bytes
from splitnet.quant.native import has_float_kernels, has_integer_kernels
from splitnet.quant.stored import Layout, as_dtype

AUTO = "auto"
INTEGERS = ("int8", "int4")
KINDS = ("float32", "bfloat16", "float16", *INTEGERS)  # what weights may be held as, by name
STORED = "stored"  # held in the codes of the checkpoint
_MOST_INPUTS = 2**16  # of kernels with a scale for each output, so that sums of products of bytes stay within 32 bits


@dataclass(frozen=True)
class WeightFormat:
    """What the weight of a linear layer is brought into."""

    numbers: torch.dtype | Layout
    """A type of floats; int8, of which floats are made at every call; or the layout of codes in tiles."""
    narrows: bool = False  # bfloat16 takes the place of float16 where only that is exact

    def fits(self, outputs: int, inputs: int) -> bool:
        if not isinstance(self.numbers, Layout):
            return True
        return inputs % self.numbers.group == 0 if self.numbers.group else inputs <= _MOST_INPUTS

    def bytes_for(self, outputs: int, inputs: int) -> int:
        if isinstance(self.numbers, Layout):
            return held_bytes(self.numbers, outputs, inputs)
        scales = outputs * torch.bfloat16.itemsize if self.numbers == torch.int8 else 0
        return outputs * inputs * self.numbers.itemsize + scales

    def of(self, weight: Tensor) -> WeightForm | None:
        """Brings a weight into this format, on its device; None if its values do not allow it.

        `weight`: `[outputs, inputs]`, float32; it is left alone and not kept.
        """
        if isinstance(self.numbers, Layout):
            codes = integer_codes(weight, self.numbers)
            rounds = self.numbers == INT8
            return codes and BlockQuantWeight.hold(self.numbers, [codes], weight.device, rounds_rows=rounds)
        if self.numbers == torch.int8:
            return ScaledForm.of(weight)
        return FloatForm.narrowest(weight) if self.narrows else FloatForm.of(weight, self.numbers)


NARROW = WeightFormat(torch.float16, narrows=True)
INT8_TILES = WeightFormat(INT8)
INT8_SCALED = WeightFormat(torch.int8)
INT4_TILES = WeightFormat(INT4)


@dataclass(frozen=True)
class Weights:
    """How the blocks of a span hold their weights.

    Attributes:
        kind: one of `KINDS`, of the linear layers that fit it; or `STORED`.
        dtype: what blocks compute in, which is the type of everything else: activations, KV caches, norms, experts.
        forms: of a linear layer, the first that fits it; where none does, it stays in `dtype`, or in its codes.
        as_stored: where the checkpoint has codes, these are kept, whatever `forms` would fit.
        exact: no layer was rounded to `kind`, so that blocks compute as with weights in `dtype`; known once loaded.
    """

    kind: str
    dtype: torch.dtype
    forms: tuple[WeightFormat, ...] = ()
    as_stored: bool = False
    device: torch.device = field(default=torch.device("cpu"), compare=False)
    exact: bool = False

    @property
    def keeps_codes(self) -> bool:
        """Whether layers that the checkpoint has in codes, and that none of `forms` takes, keep them."""
        return self.as_stored or bool(self.forms)

    @property
    def text(self) -> str:
        """Which numbers, and behind a slash what blocks compute in if that is another type, as in `int8/float32`."""
        computes = name_of(self.dtype)
        return computes if self.kind == computes or self.exact else f"{self.kind}/{computes}"

    def form_for(self, outputs: int, inputs: int) -> WeightFormat | None:
        """The form of a linear layer of these sizes; None: it stays as it is."""
        return next((form for form in self.forms if form.fits(outputs, inputs)), None)

    def layout_of_experts(self, inputs: int) -> Layout | None:
        """What experts with so many inputs are brought into; None: they stay as they are loaded."""
        layout = {"int4": INT4, "int8": INT8}.get(self.kind)
        return layout if layout is not None and inputs % max(1, layout.group) == 0 else None

    def as_loaded(self, held: Iterable[Any]) -> Weights:
        """The same where the forms of all layers are known, among anything else in `held`."""
        is_stored = self.kind.startswith(STORED)
        forms = [form for form in held if isinstance(form, WeightForm)]
        floats = [form for form in forms if isinstance(form, FloatForm)]
        # Codes of the checkpoint lose nothing; others are made of numbers.
        if not floats or not all(form.exact for form in (floats if is_stored else forms)):
            return self
        if is_stored:
            return replace(self, kind=STORED)
        narrowest = all(form.weight.dtype == torch.bfloat16 for form in floats)
        return replace(self, kind="bfloat16" if narrowest else "float16", exact=True)

    def plain(self) -> Weights:
        """The same with all weights that are not in codes in the type that blocks compute in."""
        return replace(self, kind=name_of(self.dtype), forms=())


_MOST_WIDENED = 1.25  # times the bytes that "auto" takes to compute in a wider type than that of the checkpoint


def choose_weights(
    kind: str | None,
    dtype: torch.dtype | str | None,
    stored: torch.dtype,
    device: torch.device,
    held_bytes: Callable[[Weights], int] | None = None,
) -> Weights:
    """What the weights of a checkpoint are held as.

    Args:
        kind: one of `KINDS`: all that fits it; "auto": as `dtype`, or float16 for float32 where CPUs decode faster so;
            None: as `dtype`. With both of these, weights that the checkpoint has in codes keep them.
        dtype: what blocks shall compute in; None: what goes with `kind`, else as they are stored.
        stored: the type in the checkpoint; of codes, that of the numbers that they stand for.
        held_bytes: what blocks take if they are held so. With it, "auto" computes in a wider type only where that takes
            little more: experts, of which some models mostly consist, are held in what blocks compute in.

    Raises WeightsError if there is no such kind, or it does not go with `dtype`, ValueError if there is no such type.
    """
    wished = as_dtype(dtype)
    if kind is None:
        return Weights(name_of(wished or stored), wished or stored, as_stored=True, device=device)
    if kind == AUTO:
        computes = wished or stored
        if wished is None and stored == torch.float16 and _reads_halves_fast(device):
            computes = torch.float32  # three times as fast, as no steps in halves are compiled, and no less exact
        # Decoding reads all weights for every token: half of the bytes are twice as fast, where a kernel reads them.
        halves = computes == torch.float32 and _reads_halves_fast(device)
        fastest = _of_kind("float16" if halves else name_of(computes), computes, stored, device)
        chosen = replace(fastest, forms=(NARROW,) if halves else fastest.forms, as_stored=True, device=device)
        if computes.itemsize > (wished or stored).itemsize and held_bytes is not None:
            narrow = choose_weights(None, stored, stored, device)
            return chosen if held_bytes(chosen) <= _MOST_WIDENED * held_bytes(narrow) else narrow
        return chosen
    return replace(_of_kind(kind, wished, stored, device), device=device)


def _of_kind(kind: str, wished: torch.dtype | None, stored: torch.dtype, device: torch.device) -> Weights:
    if kind not in KINDS:
        raise WeightsError(f"weights cannot be held as {kind!r}: use auto, {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if kind in INTEGERS:
        compiled = device.type == "cpu" and has_integer_kernels()
        eight = (INT8_TILES, INT8_SCALED) if compiled else (INT8_SCALED,)
        return Weights(kind, wished or stored, (INT4_TILES,) if kind == "int4" else eight)
    held = as_dtype(kind)
    assert held is not None
    if wished is None:  # half precision is what CPUs hold but do not compute in
        wished = torch.float32 if held == torch.float16 and device.type == "cpu" else held
    if held == wished:
        return Weights(kind, held)
    if wished != torch.float32 and (held, wished) != (torch.float16, torch.bfloat16):
        raise WeightsError(
            f"blocks that compute in {name_of(wished)} cannot hold weights as {kind}: leave --dtype out, or use "
            f"--weights {name_of(wished)}"
        )
    return Weights(kind, wished, (WeightFormat(held),))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reads_halves_fast(device: torch.device) -> bool:
    """Whether kernels multiply with float16 in less time than with float32: that was measured on x86."""
    return device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and has_float_kernels()
