"""Small real swarms: peers in this process, on real sockets and a real DHT."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from peers.peer_options import PeerOptions, SpanWish
from peers.running_peer import RunningPeer
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.hf.causal_lm import RemoteCausalLM, attach
from splitnet.hf.classifier import RemoteSequenceClassification, attached_classifier
from splitnet.hf.image_text import RemoteImageTextToText, attached_with_images
from splitnet.security.identity import Identity
from splitnet.session.events import Cause, Recovered
from splitnet.session.inference import Session
from splitnet.session.local import MixedSession
from splitnet.session.options import READING_IMAGES, RUNNING, ConnectionOptions
from splitnet.swarm.swarm import ModelFacts, Swarm
from tests.leftovers import outliving_tests

LOOPBACK = "tcp://127.0.0.1:0"
KV_MEMORY = 64 * 2**20
SPANS = [(0, 2), (2, 4), (4, 6)]
"""Thirds of the small models."""


@dataclass
class LocalSwarm:
    """Running peers of one checkpoint, and their clients; peers and clients end with the swarm.

    node: the DHT node of all peers and clients; None: each peer and client has a separate node.
    """

    folder: Path
    peers: list[RunningPeer] = field(default_factory=list)
    node: DhtDirectory | None = None
    _stack: ExitStack = field(default_factory=ExitStack)
    _client: Swarm | None = None

    @property
    def addresses(self) -> list[str]:
        """The addresses of the first peer in the swarm."""
        return next(peer.directory.addresses for peer in self.peers if not _has_ended(peer))

    @property
    def client(self) -> Swarm:
        """The connection shared by all models without their own identity."""
        return self._client or self.join()

    def join(self) -> Swarm:
        """Opens the shared connection; without this call, the first model opens it."""
        self._client = self.connect()
        return self._client

    def add(self, start: int, end: int, **options: Any) -> RunningPeer:
        """Starts a peer for blocks `[start, end)`, or for the span of `wish`. The peer computes in the precision of
        transformers.

        join: an address to join with, instead of the address of the first peer.
        """
        chosen = {"wish": SpanWish(blocks=(start, end)), "listen": LOOPBACK, "kv_memory": KV_MEMORY, "weights": None}
        chosen |= options
        with self._using_node():
            peer = RunningPeer.start(
                options.pop("folder", self.folder),
                PeerOptions(
                    initial_peers=chosen.pop("join", self.addresses if self.peers else ()),
                    **{name: value for name, value in chosen.items() if name != "folder"},
                ),
            )
        self.peers.append(peer)
        self._stack.callback(peer.close)
        return peer

    @contextmanager
    def mended(self) -> Iterator[LocalSwarm]:
        """The same peers, with a new client, for a test that may end some of the peers; after the test, new peers
        replace the ended ones."""
        with self.newcomer() as visitor:
            yield visitor
        ended = [peer for peer in self.peers if _has_ended(peer)]
        for peer in ended:
            peer.close()
            with outliving_tests():
                self.add(peer.span.start, peer.span.end)
            self.peers[self.peers.index(peer)] = self.peers.pop()

    @contextmanager
    def visit(self) -> Iterator[LocalSwarm]:
        """The same peers and client for some time: sessions of its models end with the visit."""
        try:
            yield self
        finally:
            self.client.links.close_sessions()

    @contextmanager
    def newcomer(self) -> Iterator[LocalSwarm]:
        """The same peers for some time, with a new client that does not know them yet and ends with the visit."""
        visitor = LocalSwarm(self.folder, self.peers, self.node)
        with visitor._stack:
            yield visitor

    def connect(self, identity: Identity | None = None) -> Swarm:
        """A new client connection, without a model."""
        facts = ModelFacts.of(Checkpoint.open(self.folder))
        with self._using_node():
            return self._stack.enter_context(Swarm(facts, self.addresses, identity=identity))

    def model(self, codec: str = "none", identity: Identity | None = None, **options: Any) -> RemoteCausalLM:
        """A causal language model whose blocks are on these peers."""
        client = self.client if identity is None else self.connect(identity)
        return attach(Checkpoint.open(self.folder), client, codec=codec, **options)

    def image_model(
        self, codec: str = "none", identity: Identity | None = None, **options: Any
    ) -> RemoteImageTextToText:
        """A model that reads images, whose blocks are on these peers."""
        client = self.client if identity is None else self.connect(identity)
        chosen = ConnectionOptions.of({"codec": codec, **options}, READING_IMAGES)
        return attached_with_images(Checkpoint.open(self.folder), client, chosen)

    def classifier(self, codec: str = "none", **options: Any) -> RemoteSequenceClassification:
        """A model for sequence classification whose blocks are on these peers."""
        labels = options.pop("num_labels", None), options.pop("id2label", None), options.pop("label2id", None)
        chosen = ConnectionOptions.of({"codec": codec, **options}, RUNNING)
        return attached_classifier(Checkpoint.open(self.folder), self.client, labels, chosen)

    @contextmanager
    def _using_node(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if self.node is not None:
                lent = _LentDirectory(self.node)
                patch.setattr(DhtDirectory, "start", lambda **_: lent)
            yield


def _has_ended(peer: RunningPeer) -> bool:
    return peer._leaving.is_set() or peer.transport._closing


class _LentDirectory:
    """A directory whose owner closes it."""

    def __init__(self, directory: DhtDirectory) -> None:
        self._directory = directory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._directory, name)

    def close(self) -> None:
        pass


def dht_node() -> DhtDirectory:
    """A DHT node for swarms whose peers and clients can share one: a node is a process that starts slowly."""
    return DhtDirectory.start(listen=["/ip4/127.0.0.1/tcp/0"])


@contextmanager
def local_swarm(
    folder: Path, spans: Sequence[tuple[int, int]], *, node: DhtDirectory | None = None, **options: Any
) -> Iterator[LocalSwarm]:
    """Peers for `spans` of the checkpoint in `folder`; `node`: the DHT node, see `LocalSwarm`."""
    swarm = LocalSwarm(folder, node=node)
    with swarm._stack:
        for start, end in spans:
            swarm.add(start, end, **options)
        yield swarm


@contextmanager
def shared_swarm(folder: Path, spans: Sequence[tuple[int, int]], **options: Any) -> Iterator[LocalSwarm]:
    """As `local_swarm`, with a client that exists from the beginning, for all tests of a module."""
    with local_swarm(folder, spans, **options) as swarm:
        swarm.join()
        yield swarm


def repairs(session: Session | MixedSession) -> list[Recovered]:
    """The recoveries of a session from lost hops. Moves to a better route, which may happen on a busy machine, are left
    out."""
    return [each for each in session.recoveries if each.cause is not Cause.BETTER_ROUTE]


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < until
        threading.Event().wait(0.02)
