"""Runs one new position per sequence through blocks of the usual structure, with as few operations as possible.

A decode step reads all weights and computes little, so the overhead of a family's own code counts: its modules, its
copies, and the separate operations of norms and rotary embeddings. This module runs blocks that have the structure of
Llama's blocks, and calls the family's own layers. Such blocks are recognised by the names of their parts. When a span
loads, a comparison with the outputs of the family's own code shows whether this module computes the same. The family's
own code runs all other blocks, and all steps with more positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitnet.blocks.attention import RowChunk, attend_by_group, rotary_positions_of
from splitnet.blocks.rotary import RopeLayout

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}

Turns = tuple[Tensor, Tensor]  # cosines and signed sines, see `TorchStep.turns`


class TorchStep:
    """Runs blocks of a family that `TorchStep.of` recognises, in order. `windows`: the sliding window of each block in
    positions (None: no window), by the block's index in the KV cache."""

    def __init__(self, blocks: Sequence[nn.Module], rope: nn.Module, windows: Sequence[int | None]) -> None:
        self.blocks = [LeanBlock(block, windows) for block in blocks]
        self._rope = rope

    @classmethod
    def of(cls, blocks: Sequence[nn.Module], rope: nn.Module | None, windows: Sequence[int | None]) -> TorchStep | None:
        """The step for these blocks; None if their parts are not the usual ones."""
        if rope is None or not all(is_usual(block, experts=True) for block in blocks):
            return None
        if any(hasattr(block.self_attn, "sinks") for block in blocks):  # sinks are logits that belong to no position
            return None
        attention: Any = blocks[0].self_attn
        if RopeLayout.from_attention(attention, attention.head_dim, rope, attention.q_proj.in_features) != RopeLayout():
            return None
        return cls(blocks, rope, windows)

    def only(self, blocks: Sequence[LeanBlock]) -> TorchStep:
        """A step for some of the blocks of this step."""
        some = copy(self)
        some.blocks = list(blocks)
        return some

    def takes(self, parts: Sequence[RowChunk]) -> bool:
        """Whether every part of a pass has one position and no adapter."""
        return all(part.count == 1 and part.adapter is None for part in parts)

    def forward(self, hidden: Tensor, parts: Sequence[RowChunk], taps: Sequence[int] = ()) -> Tensor:
        """Runs the blocks: `[positions, hidden]` -> `[positions, (taps + 1) * hidden]`. The result joins the hidden
        states after each number of blocks in `taps`, and the output last. The other fast steps have the same method."""
        turns = self.turns(hidden, rotary_positions_of(parts).to(hidden.device))
        tapped: list[Tensor] = []
        for count, block in enumerate(self.blocks, 1):
            query, key, value = block.before(hidden, turns)
            hidden = block.behind(hidden, block.attend(query, key, value, parts))
            if count in taps:
                tapped.append(hidden)
        return torch.cat((*tapped, hidden), dim=1) if tapped else hidden

    def turns(self, like: Tensor, positions: Tensor) -> Turns:
        """Cosines and sines for the rotation of heads, `[positions, 1, head size]` each, on the device and in the type
        of `like`; `positions`: see `rotary_positions_of`."""
        cos, sin = self._rope(like[None], positions)
        half = cos.shape[-1] // 2
        # `_turned` swaps the two halves of a head, so the sines of the first half are negative.
        return cos[0][:, None], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)[:, None]


