from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import ifaddr
import pytest

from splitnet.errors import SplitnetError
from splitnet.security.identity import Identity
from splitnet.transport import addresses
from splitnet.transport.addresses import (
    dht_addresses,
    hosts_of,
    is_reachable,
    loopback_address_of,
    public_address,
    with_literal_host,
)
from splitnet.wire.endpoints import is_address, is_global


@pytest.mark.parametrize(
    ("listen", "dht", "reachable"),
    [
        ("tcp://0.0.0.0:0", ("/ip4/0.0.0.0/tcp/0",), True),
        ("tcp://*:31331", ("/ip4/0.0.0.0/tcp/0",), True),
        ("tcp://192.168.1.3:31331", ("/ip4/192.168.1.3/tcp/0",), True),
        ("tcp://127.0.0.1:0", ("/ip4/127.0.0.1/tcp/0",), False),
        ("tcp://127.8.0.1:0", ("/ip4/127.8.0.1/tcp/0",), False),
        ("tcp://localhost:0", ("/ip4/127.0.0.1/tcp/0",), False),
        ("tcp://[::]:0", ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0"), True),
        ("tcp://[2001:db8::1]:0", ("/ip6/2001:db8::1/tcp/0",), True),
        ("tcp://[::1]:0", ("/ip6/::1/tcp/0",), False),
    ],
)
def test_the_dht_listens_where_the_peer_does(listen: str, dht: str, reachable: bool) -> None:
    assert dht_addresses(listen) == dht
    assert is_reachable(listen) is reachable


@pytest.mark.parametrize(
    ("given", "literal"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("192.0.2.7:80", "192.0.2.7:80"),
        ("[2001:db8::1]", "[2001:db8::1]"),
        ("[2001:db8::1]:80", "[2001:db8::1]:80"),
        ("localhost:80", "127.0.0.1:80"),
    ],
)
def test_a_host_name_is_replaced_by_its_address(given: str, literal: str) -> None:
    assert with_literal_host(given) == literal


def test_the_address_to_announce_has_no_name() -> None:
    assert public_address("tcp://0.0.0.0:0", 7, "localhost") == "tcp://127.0.0.1:7"
    assert public_address("tcp://localhost:0", 7, None) == "tcp://127.0.0.1:7"
    assert public_address("tcp://0.0.0.0:0", 7, "[::1]:9") == "tcp://[::1]:9"


V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.mark.parametrize(
    ("listen", "routes", "networks", "host"),
    [
        ("tcp://0.0.0.0:7", {V4: "192.0.2.7", V6: "2001:db8::7"}, {}, "192.0.2.7"),
        ("tcp://[::]:7", {V4: "192.0.2.7", V6: "2001:db8::7"}, {}, "192.0.2.7"),
        ("tcp://[::]:7", {V6: "2001:db8::7"}, {}, "[2001:db8::7]"),
        ("tcp://[::]:7", {}, {V6: "fd00::7"}, "[fd00::7]"),
        ("tcp://[::]:7", {V6: "2001:db8::7"}, {V4: "192.168.7.7"}, "[2001:db8::7]"),
        ("tcp://*:7", {V6: "2001:db8::7"}, {V4: "192.168.7.7"}, "192.168.7.7"),
        ("tcp://[::]:7", {}, {}, "127.0.0.1"),
        ("tcp://[fd00::9]:7", {V4: "192.0.2.7"}, {}, "[fd00::9]"),
    ],
)
def test_the_announced_host_is_one_at_which_the_peer_listens(
    listen: str, routes: dict[Any, str], networks: dict[Any, str], host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "_on_default_route", lambda family: routes.get(family, ""))
    monkeypatch.setattr(addresses, "_on_any_network", lambda family: networks.get(family, ""))
    assert public_address(listen, 7, None) == f"tcp://{host}:7"


def test_a_network_without_a_router_has_addresses_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ips = [("127.0.0.1", 8), ("169.254.7.7", 16), ("10.7.0.7", 24), (("::1", 0, 0), 128), (("fe80::7", 0, 3), 64)]
    ips += [(("fd00::7", 0, 0), 64)]
    adapter = ifaddr.Adapter("eth0", "eth0", [ifaddr.IP(ip, prefix, "eth0") for ip, prefix in ips])
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: [adapter])
    assert (addresses._on_any_network(V4), addresses._on_any_network(V6)) == ("10.7.0.7", "fd00::7")


