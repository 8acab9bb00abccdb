"""Who serves which blocks of a model, in the figures and words that people are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from scheduler.cost import hop_joules
from scheduler.facts import CLIENT, Peer, Speed, missing_blocks
from splitnet.directory.record import PeerRecord, facts_of
from splitnet.security.identity import PublicKey
from splitnet.swarm.plan import StartPeer
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.transport.addresses import peer_address

SHORT_KEY = 9
"""Characters of a key that are enough for people to tell peers apart."""


@dataclass(frozen=True)
class Overview:
    """The peers of a model, in the order of their blocks.

    Attributes:
        missing: ranges of blocks `[start, end)` that nobody serves, nor whoever asks.
        start_peer: the command that starts a peer for blocks.
    """

    facts: ModelFacts
    records: tuple[PeerRecord, ...]
    missing: tuple[tuple[int, int], ...]
    start_peer: StartPeer

    @classmethod
    def of(cls, swarm: Swarm, records: Iterable[PeerRecord], local: Iterable[tuple[int, int]] = ()) -> Overview:
        """Of the peers that are there, for a client that runs the blocks `local` itself."""
        ordered = tuple(sorted(records, key=lambda record: (record.start, record.end, record.key.text)))
        serving = [facts_of(record) for record in ordered if record.serves]
        serving += [Peer(CLIENT, start, end, Speed.of(0.0, 0.0)) for start, end in local]
        missing = missing_blocks(serving, swarm.facts.num_blocks)
        return cls(swarm.facts, ordered, tuple(missing), swarm.start_peer)

    def advice(self) -> list[str]:
        """What to do about each range of blocks that nobody serves."""
        return [
            f"blocks {blocks_text(start, end)} are served by nobody: start a peer with `{self.start_peer(start, end)}`"
            for start, end in self.missing
        ]

    def as_json(self) -> dict[str, Any]:
        """All that the records say."""
        return {
            "model": self.facts.name,
            "fingerprint": self.facts.fingerprint,
            "num_blocks": self.facts.num_blocks,
            "missing": [list(hole) for hole in self.missing],
            "peers": [_record_as_json(record) for record in self.records],
        }


def blocks_text(start: int, end: int) -> str:
    """The blocks `[start, end)`."""
    return f"{start}..{end - 1}" if end - start > 1 else f"{start}"


def short_key(key: str) -> str:
    """The beginning of a key, for people."""
    return key[:SHORT_KEY]


def reached(record: PeerRecord) -> str:
    """How a peer is reached, for people: at its address, or through how many helpers."""
    count = len(record.relays)
    return "direct" if not count else f"{count} helper{'s' * (count > 1)}"


def token_ms(record: PeerRecord) -> float:
    """Ms that a decode step of one token takes in all blocks of a peer."""
    return record.block_ms[0] * (record.end - record.start)


def token_joules(record: PeerRecord) -> float | None:
    """Joules of a decoded token in all blocks of a peer; None where they are not known."""
    return hop_joules(facts_of(record), record.end - record.start)


def _record_as_json(record: PeerRecord) -> dict[str, Any]:
    values = dataclasses.asdict(record)
    values["key"] = record.key.text
    values["watts"] = record.watts or None
    values["joules_per_token"] = token_joules(record)
    values["join"] = peer_address(record.endpoint)
    values["relays"] = [{"address": relay.address, "key": PublicKey(relay.key).text} for relay in record.relays]
    values["links"] = [
        {"peer": link.peer.hex(), "rtt_ms": link.rtt_ms, "bytes_per_ms": link.bytes_per_ms} for link in record.links
    ]
    return values
