"""Generation with peers and a client that are all behind routers, through relays that die meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks import netlab
from peers.running_peer import RunningPeer
from splitnet.directory.announcer import offered, relaying
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.hf.causal_lm import RemoteCausalLM, attach
from splitnet.nat import unreachable as hidden_module
from splitnet.nat.punch import PathKind
from splitnet.nat.relay import RelayServer
from splitnet.nat.stream import StreamLoop
from splitnet.security.identity import Identity
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.transport.addresses import Reach
from tests.swarm.generation import GREEDY, prompt
from tests.swarm.harness import SPANS, LocalSwarm, local_swarm, wait_until

pytestmark = pytest.mark.swarm

KINDS = {"a": "port-restricted", "b": "address-mapped", "c": "restricted", "client": "symmetric"}
"""The kind of each host's router."""
ANY_PORT = replace(netlab.NAMED["symmetric"], random_ports=True)
"""Between such a router and a router that filters by port, all streams stay relayed."""


class Behind:
    """Three peers with a third of the blocks each, a node of the DHT, and relays."""

    def __init__(self, stack: ExitStack, folder: Path, client: netlab.Router, helpers: int) -> None:
        self._stack = stack
        routers = {f"router of {host}": netlab.NAMED[kind] for host, kind in KINDS.items()} | {
            "router of client": client
        }
        self.names = [f"helper {number}" for number in range(helpers)]
        behind = {host: f"router of {host}" for host in KINDS}
        try:
            lab = netlab.Lab(["node", *self.names, *KINDS], delay_ms=5.0, routers=routers, behind=behind)
            self.lab = stack.enter_context(lab)
        except netlab.LabError as error:
            pytest.skip(str(error))
        with self.lab.inside("node"):
            self.node = stack.enter_context(DhtDirectory.start(listen=[f"/ip4/{self.lab.address('node')}/tcp/0"]))
        self.helpers = {name: self._help(stack, name) for name in self.names}
        self._swarm: LocalSwarm = stack.enter_context(local_swarm(folder, []))
        self.peers = {host: self._peer(host, span) for host, span in zip("abc", SPANS, strict=True)}
        wait_until(lambda: all(len(peer.paths.hidden.relays) == helpers for peer in self.peers.values()))
        for peer in self.peers.values():
            peer._announcer.publish()

    def _help(self, stack: ExitStack, name: str) -> RelayServer:
        identity = Identity.generate()
        with self.lab.inside(name):
            loop = StreamLoop()
            stack.callback(loop.close)
            helper = RelayServer(loop, identity, f"tcp://{self.lab.address(name)}:0")
            stack.callback(helper.close)
            helper.start()
            stack.enter_context(offered(self.node, identity, helper.relay_at(self.lab.address(name))))
        return helper

    def _peer(self, host: str, span: tuple[int, int]) -> RunningPeer:
        listen = f"tcp://{self.lab.address(host)}:0"
        with self.lab.inside(host):
            return self._swarm.add(*span, listen=listen, join=self.node.addresses, reach=Reach.helpers)

    def model(self) -> RemoteCausalLM:
        """The model of a client in the network of the calling thread."""
        facts = ModelFacts.of(self.peers["a"].checkpoint)
        self.client = self._stack.enter_context(Swarm(facts, self.node.addresses))
        return attach(self.peers["a"].checkpoint, self.client, codec="none")

    def ways(self) -> dict[str, PathKind]:
        """The ways from the client to each peer, and from each peer to the next."""
        records = {record.key: record.endpoint for record in self.node.peers(self.peers["a"].checkpoint.fingerprint)}
        ends = {host: records[peer.identity.public] for host, peer in self.peers.items()}
        found = {f"client-{host}": self.client.links.tunnels.path_kind(end) for host, end in ends.items()}
        found["a-b"] = self.peers["a"]._tunnels.path_kind(ends["b"])
        found["b-c"] = self.peers["b"]._tunnels.path_kind(ends["c"])
        return found


