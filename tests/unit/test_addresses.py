from __future__ import annotations

import threading
from typing import Any

import pytest

from splitnet.errors import SplitnetError
from splitnet.net.addresses import dht_address, inside_of, is_global, is_reachable, public_address, with_literal_host


@pytest.mark.parametrize(
    ("listen", "dht", "reachable"),
    [
        ("tcp://0.0.0.0:0", "/ip4/0.0.0.0/tcp/0", True),
        ("tcp://*:31331", "/ip4/0.0.0.0/tcp/0", True),
        ("tcp://192.168.1.3:31331", "/ip4/192.168.1.3/tcp/0", True),
        ("tcp://127.0.0.1:0", "/ip4/127.0.0.1/tcp/0", False),
        ("tcp://127.8.0.1:0", "/ip4/127.8.0.1/tcp/0", False),
        ("tcp://localhost:0", "/ip4/127.0.0.1/tcp/0", False),
    ],
)
def test_the_dht_listens_where_the_peer_does(listen: str, dht: str, reachable: bool) -> None:
    assert dht_address(listen) == dht
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
def test_a_host_is_announced_by_its_address(given: str, literal: str) -> None:
    assert with_literal_host(given) == literal


def test_the_address_to_announce_has_no_name() -> None:
    assert public_address("tcp://0.0.0.0:0", 7, "localhost") == "tcp://127.0.0.1:7"
    assert public_address("tcp://localhost:0", 7, None) == "tcp://127.0.0.1:7"
    assert public_address("tcp://0.0.0.0:0", 7, "[::1]:9") == "tcp://[::1]:9"


@pytest.mark.parametrize("given", ["no such host:80", "a:b:c", "", "nowhere.invalid"])
def test_a_host_without_an_address_is_named(given: str) -> None:
    with pytest.raises(SplitnetError, match=r"host|address"):
        with_literal_host(given)


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        over.wait(20)
        raise OSError("too late")

    monkeypatch.setattr("socket.getaddrinfo", hang)
    monkeypatch.setattr("splitnet.net.addresses.RESOLVE_S", 0.05)
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
def test_where_a_peer_finds_its_own_port(listen: str, inside: str) -> None:
    assert inside_of(listen, 7) == inside


def test_addresses_of_the_internet() -> None:
    assert is_global("tcp://44.77.0.1:80") and is_global("tcp://[2600::1]:80")
    assert not any(
        map(is_global, ("tcp://192.168.1.2:80", "tcp://100.64.0.1:80", "tcp://127.0.0.1:80", "tcp://[::1]:8"))
    )
