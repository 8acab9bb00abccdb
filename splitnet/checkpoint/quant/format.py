"""The interface of formats of quantized weights: names of tensors, and how they make up a weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from splitnet.errors import UnsupportedModel
from splitnet.quant.packed_tensor import CodeLayout, Codes, Experts, PackedTensor, StoredMatrix


@dataclass(frozen=True)
class Part:
    """One tensor in the files; `read` is called with an index, such as `...` or the number of an expert."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[Any], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Numbers:
    """A quantized weight that no `CodeLayout` describes for the reason `why`. The weight is read as float32, and
    rounded to `dtype` once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    why: str


@dataclass(frozen=True)
class Suffix:
    """The name of a tensor that belongs to a weight: the weight's name with `ending` instead of `base`."""

    ending: str
    base: str
    role: str  # the format's key of the tensor
    sure: bool = True  # the ending has no other meaning; if false, the ending counts only if the weight exists


def of_weight(text: str) -> tuple[Suffix, ...]:
    """Suffixes from `ending=role ...`: each ending replaces `weight` in the name."""
    pairs = (pair.partition("=") for pair in text.split())
    return tuple(Suffix(f".{ending}", ".weight", role) for ending, _, role in pairs)


MALFORMED = (
    *(KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError, RecursionError),
)
"""Exceptions that malformed descriptions cause."""
# Bytes up to which a part of a quantized weight may be a description of the other parts.
DESCRIPTION_BYTES = 1 << 16
_MOST_COUNTED = 1 << 31
_SCALES = (".weight_scale_inv", ".weight_scale", ".scale", ".scales", ".qscale_weight", ".weight_scale_2")
"""Endings of the names of scales, in place of `.weight`."""
WEIGHT = "weight"  # the role of the tensor that has the weight's own name


