"""Choosing the blocks that a client runs itself, by its memory and speed and by what it knows of the peers."""

from __future__ import annotations

import statistics

import torch

from scheduler.local_share import best_share
from splitnet.client.link_codecs import LinkCodecs
from splitnet.client.planner import Needs
from splitnet.client.swarm import Swarm
from splitnet.errors import CoverageError, PeerBusy
from splitnet.model.checkpoint import Checkpoint
from splitnet.model.device_clock import seconds_after_work
from splitnet.model.memory import free_memory
from splitnet.model.span import Part, Span, block_bytes

MEMORY_SHARE = 0.5
"""Of what is free, for weights; caches and others need memory, too."""

TIMED_STEPS = 5


def choose_local_blocks(
    checkpoint: Checkpoint, swarm: Swarm, *, codec: str, device: str, weights: str | None
) -> str | None:
    """The first blocks, as `LocalBlocks.load` takes them, with which tokens come soonest; None: none.

    Args:
        codec, device, weights: as for `splitnet.AutoModelForCausalLM`.

    Raises:
        CoverageError, PeerBusy: peers are missing for what the client has no memory for.
    """
    blocks = checkpoint.num_blocks
    size = block_bytes(checkpoint, None, weights, device)
    most = min(blocks, int(MEMORY_SHARE * free_memory(torch.device(device)) / size))
    encodings = LinkCodecs(swarm, codec).encodings
    problem: CoverageError | PeerBusy | None = None

    def route_ms(first: int) -> float | None:
        nonlocal problem
        if first == blocks:
            return 0.0
        needs = Needs(1, encodings, (first, blocks))
        try:
            return swarm.planner.cost_ms(needs, swarm.plan(needs))
        except (CoverageError, PeerBusy) as error:
            problem = error
            return None

    # Between the ends of spans every block more costs the same.
    edges = {edge for record in swarm.peers() for edge in (record.start, record.end) if edge <= most}
    try:
        share = best_share({0, most, *edges}, _block_ms(checkpoint, device, weights) if most else 0.0, route_ms)
    except ValueError:
        assert problem is not None
        raise problem from None
    return f"0:{share}" if share else None


def _block_ms(checkpoint: Checkpoint, device: str, weights: str | None) -> float:
    """Of a decode step through the first block, here."""
    span = Span.load(checkpoint, 0, 1, device=device, weights=weights)
    row = span.new_row()
    hidden = torch.randn(1, span.hidden_size, generator=torch.Generator().manual_seed(0))
    times: list[float] = []
    for position in range(1 + TIMED_STEPS):
        began = seconds_after_work(span.device)
        span.forward(hidden, [Part(row, position, 1)])
        times.append((seconds_after_work(span.device) - began) * 1000)
    return statistics.median(times[1:])
