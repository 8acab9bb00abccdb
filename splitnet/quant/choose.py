"""Chooses the weight format of a span's linear layers, and the type that blocks compute in, by the device."""

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
from splitnet.quant.packed_tensor import CodeLayout, as_dtype

AUTO = "auto"
INTEGERS = ("int8", "int4")
KINDS = ("float32", "bfloat16", "float16", *INTEGERS)  # the weight formats that a user may name
STORED = "stored"  # the codes of the checkpoint
# Inputs of kernels with one scale per output: with more, sums of products of bytes could exceed 32 bits.
_MOST_INPUTS = 2**16


@dataclass(frozen=True)
class WeightFormat:
    """The format into which the weight of a linear layer is converted."""

    numbers: torch.dtype | CodeLayout
    """A float type; int8, from which floats are made at every call; or the layout of codes in tiles."""
    narrows: bool = False  # whether bfloat16 replaces float16 for weights that bfloat16 holds exactly

    def fits(self, outputs: int, inputs: int) -> bool:
        if not isinstance(self.numbers, CodeLayout):
            return True
        return inputs % self.numbers.group == 0 if self.numbers.group else inputs <= _MOST_INPUTS

    def bytes_for(self, outputs: int, inputs: int) -> int:
        if isinstance(self.numbers, CodeLayout):
            return held_bytes(self.numbers, outputs, inputs)
        scales = outputs * torch.bfloat16.itemsize if self.numbers == torch.int8 else 0
        return outputs * inputs * self.numbers.itemsize + scales

    def of(self, weight: Tensor) -> WeightForm | None:
        """Converts a weight into this format, on the weight's device; None if a value of the weight is outside the
        range of the format.

        `weight`: `[outputs, inputs]`, float32; the tensor is neither changed nor kept.
        """
        if isinstance(self.numbers, CodeLayout):
            codes = integer_codes(weight, self.numbers)
            rounds = self.numbers == INT8
            return codes and BlockQuantWeight.from_codes(self.numbers, [codes], weight.device, rounds_rows=rounds)
        if self.numbers == torch.int8:
            return ScaledForm.of(weight)
        return FloatForm.narrowest(weight) if self.narrows else FloatForm.of(weight, self.numbers)


NARROW = WeightFormat(torch.float16, narrows=True)
INT8_TILES = WeightFormat(INT8)
INT8_SCALED = WeightFormat(torch.int8)
INT4_TILES = WeightFormat(INT4)


@dataclass(frozen=True)
class WeightChoice:
    """How the blocks of a span hold their weights.

    Attributes:
        kind: one of `KINDS`, for the linear layers that fit it; or `STORED`.
        dtype: the type that blocks compute in, which is the type of everything else: activations, KV caches, norms,
            experts.
        forms: a linear layer has the first of these formats that fits it; if none fits, the layer stays in `dtype`, or
            in its codes.
        as_stored: codes of the checkpoint are kept, even if one of `forms` would fit.
        exact: no layer was rounded to `kind`, so blocks compute the results of weights in `dtype`; known after loading.
    """

    kind: str
    dtype: torch.dtype
    forms: tuple[WeightFormat, ...] = ()
    as_stored: bool = False
    device: torch.device = field(default=torch.device("cpu"), compare=False)
    exact: bool = False

    @property
    def keeps_codes(self) -> bool:
        """Whether layers that the checkpoint has in codes keep their codes if none of `forms` fits."""
        return self.as_stored or bool(self.forms)

    @property
    def description(self) -> str:
        """The weight format, and after a slash the type that blocks compute in if it differs, such as
        `int8/float32`."""
        computes = name_of(self.dtype)
        return computes if self.kind == computes or self.exact else f"{self.kind}/{computes}"

    def form_for(self, outputs: int, inputs: int) -> WeightFormat | None:
        """The format of a linear layer of these sizes; None: it is not converted."""
        return next((form for form in self.forms if form.fits(outputs, inputs)), None)

    def layout_of_experts(self, inputs: int) -> CodeLayout | None:
        """The layout into which experts with `inputs` inputs are converted; None: they are not converted."""
        layout = {"int4": INT4, "int8": INT8}.get(self.kind)
        return layout if layout is not None and inputs % max(1, layout.group) == 0 else None

    def as_loaded(self, held: Iterable[Any]) -> WeightChoice:
        """This choice with the facts that are known once all layers are loaded. `held`: the layers' forms, among other
        objects."""
        is_stored = self.kind.startswith(STORED)
        forms = [form for form in held if isinstance(form, WeightForm)]
        floats = [form for form in forms if isinstance(form, FloatForm)]
        # Codes of the checkpoint lose nothing; other codes are rounded from numbers.
        if not floats or not all(form.exact for form in (floats if is_stored else forms)):
            return self
        if is_stored:
            return replace(self, kind=STORED)
        narrowest = all(form.weight.dtype == torch.bfloat16 for form in floats)
        return replace(self, kind="bfloat16" if narrowest else "float16", exact=True)

    def plain(self) -> WeightChoice:
        """This choice, changed: weights that are not in codes are held in the type that blocks compute in."""
        return replace(self, kind=name_of(self.dtype), forms=())