class QuantizedFormat(ABC):
    """A format of quantized weights."""

    suffixes: Sequence[Suffix]  # endings of the tensors that belong to a weight; the first that fits counts
    needed: frozenset[str]  # the roles that every quantized weight has
    # Endings of tensors that concern only activations or caches. They are ignored, because splitnet does not quantize
    # activations and chooses the type of caches itself.
    left: tuple[str, ...] = ()

    @abstractmethod
    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor | Numbers:
        """Makes a weight; nothing large is read before it is used. `parts`: role -> tensor in the files. `dtype`: the
        type that the weight shows to other code. Raises UnsupportedModel: the tensors contradict the format."""

    def group(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Name of each weight -> role -> name in the files. Plain tensors have only the role `WEIGHT`. Raises
        UnsupportedModel: a weight lacks a tensor."""
        names = list(names)
        present = set(names)
        groups: dict[str, dict[str, str]] = {}
        for name in names:
            if name.endswith(self.left):
                continue
            weight, role = name, WEIGHT
            for suffix in self.suffixes:
                base = name.removesuffix(suffix.ending) + suffix.base
                if name.endswith(suffix.ending) and (suffix.sure or base in present):
                    weight, role = base, suffix.role
                    break
            groups.setdefault(weight, {})[role] = name
        for weight, roles in groups.items():
            lacking = self.needed - roles.keys()
            if roles.keys() != {WEIGHT} and lacking:
                raise UnsupportedModel(
                    f"{next(iter(roles.values()))} is in the checkpoint without its other tensors ({weight}: "
                    f"{', '.join(sorted(lacking))}): download it again, or take another checkpoint of this model"
                )
        return groups


class CheckpointWeights:
    """The weights of a checkpoint, and the tensors in the files that make up each weight. `groups`: name of each weight
    -> role -> name in the files. `dtype`: the type that weights of codes show to other code."""

    def __init__(self, names: Sequence[str], format: QuantizedFormat | None, dtype: torch.dtype) -> None:
        """Raises as `QuantizedFormat.group`."""
        self.groups = {name: {WEIGHT: name} for name in names} if format is None else format.group(names)
        self.dtype = dtype
        self._format = format

    def tensor(self, name: str, part: Callable[[str], Part]) -> PackedTensor | Numbers | None:
        """A weight that is read when it is used; None for plain numbers. `part`: called with names in the files. Raises
        UnsupportedModel: as `QuantizedFormat.tensor`, or the weight is codes without scales, or integers of no
        format."""
        if self._format is None:
            plain = part(name)
            # Tensors with four dimensions are masks of attention in old checkpoints.
            if plain.dtype in (torch.int8, torch.uint8, torch.uint32) and len(plain.shape) in (2, 3):
                raise misfit(plain, "is stored in integers, and the config does not say what they encode")
            stem = name.removesuffix(".weight")
            if plain.dtype.itemsize == 1 and any(f"{stem}{scale}" in self.groups for scale in _SCALES):
                raise UnsupportedModel(
                    f"{name} is stored in {plain.dtype} with scales, and the config does not say how weights are "
                    "quantized ('quantization_config'): take another config of this model, or another checkpoint"
                )
            return None
        parts = {role: part(stored) for role, stored in self.groups[name].items()}
        if parts.keys() != {WEIGHT}:
            if empty := next((one for one in parts.values() if 0 in one.shape), None):
                raise misfit(empty, "is empty, with no numbers")
            try:
                return self._format.tensor(name, parts, self.dtype)
            except MALFORMED as error:
                raise UnsupportedModel(
                    f"{name} contradicts the config's description of quantized weights ({error!r}): download it again"
                ) from error
        plain = parts[WEIGHT]
        if plain.dtype.itemsize == 1 and plain.dtype != torch.bool:
            raise misfit(plain, "is in the checkpoint without its scales")
        return None


def number_in(settings: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A count or size from a description. The value is not bounded by this check: callers compare it with sizes of
    tensors before they use it. Raises ValueError: the value is not a positive integer."""
    value = settings.get(key, default)
    if type(value) is not int or not 0 < value < _MOST_COUNTED:
        raise ValueError(f"{key}: {value!r}")
    return value


def misfit(part: Part, why: str) -> UnsupportedModel:
    """The error of a tensor that contradicts its format."""
    return UnsupportedModel(
        f"{part.name} ({list(part.shape)}, {part.dtype}) {why}: take another checkpoint of this model"
    )


def by_group(codes: Codes, group: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """The numbers of codes; `group` gives the group of each input."""
    zeros = offset if codes.zeros is None else codes.zeros.float()[:, group]
    return (codes.codes.float() - zeros) * codes.scales.float()[:, group]


def codes_or_numbers(
    layout: CodeLayout, shape: Sequence[int], read: Callable[[Any], Codes], dtype: torch.dtype
) -> PackedTensor | Numbers:
    """As `one_or_stacked`, for groups of any length; numbers if codes with this group length cannot be held."""
    if layout.group % 16 == 0:
        return one_or_stacked(layout, shape, read, dtype)
    whole = one_or_stacked(layout, shape, read, torch.float32)
    return Numbers(tuple(shape), dtype, whole.to_floats, f"{layout.group} inputs share a scale")


def one_or_stacked(
    layout: CodeLayout,
    shape: Sequence[int],
    read: Callable[[Any], Codes],
    dtype: torch.dtype,
    *,
    transposed: bool = False,
) -> PackedTensor:
    """A weight `[outputs, inputs]`, or of experts `[experts, outputs, inputs]`. `read`: called with `...`, or with the
    number of an expert. `transposed`: the tensor is `[..., inputs, outputs]`; `shape` is not."""
    *experts, outputs, inputs = shape

    def matrix(index: Any) -> tuple[StoredMatrix]:
        return (StoredMatrix(layout, (outputs, inputs), lambda: read(index)),)

    every = Experts(experts[0], matrix) if experts else [matrix(...)]
    return PackedTensor.__new__(PackedTensor, every, stacked=bool(experts), transposed=transposed, dtype=dtype)
