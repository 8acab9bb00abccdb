"""In which form a span holds the weights of its linear layers, and what it computes in: chosen by the device."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from splitnet.errors import WeightsError
from splitnet.quant.floats import (
    CompiledBfloat16,
    CompiledFloat16,
    ConvertedBfloat16,
    ConvertedFloat,
    ConvertedFloat16,
    NarrowFloat,
    PackedFloat16,
)
from splitnet.quant.integers import DequantisedInt8, Int4, Int8, KernelInt4, KernelInt8
from splitnet.quant.native import has_float_kernels, has_integer_kernels
from splitnet.quant.weight_form import WeightForm, as_dtype

AUTO = "auto"
INTEGERS = ("int8", "int4")
KINDS = ("float32", "bfloat16", "float16", *INTEGERS)
"""What weights may be held as, by name."""

STORED = "stored"
"""Held in the codes of the checkpoint."""


@dataclass(frozen=True)
class Weights:
    """How the blocks of a span hold their weights.

    Attributes:
        kind: one of `KINDS`, of the linear layers that fit it; or `STORED`.
        dtype: what blocks compute in, which is the type of everything else: activations, KV caches, norms, experts.
        forms: of a linear layer, the first that fits it; where none does, it stays in `dtype`, or in its codes.
        as_stored: where the checkpoint has codes, these are kept, whatever `forms` would fit.
        device: that holds them.
        exact: whether no layer was rounded to `kind`, so that blocks compute what they would with weights in `dtype`.
            Known once they are loaded.
    """

    kind: str
    dtype: torch.dtype
    forms: tuple[type[WeightForm], ...] = ()
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

    def form_for(self, outputs: int, inputs: int) -> type[WeightForm] | None:
        """The form of a linear layer of these sizes; None: it stays as it is."""
        return next((form for form in self.forms if form.fits(outputs, inputs)), None)

    def as_loaded(self, held: Iterable[Any]) -> Weights:
        """The same where the forms of all layers are known, among anything else in `held`."""
        is_stored = self.kind.startswith(STORED)
        forms = [form for form in held if isinstance(form, WeightForm)]
        floats = [form for form in forms if isinstance(form, ConvertedFloat | PackedFloat16)]
        # Codes of the checkpoint lose nothing; others are made of numbers.
        if not floats or not all(form.exact for form in (floats if is_stored else forms)):
            return self
        if is_stored:
            return replace(self, kind=STORED)
        narrowest = all(isinstance(form, CompiledBfloat16) for form in floats)
        return replace(self, kind="bfloat16" if narrowest else "float16", exact=True)

    def plain(self) -> Weights:
        """The same with all weights that are not in codes in the type that blocks compute in."""
        return replace(self, kind=name_of(self.dtype), forms=())


_MOST_WIDENED = 1.25
"""Times the bytes that "auto" takes to compute in a wider type than that of the checkpoint."""


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

    Raises:
        WeightsError: there is no such kind, or it does not go with `dtype`.
        ValueError: there is no such type.
    """
    wished = as_dtype(dtype)
    if kind is None:
        return Weights(name_of(wished or stored), wished or stored, as_stored=True, device=device)
    if kind == AUTO:
        computes = wished or stored
        if wished is None and stored == torch.float16 and has_kernels(device) and _has_float_kernels(device):
            computes = torch.float32  # three times as fast, as no steps in halves are compiled, and no less exact
        fastest = _of_kind(_fastest(computes, device), computes, stored, device)
        forms = (NarrowFloat,) if CompiledFloat16 in fastest.forms else fastest.forms
        chosen = replace(fastest, forms=forms, as_stored=True, device=device)
        if computes.itemsize > (wished or stored).itemsize and held_bytes is not None:
            narrow = choose_weights(None, stored, stored, device)
            return chosen if held_bytes(chosen) <= _MOST_WIDENED * held_bytes(narrow) else narrow
        return chosen
    return replace(_of_kind(kind, wished, stored, device), device=device)


def _of_kind(kind: str, wished: torch.dtype | None, stored: torch.dtype, device: torch.device) -> Weights:
    if kind not in KINDS:
        raise WeightsError(f"weights cannot be held as {kind!r}: use auto, {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if kind in INTEGERS:
        return Weights(kind, wished or stored, _integer_forms(kind, device))
    held = as_dtype(kind)
    assert held is not None
    if wished is None:
        # Half precision is what CPUs hold but do not compute in.
        wished = torch.float32 if held == torch.float16 and device.type == "cpu" else held
    if held == wished:
        return Weights(kind, held)
    if wished != torch.float32 and (held, wished) != (torch.float16, torch.bfloat16):
        raise WeightsError(
            f"blocks that compute in {name_of(wished)} cannot hold weights as {kind}: leave --dtype out, or use "
            f"--weights {name_of(wished)}"
        )
    if held == torch.bfloat16:
        return Weights(kind, wished, (CompiledBfloat16 if _has_float_kernels(device) else ConvertedBfloat16,))
    return Weights(kind, wished, _float16_forms(device))


def name_of(dtype: torch.dtype) -> str:
    """The name of a type as users write it."""
    return str(dtype).removeprefix("torch.")


def has_kernels(device: torch.device) -> bool:
    """Whether torch has kernels for packed weights on a device: for now on x86 CPUs. Others convert at every call."""
    return (
        device.type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and torch.backends.quantized.engine in ("x86", "fbgemm")
    )


def _fastest(dtype: torch.dtype, device: torch.device) -> str:
    """Decoding reads all weights for every token, so half of the bytes are twice as fast, where a kernel reads them."""
    return "float16" if dtype == torch.float32 and has_kernels(device) else name_of(dtype)


def _float16_forms(device: torch.device) -> tuple[type[WeightForm], ...]:
    if _has_float_kernels(device):
        return (CompiledFloat16,)
    return (PackedFloat16, ConvertedFloat16) if has_kernels(device) else (ConvertedFloat16,)


def _has_float_kernels(device: torch.device) -> bool:
    return device.type == "cpu" and has_float_kernels()


def _integer_forms(kind: str, device: torch.device) -> tuple[type[WeightForm], ...]:
    """Best first."""
    compiled = device.type == "cpu" and has_integer_kernels()
    if kind == "int4":
        return (KernelInt4, Int4) if has_kernels(device) and not compiled else (Int4,)
    forms: list[type[WeightForm]] = [DequantisedInt8]
    if has_kernels(device):
        forms.insert(0, KernelInt8)
    if compiled:
        forms.insert(0, Int8)
    return tuple(forms)
