"""Modules in place of a model's blocks, and the values that the model hands to its blocks besides hidden states."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, _vmap_expansion_sdpa

from splitnet.errors import UnsupportedModel

HANDED = "splitnet_handed"  # name of an attention function that has only masks
_DERIVED = re.compile(r"^(attention_mask|position_ids|position_embeddings|cache_position)")
"""Arguments of blocks that peers compute from rotary positions, padding and groups."""

_CHECKED_ROWS = 256  # rows of a mask that are compared at once


class AllBlocks(nn.Module):
    """The only entry of the list of blocks. This module calls `blocks`, and returns a value of the type that the
    family's own blocks return. The backbone's mask, positions and cache are ignored, because the code that provides
    `blocks` takes them earlier (see `backbone_of`)."""

    attention_type = layer_type = block_type = "full_attention"  # some backbones choose a mask by this attribute

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
    that see each other, 0 for none."""


class HandedStates(threading.local):
    """The values that a multimodal model hands to its blocks in the call of this thread.

    first: the input of the first block, `[batch, seq, hidden]`. added: by block, states that the model adds before it.
    mask: None: the model makes no mask.
    """

    first: Tensor
    mask: GroupMask | None = None

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.added: dict[int, Tensor] = {}

    def receive(self, index: int, hidden: Tensor, args: Sequence[object], named: Mapping[str, object]) -> None:
        """Takes in the arguments of a block. Raises UnsupportedModel: there is a tensor that peers do not know."""
        others = {f"argument {place}": value for place, value in enumerate(args, 2)} | dict(named)
        for name, value in others.items():
            if isinstance(value, Tensor) and not _DERIVED.search(name):
                raise UnsupportedModel(
                    f"the model hands {name!r} to its blocks, which peers do not read: use its text alone"
                )
        if not index:
            self.first, self.added, self.mask = hidden, {}, None
        elif bool(hidden.any()):
            self.added[index] = hidden
        mask = named.get("attention_mask")
        if not isinstance(mask, GroupMask) or mask is self.mask:
            return
        if self.mask is None:
            self.mask = mask
        elif not torch.equal(mask, self.mask):
            raise UnsupportedModel("the blocks of the model have groups of positions that differ: use its text alone")


class BlockStandIn(AllBlocks):
    """One entry of the list of blocks of a multimodal model. The last entry runs all blocks; the entries before it give
    zeros, so that states which the model adds between two blocks are the input of the next entry.

    kind: of the block, by which some backbones choose a mask.
    """

    def __init__(self, blocks: nn.Module, returns_tuple: bool, handed: HandedStates, index: int, kind: str) -> None:
        super().__init__(blocks, returns_tuple)
        self.attention_type = self.layer_type = self.block_type = kind
        self._handed, self._index, self._is_last = handed, index, index + 1 == handed.num_blocks
        self.output: Tensor | None = None  # in place of zeros

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, None]:
        """As `AllBlocks.forward`. Raises UnsupportedModel: the model hands over a tensor that peers do not know."""
        self._handed.receive(self._index, hidden_states, args, kwargs)
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

    Raises UnsupportedModel: positions see later positions that are not in a group of neighbours.
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

    pieces = new.split(_CHECKED_ROWS)
    neighbours = (new + 1).clamp(max=int(new[-1])).split(_CHECKED_ROWS)
    each = [sees(*pair).diagonal(dim1=1, dim2=2) for pair in zip(pieces, neighbours, strict=True)]
    after = torch.cat(each, dim=1)[:, :-1]
    if not bool(after.any()) and not bool(sees(new[:-1], new[-1:]).any()):
        return found.as_subclass(GroupMask)
    begins = torch.cat((torch.ones_like(after[:, :1]), ~after), dim=1)
    alone = begins & torch.cat((begins[:, 1:], torch.ones_like(begins[:, :1])), dim=1)
    groups = begins.cumsum(1).masked_fill(alone, 0)
    for own, some in zip(pieces, groups.split(_CHECKED_ROWS, dim=1), strict=True):
        same = (some[:, :, None] == groups[:, None]) & (some[:, :, None] > 0)
        seen = sees(own, new)
        if bool((((seen != same) & (own[:, None] < new)) | (same & ~seen)).any()):
            raise UnsupportedModel(
                "positions of the model see later positions without a group, or not all of their group: use its text"
            )
    own_columns = found[:, kv_length - q_length :]
    found[:, kv_length - q_length :] = torch.where(own_columns < 0, own_columns, groups)
    return found.as_subclass(GroupMask)


AttentionMaskInterface.register(HANDED, _mask_handed)
