"""Runs a few new positions through blocks with the usual parts, in one call of compiled code.

With weights in few bits, `TorchStep` spends more than half of a decode step on some twenty calls of torch for each
block, on tensors of a few hundred numbers. `native/step.h` implements the whole block, also for several positions of a
sequence, as in windows of drafts. Its results are compared with the family's own code when a span loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from inspect import signature
from itertools import chain, pairwise
from struct import pack
from typing import Any

import torch
from torch import Tensor, nn

from splitnet.blocks.attention import RowChunk, positions_of, rotary_positions_of
from splitnet.blocks.block_inputs import PositionInputs
from splitnet.blocks.fast.describe import Attention, BlockDescription, KnownExperts, Norm, TransposedLinear, UnknownPart
from splitnet.blocks.kv_form import KVForm
from splitnet.blocks.rotary import PairLayout, RopeLayout
from splitnet.quant import native
from splitnet.quant.forms import FloatForm
from splitnet.quant.grouped import BlockQuantWeight
from splitnet.quant.linear import PLAIN_LINEAR, QuantizedLinear
from splitnet.quant.tiles import CHUNK

MOST_POSITIONS = 16  # maximum positions of one step
MOST_IN_STEPS = 128  # maximum positions of a pass that may run in several steps
# Maximum positions per sequence, on average, of such a pass: prompts must be computed with the precision of whole
# passes.
MOST_OF_EACH = 4
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GROUPED = 3
_VECTOR = 16

Fields = list[int | float]  # fields of a C struct, 8 bytes each


class NativeStep:
    """Runs blocks that `NativeStep.of` recognises.

    Args:
        rope, turning: the module that gives the cosines and sines of positions, and how they rotate heads; None: no
            block has a rotary embedding.
        windows: sliding windows in positions, by the index of blocks in their caches.
        dtype: the type that the span computes in, and keeps in its caches.
        form: the format of the caches, if it differs from `dtype`.
    """

    def __init__(
        self,
        blocks: Sequence[BlockDescription],
        rope: nn.Module | None,
        turning: RopeLayout | None,
        windows: Sequence[int | None],
        dtype: torch.dtype,
        form: KVForm | None,
    ) -> None:
        self._rope: Any = rope
        self._turning = turning
        self._halves_suffice = turning is None or turning.halves_suffice(rope, blocks[0].width)
        self._ropes = _ropes_of(blocks, rope)
        self._dtype = dtype
        self._stored = (dtype.itemsize, *((0, 0) if form is None else (form.bits, form.value_bits)))
        self._kept = blocks[0].attention.kept
        self._indices = tuple(block.attention.index for block in blocks)
        self._alive: list[Tensor] = []
        fields = chain.from_iterable(self._fields(block, windows[block.attention.index]) for block in blocks)
        described = b"".join(pack("d" if isinstance(field, float) else "q", field) for field in fields)
        self._blocks = torch.frombuffer(bytearray(described), dtype=torch.int64)
        self._fields_each = len(self._blocks) // len(blocks)

    @classmethod
    def of(
        cls,
        blocks: Sequence[nn.Module],
        rope: nn.Module | None,
        windows: Sequence[int | None],
        dtype: torch.dtype,
        form: KVForm | None = None,
    ) -> NativeStep | None:
        """The step for these blocks; None if nothing is compiled for this CPU. Raises UnknownPart if their parts are
        not the usual ones; unknown blocks may raise any other exception."""
        if not native.has_fast_kernels() or dtype not in (torch.float32, torch.bfloat16):
            return None
        described = [BlockDescription.of(block) for block in blocks]
        for block in described:
            _check(block)
        if len({block.attention.kept for block in described}) > 1:
            raise UnknownPart("blocks with different heads")
        halved = form is not None and form.value_bits == 4
        if halved and any(size % (2 * _VECTOR) for _, size in described[0].attention.kept):
            raise UnknownPart("heads whose halves are not whole vectors")
        return cls(described, rope, _turning_of(blocks, described, rope), windows, dtype, form)

    def takes(self, parts: Sequence[RowChunk]) -> bool:
        """Whether a pass is small enough, without adapters, and without block inputs that this step does not read."""
        plain = all(part.adapter is None and not part.row.prefix_length and self._reads(part.inputs) for part in parts)
        return plain and sum(part.count for part in parts) <= MOST_POSITIONS

    def _reads(self, inputs: PositionInputs | None) -> bool:
        if not inputs:
            return True
        positions = inputs.positions
        alike = self._halves_suffice or positions is None or bool((positions == positions[:, :1]).all())
        return alike and inputs.groups is None and not inputs.added and not inputs.per_layer

    def forward(self, hidden: Tensor, parts: Sequence[RowChunk], taps: Sequence[int] = ()) -> Tensor:
        """As `TorchStep.forward`, in the type of `hidden`; `taps`: in rising order."""
        positions = torch.tensor(positions_of(parts))
        cosines, sines = self._turns(hidden, rotary_positions_of(parts))
        result = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        kept = self._kept, self._dtype
        reserved = [(part.row.reserve(self._indices, part.count, *kept), part.count) for part in parts]
        rows = [stores for stores, count in reserved for _ in range(count)]
        stores = rows[0] if len(rows) == 1 else torch.stack(rows, dim=1)
        turns = (cosines, sines, PairLayout.APART if self._turning is None else self._turning.pair_layout)
        count, described, tapped = len(self._indices), self._blocks, list[Tensor]()
        for begin, end in pairwise((0, *taps)):
            native.step(described, end - begin, result, stores, positions, *turns, *self._stored)
            tapped.append(result.clone())
            described, stores = described[(end - begin) * self._fields_each :], stores[end - begin :]
        left = count - (taps[-1] if taps else 0)
        native.step(described, left, result, stores, positions, *turns, *self._stored)
        return (torch.cat((*tapped, result), dim=1) if tapped else result).to(hidden.dtype)

    def _turns(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, `[ropes, positions, half of the rotated numbers]`; `positions`: see
        `rotary_positions_of`."""
        if self._turning is None:
            return torch.empty(1, 0), torch.empty(1, 0)
        found = [self._rope(hidden[None], positions, *kind) for kind in self._ropes]
        halves = [[turn[0].float() for turn in self._turning.halves(turns)] for turns in found]
        if len(halves) == 1:
            return halves[0][0].contiguous(), halves[0][1].contiguous()
        cosines, sines = (torch.stack(turns) for turns in zip(*halves, strict=True))
        return cosines, sines

    def _fields(self, block: BlockDescription, window: int | None) -> Fields:
        """The fields of `Block` in `native/step.h`, in order."""
        attention, mlp, experts = block.attention, block.mlp, block.experts
        norms = (block.before, block.after, block.between, block.behind, attention.query_norm, attention.key_norm)
        fields: Fields = [*chain.from_iterable(map(self._norm, norms))]
        fields += [block.parallel, block.residual, self._floats(attention.sinks), self._floats(attention.slopes)]
        places = None if attention.places is None else torch.tensor(attention.places)
        fields += [self._address(places), attention.scale, attention.cap, attention.clip]
        latents = attention.latents
        rank, absorbed = (0, False) if latents is None else (latents.rank, latents.kept)
        fields += [attention.heads, attention.stored, attention.size, attention.value_size, rank, absorbed]
        fields += [window or 0, attention.joined, attention.late]
        turns = self._turning is not None and attention.turns
        fields += [self._ropes.index(_kind_of(attention, self._rope)) if turns else -1]
        fields += [0, 0.0, 0.0, 0.0, 0.0] if mlp is None else [int(mlp.activation.kind), *mlp.activation.shape]
        fields += chain.from_iterable(map(self._matrix, block.layers))
        inner = (None, None) if latents is None else (latents.lowered_norm, latents.norm)
        fields += chain.from_iterable(map(self._norm, inner))
        fields += chain.from_iterable(map(self._matrix, attention.latent_layers))
        return fields + ([0] * 31 if experts is None else self._described_experts(experts))

    def _described_experts(self, experts: KnownExperts) -> Fields:
        choice, gating = experts.choice, experts.gating
        weight, short = choice.weight, choice.weight.bfloat16()
        if torch.equal(short.float(), weight.float()):
            weight = short  # the checkpoint's own type
        outputs, inputs = weight.shape
        router = [self._address(weight.contiguous()), 0, self._floats(choice.bias), inputs, outputs]
        matrices: Fields = [_KINDS[weight.dtype], *router]
        for name in ("gate_up_proj", "down_proj"):
            form = experts.held.held[name].parts[0]
            bias = self._floats(getattr(experts.held, f"{name}_bias") if experts.held.has_bias else None)
            places = self._address(form.tiles), self._address(form.description)
            matrices += [_GROUPED, *places, bias, form.inputs, form.outputs]
        fields: Fields = [outputs, choice.chosen, choice.sigmoid, choice.normalised]
        fields += [choice.groups, choice.kept, choice.judges, gating.interleaved, self._floats(choice.correction)]
        return [*fields, choice.factor, gating.alpha, gating.limit, gating.shift, *matrices]

    def _norm(self, norm: Norm | None) -> Fields:
        if norm is None:
            return [0] * 5
        stride = norm.weight.shape[1] if norm.weight.ndim == 2 else 0
        return [int(norm.kind), self._floats(norm.weight), self._floats(norm.bias), stride, norm.epsilon]

    def _matrix(self, layer: Any) -> Fields:
        """The fields of a matrix; its kind is one of `native/products.h`."""
        if layer is None:
            return [0] * 6
        held: Any = layer.held if isinstance(layer, QuantizedLinear) else layer
        if isinstance(held, BlockQuantWeight):
            places = [_GROUPED, self._address(held.tiles), self._address(held.description)]
        else:
            places = [_KINDS[held.weight.dtype], self._address(held.weight), 0]
        return [*places, self._floats(layer.bias), layer.in_features, layer.out_features]

    def _floats(self, values: Tensor | None) -> int:
        return self._address(None if values is None else values.detach().float().contiguous())

    def _address(self, tensor: Tensor | None) -> int:
        """The address of a tensor that lives as long as this step; 0 for None."""
        if tensor is None:
            return 0
        self._alive.append(tensor)
        return tensor.data_ptr()


