from __future__ import annotations

import ipaddress
import queue
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import IPVersion, ServiceInfo, Zeroconf

from peers.joined_swarm import LanPresence
from splitnet.directory import mdns
from splitnet.directory.mdns import MAX_ADDRESSES, LanNode, LocalNetwork, is_lan_address
from splitnet.errors import LanError, ProtocolError
from splitnet.wire.messages import PROTOCOL_VERSION
from tests.attacks.directory import flooded_lan, hide_on_lan
from tests.multicast import LOOPBACK, use_network_of_its_own

MODEL = "ab" * 16
FOUND_S = 10.0

base58 = st.text("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", min_size=46, max_size=52)
home_ips = st.one_of(
    st.ip_addresses(network="192.168.0.0/16"),
    st.ip_addresses(network="10.0.0.0/8"),
    st.ip_addresses(network="169.254.0.0/16"),
    st.ip_addresses(network="fd00::/8"),
)


def multiaddr(host: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int, node: str) -> str:
    return f"/ip{host.version}/{host}/tcp/{port}/p2p/{node}"


@st.composite
def nodes(draw: st.DrawFn) -> LanNode:
    node = draw(base58)
    places = draw(st.lists(st.tuples(home_ips, st.integers(1, 65535)), min_size=1, max_size=MAX_ADDRESSES))
    addresses = tuple(multiaddr(host, port, node) for host, port in places)
    model = draw(st.text("0123456789abcdef", min_size=8, max_size=128))
    return LanNode(model, draw(st.integers(0, 65535)), addresses)


def node_at(number: int, model: str = MODEL) -> LanNode:
    return LanNode(model, PROTOCOL_VERSION, (f"/ip4/192.168.7.{number}/tcp/31330/p2p/{str(number) * 46}",))


@given(nodes())
def test_an_announcement_is_read_as_it_was_written(node: LanNode) -> None:
    text: dict[bytes, bytes | None] = {key.encode(): value.encode() for key, value in node.txt_entries().items()}
    assert LanNode.from_txt(text) == node
    assert all(len(key) + 1 + len(value or b"") <= 255 for key, value in text.items())


@given(
    st.dictionaries(
        st.sampled_from([b"model", b"protocol", *(f"dht{index}".encode() for index in range(12))]),
        st.none()
        | st.binary(max_size=80)
        | nodes().flatmap(lambda node: st.sampled_from([*node.txt_entries().values()])).map(str.encode),
    )
)
def test_any_announcement_is_valid_or_refused(text: dict[bytes, bytes | None]) -> None:
    try:
        node = LanNode.from_txt(text)
    except ProtocolError:
        return
    assert 1 <= len(node.addresses) <= MAX_ADDRESSES
    assert all(map(is_lan_address, node.addresses))
    assert {address.rpartition("/")[2] for address in node.addresses} == {node.id}


@pytest.mark.parametrize(
    "place",
    [
        "/ip4/127.0.0.1/tcp/31330",
        "/ip4/0.0.0.0/tcp/31330",
        "/ip4/224.0.0.251/tcp/31330",
        "/ip4/255.255.255.255/tcp/31330",
        "/ip4/8.8.8.8/tcp/31330",
        "/ip4/192.168.1.300/tcp/31330",
        "/ip4/192.168.1.3/tcp/0",
        "/ip4/192.168.1.3/tcp/65536",
        "/ip4/192.168.1.3/udp/31330",
        "/ip6/::1/tcp/31330",
        "/ip6/::ffff:8.8.8.8/tcp/31330",
        "/ip6/fe80::1/tcp/31330",
        "/ip6/192.168.1.3/tcp/31330",
        "/dns4/example.org/tcp/31330",
    ],
)
def test_addresses_outside_the_local_network_are_refused(place: str) -> None:
    node = "2" * 46
    assert is_lan_address(f"/ip4/192.168.1.3/tcp/31330/p2p/{node}")
    assert not is_lan_address(f"{place}/p2p/{node}")


def test_only_addresses_that_others_can_reach_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    use_network_of_its_own(monkeypatch)
    with LocalNetwork(MODEL) as network, pytest.raises(LanError, match="no address on a local network"):
        network.announce_node([f"/ip4/127.0.0.1/tcp/31330/p2p/{'2' * 46}", f"/ip4/8.8.8.8/tcp/31330/p2p/{'2' * 46}"])
    monkeypatch.setattr(mdns, "_own_addresses", list)
    with pytest.raises(LanError, match="this machine has no address on a local network"):
        LocalNetwork(MODEL)


@pytest.mark.full
def test_nodes_of_a_model_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    use_network_of_its_own(monkeypatch)
    seen: queue.SimpleQueue[Sequence[LanNode]] = queue.SimpleQueue()
    with LocalNetwork(MODEL) as first, LocalNetwork(MODEL) as second, LocalNetwork("cd" * 16) as other:
        first.watch_nodes(seen.put)
        first.announce_node(node_at(1).addresses)
        other.announce_node(node_at(2, "cd" * 16).addresses)
        second.announce_node([f"/ip4/127.0.0.1/tcp/31330/p2p/{'3' * 46}", *node_at(3).addresses])
        assert second.search(FOUND_S) == [node_at(1)]
        assert seen.get(timeout=FOUND_S) == [node_at(3)]
        assert seen.empty()


