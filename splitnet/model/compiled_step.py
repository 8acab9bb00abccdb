"""A few new positions through blocks of the usual structure, in one call of compiled code.

What `splitnet.model.lean_step` leaves is more than half of the time of a decode step with weights of few bits: for each
block some twenty calls of torch, on tensors of a few hundred numbers. `native/step.h` has the whole block instead, also
for several positions of a sequence, as windows of drafts have them. As there, what comes out is compared with the
family's own code when a span loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from struct import pack
from typing import Any

import torch
from torch import nn

from splitnet.model import kernels
from splitnet.model.attention import Part
from splitnet.model.float_forms import CompiledBfloat16, CompiledFloat16, ConvertedBfloat16, ConvertedFloat32
from splitnet.model.grouped_forms import GroupedForm
from splitnet.model.held_experts import HeldExperts
from splitnet.model.held_linear import HeldLinear
from splitnet.model.int8_forms import CompiledInt8
from splitnet.model.lean_step import is_usual
from splitnet.model.tiles import CHUNK

MOST_POSITIONS = 16
"""In one step; with more, products of matrices are faster."""

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT8, _GROUPED = 3, 4
_VECTOR = 16


class CompiledStep:
    """Runs blocks that `CompiledStep.of` knows.

    Args:
        blocks: the family's own, in order.
        rope: gives the cosines and sines of positions.
        windows: sliding windows in positions, by the index that blocks have in their caches.
        dtype: what the span computes in, and keeps in its caches.
    """

    def __init__(
        self, blocks: Sequence[Any], rope: nn.Module, windows: Sequence[int | None], dtype: torch.dtype
    ) -> None:
        first: Any = blocks[0]
        attention = first.self_attn
        self._rope = rope
        self._dtype = dtype
        self._size: int = attention.head_dim
        self._indices = tuple(block.self_attn.layer_idx for block in blocks)
        self._heads = attention.k_proj.out_features // self._size
        self._alive: list[torch.Tensor] = []
        described = b"".join(self._describe(block, windows) for block in blocks)
        self._blocks = torch.frombuffer(bytearray(described), dtype=torch.int64)

    @classmethod
    def of(
        cls, blocks: Sequence[nn.Module], rope: nn.Module | None, windows: Sequence[int | None], dtype: torch.dtype
    ) -> CompiledStep | None:
        """For these blocks; None if their parts are not the usual ones, or nothing is compiled for this CPU."""
        if not kernels.has_fast_kernels() or dtype not in (torch.float32, torch.bfloat16) or rope is None:
            return None
        if not all(is_usual(block, experts=True) and _is_known(block) for block in blocks):
            return None
        return cls(blocks, rope, windows, dtype)

    def takes(self, parts: Sequence[Part]) -> bool:
        """Whether a pass is small enough, and without adapters."""
        plain = all(part.adapter is None and not part.row.prefix_length for part in parts)
        return plain and sum(part.count for part in parts) <= MOST_POSITIONS

    def forward(self, hidden: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
        """`[positions, hidden]` -> `[positions, hidden]`, in the type of `hidden`."""
        indices = [part.row.prefix_length + part.start + new for part in parts for new in range(part.count)]
        positions = torch.tensor(indices)
        cosines, sines = (turn[0].float().contiguous() for turn in self._rope(hidden[None], positions[None]))
        if cosines.shape[-1] != self._size:
            raise RuntimeError("rotary embeddings of a part of the head")
        result = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        rows = [self._stores(part) for part in parts for _ in range(part.count)]
        stores = torch.tensor(list(chain.from_iterable(zip(*rows, strict=True)))).flatten()
        kernels.step(self._blocks, len(self._indices), result, stores, positions, cosines, sines, self._dtype.itemsize)
        return result.to(hidden.dtype)

    def _stores(self, part: Part) -> list[tuple[int, int, int]]:
        shape = (1, self._heads, 0, self._size)
        return part.row.reserve(self._indices, part.count, shape, self._dtype)

    def _describe(self, block: Any, windows: Sequence[int | None]) -> bytes:
        """As `Block` in `native/step.h`."""
        attention, mlp = block.self_attn, block.mlp
        norms = [block.input_layernorm, block.post_attention_layernorm]
        norms += [getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)]
        addresses = [0 if norm is None else self._float_address(norm.weight) for norm in norms]
        numbers = [0.0 if norm is None else norm.variance_epsilon for norm in norms] + [attention.scaling]
        heads = attention.q_proj.out_features // self._size
        sizes = [heads, self._heads, self._size, windows[attention.layer_idx] or 0]
        layers = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        matrices = list(chain.from_iterable(self._matrix(layer) for layer in layers))
        if has_experts(block):
            matrices += [0] * 18
            experts = self._experts(mlp)
        else:
            dense = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
            matrices += list(chain.from_iterable(self._matrix(layer) for layer in dense))
            experts = [0] * 21
        return pack("4q5d4q63q", *addresses, *numbers, *sizes, *matrices, *experts)

    def _experts(self, mlp: Any) -> list[int]:
        router, experts = mlp.gate, mlp.experts
        outputs, inputs = router.weight.shape
        described = [outputs, router.top_k, int(getattr(router, "norm_topk_prob", True))]
        described += [_KINDS[torch.float32], self._float_address(router.weight), 0, 0, inputs, outputs]
        for name in ("gate_up_proj", "down_proj"):
            form = experts.held[name].parts[0]
            self._alive += [form.tiles, form.description]
            described += [_GROUPED, form.tiles.data_ptr(), form.description.data_ptr(), 0, form.inputs, form.outputs]
        return described

    def _matrix(self, layer: Any) -> list[int]:
        bias = 0 if layer.bias is None else self._float_address(layer.bias)
        kind, weight, scales = _held(layer)
        scales_at = 0 if scales is None else scales.data_ptr()
        self._alive += [weight] if scales is None else [weight, scales]
        return [kind, weight.data_ptr(), scales_at, bias, layer.in_features, layer.out_features]

    def _float_address(self, values: torch.Tensor) -> int:
        self._alive.append(values.detach().float().contiguous())
        return self._alive[-1].data_ptr()


def has_experts(block: Any) -> bool:
    """Whether experts stand in the place of a block's MLP, and in codes, and nothing else does."""
    mlp = block.mlp
    return {name for name, _ in mlp.named_children()} == {"gate", "experts"} and isinstance(mlp.experts, HeldExperts)


