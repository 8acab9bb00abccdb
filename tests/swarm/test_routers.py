"""Peers behind emulated routers are reached through relays and directly. Skipped where the system has no lab."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from benchmarks import netlab
from splitnet.nat import punch
from splitnet.nat import unreachable as hidden_module
from splitnet.nat.punch import PathKind
from splitnet.nat.relay import RelayServer
from splitnet.nat.stream import StreamLoop
from splitnet.nat.unreachable import UnreachablePeer
from splitnet.security.identity import Identity
from splitnet.wire.endpoints import Endpoint, LinkState
from tests.unit.nat.test_stream import ask, wait_until
from tests.unit.transport.test_transport import Node, echo

pytestmark = pytest.mark.swarm

PUBLIC, SAME = "public", "same router"


class Lab:
    """A relay, an unreachable peer behind a router, and a caller behind another router, the same router, or none."""

    def __init__(self, stack: ExitStack, peer: str, caller: str) -> None:
        self.stack = stack
        routers = {"peer's": netlab.NAMED[peer]}
        behind = {"peer": "peer's"}
        if caller == SAME:
            behind["caller"] = "peer's"
        elif caller != PUBLIC:
            routers["caller's"] = netlab.NAMED[caller]
            behind["caller"] = "caller's"
        try:
            hosts = ("helper", "peer", "caller")
            self.net = stack.enter_context(netlab.Lab(hosts, delay_ms=5.0, routers=routers, behind=behind))
        except netlab.LabError as error:
            pytest.skip(str(error))
        with self.net.inside("helper"):  # a thread stays in the network in which it starts
            loop = StreamLoop()
            stack.callback(loop.close)
            self.helper = RelayServer(loop, Identity.generate(), f"tcp://{self.net.address('helper')}:0")
            stack.callback(self.helper.close)
            self.helper.start()
        self.node = self._node("peer", "tcp://0.0.0.0:0")
        self.node.answer = echo
        tunnels, relays = self.node.tunnels, [self.helper.relay_at(self.net.address("helper"))]
        with self.net.inside("peer"):
            inside = f"tcp://127.0.0.1:{self.node.transport.port}"
            self.hidden = UnreachablePeer(
                tunnels.loop, self.node.identity, inside, tunnels.behind, lambda: relays, lambda: None
            )
            stack.callback(self.hidden.stop_relaying)
            self.hidden.start()
        wait_until(lambda: self.hidden.relays)
        self.caller = self._node("caller")

    def endpoint(self, *, relayed: bool = True) -> Endpoint:
        address = f"tcp://{self.net.public_address('peer')}:{self.node.transport.port}"
        return Endpoint(address, self.node.identity.public, self.hidden.relays if relayed else ())

    def _node(self, host: str, listen: str | None = None) -> Node:
        with self.net.inside(host):
            node = Node(listen)
            self.stack.callback(node.transport.close)
            node.transport.start()
        return node


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setattr(hidden_module, "LOOK_S", 0.1)
    with ExitStack() as stack:
        yield stack


@pytest.mark.default_cases(peer=("port-restricted",), caller=(SAME,))
@pytest.mark.default_cases(peer=("symmetric",), caller=("restricted",))
@pytest.mark.parametrize(
    ("peer", "caller"),
    [
        ("full-cone", PUBLIC),
        ("port-restricted", PUBLIC),
        ("symmetric", PUBLIC),
        ("full-cone", "symmetric"),
        ("symmetric", "restricted"),
        ("port-restricted", "restricted"),
        ("port-restricted", "port-restricted"),
        ("port-restricted", SAME),
        ("symmetric", SAME),
        ("port-restricted", "symmetric"),
        ("symmetric", "address-mapped"),
        ("symmetric", "symmetric"),
    ],
)
def test_a_peer_behind_a_router_is_finally_reached_without_a_relay(stack: ExitStack, peer: str, caller: str) -> None:
    lab = Lab(stack, peer, caller)
    endpoint = lab.endpoint()
    ask(lab.caller, endpoint, b"first")
    wait_until(
        lambda: ask(lab.caller, endpoint, b"x") or lab.caller.tunnels.path_kind(endpoint) is not PathKind.RELAYED
    )
    wait_until(lambda: ask(lab.caller, endpoint, b"y") or not lab.helper.streams.taken)
    lab.net.down("helper")
    ask(lab.caller, endpoint, *(bytes(50_000 + index) for index in range(20)))
    assert lab.caller.states == [(endpoint, LinkState.UP)]


def test_streams_stay_relayed_where_routers_give_connections_random_ports(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(punch, "PUNCH_S", 1.5)
    kind = netlab.NAMED["symmetric"]
    monkeypatch.setitem(netlab.NAMED, "symmetric", dataclasses.replace(kind, random_ports=True))
    lab = Lab(stack, "symmetric", "symmetric")
    endpoint = lab.endpoint()
    wait_until(lambda: ask(lab.caller, endpoint, b"x") or punch._places.taken)
    wait_until(lambda: ask(lab.caller, endpoint, b"x") or not punch._places.taken)
    ask(lab.caller, endpoint, b"y")
    assert lab.caller.tunnels.path_kind(endpoint) is PathKind.RELAYED


def test_a_router_blocks_unrequested_packets(stack: ExitStack) -> None:
    lab = Lab(stack, "port-restricted", PUBLIC)
    direct = lab.endpoint(relayed=False)
    lab.caller.transport.send(direct, [b"x"])
    ask(lab.caller, lab.endpoint(), b"y")
    assert lab.caller.transport.link_state(direct) is not LinkState.UP