Kind = tuple[str, ...]  # arguments of a rotary embedding besides hidden states and positions


def _kind_of(attention: Attention, rope: nn.Module | None) -> Kind:
    """The argument that selects the rotary embedding of a block where the family has several."""
    several = rope is not None and "layer_type" in signature(rope.forward).parameters
    return (attention.kind or "",) if several else ()


def _ropes_of(blocks: Iterable[BlockDescription], rope: nn.Module | None) -> list[Kind]:
    return sorted({_kind_of(block.attention, rope) for block in blocks if block.attention.turns})


def _turning_of(
    blocks: Sequence[nn.Module], described: Sequence[BlockDescription], rope: nn.Module | None
) -> RopeLayout | None:
    kinds = _ropes_of(described, rope)
    if rope is None or not kinds:
        return None
    module, attention = next(each for each in blocks[0].modules() if hasattr(each, "layer_idx")), described[0].attention
    size = attention.size if attention.latents is None else attention.latents.turned
    found = {RopeLayout.from_attention(module, size, rope, described[0].width, kind) for kind in kinds}
    turning = found.pop()
    if found or turning is None:
        raise UnknownPart("rotary embedding")
    return turning


def _check(block: BlockDescription) -> None:
    """Raises UnknownPart if there are no kernels for a block."""
    experts, attention = block.experts, block.attention
    layers, latents = (*block.layers, *attention.latent_layers), attention.latents
    sizes = (attention.size, attention.value_size, *(() if latents is None else (latents.rank, latents.turned)))
    if any(size % _VECTOR for size in sizes) or not all(layer is None or _is_held(layer) for layer in layers):
        raise UnknownPart("layers")
    if latents is not None and latents.kept:
        layer = latents.expand
        floats = type(layer) is nn.Linear and layer.weight.dtype in (torch.float32, torch.bfloat16)
        if not floats or layer.bias is not None:
            raise UnknownPart("codes in the layer that expands latents")
    if experts is not None and not _experts_fit(experts, block.width):
        raise UnknownPart("experts")


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


def _is_held(layer: nn.Linear | QuantizedLinear | TransposedLinear) -> bool:
    if isinstance(layer, QuantizedLinear):
        if isinstance(layer.held, BlockQuantWeight):
            return layer.held.has_fast_kernel and layer.in_features % CHUNK == 0
        return isinstance(layer.held, FloatForm)
    plain = type(layer) in (nn.Linear, TransposedLinear) or type(layer).__name__ in PLAIN_LINEAR
    return plain and layer.weight.dtype in _KINDS and layer.weight.is_contiguous()


def steps_of(parts: Sequence[RowChunk]) -> list[list[RowChunk]]:
    """Divides the parts, in their order, into as few steps as possible."""
    steps: list[list[RowChunk]] = []
    room = 0
    for part in parts:
        done = 0
        while done < part.count:
            if not room:
                steps.append([])
                room = MOST_POSITIONS
            count = min(room, part.count - done)
            inputs = part.inputs and part.inputs.cut(done, done + count)
            own = replace(part, start=part.start + done, count=count, inputs=inputs)
            steps[-1].append(part if count == part.count else own)
            done, room = done + count, room - count
    return steps
