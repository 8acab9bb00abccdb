"""The addresses that a daemon prints."""

from __future__ import annotations

import pytest

from splitnet.cli.daemon import print_addresses

NODE = "/tcp/41213/p2p/12D3KooWPkSdD98RbWTfupGKkRTurAsT2Cn8x5gF5dSG6QMER1Lw"
PEER = ":31331?key=sn1mr3hkttvvbbnldwh4gvwotk566252xovysdvdkmxlzjcsskcyb5dedoe"


def test_the_address_for_other_machines_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    print_addresses([f"/ip4/192.0.2.7{NODE}", f"/ip4/127.0.0.1{NODE}", f"tcp://192.0.2.7{PEER}"])
    assert capsys.readouterr().out.splitlines() == [
        "others join with",
        f'  --join "tcp://192.0.2.7{PEER}"',
        f"  or, through the DHT: --join /ip4/192.0.2.7{NODE}",
        f"  on this machine, through the DHT: --join /ip4/127.0.0.1{NODE}",
    ]


@pytest.mark.parametrize("host", ["tcp://127.0.0.1", "tcp://[::1]"])
def test_addresses_for_this_machine_only_are_marked(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_addresses([f"/ip4/127.0.0.1{NODE}", f"/ip6/::1{NODE}", f"{host}{PEER}"])
    first, address, *more = capsys.readouterr().out.splitlines()
    assert (first, address) == ("others on this machine join with", f'  --join "{host}{PEER}"')
    assert [line.partition(",")[0] for line in more] == ["  on this machine"] * 2


def test_a_bootstrap_node_prints_its_dht_address_only(capsys: pytest.CaptureFixture[str]) -> None:
    print_addresses([f"/dns4/swarm.example.org{NODE}"])
    assert capsys.readouterr().out == f"others join with\n  --join /dns4/swarm.example.org{NODE}\n"
