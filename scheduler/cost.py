"""The one cost model: how long a step takes on a route, and its energy. Clients, peers and the simulator all use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Final

from scheduler.batching import PASS_POSITIONS
from scheduler.facts import CLIENT, PASS_SIZES, Hop, Link, Network, Peer, Speed


@dataclass(frozen=True, slots=True)
class Encoding:
    """The size and the speed of a codec."""

    name: str
    bytes_per_position: float  # size of an encoded position
    step_ms: float = 0.0  # constant part of the time to encode and decode a step
    position_ms: float = 0.0  # additional time per position

    def ms(self, positions: float, bytes_per_ms: float) -> float:
        """Ms to send a step of this many positions over a link, without its latency."""
        per_position = self.position_ms + self.bytes_per_position / bytes_per_ms
        return self.step_ms + positions * per_position


CODING_MS: Final[Mapping[str, tuple[float, float]]] = {"none": (0.0, 0.0001), "int8": (0.24, 0.0029)}
"""(step_ms, position_ms) of the codecs whose loss does not show in the text. Only these are chosen automatically.

Both were measured on one CPU core, with a hidden size of 576. step_ms: the time that int8 adds to a hop between two
passes, with cold caches (docs/benchmarks.md). position_ms: the time for 512 positions at once, per position
(docs/codecs.md).
"""


def encodings_of(bytes_per_position: Mapping[str, float]) -> tuple[Encoding, ...]:
    """The encodings with these sizes that may be chosen automatically. Raises ValueError: no codec may be chosen."""
    known = [Encoding(name, size, *CODING_MS[name]) for name, size in bytes_per_position.items() if name in CODING_MS]
    if not known:
        raise ValueError(
            f"no codec may be chosen automatically; known codecs: {', '.join(bytes_per_position) or 'none'}"
        )
    return tuple(known)


def choose_codec(bytes_per_position: Mapping[str, float], bytes_per_ms: float) -> str:
    """The fastest codec for a link on which half of the positions belong to a prefill, and half to single decode steps.

    bytes_per_position: the size of an encoded position, for the codecs that both ends know. bytes_per_ms: bandwidth of
    the link; a link that was not measured counts as slow. Raises ValueError if no codec may be chosen automatically.
    """
    return fastest_encoding(encodings_of(bytes_per_position), bytes_per_ms).name


def fastest_encoding(encodings: Sequence[Encoding], bytes_per_ms: float) -> Encoding:
    """The encoding that `choose_codec` chooses."""
    return min(encodings, key=lambda encoding: encoding.ms(2, bytes_per_ms))


@dataclass(frozen=True, slots=True)
class BlockWork:
    """The work of a pass through one block of a model."""

    dense_bytes: float  # weights that every pass reads
    flops: float  # floating-point operations per position
    expert_bytes: float = 0.0  # weights of all experts
    expert_share: float = 1.0  # part of the experts' weights that one position uses
    cache_bytes: float = 0.0  # keys and values of a session; a pass reads the cache of one session per position
    sessions: int = 1  # largest number of sessions whose caches a pass reads

    def bytes_read(self, positions: int) -> float:
        """Bytes that a pass of this many positions reads; at worst each position uses different experts."""
        used = min(1.0, positions * self.expert_share)
        return self.dense_bytes + used * self.expert_bytes + min(positions, self.sessions) * self.cache_bytes


def roofline(work: BlockWork, *, bytes_per_ms: float, flops_per_ms: float) -> Speed:
    """The speed of a device that only reads memory and multiplies, both at the same time.

    This is the roofline model (Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for
    multicore architectures", 2009): a pass takes as long as the slower of reading and
    multiplying. The model is a lower bound of the time, so pass the rates that the device achieves.

    bytes_per_ms: rate at which the device reads memory. flops_per_ms: floating-point operations in the type of the
    weights. Raises ValueError if a rate is not positive.
    """
    if bytes_per_ms <= 0 or flops_per_ms <= 0:
        raise ValueError("bytes_per_ms and flops_per_ms must be greater than 0")
    return Speed(
        tuple(max(work.bytes_read(size) / bytes_per_ms, size * work.flops / flops_per_ms) for size in PASS_SIZES)
    )


PROMPT_SHARE: Final = 0.03
"""Weight of a millisecond of prefill, where a millisecond per generated token has the weight 1. With 0.01 the time of a
whole answer of 100 tokens would be minimal; with 0.03 the time to the first token is a seventh shorter, and the time
per token 2% longer (docs/simulation.md)."""

# The power assumed for a peer that does not state it: more than most devices draw, so that no peer gains by silence.
UNKNOWN_WATTS: Final = 300.0


def block_ms(peer: Peer, positions: int, prompt: int = 0, context: int = 0) -> float:
    """Ms for `positions` new positions through one block of `peer`, in a pass that other sessions share.

    prompt: positions of an earlier prefill in separate passes, whose time counts with `PROMPT_SHARE`. context:
    positions that the session holds after the prefill, including the prompt.
    """
    token_ms = peer.speed.block_ms_at(positions + peer.batch)
    prompt = max(0, prompt - peer.stored_prefix)
    if prompt:
        passes = ceil(prompt / PASS_POSITIONS)
        token_ms += PROMPT_SHARE * passes * peer.speed.block_ms_at(prompt / passes)
    return token_ms + past_ms(peer, positions, prompt, context) if context else token_ms


def past_ms(peer: Peer, positions: int, prompt: int, context: int) -> float:
    """The part of `block_ms` for reading the session's KV cache; the passes of a prompt read half of it on average."""
    token_ms = peer.context_cost.ms_at(positions, context)
    if not prompt:
        return token_ms
    passes = ceil(prompt / PASS_POSITIONS)
    return token_ms + PROMPT_SHARE * passes * peer.context_cost.ms_at(prompt / passes, context - prompt / 2)


def hop_ms(peer: Peer, blocks: int, positions: int, prompt: int = 0, context: int = 0) -> float:
    """Ms from the arrival of a step at a hop until its blocks are done."""
    return peer.queue_ms + blocks * block_ms(peer, positions, prompt, context)


def block_joules(peer: Peer, positions: int, prompt: int = 0, context: int = 0) -> float:
    """Joules for `positions` new positions through one block of `peer`: the positions' part of a shared pass."""
    watts = peer.watts or UNKNOWN_WATTS
    alone_ms = block_ms(peer, positions)
    share = positions / (positions + peer.batch)
    return watts * (alone_ms * share + block_ms(peer, positions, prompt, context) - alone_ms) / 1000


def hop_joules(peer: Peer, blocks: int) -> float | None:
    """Joules of a step of one position at a hop; None if the peer's power is not known."""
    return blocks * block_joules(peer, 1) if peer.watts else None


def transfer_ms(link: Link, positions: int, encodings: Sequence[Encoding], prompt: int = 0) -> float:
    """Ms from the start of encoding to the end of decoding, with the fastest codec."""
    return link.latency_ms + occupied_ms(link, positions, encodings, prompt)


def occupied_ms(link: Link, positions: int, encodings: Sequence[Encoding], prompt: int = 0) -> float:
    """Ms for which a step occupies the link and its two ends, without the latency."""
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
    context: int = 0,
    in_flight: int = 1,
    source: str = CLIENT,
    target: str = CLIENT,
) -> float:
    """Ms until `in_flight` steps of `positions` positions, sent at the same time, are back at the client.

    The first step takes the sum of all hops and links. The slowest stage, a hop or a link, delays each further step. A
    `prompt` of this many positions counts with `PROMPT_SHARE`; a `context` adds the time for reading these positions,
    see `block_ms`.

    encodings: the codecs that a link may use. source, target: peers that replace the client, for a part of a route.
    """
    names = [source, *(hop.peer for hop in hops), target]
    links = [network.link(sender, receiver) for sender, receiver in pairwise(names)]
    passes = [hop_ms(peers[hop.peer], hop.end - hop.start, positions, prompt, context) for hop in hops]
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
    """Ms until consecutive new hops hold the KV cache of `cached` positions, and the client is notified.

    The cache is replayed in chunks that fill a pass, so that the hops work at the same time. source: the sender to the
    first hop.
    """
    chunks = max(1, ceil(cached / PASS_POSITIONS))
    positions = ceil(cached / chunks)
    names = [source, *(hop.peer for hop in hops)]
    stages = [hop_ms(peers[hop.peer], hop.end - hop.start, positions, context=cached // 2) for hop in hops]
    stages += [occupied_ms(network.link(*pair), positions, encodings) for pair in pairwise(names)]
    latency_ms = sum(network.link(*pair).latency_ms for pair in pairwise([*names, CLIENT]))
    return latency_ms + sum(stages) + (chunks - 1) * max(stages)
