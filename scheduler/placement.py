"""Which blocks a peer should serve."""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.swarm import Peer

_FASTEST_BLOCK_MS = 1e-6


def choose_span(peers: Iterable[Peer], num_blocks: int, max_blocks: int) -> tuple[int, int]:
    """The span [start, end) of `max_blocks` blocks (all, if the model has fewer) where a new peer helps most.

    The throughput of a chain is that of its weakest block. Of all spans this takes the one whose weakest block has the
    lowest summed throughput; between equals the next weakest block decides, and so on, then the lower start. A block
    without a peer has no throughput at all, so holes come first, and of these as many as fit. (The rule of Petals,
    Borzunov et al., 2023.) Raises ValueError if max_blocks or num_blocks is less than 1.
    """
    if num_blocks < 1 or max_blocks < 1:
        raise ValueError("a peer serves at least one block")
    throughput = [0.0] * num_blocks
    for peer in peers:
        for block in range(max(peer.start, 0), min(peer.end, num_blocks)):
            throughput[block] += 1.0 / max(peer.decode_ms, _FASTEST_BLOCK_MS)
    length = min(max_blocks, num_blocks)
    starts = range(num_blocks - length + 1)
    start = min(starts, key=lambda start: sorted(throughput[start : start + length]))
    return start, start + length
