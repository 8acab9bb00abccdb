"""Peers that find each other on a local network, and a client that finds the peers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peers.peer_options import PeerOptions, SpanWish
from peers.running_peer import RunningPeer
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.connection import find_swarm
from splitnet.errors import DirectoryError
from splitnet.swarm.swarm import ModelFacts, Swarm
from tests.multicast import lan_host, use_network_of_its_own
from tests.swarm.harness import KV_MEMORY

pytestmark = pytest.mark.swarm


def test_peers_and_clients_find_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_network_of_its_own(monkeypatch)
    listen = f"tcp://{lan_host()}:0"
    facts = ModelFacts.of(Checkpoint.open(folder))

    def start(blocks: tuple[int, int]) -> tuple[RunningPeer, list[str]]:
        stages: list[str] = []
        options = PeerOptions(wish=SpanWish(blocks), lan=True, listen=listen, kv_memory=KV_MEMORY)
        return RunningPeer.start(folder, options, progress=lambda stage, done, total: stages.append(stage)), stages

    first, stages = start((0, 2))
    try:
        assert f"no swarm for {facts.name} on this network: starting one" in stages
        second, stages = start((2, 6))
        try:
            assert "found 1 peer on this network: joining" in stages
            addresses = find_swarm(facts, lan=True)
            # One answer is enough; the second may come later.
            assert re.fullmatch(r"found (1 peer|2 peers) on this network: joining \.\.\.\n", capsys.readouterr().err)
            with Swarm(facts, addresses) as swarm:
                assert {(record.start, record.end) for record in swarm.peers(fresh=True)} == {(0, 2), (2, 6)}
        finally:
            second.close()
    finally:
        first.close()
    with pytest.raises(DirectoryError, match=r"on this network: start a peer with `splitnet peer \S+`, or give --join"):
        find_swarm(facts, lan=True)