def _is_known(block: Any) -> bool:
    attention, mlp = block.self_attn, block.mlp
    layers = list(attention.children())
    if has_experts(block):
        if not _are_known(mlp.gate, mlp.experts):
            return False
    elif is_usual(block):
        layers += list(mlp.children())
    else:
        return False
    linear = [layer for layer in layers if isinstance(layer, (nn.Linear, HeldLinear))]
    return (
        len(linear) == (4 if has_experts(block) else 7)
        and all(_is_held(layer) for layer in linear)
        and type((mlp.experts if has_experts(block) else mlp).act_fn).__name__ in ("SiLU", "SiLUActivation")
        and _fits_together(block)
    )


def _are_known(router: Any, experts: Any) -> bool:
    """Whether experts are chosen by softmax and have one layout each; the rest is shown by trying."""
    forms = [experts.held[name] for name in ("gate_up_proj", "down_proj") if name in experts.held]
    return (
        len(forms) == 2
        and not experts.has_bias
        and type(experts)._apply_gate.__name__ == "_default_apply_gate"
        and all(len(form.parts) == 1 and form.parts[0].has_fast_kernel for form in forms)
        and all(form.inputs % CHUNK == 0 for form in forms)
        and isinstance(getattr(router, "top_k", None), int)
        and isinstance(getattr(router, "weight", None), torch.Tensor)
        and router.weight.shape[0] == forms[0].experts
        and forms[0].outputs == 2 * forms[1].inputs
    )


def _fits_together(block: Any) -> bool:
    """Whether the sizes are those that the compiled code takes for granted."""
    attention, mlp = block.self_attn, block.mlp
    size, width = attention.head_dim, attention.q_proj.in_features
    heads, stored = attention.q_proj.out_features, attention.k_proj.out_features
    norms = {block.input_layernorm: width, block.post_attention_layernorm: width}
    norms |= {norm: size for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None)) is not None}
    return (
        size % _VECTOR == 0
        and stored % size == 0
        and heads % stored == 0
        and attention.v_proj.out_features == stored
        and {layer.in_features for layer in (attention.k_proj, attention.v_proj)} == {width}
        and (attention.o_proj.in_features, attention.o_proj.out_features) == (heads, width)
        and (_experts_fit(mlp, width) if has_experts(block) else _layers_fit(mlp, width))
        and all(norm.weight.numel() == length for norm, length in norms.items())
    )


def _layers_fit(mlp: Any, width: int) -> bool:
    between = mlp.gate_proj.out_features
    sizes = (mlp.gate_proj.in_features, mlp.up_proj.in_features, mlp.up_proj.out_features, mlp.down_proj.in_features)
    return sizes == (width, width, between, between) and mlp.down_proj.out_features == width


def _experts_fit(mlp: Any, width: int) -> bool:
    inner, outer = mlp.experts.held["gate_up_proj"], mlp.experts.held["down_proj"]
    return mlp.gate.weight.shape[1] == inner.inputs == outer.outputs == width


def _is_held(layer: nn.Linear | HeldLinear) -> bool:
    if isinstance(layer, HeldLinear):
        if isinstance(layer.held, GroupedForm):
            return layer.held.has_fast_kernel and layer.in_features % CHUNK == 0
        known = (CompiledInt8, CompiledFloat16, CompiledBfloat16, ConvertedBfloat16, ConvertedFloat32)
        return type(layer.held) in known
    return type(layer) is nn.Linear and layer.weight.dtype in _KINDS and layer.weight.is_contiguous()


def _held(layer: nn.Linear | HeldLinear) -> tuple[int, torch.Tensor, torch.Tensor | None]:
    """The number of its kind in `native/products.h`, its tensor, and its scales or its description."""
    held: Any = layer.held if isinstance(layer, HeldLinear) else layer
    if isinstance(held, CompiledInt8):
        return _INT8, held.codes, held.scales
    if isinstance(held, GroupedForm):
        return _GROUPED, held.tiles, held.description
    return _KINDS[held.weight.dtype], held.weight, None