class Watching(BaseStreamer):
    """Runs an action after a number of tokens, and measures the longest pause after it."""

    def __init__(self, tokens: int, action: Any) -> None:
        self._left = tokens + 1  # `put` gets the prompt first
        self._action = action
        self._at = 0.0
        self.longest_s = 0.0

    def put(self, value: torch.Tensor) -> None:
        now = time.monotonic()
        self._left -= 1
        if self._left < 0:
            self.longest_s = max(self.longest_s, now - self._at)
        if self._left == 0:
            self._action()
        self._at = time.monotonic()

    def end(self) -> None:
        pass


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setattr(hidden_module, "LOOK_S", 0.5)
    with ExitStack() as stack:
        yield stack


@pytest.mark.full
def test_unreachable_peers_learn_from_a_relay_that_they_are_unreachable(
    stack: ExitStack, folder: Path, local: Any
) -> None:
    """As in docs/routers.md: no options about routers are given, and no peer of the model can connect to another."""
    kinds = dict.fromkeys(("a", "b"), netlab.NAMED["port-restricted"])
    behind = {host: f"router of {host}" for host in kinds}
    routers = {f"router of {host}": kind for host, kind in kinds.items()}
    try:
        lab = netlab.Lab(["helper", "client", *kinds], routers=routers, behind=behind, public="44.77.0")
        stack.enter_context(lab)
    except netlab.LabError as error:
        pytest.skip(str(error))
    with lab.inside("helper"):
        node = stack.enter_context(DhtDirectory.start(listen=[f"/ip4/{lab.address('helper')}/tcp/0"]))
        stack.enter_context(relaying(node, Identity.generate(), "0.0.0.0", 0, lab.address("helper")))
    swarm = stack.enter_context(local_swarm(folder, []))
    for host, span in (("a", (0, 3)), ("b", (3, 6))):
        with lab.inside(host):
            peer = swarm.add(*span, listen="tcp://0.0.0.0:0", join=node.addresses, port_mapping=False)
            assert peer.endpoint.address.startswith(f"tcp://{lab.address(host)}:")
    with lab.inside("client"):
        client = stack.enter_context(Swarm(ModelFacts.of(swarm.peers[0].checkpoint), node.addresses))
        wait_until(lambda: [len(record.relays) for record in client.peers(fresh=True)] == [1, 1])
        model = attach(swarm.peers[0].checkpoint, client, codec="none")
        assert torch.equal(model.generate(**prompt(), **GREEDY), local.generate(**prompt(), **GREEDY))


@pytest.mark.full
def test_direct_ways_continue_after_the_relay_has_died(stack: ExitStack, folder: Path, local: Any) -> None:
    behind = Behind(stack, folder, netlab.NAMED[KINDS["client"]], helpers=1)
    wanted = local.generate(**prompt(), **GREEDY)
    with behind.lab.inside("client"):
        model = behind.model()
        with model.session() as cache:
            assert torch.equal(model.generate(**prompt(), **GREEDY), wanted)
            assert cache.session is not None
            assert not any(hop.relayed for hop in cache.session.hops), "hops reach each other, too"

            def are_straight() -> bool:
                assert torch.equal(model.generate(**prompt(), **GREEDY), wanted)
                return PathKind.RELAYED not in behind.ways().values()

            wait_until(are_straight)
        watching = Watching(5, lambda: behind.lab.down("helper 0"))
        with model.session():
            assert torch.equal(model.generate(**prompt(), **GREEDY, streamer=watching), wanted)
        assert not [event for event in model.swarm.events.since(0) if event.kind == "lost"]
        print(f"longest pause {watching.longest_s:.2f} s")


@pytest.mark.full
def test_an_answer_continues_through_another_relay(stack: ExitStack, folder: Path, local: Any) -> None:
    behind = Behind(stack, folder, ANY_PORT, helpers=2)
    wanted = local.generate(**prompt(), **GREEDY)
    killed: list[str] = []

    def kill() -> None:
        name = max(behind.names, key=lambda name: behind.helpers[name].passed_bytes)
        behind.helpers[name].close()
        killed.append(name)

    with behind.lab.inside("client"):
        model = behind.model()
        model.generate(**prompt(), **GREEDY)
        assert behind.ways()["client-a"] is PathKind.RELAYED
        watching = Watching(10, kill)
        with model.session():
            assert torch.equal(model.generate(**prompt(), **GREEDY, streamer=watching), wanted)
            assert behind.ways()["client-a"] is PathKind.RELAYED
        assert len(killed) == 1
        print(f"longest pause {watching.longest_s:.2f} s")