class LeanBlock:
    """One block, which runs in three parts: `before` attention, `attend`, and `behind` attention. Only `attend` depends
    on the sequences."""

    def __init__(self, block: Any, windows: Sequence[int | None]) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.index: int = attention.layer_idx
        self._window = windows[self.index]
        self._before, self._between = block.input_layernorm, block.post_attention_layernorm
        self._query, self._key, self._value = attention.q_proj, attention.k_proj, attention.v_proj
        self._query_norm = getattr(attention, "q_norm", None)
        self._key_norm = getattr(attention, "k_norm", None)
        self._out = attention.o_proj
        self._size: int = attention.head_dim
        self._scale: float = attention.scaling
        self._mlp = mlp
        if is_usual(block):
            self._mlp = None
            self._gate, self._up, self._down, self._act = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    @property
    def weights_at(self) -> int:
        """The address of one weight. If the address changes, the block's weights have moved, for example to another
        device."""
        return self._before.weight.untyped_storage().data_ptr()

    def before(self, hidden: Tensor, turns: Turns) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[positions, heads, 1, head size]`, and keys and values `[positions, 1, heads, 1, head size]`."""
        count = len(hidden)
        normed = _norm(self._before, hidden)
        query = _product(self._query, normed).view(count, -1, self._size)
        key = _product(self._key, normed).view(count, -1, self._size)
        value = _product(self._value, normed).view(count, 1, -1, 1, self._size)
        if self._query_norm is not None and self._key_norm is not None:
            query, key = _norm(self._query_norm, query), _norm(self._key_norm, key)
        heads = query.shape[1]
        turned = _turned(torch.cat((query, key), dim=1), *turns)
        return turned[:, :heads].unsqueeze(2), turned[:, heads:].unsqueeze(1).unsqueeze(3), value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, parts: Sequence[RowChunk]) -> Tensor:
        """Stores the keys and values of the parts' positions, and returns `[positions, heads * head size]`. Further
        positions in `query`, `key` and `value` are ignored."""
        attended: list[Tensor] = []
        for index, part in enumerate(parts):
            keys, values = part.row.append(self.index, key[index], value[index])
            if self._window is not None:
                keys, values = keys[:, :, -self._window :], values[:, :, -self._window :]
            attended.append(attend_by_group(query[index : index + 1], keys, values, None, self._scale))
        mixed = attended[0] if len(parts) == 1 else torch.cat(attended)
        return mixed.reshape(len(parts), -1)

    def behind(self, hidden: Tensor, mixed: Tensor, into: Tensor | None = None) -> Tensor:
        """Computes the block's output from `[positions, hidden]` of hidden states and the result of `attend`. `into`:
        the output tensor, which may be `hidden`; None: a new one."""
        hidden = hidden + _product(self._out, mixed)
        normed = _norm(self._between, hidden)
        if self._mlp is not None:
            added = self._mlp(normed[None])
            return torch.add(hidden, (added[0] if isinstance(added, tuple) else added)[0], out=into)
        gated = self._act(_product(self._gate, normed)).mul_(_product(self._up, normed))
        return torch.add(hidden, _product(self._down, gated), out=into)


def is_usual(block: nn.Module, *, experts: bool = False) -> bool:
    """Whether the parts of a block have the names of the parts of Llama's block; equal names do not prove an equal
    computation. `experts`: accepts any module that maps hidden states to hidden states in place of the MLP."""
    children = dict(block.named_children())
    if set(children) != _PARTS:
        return False
    attention: Any = children["self_attn"]
    within = {name for name, _ in attention.named_children()}
    return (
        within in (_ATTENTION, _ATTENTION | _HEAD_NORMS)
        and {name for name, _ in attention.named_parameters(recurse=False)} <= {"sinks"}
        and getattr(getattr(attention, "config", None), "clip_qkv", None) is None
        and (experts or is_mlp(children["mlp"]))
        and all(hasattr(attention, name) for name in ("layer_idx", "head_dim", "scaling"))
        and all(
            hasattr(norm, "variance_epsilon") and hasattr(norm, "weight")
            for name, norm in (*children.items(), *attention.named_children())
            if name.endswith("norm")
        )
    )


def is_mlp(module: nn.Module) -> bool:
    """Whether the parts of a module have the names of the parts of Llama's MLP."""
    return {name for name, _ in module.named_children()} == _MLP


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al., "RoFormer", arXiv:2104.09864) of `[positions, heads, head size]`."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def _product(layer: Any, rows: Tensor) -> Tensor:
    plain = type(layer) is nn.Linear and layer.bias is None
    if plain and len(rows) == 1 and rows.dtype == torch.float32 and rows.device.type == "cpu":
        return torch.mv(layer.weight, rows[0])[None]  # mv reads the weight faster than a product of matrices
    return layer(rows)