# Maximum growth of the bytes of blocks for which "auto" computes in a wider type than that of the checkpoint.
_MOST_WIDENED = 1.25


def choose_weights(
    kind: str | None,
    dtype: torch.dtype | str | None,
    stored: torch.dtype,
    device: torch.device,
    held_bytes: Callable[[WeightChoice], int] | None = None,
) -> WeightChoice:
    """Chooses how the weights of a checkpoint are held.

    Args:
        kind: one of `KINDS`, for all layers that fit it; "auto": as `dtype`, or float16 instead of float32 where CPUs
            then decode faster; None: as `dtype`. With "auto" and None, weights that the checkpoint has in codes keep
            them.
        dtype: the type that blocks compute in; None: the type that suits `kind`, else the type of the stored weights.
        stored: the type in the checkpoint; for codes, the type of the numbers that they encode.
        held_bytes: gives the bytes of blocks that are held in a certain way. With it, "auto" computes in a wider type
            only if the bytes grow little: experts, most of the weights of some models, are held in the type that blocks
            compute in.

    Raises WeightsError if the kind is unknown, or contradicts `dtype`, ValueError if there is no such type.
    """
    wished = as_dtype(dtype)
    if kind is None:
        return WeightChoice(name_of(wished or stored), wished or stored, as_stored=True, device=device)
    if kind == AUTO:
        computes = wished or stored
        if wished is None and stored == torch.float16 and _reads_halves_fast(device):
            # Three times as fast as float16, for which no steps are compiled, and not less exact.
            computes = torch.float32
        # Decoding reads all weights for every token, so a kernel that reads half of the bytes is twice as fast.
        halves = computes == torch.float32 and _reads_halves_fast(device)
        fastest = _of_kind("float16" if halves else name_of(computes), computes, stored, device)
        chosen = replace(fastest, forms=(NARROW,) if halves else fastest.forms, as_stored=True, device=device)
        if computes.itemsize > (wished or stored).itemsize and held_bytes is not None:
            narrow = choose_weights(None, stored, stored, device)
            return chosen if held_bytes(chosen) <= _MOST_WIDENED * held_bytes(narrow) else narrow
        return chosen
    return replace(_of_kind(kind, wished, stored, device), device=device)


def _of_kind(kind: str, wished: torch.dtype | None, stored: torch.dtype, device: torch.device) -> WeightChoice:
    if kind not in KINDS:
        raise WeightsError(f"weights cannot be held as {kind!r}: use auto, {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if kind in INTEGERS:
        compiled = device.type == "cpu" and has_integer_kernels()
        eight = (INT8_TILES, INT8_SCALED) if compiled else (INT8_SCALED,)
        return WeightChoice(kind, wished or stored, (INT4_TILES,) if kind == "int4" else eight)
    held = as_dtype(kind)
    assert held is not None
    if wished is None:  # CPUs hold half precision but do not compute in it
        wished = torch.float32 if held == torch.float16 and device.type == "cpu" else held
    if held == wished:
        return WeightChoice(kind, held)
    if wished != torch.float32 and (held, wished) != (torch.float16, torch.bfloat16):
        raise WeightsError(
            f"blocks that compute in {name_of(wished)} cannot hold weights as {kind}: leave --dtype out, or use "
            f"--weights {name_of(wished)}"
        )
    return WeightChoice(kind, wished, (WeightFormat(held),))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reads_halves_fast(device: torch.device) -> bool:
    """Whether kernels multiply with float16 in less time than with float32: measured on x86."""
    return device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and has_float_kernels()
