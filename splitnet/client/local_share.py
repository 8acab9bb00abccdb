"""Choosing the blocks that a client runs itself, by its memory and speed and by what it knows of the peers."""

from __future__ import annotations

import statistics

import torch

from splitnet.client.link_codecs import LinkCodecs
from splitnet.client.planner import Needs, PlannedHop
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

    Of as good numbers of blocks the smallest.

    Args:
        codec, device, weights: as for `splitnet.AutoModelForCausalLM`.

    Raises:
        CoverageError, PeerBusy: peers are missing for what the client has no memory for.
    """
    blocks = checkpoint.num_blocks
    size = block_bytes(checkpoint, None, weights, device)
    most = min(blocks, int(MEMORY_SHARE * free_memory(torch.device(device)) / size))
    encodings = LinkCodecs(swarm, codec).encodings
    # Between the ends of spans every block more costs the same.
    edges = {edge for record in swarm.peers() for edge in (record.start, record.end) if edge <= most}
    routes: dict[int, tuple[Needs, list[PlannedHop]]] = {}
    problem: CoverageError | PeerBusy | None = None
    for first in {0, most, *edges}:
        needs = Needs(1, encodings, (first, blocks))
        try:
            routes[first] = needs, swarm.plan(needs) if first < blocks else []
        except (CoverageError, PeerBusy) as error:
            problem = error
    if problem and not routes:
        raise problem
    # Planning measures, too: routes are compared by what is known when all are planned.
    costs = {first: swarm.planner.cost_ms(needs, hops) if hops else 0.0 for first, (needs, hops) in routes.items()}
    block_ms = _block_ms(checkpoint, device, weights) if most else 0.0
    share = min(costs, key=lambda first: (first * block_ms + costs[first], first))
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