def test_without_a_router_the_address_is_of_an_interface_that_is_up_and_leads_to_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = {
        "docker0": ["172.17.0.1"],  # recognised by its name only
        "inner": ["172.18.0.1", ("2001:4860::5", 0, 0)],  # a bridge of containers
        "off": ["10.9.9.9"],
        "br-lan": ["10.1.1.5", ("fd00::5", 0, 0), ("2001:4860::1", 0, 0)],  # a bridge with a card
    }
    for name, carrier in (("docker0", "1"), ("inner", "1"), ("br-lan", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "carrier").write_text(f"{carrier}\n")
    for port in ("inner/brif/veth1", "inner/bridge", "br-lan/brif/eth0/device", "br-lan/bridge"):
        (tmp_path / port).mkdir(parents=True)
    adapters = [ifaddr.Adapter(name, name, [ifaddr.IP(ip, 24, name) for ip in ips]) for name, ips in given.items()]
    monkeypatch.setattr(addresses, "_INTERFACES", tmp_path)
    monkeypatch.setattr(addresses, "_on_default_route", lambda family: "")
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: adapters)
    assert public_address("tcp://0.0.0.0:0", 7, None) == "tcp://10.1.1.5:7"
    assert addresses._on_any_network(V6) == "2001:4860::1"
    adapters.pop()
    assert public_address("tcp://0.0.0.0:0", 7, None) == "tcp://10.9.9.9:7"
    adapters.pop()
    assert not caplog.records
    assert public_address("tcp://0.0.0.0:0", 7, None) == "tcp://127.0.0.1:7"
    assert "No other machine reaches 127.0.0.1: give --public-host" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "192.168.1.1", "8.8.8.8", "0.0.0.0"])
def test_an_ipv4_address_has_one_form(host: str) -> None:
    assert not is_address(f"tcp://[::ffff:{host}]:80")
    assert with_literal_host(f"[::ffff:{host}]:80") == f"{host}:80"


@pytest.mark.parametrize("given", ["no such host:80", "a:b:c", "", "nowhere.invalid"])
def test_a_host_without_an_address_is_named(given: str) -> None:
    with pytest.raises(SplitnetError, match=r"host|address"):
        with_literal_host(given)


def test_the_wait_for_a_silent_name_server_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        over.wait(20)
        raise OSError("too late")

    monkeypatch.setattr("socket.getaddrinfo", hang)
    monkeypatch.setattr("splitnet.transport.addresses.RESOLVE_S", 0.05)
    try:
        with pytest.raises(SplitnetError, match=r"slow\.example\.org"):
            with_literal_host("slow.example.org:80")
    finally:
        over.set()


@pytest.mark.parametrize(
    ("listen", "inside"),
    [
        ("tcp://0.0.0.0:0", "tcp://127.0.0.1:7"),
        ("tcp://*:7", "tcp://127.0.0.1:7"),
        ("tcp://[::]:7", "tcp://[::1]:7"),
        ("tcp://192.168.1.2:0", "tcp://192.168.1.2:7"),
        ("tcp://[fe80::1]:0", "tcp://[fe80::1]:7"),
    ],
)
def test_the_address_of_a_peers_own_port_on_its_machine(listen: str, inside: str) -> None:
    assert loopback_address_of(listen, 7) == inside


def test_globally_routable_addresses() -> None:
    assert is_global("tcp://44.77.0.1:80") and is_global("tcp://[2600::1]:80")
    assert not any(
        map(is_global, ("tcp://192.168.1.2:80", "tcp://100.64.0.1:80", "tcp://127.0.0.1:80", "tcp://[::1]:8"))
    )


def test_hosts_of_addresses_to_join_with() -> None:
    key = Identity.generate().public
    joined = ["/ip4/192.0.2.7/tcp/31330/p2p/Qm", "/ip6/2001:db8::7/tcp/1/p2p/Qm", "/dns4/localhost/tcp/1/p2p/Qm"]
    joined += [
        f"tcp://192.0.2.8:31331?key={key}",
        f"tcp://[2001:db8::8]:31331?key={key}",
        "/dns4/nowhere.invalid/tcp/1",
    ]
    found = {"192.0.2.7", "[2001:db8::7]", "127.0.0.1", "192.0.2.8", "[2001:db8::8]"}
    assert hosts_of(joined) == found
