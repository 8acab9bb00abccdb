"""The one cost model: how long a step takes on a route, and its energy. Clients, peers and the simulator all use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil
from typing import Final

from scheduler.encoding import Encoding
from scheduler.network import CLIENT, Link, Network
from scheduler.packing import PASS_POSITIONS
from scheduler.swarm import Hop, Peer

PROMPT_SHARE: Final = 0.03
"""What a ms of the prompt counts beside a ms of each token.

An answer of 100 tokens lasts as long as its tokens and its prompt with 0.01. But people wait for the first token: with
0.03 it comes a seventh sooner, and each token 2% later (docs/simulation.md).
"""

UNKNOWN_WATTS: Final = 300.0
"""What a peer counts as of which nobody knows what it draws: more than most devices, as nothing unknown is free."""


def block_ms(peer: Peer, positions: int, prompt: int = 0) -> float:
    """Ms for `positions` new positions through one block of `peer`, in a pass that other sessions share.

    prompt: positions that come once before, in passes of their own, of which `PROMPT_SHARE` counts.
    """
    token_ms = peer.speed.at(positions + peer.batch)
    if not prompt:
        return token_ms
    passes = ceil(prompt / PASS_POSITIONS)
    return token_ms + PROMPT_SHARE * passes * peer.speed.at(prompt / passes)


def hop_ms(peer: Peer, blocks: int, positions: int, prompt: int = 0) -> float:
    """Ms from the arrival of a step at a hop until its blocks are done."""
    return peer.queue_ms + blocks * block_ms(peer, positions, prompt)


def block_joules(peer: Peer, positions: int, prompt: int = 0) -> float:
    """Joules for `positions` new positions through one block of `peer`: their part of a pass that others share."""
    watts = peer.watts or UNKNOWN_WATTS
    alone_ms = block_ms(peer, positions)
    share = positions / (positions + peer.batch)
    return watts * (alone_ms * share + block_ms(peer, positions, prompt) - alone_ms) / 1000


def hop_joules(peer: Peer, blocks: int, positions: int = 1) -> float | None:
    """Joules of a step at a hop; None if it is not known what the peer draws."""
    return blocks * block_joules(peer, positions) if peer.watts else None


def transfer_ms(link: Link, positions: int, encodings: Sequence[Encoding], prompt: int = 0) -> float:
    """Ms from the first byte encoded to the last one decoded, with the codec that takes least."""
    return link.latency_ms + occupied_ms(link, positions, encodings, prompt)


def occupied_ms(link: Link, positions: int, encodings: Sequence[Encoding], prompt: int = 0) -> float:
    """Ms for which a step keeps the link and its two ends busy; the latency is not part of it."""
    step_ms = min(encoding.ms(positions, link.bytes_per_ms) for encoding in encodings)
    return step_ms + (PROMPT_SHARE * occupied_ms(link, prompt, encodings) if prompt else 0.0)


def route_ms(
    hops: Sequence[Hop],
    peers: Mapping[str, Peer],
    network: Network,
    *,
    positions: int,
    encodings: Sequence[Encoding],
    prompt: int = 0,
    in_flight: int = 1,
    source: str = CLIENT,
    target: str = CLIENT,
) -> float:
    """Ms until `in_flight` steps of `positions` positions, sent at the same time, came back to the client.

    The first takes the sum of all hops and links. Each further one is behind it by the slowest stage: a hop, or a link.
    With a `prompt` of so many positions its share counts, see `PROMPT_SHARE`.

    encodings: the codecs that a link may use. source, target: peers in place of the client, for a part of a route.
    """
    names = [source, *(hop.peer for hop in hops), target]
    links = [network.link(sender, receiver) for sender, receiver in pairwise(names)]
    passes = [hop_ms(peers[hop.peer], hop.end - hop.start, positions, prompt) for hop in hops]
    total = sum(transfer_ms(link, positions, encodings, prompt) for link in links) + sum(passes)
    slowest = max(*passes, *(occupied_ms(link, positions, encodings, prompt) for link in links))
    return total + (in_flight - 1) * slowest


def move_ms(
    hops: Sequence[Hop],
    peers: Mapping[str, Peer],
    network: Network,
    *,
    cached: int,
    encodings: Sequence[Encoding],
    source: str = CLIENT,
) -> float:
    """Ms until new hops in a row hold the KV cache of `cached` positions, and the client knows.

    It is replayed in chunks that fill a pass, so the hops work on it at the same time: one pass of all positions would
    count the arithmetic of every hop in full, one after the other.

    source: the hop before them, which replays what it has sent.
    """
    chunks = max(1, ceil(cached / PASS_POSITIONS))
    positions = ceil(cached / chunks)
    names = [source, *(hop.peer for hop in hops)]
    stages = [hop_ms(peers[hop.peer], hop.end - hop.start, positions) for hop in hops]
    stages += [occupied_ms(network.link(*pair), positions, encodings) for pair in pairwise(names)]
    latency_ms = sum(network.link(*pair).latency_ms for pair in pairwise([*names, CLIENT]))
    return latency_ms + sum(stages) + (chunks - 1) * max(stages)
