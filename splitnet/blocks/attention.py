"""Attention of a packed batch: positions of several sequences in one tensor, each against its own KV cache.

The attention function is registered with transformers' `AttentionInterface`, so the model code of a family runs
unchanged: its linear layers see all positions at once (one read of the weights for all sequences), and only the
attention is replaced. The thread that runs the pass knows which sequences are packed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from splitnet.blocks.adapters import AdapterTensors
from splitnet.blocks.block_inputs import PositionInputs
from splitnet.blocks.kv_cache import SequenceCache, TracedSequence
from splitnet.blocks.kv_form import WINDOW

PACKED = "splitnet_packed"  # name of the attention function, for which transformers makes no masks
GROUPED = "splitnet_sdpa"  # as "sdpa", masks included, for families whose sequences run one by one

# Bytes of the scores of one call of attention. The scores of more new positions are computed in chunks of this size.
SCORE_BYTES = 128 * 2**20
_COPIES = 3  # copies of the scores, each counted as float32: with the mask, after softmax, in the dtype of the values


def positions_at_once(heads: int, key_count: int) -> int:
    """How many new positions, at least 1, have scores that fit in `SCORE_BYTES`; a position has `heads` x `key_count`
    scores."""
    return max(1, SCORE_BYTES // (4 * _COPIES * heads * key_count))


BLOCK = 512  # new positions per call of attention where torch keeps no scores

Masks = dict[tuple[int, int, int | None, torch.dtype | None, range, range], Tensor]


@dataclass(frozen=True)
class RowChunk:
    """New positions of one sequence: `count` of them from the absolute position `start`, which is `row.length`."""

    row: SequenceCache
    start: int
    count: int
    adapter: AdapterTensors | None = None  # the client's changes to the blocks; its prefix is in the row
    # The minimum length, in positions, for which the sequence's rotary frequencies are computed; see
    # `splitnet.wire.messages.Step.rope_length`.
    rope_length: int = 0
    inputs: PositionInputs | None = None

    @property
    def positions(self) -> range:
        """The positions as the blocks count them, after the prefix."""
        start = self.row.prefix_length + self.start
        return range(start, start + self.count)


def positions_of(parts: Sequence[RowChunk]) -> list[int]:
    """The positions of all parts, in order."""
    return [position for part in parts for position in part.positions]


def rotary_positions_of(parts: Sequence[RowChunk]) -> Tensor:
    """The positions by which heads are rotated: `[1, positions]`, or `[axes, 1, positions]` if the axes differ."""
    if all(part.row.rotary is None for part in parts):
        return torch.tensor([positions_of(parts)])
    found = [part.row.rotary_positions(part.start, part.count) for part in parts]
    axes = max(each.shape[1] for each in found)
    positions = torch.cat([each.expand(-1, axes) for each in found])
    return positions.T[:, None] if bool((positions != positions[:, :1]).any()) else positions[None, :, 0]


@dataclass(frozen=True)
class PackedPass:
    """The facts about the running pass that the attention function needs."""

    parts: Sequence[RowChunk]  # in the order of their positions in the packed tensor
    # Sliding windows in positions, by block of the span. If empty, the window that a block passes to its attention
    # counts.
    windows: Sequence[int | None]
    sdpa: bool  # whether the family's attention is torch's scaled dot product attention
    masks: Masks = field(default_factory=dict)  # the masks of this pass; most blocks share them
    # By address of the keys of a block whose keys and values other blocks read: these keys, and `append_with_codes` for
    # each part.
    shared: dict[int, tuple[Tensor, list[tuple[Tensor, Tensor, range]]]] = field(default_factory=dict[int, Any])


def _mask(
    masks: Masks,
    count: int,
    key_count: int,
    window: int | None,
    additive: torch.dtype | None,
    device: torch.device,
    twice: range = range(0),
    without: range = range(0),
) -> Tensor:
    """`[1, 1, count, columns]`: the mask of the last `count` of `key_count` positions, boolean or, with `additive`, as
    numbers to add to scores.

    twice: positions with a column in codes and a column in full, see `SequenceCache.append_with_codes`.
    without: columns that the mask leaves out.
    """
    key = (count, key_count, window, additive, twice, without)
    if key not in masks:
        columns = range(without.start), range(without.stop, key_count + len(twice)), range(key_count - count, key_count)
        before, after, own = (torch.arange(each.start, each.stop, device=device) for each in columns)
        masks[key] = _mask_for(own, torch.cat((before, after)), window, additive, twice)
    return masks[key]


def _mask_for(
    own: Tensor,
    column: Tensor,
    window: int | None,
    additive: torch.dtype | None,
    twice: range,
    groups: Tensor | None = None,
    windowed: bool = False,
) -> Tensor:
    """As `_mask`, for the positions `own` and some columns. groups: by position, see `PositionInputs`."""
    in_codes = column < twice.stop
    position = torch.where(in_codes, column, column - len(twice))
    ahead = position - own[:, None]
    mask = ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)
    if groups is not None:
        same = (groups[own, None] == groups[position]) & (groups[position] != 0)
        mask |= same & (ahead > -window) if windowed and window is not None else same
    if twice:
        mask &= (position < twice.start) | (position >= twice.stop) | (in_codes == (ahead <= -WINDOW))
    if additive is not None:
        hidden = torch.finfo(additive).min
        mask = torch.zeros(mask.shape, dtype=additive, device=own.device).masked_fill_(~mask, hidden)
    return mask[None, None]


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
    """`query`, `key`, `value`: `[1, heads, positions, head size]`. Returns `[1, positions, heads, head size]`."""
    packed = _running.packed
    if packed is None:
        raise RuntimeError("packed attention runs only inside Span.forward")
    block: int = module.layer_idx  # type: ignore[assignment]
    window = packed.windows[block] if packed.windows else kwargs.get("sliding_window")
    sinks = kwargs.get("s_aux")
    eager = not packed.sdpa or kwargs.get("softcap") is not None or sinks is not None
    # The family's own eager code implements its soft caps, sinks and other special terms.
    attend = sys.modules[type(module).__module__].eager_attention_forward if eager else _sdpa_attention
    additive = query.dtype if eager else None
    # Where values and keys differ in head size, torch computes all scores, as the families' code does.
    heads = query.shape[1] if eager or value.shape[3] != query.shape[3] else 1

    # Where torch returns the sums of exponentials, partial results are merged: no scores are kept, no masks or keys
    # repeated.
    blockwise = key.device.type == "cpu" and kwargs.get("position_bias") is None and not torch.is_grad_enabled()
    # Whole sequences must give the same result with a graph for gradients and without.
    traced = any(isinstance(part.row, TracedSequence) for part in packed.parts)
    blockwise = blockwise and not traced and value.shape[3] <= key.shape[3]
    if blockwise and eager:
        blockwise = sinks is not None and _has_sinks_alone(module, attend, query, key, value, kwargs)

    def attend_to(
        query: Tensor, keys: Tensor, values: Tensor, twice: range, masks: Masks | None, mask: Tensor | None = None
    ) -> Tensor:
        count, key_count = query.shape[2], keys.shape[2] - len(twice)
        if mask is None and (twice or _needs_mask(count, key_count, window, eager)):
            mask = _mask({} if masks is None else masks, count, key_count, window, additive, keys.device, twice)
        return attend(module, query, keys, values, mask, **kwargs)[0]

    outputs: list[Tensor] = []
    end = 0
    known = packed.shared.get(id(key), (key, []))[1]
    appended: list[tuple[Tensor, Tensor, range]] = []
    if getattr(module, "store_full_length_kv", False):
        packed.shared[id(key)] = key, appended
    for index, part in enumerate(packed.parts):
        begin, end = end, end + part.count
        if not known:
            own = key[:, :, begin:end], value[:, :, begin:end]
            appended.append(part.row.append_with_codes(block, *own))
        keys, values, twice = (known or appended)[index]
        key_count = keys.shape[2] - len(twice)
        groups = None if part.inputs is None else part.inputs.groups
        if part.inputs is not None and groups is not None and (window is not None or not part.inputs.windowed):
            groups = torch.cat((groups.new_zeros(key_count - part.count), groups)).to(keys.device)
            column = torch.arange(keys.shape[2], device=keys.device)
            most = positions_at_once(query.shape[1], key_count)
            rows = column[key_count - part.count : key_count].split(most)
            for own, given in zip(rows, query[:, :, begin:end].split(most, 2), strict=True):
                mask = _mask_for(own, column, window, additive, twice, groups, part.inputs.windowed)
                outputs.append(_recomputed(attend_to, given, keys, values, twice, None, mask))
            continue
        most, in_blocks = part.count, False
        if twice or heads > 1 or _needs_mask(part.count, key_count, window, eager):
            seen = key_count if window is None else min(key_count, window + part.count - 1)
            in_blocks = blockwise and part.count > 1
            most = min(most, BLOCK if in_blocks else positions_at_once(heads, seen))
        for first in range(begin, end, most):
            last = min(first + most, end)
            seen = key_count - (end - last)
            since = max(0, seen - (window + last - first - 1)) if window is not None else 0
            own_keys, own_values, both = _seen(keys, values, twice, last - first, range(since, seen))
            given = query[:, :, first:last], own_keys, own_values
            if in_blocks:
                mixed = attend_blockwise(*given, packed.masks, window, kwargs.get("scaling"), sinks, both)
                outputs.append(mixed.transpose(1, 2))
            elif most == part.count:
                outputs.append(attend_to(*given, both, packed.masks))
            else:
                outputs.append(_recomputed(attend_to, *given, both, None))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def _recomputed(attend: Callable[..., Tensor], *given: Any) -> Tensor:
    """Attention of a chunk. The backward pass computes it again, so that only one chunk's intermediate results are in
    memory."""
    if torch.is_grad_enabled():
        return checkpoint(attend, *given, use_reentrant=False, preserve_rng_state=False)
    return attend(*given)


def _seen(keys: Tensor, values: Tensor, twice: range, count: int, seen: range) -> tuple[Tensor, Tensor, range]:
    """The columns of `SequenceCache.append_with_codes` that the last `count` positions of `seen` attend to."""
    # The positions from which the first and the last of these positions see keys and values in full.
    begin, end = (
        max(seen.start, twice.start, min(stop - WINDOW, twice.stop)) for stop in (seen.stop + 1 - count, seen.stop)
    )
    codes, full = slice(seen.start, end), slice(begin + len(twice), seen.stop + len(twice))
    if codes.stop == full.start:
        codes, full = slice(0), slice(codes.start, full.stop)  # views, not copies
    keys, values = (
        torch.cat((each[:, :, codes], each[:, :, full]), 2) if codes.stop else each[:, :, full]
        for each in (keys, values)
    )
    return keys, values, range(begin - seen.start, end - seen.start)


def _needs_mask(count: int, key_count: int, window: int | None, eager: bool) -> bool:
    """Whether a mask is needed. One position needs none; neither do several where sdpa's own causal mask is right (its
    fast path)."""
    if count == 1:
        return False
    return eager or key_count > count or (window is not None and key_count > window)


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
    """As transformers' own function, but on CPUs it does not copy shared keys and values for each head."""
    is_causal = query.shape[2] > 1 and attention_mask is None
    by_head = attention_mask is not None and attention_mask.shape[1] > 1
    if query.device.type != "cpu" or is_causal or by_head or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attend_by_group(query, key, value, attention_mask, scaling).transpose(1, 2), None