def test_invalid_announcements_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    use_network_of_its_own(monkeypatch)
    with LocalNetwork(MODEL) as network, LocalNetwork(MODEL) as old, LocalNetwork(MODEL) as honest:
        with monkeypatch.context() as patch:
            patch.setattr(mdns, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
            old.announce_node(node_at(4).addresses)
        stranger = Zeroconf(interfaces=[LOOPBACK], ip_version=IPVersion.V4Only)
        try:
            good = node_at(5).txt_entries()
            for number, text in enumerate(
                ({}, {"model": b"\xff" * 200}, {**good, "dht0": "/ip4/8.8.8.8/tcp/1/p2p/x"}, {**good, "protocol": "-1"})
            ):
                name = f"s{number}.{mdns.SERVICE_TYPE}"
                info = ServiceInfo(mdns.SERVICE_TYPE, name, port=9, parsed_addresses=[LOOPBACK], properties=text)
                stranger.register_service(info, cooperating_responders=True)
            honest.announce_node(node_at(6).addresses)
            assert network.search(FOUND_S) == [node_at(6)]
            assert network.foreign_protocols == {PROTOCOL_VERSION + 1}
        finally:
            stranger.close()


def test_fake_nodes_do_not_hide_a_later_node(monkeypatch: pytest.MonkeyPatch) -> None:
    use_network_of_its_own(monkeypatch)
    monkeypatch.setattr(mdns, "MAX_NODES", 3)
    monkeypatch.setattr(mdns, "MAX_WAITING", 5)
    seen: queue.SimpleQueue[Sequence[LanNode]] = queue.SimpleQueue()
    with LocalNetwork(MODEL) as victim, LocalNetwork(MODEL) as honest, flooded_lan(MODEL, count=9):
        assert len(victim.search(FOUND_S)) == 3
        assert len(victim._waiting) <= 5
        victim.watch_nodes(seen.put)
        honest.announce_node(node_at(7).addresses)
        while node_at(7) not in seen.get(timeout=FOUND_S):
            pass


@pytest.mark.full
def test_a_flood_does_not_hide_a_later_node(monkeypatch: pytest.MonkeyPatch) -> None:
    use_network_of_its_own(monkeypatch)
    monkeypatch.setattr(mdns, "LOOK_S", 0.05)
    monkeypatch.setattr(mdns, "FIRST_PAUSE_S", 0.05)
    seen: queue.SimpleQueue[Sequence[LanNode]] = queue.SimpleQueue()
    with LocalNetwork(MODEL) as victim, LocalNetwork(MODEL) as honest:
        victim.announce_node(node_at(6).addresses)
        victim.watch_nodes(seen.put)
        hide_on_lan(MODEL)
        honest.announce_node(node_at(7).addresses)
        while node_at(7) not in seen.get(timeout=FOUND_S):
            pass
        assert victim._records() <= mdns.MOST_RECORDS
        with LocalNetwork(MODEL) as newcomer:
            newcomer.watch_nodes(seen.put)
            while node_at(6) not in seen.get(timeout=FOUND_S):  # the node announces itself repeatedly
                pass


def test_a_node_is_found_at_its_new_address(monkeypatch: pytest.MonkeyPatch) -> None:
    use_network_of_its_own(monkeypatch)
    monkeypatch.setattr(mdns, "LOOK_S", 0.05)
    monkeypatch.setattr(mdns, "FIRST_PAUSE_S", 0.05)
    moved = LanNode(MODEL, PROTOCOL_VERSION, (node_at(8).addresses[0].replace("192.168.7.8", "192.168.9.9"),))
    seen: queue.SimpleQueue[Sequence[LanNode]] = queue.SimpleQueue()
    with LocalNetwork(MODEL) as network, LocalNetwork(MODEL) as other:
        other.watch_nodes(seen.put)
        network.watch_nodes(seen.put)
        network.announce_node(node_at(8).addresses)
        assert node_at(8) in seen.get(timeout=FOUND_S)
        with monkeypatch.context() as patch:
            patch.setattr(mdns, "_own_addresses", list)
            with pytest.raises(LanError, match="no address on a local network"):
                network.begin_again(addresses=moved.addresses)
        while moved not in seen.get(timeout=FOUND_S):  # after the network has come up
            pass


def test_a_node_announces_its_new_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the directory notices the new addresses late: the peer may look before that, and again later."""
    use_network_of_its_own(monkeypatch)
    moved = LanNode(MODEL, PROTOCOL_VERSION, (node_at(8).addresses[0].replace("192.168.7.8", "192.168.9.9"),))
    seen: queue.SimpleQueue[Sequence[LanNode]] = queue.SimpleQueue()
    directory: Any = SimpleNamespace(addresses=list(node_at(8).addresses), meet=len)
    checkpoint: Any = SimpleNamespace(fingerprint=MODEL, name="tiny")
    with LocalNetwork(MODEL) as other:
        other.watch_nodes(seen.put)
        presence = LanPresence.start(directory, checkpoint, has_joined=True, report=lambda *_: None)
        assert presence is not None
        try:
            assert node_at(8) in seen.get(timeout=FOUND_S)
            begun = presence._network._mdns
            presence.announce_addresses()
            directory.addresses = [f"/ip4/127.0.0.1/tcp/31330/p2p/{'8' * 46}"]
            presence.announce_addresses()
            assert presence._network._mdns is begun
            directory.addresses = list(moved.addresses)
            presence.announce_addresses()
            while moved not in seen.get(timeout=FOUND_S):
                pass
        finally:
            presence.close()


def test_two_concurrent_restarts_listen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    use_network_of_its_own(monkeypatch)
    with LocalNetwork(MODEL) as network:
        opened = [network._mdns]

        def open_one(made: Any = network._opened) -> Any:
            opened.append(made())
            return opened[-1]

        def meanwhile(*_: object) -> None:
            patch.undo()
            network.begin_again()

        with monkeypatch.context() as patch:
            network._opened = open_one
            patch.setattr(network._changing, "wait_for", meanwhile)
            network.begin_again()
        assert opened[1:] == [network._mdns]
