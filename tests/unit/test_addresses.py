from __future__ import annotations

import pytest

from splitnet.net.addresses import dht_address, is_reachable


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
