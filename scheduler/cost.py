"""The one cost model: how long a step takes on a route. Clients, peers and the simulator all use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from scheduler.swarm import CLIENT, Hop, Link, Network, Peer


def block_ms(peer: Peer, positions: int) -> float:
    """Ms for `positions` new tokens through one block of `peer`.

    A short step is bound by reading the weights, as a decode step is; a long one by its arithmetic.
    """
    return max(peer.decode_ms, positions * peer.prefill_ms)


def transfer_ms(link: Link, num_bytes: float) -> float:
    """Ms from the first byte sent to the last byte received."""
    return link.latency_ms + num_bytes / link.bytes_per_ms


def route_ms(
    hops: Iterable[Hop], peers: Mapping[str, Peer], network: Network, *, positions: int, bytes_per_position: float
) -> float:
    """Ms of one step of `positions` tokens from the client through `hops` and back to it.

    bytes_per_position: size of the boundary activation of one token as the codec writes it.
    """
    num_bytes = positions * bytes_per_position
    total, sender = 0.0, CLIENT
    for hop in hops:
        peer = peers[hop.peer]
        total += transfer_ms(network.link(sender, hop.peer), num_bytes)
        total += peer.queue_ms + (hop.end - hop.start) * block_ms(peer, positions)
        sender = hop.peer
    return total + transfer_ms(network.link(sender, CLIENT), num_bytes)
