"""Modules in place of a model's blocks, and the values that the model hands to its blocks besides hidden states."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, _vmap_expansion_sdpa

from splitnet.blocks.block_inputs import PositionInputs
from splitnet.checkpoint.families import PER_LAYER_INPUT
from splitnet.errors import UnsupportedModel

HANDED = "splitnet_handed"  # name of an attention function that has only masks
_DERIVED = re.compile(r"^(attention_mask|position_ids|position_embeddings|cache_position)")
"""Arguments of blocks that peers compute from rotary positions, padding and groups."""

_OF_HEAD = frozenset({"labels", "shift_labels", "num_items_in_batch", "logits_to_keep"})
"""Arguments of the head and the loss, which some families hand to their blocks, too; no block reads them."""

_CHECKED_ROWS = 256  # rows of a mask that are compared at once


class AllBlocks(nn.Module):
    """The only entry of the list of blocks. This module calls `blocks`, and returns a value of the type that the
    family's own blocks return. The backbone's mask, positions and cache are ignored, because the code that provides
    `blocks` takes them earlier (see `backbone_of`)."""

    attention_type = layer_type = block_type = "full_attention"  # some backbones choose a mask by this attribute
    handed: HandedStates | None = None  # the values that the model hands to blocks, if blocks read more than one

    def __init__(self, blocks: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.blocks, self._returns_tuple = blocks, returns_tuple

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, None]:
        """`[batch, sequence, hidden]` -> `[batch, sequence, hidden]`."""
        output = self.blocks(hidden_states)
        return (output, None) if self._returns_tuple else output  # some backbones unpack two values


class BlockList(nn.ModuleList):
    """Replaces the list of blocks: the model's own code sees the modules in `called`, and code that looks for layers
    sees an outline of each block."""

    def __init__(self, called: Sequence[nn.Module], outlines: Sequence[nn.Module]) -> None:
        super().__init__()
        self.__dict__["_called"] = list(called)
        for index, outline in enumerate(outlines):
            self.add_module(str(index), outline)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.__dict__["_called"])

    def __len__(self) -> int:
        return len(self.__dict__["_called"])

    def __getitem__(self, index: Any) -> Any:
        return self.__dict__["_called"][index]


class GroupMask(Tensor):
    """`[batch, columns]`, int64, in place of a mask: -1 for padding, and otherwise the number of the group of positions
    that see each other, 0 for none. within_window: some positions do not see the first positions of their group."""

    within_window = False

    @property
    def longest(self) -> int:
        """The number of positions of the longest group."""
        return max((int((self == number).sum(1).max()) for number in self.unique().tolist() if number > 0), default=0)


class HandedStates(threading.local):
    """The values that a multimodal model hands to its blocks in the call of this thread.

    first: the input of the first block, `[batch, seq, hidden]`. added: by block, states that the model adds before it.
    masks: by kind of block; empty: the model makes no mask. per_layer: by block, its own input, `[batch, seq, size]`.
    """

    first: Tensor

    def __init__(self, num_blocks: int, window: int | None = None, per_layer_size: int = 0) -> None:
        self.num_blocks = num_blocks
        self._window = window
        self._per_layer_size = per_layer_size
        self.per_layer: dict[int, Tensor] = {}
        self.added: dict[int, Tensor] = {}
        self.masks: dict[str, GroupMask] = {}

    def receive(
        self, index: int, kind: str, hidden: Tensor, args: Sequence[object], named: Mapping[str, object]
    ) -> None:
        """Takes in the arguments of a block of some kind. Raises UnsupportedModel: there is a tensor that peers do not
        know."""
        others = {f"argument {place}": value for place, value in enumerate(args, 2)} | dict(named)
        if not index:
            self.first, self.added, self.per_layer, self.masks = hidden, {}, {}, {}
        if self._per_layer_size:
            own = others.pop("argument 2" if args else PER_LAYER_INPUT, None)
            if not isinstance(own, Tensor) or own.shape != (*hidden.shape[:2], self._per_layer_size):
                raise UnsupportedModel(f"the model hands no {PER_LAYER_INPUT!r} of the right size to block {index}")
            self.per_layer[index] = own
        for name, value in others.items():
            if isinstance(value, Tensor) and name not in _OF_HEAD and not _DERIVED.search(name):
                raise UnsupportedModel(
                    f"the model hands {name!r} to its blocks, which peers do not read: use its text alone"
                )
        if index and bool(hidden.any()):
            self.added[index] = hidden
        mask = named.get("attention_mask")
        if isinstance(mask, GroupMask) and not torch.equal(mask, self.masks.setdefault(kind, mask)):
            raise _groups_differ()

    def with_per_layer(self, inputs: Sequence[PositionInputs], batch: int) -> Sequence[PositionInputs]:
        """The inputs of each row of a call with those of blocks; `inputs` may be empty."""
        if not self.per_layer:
            return inputs
        given = inputs or [PositionInputs()] * batch
        by_block = {block: values.detach().cpu() for block, values in self.per_layer.items()}
        return [
            replace(own, per_layer={block: values[row] for block, values in by_block.items()})
            for row, own in enumerate(given)
        ]

    def mask(self) -> tuple[GroupMask | None, bool]:
        """The mask of the blocks, if there is one, and whether its groups count only in blocks with a sliding window,
        and within it. Raises UnsupportedModel: peers have no such masks."""
        if not self.masks:
            return None, False
        most = max(self.masks.values(), key=lambda mask: int(mask.max()))
        if all(torch.equal(mask, most) and not mask.within_window for mask in self.masks.values()):
            return most, False
        fits = all(
            torch.equal(mask, most if kind == "sliding_attention" else most.clamp(max=0))
            for kind, mask in self.masks.items()
        )
        if not fits or self._window is None or most.within_window != (most.longest > self._window):
            raise _groups_differ()
        return most, True


def _groups_differ() -> UnsupportedModel:
    return UnsupportedModel("the blocks of the model have groups of positions that differ: use its text alone")


class BlockStandIn(AllBlocks):
    """One entry of the list of blocks of a multimodal model. The last entry runs all blocks; the entries before it give
    zeros, so that states which the model adds between two blocks are the input of the next entry.

    kind: of the block, by which some backbones choose a mask.
    """

    def __init__(self, blocks: nn.Module, returns_tuple: bool, handed: HandedStates, index: int, kind: str) -> None:
        super().__init__(blocks, returns_tuple)
        self.attention_type = self.layer_type = self.block_type = kind
        self.handed = self._handed = handed
        self._index, self._is_last = index, index + 1 == handed.num_blocks
        self.output: Tensor | None = None  # in place of zeros

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, None]:
        """As `AllBlocks.forward`. Raises UnsupportedModel: the model hands over a tensor that peers do not know."""
        self._handed.receive(self._index, self.attention_type, hidden_states, args, kwargs)
        if self._is_last:
            return super().forward(self._handed.first)
        output = torch.zeros_like(hidden_states) if self.output is None else self.output
        return (output, None) if self._returns_tuple else output


def _mask_handed(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **_: Any,
) -> Tensor:
    """A `GroupMask`. Arguments as in `transformers.masking_utils.sdpa_mask`.

    Raises UnsupportedModel: positions see later positions that are not in a group of neighbours, or cached positions
    see new ones.
    """
    found = torch.zeros(batch_size, kv_length, dtype=torch.int64, device=device)
    if attention_mask is not None:
        found[~attention_mask[:, kv_offset : kv_offset + kv_length].bool()] = -1
    if q_length == 1:
        return found.as_subclass(GroupMask)
    rows, new = torch.arange(batch_size, device=device), torch.arange(q_length, device=device) + q_offset
    head = torch.zeros((), dtype=torch.int64, device=device)

    def sees(queries: Tensor, columns: Tensor) -> Tensor:
        """`[batch, queries, columns]`."""
        if use_vmap:
            return _vmap_expansion_sdpa(mask_function)(rows, head[None], queries, columns)[:, 0]
        seen = mask_function(rows[:, None, None], head, queries[:, None], columns[None])
        return seen.expand(batch_size, len(queries), len(columns))

    if q_offset > 0 and bool(sees(new[:1] - 1, new[:1]).any()):
        raise UnsupportedModel("a piece of the prompt ends within an image: leave out prefill_chunk_size")
    pieces = new.split(_CHECKED_ROWS)
    neighbours = (new + 1).clamp(max=int(new[-1])).split(_CHECKED_ROWS)
    each = [sees(*pair).diagonal(dim1=1, dim2=2) for pair in zip(pieces, neighbours, strict=True)]
    after = torch.cat(each, dim=1)[:, :-1]
    if not bool(after.any()) and not bool(sees(new[:-1], new[-1:]).any()):
        return found.as_subclass(GroupMask)
    begins = torch.cat((torch.ones_like(after[:, :1]), ~after), dim=1)
    alone = begins & torch.cat((begins[:, 1:], torch.ones_like(begins[:, :1])), dim=1)
    groups = begins.cumsum(1).masked_fill(alone, 0)
    within_window = False
    for own, some in zip(pieces, groups.split(_CHECKED_ROWS, dim=1), strict=True):
        same = (some[:, :, None] == groups[:, None]) & (some[:, :, None] > 0)
        seen = sees(own, new)
        within_window |= bool((same & ~seen).any())
        if bool(((seen != same) & (own[:, None] < new)).any()):
            raise UnsupportedModel("positions of the model see later positions without a group: use its text")
    own_columns = found[:, kv_length - q_length :]
    found[:, kv_length - q_length :] = torch.where(own_columns < 0, own_columns, groups)
    made = found.as_subclass(GroupMask)
    made.within_window = within_window
    return made


AttentionMaskInterface.register(HANDED, _mask_handed)
