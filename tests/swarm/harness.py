"""Small real swarms: peers in this process, on real sockets and a real DHT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.daemon import Peer
from peers.options import PeerOptions
from peers.placing import SpanWish
from splitnet.client.causal_lm import RemoteCausalLM, attach
from splitnet.client.sequence_classification import RemoteSequenceClassification, attach_classifier
from splitnet.client.swarm import ModelFacts, Swarm
from splitnet.model.checkpoint import Checkpoint
from splitnet.net.identity import Identity

LOOPBACK = "tcp://127.0.0.1:0"
KV_MEMORY = 64 * 2**20


@dataclass
class LocalSwarm:
    """Running peers of one checkpoint, and clients of theirs; all end with the swarm."""

    folder: Path
    peers: list[Peer] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def addresses(self) -> list[str]:
        return self.peers[0].addresses

    def add(self, start: int, end: int, **options: Any) -> Peer:
        """Starts a peer for blocks `[start, end)`, or for what `wish` says; it computes as transformers does."""
        chosen = {"wish": SpanWish(blocks=(start, end)), "listen": LOOPBACK, "kv_memory": KV_MEMORY, "weights": None}
        chosen |= options
        peer = Peer.start(
            options.pop("folder", self.folder),
            PeerOptions(
                initial_peers=self.addresses if self.peers else (),
                **{name: value for name, value in chosen.items() if name != "folder"},
            ),
        )
        self.peers.append(peer)
        self._stack.callback(peer.close)
        return peer

    @contextmanager
    def visit(self) -> Iterator[LocalSwarm]:
        """The same peers for a while: clients that are made on it end with it."""
        visitor = LocalSwarm(self.folder, self.peers)
        with visitor._stack:
            yield visitor

    def connect(self, identity: Identity | None = None) -> Swarm:
        """A client's connection, without a model."""
        facts = ModelFacts.of(Checkpoint.open(self.folder))
        return self._stack.enter_context(Swarm(facts, self.addresses, identity=identity))

    def model(self, codec: str = "none", identity: Identity | None = None, **options: Any) -> RemoteCausalLM:
        """A causal LM whose blocks are on these peers."""
        return attach(Checkpoint.open(self.folder), self.connect(identity), codec=codec, **options)

    def classifier(self, codec: str = "none", **options: Any) -> RemoteSequenceClassification:
        """A model for sequence classification whose blocks are on these peers."""
        return attach_classifier(Checkpoint.open(self.folder), self.connect(), codec=codec, **options)


@contextmanager
def local_swarm(folder: Path, spans: Sequence[tuple[int, int]], **options: Any) -> Iterator[LocalSwarm]:
    """Peers for `spans` of the checkpoint in `folder`."""
    swarm = LocalSwarm(folder)
    with swarm._stack:
        for start, end in spans:
            swarm.add(start, end, **options)
        yield swarm