def attend_blockwise(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    masks: Masks,
    window: int | None,
    scale: float | None,
    sinks: Tensor | None = None,
    twice: range = range(0),
) -> Tensor:
    """Attention of the last positions to all positions, on a CPU, without scores in memory.

    Columns that all these positions see need no mask. Columns that only some positions see are attended to
    separately, and the two results are merged by the logarithms of their sums of exponentials (Dao et al.,
    "FlashAttention", 2022).

    Args:
        query: `[1, heads, positions, head size]`, as the result.
        keys, values: `[1, shared heads, columns, head size]`.
        sinks: `[heads]`, logits that take part in the softmax and have no value.
        twice: see `_mask`.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    heads, count, size = query.shape[1:]
    shared, key_count = keys.shape[1], keys.shape[2] - len(twice)
    # torch's function takes only values of the size of keys, so the values of each shared head are padded.
    if (lacks := size - values.shape[3]) and sinks is None:
        each = zip(query.chunk(shared, 1), keys.split(1, 1), values.split(1, 1), strict=True)
        alike = ((one, own, nn.functional.pad(seen, (0, lacks))) for one, own, seen in each)
        mixed = torch.cat([attend_blockwise(*some, masks, window, scale, twice=twice) for some in alike], dim=1)
        return mixed[..., : values.shape[3]]
    past = twice.start if twice else key_count - count
    by_all = range(0 if window is None else min(max(0, key_count - window), past), past)
    rows = query.reshape(1, shared, heads // shared * count, -1)
    mask = _mask(masks, count, key_count, window, query.dtype, query.device, twice, by_all)
    mask = mask.expand(1, heads // shared, -1, -1)
    few = [torch.cat((each[:, :, : by_all.start], each[:, :, past:]), dim=2) for each in (keys, values)]
    mixed, sums = attend(rows, *few, attn_mask=mask.reshape(1, 1, rows.shape[2], -1), scale=scale)
    if by_all:
        all_see = [each[:, :, by_all.start : past] for each in (keys, values)]
        others, their_sums = attend(rows, *all_see, scale=scale)
        mixed = torch.lerp(mixed, others, torch.sigmoid(their_sums - sums)[..., None].to(mixed.dtype))
        sums = torch.logaddexp(sums, their_sums)
    mixed = mixed.reshape(1, heads, count, -1)
    if sinks is None:
        return mixed
    return mixed * torch.sigmoid(sums.reshape(1, heads, count, 1) - sinks.view(1, heads, 1, 1)).to(mixed.dtype)


_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_sinks_alone: dict[tuple[type, torch.dtype], bool] = {}


def _has_sinks_alone(
    module: nn.Module, eager: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> bool:
    """Whether the family's own code is the usual attention with sinks and nothing else; found by one trial per type."""
    kind = type(module), query.dtype
    if kwargs.get("softcap") is not None or query.dtype not in _TOLERANCES or key.shape[3] != value.shape[3]:
        return False
    if kind not in _sinks_alone:
        noise, (heads, size) = torch.Generator().manual_seed(0), query.shape[1::2]
        shapes = (1, heads, 3, size), *((1, key.shape[1], 9, size),) * 2
        query, key, value = (torch.randn(some, generator=noise, dtype=torch.float32).to(kind[1]) for some in shapes)
        expected = eager(module, query, key, value, _mask({}, 3, 9, None, kind[1], query.device), **kwargs)[0]
        found = attend_blockwise(query, key, value, {}, None, kwargs.get("scaling"), kwargs["s_aux"]).transpose(1, 2)
        wrong = (found - expected).float().norm() / expected.float().norm()
        _sinks_alone[kind] = bool(wrong < _TOLERANCES[kind[1]])
    return _sinks_alone[kind]


def attend_by_group(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention that treats the heads that share keys as positions of one head.

    `query`: `[batch, heads, positions, head size]`, as the result; `keys`, `values`: `[batch, shared heads, reach, head
    size]`; `mask`: `[batch, 1, positions, reach]`, or None if every position is seen.
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
