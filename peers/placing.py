"""Which blocks a peer takes when it joins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.placement import choose_span
from splitnet.errors import OutOfMemory, SplitnetError
from splitnet.model.checkpoint import Checkpoint
from splitnet.model.span import block_bytes, free_memory
from splitnet.net.facts import facts_of
from splitnet.net.records import PeerRecord

MEMORY_SHARE = 0.6
"""Part of the free memory that blocks take when nothing is asked for; the rest is for KV caches and the system."""


@dataclass(frozen=True)
class SpanWish:
    """What the user asked for: exact blocks, or memory in bytes for them, or neither."""

    blocks: tuple[int, int] | None = None
    memory: int | None = None


ANY_SPAN = SpanWish()


def choose_blocks(
    checkpoint: Checkpoint, wish: SpanWish, present: Sequence[PeerRecord], *, device: str, dtype: str | None
) -> tuple[int, int]:
    """The blocks `[start, end)` to serve beside the peers that are `present`.

    Raises:
        SplitnetError: the blocks asked for do not exist in the model.
        OutOfMemory: not even one block fits.
    """
    count = checkpoint.num_blocks
    if wish.blocks is not None:
        start, end = wish.blocks
        if not 0 <= start < end <= count:
            raise SplitnetError(f"{checkpoint.name} has blocks 0..{count - 1}: use --blocks START:END within 0:{count}")
        return start, end
    size = block_bytes(checkpoint, dtype)
    memory = wish.memory if wish.memory is not None else int(free_memory(device) * MEMORY_SHARE)
    fitting = min(count, memory // size)
    if fitting < 1:
        raise OutOfMemory(
            f"one block of {checkpoint.name} takes {size / 2**20:.0f} MiB, {memory / 2**20:.0f} MiB are given: "
            "use --memory with more, or a smaller --dtype"
        )
    return choose_span([facts_of(record) for record in present], count, fitting)
