"""Attention of a packed batch: positions of several sequences in one tensor, each against its own KV cache.

It is registered with transformers' `AttentionInterface`, so that the model code of a family runs unchanged: its
linear layers see all positions at once (one read of the weights for all sequences), and this function replaces the
attention alone. Which sequences are packed is known to the thread that runs the pass.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from splitnet.blocks.adapters import Adapter
from splitnet.blocks.kv_cache import SequenceCache

PACKED = "splitnet_packed"  # name of the attention function; transformers makes no masks for it
GROUPED = "splitnet_sdpa"  # as "sdpa", masks included, for families that run sequence by sequence

SCORE_BYTES = 128 * 2**20  # of a call of attention: scores of more new positions are computed in chunks of these
_COPIES = 3  # of the scores in float32: with the mask, after softmax, and in the dtype of the values


def positions_at_once(heads: int, reach: int) -> int:
    """So many new positions' scores fit in `SCORE_BYTES`, each for `heads` heads by `reach` positions; at least 1."""
    return max(1, SCORE_BYTES // (4 * _COPIES * heads * reach))


Masks = dict[tuple[int, int, int | None, torch.dtype | None], Tensor]


@dataclass(frozen=True)
class Chunk:
    """New positions of one sequence: `count` of them from the absolute position `start`, which is `row.length`."""

    row: SequenceCache
    start: int
    count: int
    adapter: Adapter | None = None  # what its client adds to the blocks; its prefix is in the row
    reach: int = 0  # positions whose rotary frequencies it has at least; see `splitnet.wire.messages.Step.reach`

    @property
    def positions(self) -> range:
        """As the blocks count them: the prefix comes first."""
        start = self.row.prefix_length + self.start
        return range(start, start + self.count)


def positions_of(parts: Sequence[Chunk]) -> list[int]:
    """All of them, one part after the other."""
    return [position for part in parts for position in part.positions]


@dataclass(frozen=True)
class PackedPass:
    """What the attention function must know of the pass that its thread runs."""

    parts: Sequence[Chunk]  # in the order of their positions in the packed tensor
    windows: Sequence[int | None]  # in positions, by block of the span; empty: what blocks pass to their attention
    sdpa: bool  # the family's attention is what torch's scaled dot product attention computes
    masks: Masks = field(default_factory=dict)  # those made so far in this pass: most blocks need the same ones


def _mask(
    masks: Masks, count: int, reach: int, window: int | None, additive: torch.dtype | None, device: torch.device
) -> Tensor:
    """`[1, 1, count, reach]`: what the last `count` of `reach` positions may see, to add to scores or of booleans."""
    key = (count, reach, window, additive)
    if key not in masks:
        past = reach - count
        mask = torch.ones(count, reach, dtype=torch.bool, device=device).tril(past)
        if window is not None:
            mask = mask.triu(past - window + 1)
        if additive is not None:
            hidden = torch.finfo(additive).min
            mask = torch.zeros(count, reach, dtype=additive, device=device).masked_fill_(~mask, hidden)
        masks[key] = mask[None, None]
    return masks[key]


class _Running(threading.local):
    packed: PackedPass | None = None


_running = _Running()


@contextmanager
def running(packed: PackedPass) -> Iterator[None]:
    """Makes `packed` the pass of this thread."""
    _running.packed = packed
    try:
        yield
    finally:
        _running.packed = None


def _packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`query`, `key`, `value`: `[1, heads, positions, head size]`; gives `[1, positions, heads, head size]`."""
    packed = _running.packed
    if packed is None:
        raise RuntimeError("packed attention runs only inside Span.forward")
    block: int = module.layer_idx  # type: ignore[assignment]
    window = packed.windows[block] if packed.windows else kwargs.get("sliding_window")
    eager = not packed.sdpa or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    # What is written out in the family's own code has soft caps, sinks and whatever else it has.
    attend = sys.modules[type(module).__module__].eager_attention_forward if eager else _sdpa_attention
    additive = query.dtype if eager else None
    # Of heads with values of another size torch computes all scores as well, as the families' code does.
    heads = query.shape[1] if eager or value.shape[3] != query.shape[3] else 1

    def attend_to(query: Tensor, keys: Tensor, values: Tensor, masks: Masks | None) -> Tensor:
        count, reach = query.shape[2], keys.shape[2]
        mask = None
        if _needs_mask(count, reach, window, eager):
            mask = _mask({} if masks is None else masks, count, reach, window, additive, keys.device)
        return attend(module, query, keys, values, mask, **kwargs)[0]

    outputs: list[Tensor] = []
    end = 0
    for part in packed.parts:
        begin, end = end, end + part.count
        keys, values = part.row.append(block, key[:, :, begin:end], value[:, :, begin:end])
        reach = keys.shape[2]
        most = part.count
        if heads > 1 or _needs_mask(part.count, reach, window, eager):
            seen = reach if window is None else min(reach, window + part.count - 1)
            most = min(most, positions_at_once(heads, seen))
        for first in range(begin, end, most):
            last = min(first + most, end)
            seen = reach - (end - last)
            since = max(0, seen - (window + last - first - 1)) if window is not None else 0
            given = query[:, :, first:last], keys[:, :, since:seen], values[:, :, since:seen]
            if most == part.count:
                outputs.append(attend_to(*given, packed.masks))
            elif torch.is_grad_enabled():
                # What comes of a chunk is computed again on the way back, so that it is in memory once at a time.
                outputs.append(checkpoint(attend_to, *given, None, use_reentrant=False, preserve_rng_state=False))
            else:
                outputs.append(attend_to(*given, None))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def _needs_mask(count: int, reach: int, window: int | None, eager: bool) -> bool:
    """Not for one position, nor where sdpa's own causal mask (its fast path) is the right one."""
    if count == 1:
        return False
    return eager or reach > count or (window is not None and reach > window)


def _sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' own, which copies keys and values that heads share for each of them; not so here on CPUs."""
    is_causal = query.shape[2] > 1 and attention_mask is None
    by_head = attention_mask is not None and attention_mask.shape[1] > 1
    if query.device.type != "cpu" or is_causal or by_head or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attend_by_group(query, key, value, attention_mask, scaling).transpose(1, 2), None


def attend_by_group(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention in which the heads that share keys are positions of one head.

    `query`: `[batch, heads, positions, head size]`, as the result; `keys`, `values`: `[batch, shared heads, reach, head
    size]`; `mask`: `[batch, 1, positions, reach]`, or None: all is seen.
    """
    batch, heads, count, size = query.shape
    shared = keys.shape[1]
    rows = query.reshape(batch, shared, heads // shared * count, size)
    if mask is not None:
        mask = mask.repeat(1, 1, heads // shared, 1)
    mixed = nn.functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    return mixed.reshape(batch, heads, count, -1)


AttentionInterface.register(PACKED, _packed_attention)
AttentionInterface.register(GROUPED, _sdpa_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
