"""A few new positions through blocks of the usual structure, in one call of compiled code.

What `splitnet.model.lean_step` leaves is more than half of the time of a decode step with weights of few bits: for each
block some twenty calls of torch, on tensors of a few hundred numbers. `native/step.h` has the whole block instead, also
for several positions of a sequence, as windows of drafts have them. As there, what comes out is compared with the
family's own code when a span loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from struct import Struct, pack
from typing import Any

import torch
from torch import nn

from splitnet.model import kernels
from splitnet.model.attention import Part
from splitnet.model.float_forms import CompiledBfloat16, CompiledFloat16, ConvertedBfloat16, ConvertedFloat32
from splitnet.model.grouped_forms import GroupedForm
from splitnet.model.held_linear import HeldLinear
from splitnet.model.known_experts import KnownExperts
from splitnet.model.lean_step import is_usual
from splitnet.model.rotary import Turning
from splitnet.model.tiles import CHUNK

MOST_POSITIONS = 16
"""In one step; with more, products of matrices are faster."""

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GROUPED = 3
_VECTOR = 16
_NO_MATRIX = [0] * 6
_EXPERTS = Struct("8q4d18q")
"""From `experts` on in `Block`."""


class CompiledStep:
    """Runs blocks that `CompiledStep.of` knows.

    Args:
        blocks: the family's own, in order.
        experts: of each block, or None where it has an MLP alone.
        rope: gives the cosines and sines of positions.
        turning: what is done with them.
        windows: sliding windows in positions, by the index that blocks have in their caches.
        dtype: what the span computes in, and keeps in its caches.
    """

    def __init__(
        self,
        blocks: Sequence[Any],
        experts: Sequence[KnownExperts | None],
        rope: nn.Module,
        turning: Turning,
        windows: Sequence[int | None],
        dtype: torch.dtype,
    ) -> None:
        first: Any = blocks[0]
        attention = first.self_attn
        self._rope = rope
        self._dtype = dtype
        self._size: int = attention.head_dim
        self._indices = tuple(block.self_attn.layer_idx for block in blocks)
        self._heads = attention.k_proj.out_features // self._size
        self._alive: list[torch.Tensor] = []
        self._turning = turning
        described = b"".join(self._describe(*each, windows) for each in zip(blocks, experts, strict=True))
        self._blocks = torch.frombuffer(bytearray(described), dtype=torch.int64)

    @classmethod
    def of(
        cls, blocks: Sequence[nn.Module], rope: nn.Module | None, windows: Sequence[int | None], dtype: torch.dtype
    ) -> CompiledStep | None:
        """For these blocks; None if their parts are not the usual ones, or nothing is compiled for this CPU."""
        if not kernels.has_fast_kernels() or dtype not in (torch.float32, torch.bfloat16) or rope is None:
            return None
        if not all(is_usual(block, experts=True) for block in blocks):
            return None
        experts = [None if is_usual(block) else KnownExperts.of(block.mlp) for block in blocks]
        if not all(_is_known(block, some) for block, some in zip(blocks, experts, strict=True)):
            return None
        turning = Turning.of(blocks[0].self_attn, rope)
        return None if turning is None else cls(blocks, experts, rope, turning, windows, dtype)

    def takes(self, parts: Sequence[Part]) -> bool:
        """Whether a pass is small enough, and without adapters."""
        plain = all(part.adapter is None and not part.row.prefix_length for part in parts)
        return plain and sum(part.count for part in parts) <= MOST_POSITIONS

    def forward(self, hidden: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
        """`[positions, hidden]` -> `[positions, hidden]`, in the type of `hidden`."""
        indices = [part.row.prefix_length + part.start + new for part in parts for new in range(part.count)]
        positions = torch.tensor(indices)
        cosines, sines = (
            turn[0].float().repeat(1, self._turning.repeats) for turn in self._rope(hidden[None], positions[None])
        )
        result = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        rows = [self._stores(part) for part in parts for _ in range(part.count)]
        stores = torch.tensor(list(chain.from_iterable(zip(*rows, strict=True)))).flatten()
        turns = (cosines, sines, self._turning.adjacent)
        kernels.step(self._blocks, len(self._indices), result, stores, positions, *turns, self._dtype.itemsize)
        return result.to(hidden.dtype)

    def _stores(self, part: Part) -> list[tuple[int, int, int]]:
        shape = (1, self._heads, 0, self._size)
        return part.row.reserve(self._indices, part.count, shape, self._dtype)

    def _describe(self, block: Any, experts: KnownExperts | None, windows: Sequence[int | None]) -> bytes:
        """As `Block` in `native/step.h`."""
        attention = block.self_attn
        norms = [block.input_layernorm, block.post_attention_layernorm]
        norms += [getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)]
        addresses = [self._optional(None if norm is None else norm.weight) for norm in norms]
        addresses += [self._optional(getattr(attention, "sinks", None))]
        numbers = [0.0 if norm is None else norm.variance_epsilon for norm in norms] + [attention.scaling]
        heads = attention.q_proj.out_features // self._size
        sizes = [heads, self._heads, self._size, windows[attention.layer_idx] or 0, _has_joined_norms(block)]
        layers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        layers += _mlp_layers(block, experts)
        matrices = [self._matrix(layer) for layer in layers]
        matrices += [_NO_MATRIX] * (7 - len(matrices))
        matrices += [_NO_MATRIX if experts is None or experts.opener is None else self._matrix(experts.opener)]
        of_experts = bytes(_EXPERTS.size) if experts is None else self._described_experts(experts)
        return pack("5q5d5q48q", *addresses, *numbers, *sizes, *chain.from_iterable(matrices)) + of_experts

    def _described_experts(self, experts: KnownExperts) -> bytes:
        choice, gating = experts.choice, experts.gating
        weight, short = choice.weight, choice.weight.bfloat16()
        if torch.equal(short.float(), weight.float()):
            weight = short  # as it came
        self._alive.append(weight.contiguous())
        outputs, inputs = weight.shape
        matrices = [_KINDS[weight.dtype], self._alive[-1].data_ptr(), 0, self._optional(choice.bias), inputs, outputs]
        for name in ("gate_up_proj", "down_proj"):
            form = experts.held.held[name].parts[0]
            self._alive += [form.tiles, form.description]
            bias = self._optional(getattr(experts.held, f"{name}_bias") if experts.held.has_bias else None)
            matrices += [_GROUPED, form.tiles.data_ptr(), form.description.data_ptr(), bias, form.inputs, form.outputs]
        numbers = [outputs, choice.chosen, choice.sigmoid, choice.normalised, choice.groups, choice.kept]
        numbers += [gating.interleaved, self._optional(choice.correction)]
        return _EXPERTS.pack(*numbers, choice.factor, gating.alpha, gating.limit, gating.shift, *matrices)

    def _matrix(self, layer: Any) -> list[int]:
        bias = self._optional(layer.bias)
        kind, weight, scales = _held(layer)
        scales_at = 0 if scales is None else scales.data_ptr()
        self._alive += [weight] if scales is None else [weight, scales]
        return [kind, weight.data_ptr(), scales_at, bias, layer.in_features, layer.out_features]

    def _optional(self, values: torch.Tensor | None) -> int:
        return 0 if values is None else self._float_address(values)

    def _float_address(self, values: torch.Tensor) -> int:
        self._alive.append(values.detach().float().contiguous())
        return self._alive[-1].data_ptr()


def _mlp_layers(block: Any, experts: KnownExperts | None) -> list[Any]:
    """Of what all positions run through: its gate, up and down."""
    mlp: Any = block.mlp if experts is None else experts.shared
    return [] if mlp is None else [mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _is_known(block: Any, experts: KnownExperts | None) -> bool:
    attention, mlp = block.self_attn, block.mlp if experts is None else experts.shared
    if experts is None and not is_usual(block):
        return False
    layers = [layer for layer in attention.children() if isinstance(layer, (nn.Linear, HeldLinear))]
    layers += _mlp_layers(block, experts)
    layers += [] if experts is None or experts.opener is None else [experts.opener]
    return (
        all(isinstance(layer, (nn.Linear, HeldLinear)) and _is_held(layer) for layer in layers)
        and len([layer for layer in attention.children() if layer in layers]) == 4
        and (mlp is None or type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation"))
        and _fits_together(block, experts)
    )


def _has_joined_norms(block: Any) -> bool:
    """Whether queries are normalised over all heads together, and keys."""
    attention = block.self_attn
    return hasattr(attention, "q_norm") and attention.q_norm.weight.numel() > attention.head_dim


def _fits_together(block: Any, experts: KnownExperts | None) -> bool:
    """Whether the sizes are those that the compiled code takes for granted."""
    attention = block.self_attn
    size, width = attention.head_dim, attention.q_proj.in_features
    heads, stored = attention.q_proj.out_features, attention.k_proj.out_features
    norms = {block.input_layernorm: width, block.post_attention_layernorm: width}
    if hasattr(attention, "q_norm"):
        joined = _has_joined_norms(block)
        norms |= {attention.q_norm: heads if joined else size, attention.k_norm: stored if joined else size}
    return (
        size % _VECTOR == 0
        and stored % size == 0
        and heads % stored == 0
        and attention.v_proj.out_features == stored
        and {layer.in_features for layer in (attention.k_proj, attention.v_proj)} == {width}
        and (attention.o_proj.in_features, attention.o_proj.out_features) == (heads, width)
        and _layers_fit(_mlp_layers(block, experts), width)
        and (experts is None or _experts_fit(experts, width))
        and all(norm.weight.numel() == length for norm, length in norms.items())
        and getattr(attention, "sinks", torch.empty(heads // size)).numel() == heads // size
    )


def _layers_fit(layers: Sequence[Any], width: int) -> bool:
    if not layers:
        return True
    gate, up, down = layers
    between = gate.out_features
    sizes = (gate.in_features, up.in_features, up.out_features, down.in_features, down.out_features)
    return sizes == (width, width, between, between, width)


def _experts_fit(experts: KnownExperts, width: int) -> bool:
    inner, outer = experts.held.held["gate_up_proj"], experts.held.held["down_proj"]
    return (
        all(len(form.parts) == 1 and form.parts[0].has_fast_kernel for form in (inner, outer))
        and all(form.inputs % CHUNK == 0 for form in (inner, outer))
        and inner.outputs == 2 * outer.inputs
        and experts.choice.weight.shape[1] == inner.inputs == outer.outputs == width
        and experts.choice.chosen <= outer.experts
        and (experts.opener is None or (experts.opener.in_features, experts.opener.out_features) == (width, 1))
    )


def _is_held(layer: nn.Linear | HeldLinear) -> bool:
    if isinstance(layer, HeldLinear):
        if isinstance(layer.held, GroupedForm):
            return layer.held.has_fast_kernel and layer.in_features % CHUNK == 0
        known = (CompiledFloat16, CompiledBfloat16, ConvertedBfloat16, ConvertedFloat32)
        return type(layer.held) in known
    return type(layer) is nn.Linear and layer.weight.dtype in _KINDS and layer.weight.is_contiguous()


def _held(layer: nn.Linear | HeldLinear) -> tuple[int, torch.Tensor, torch.Tensor | None]:
    """The number of its kind in `native/products.h`, its tensor, and its description if it has one."""
    held: Any = layer.held if isinstance(layer, HeldLinear) else layer
    if isinstance(held, GroupedForm):
        return _GROUPED, held.tiles, held.description
    return _KINDS[held.weight.dtype], held.weight, None
