"""Peers that leave on purpose, and slow peers that sessions leave."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from peers import service
from peers.counters import SessionEnd
from peers.running_peer import RunningPeer
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.session.events import Cause
from tests.swarm.generation import GREEDY, After, prompt
from tests.swarm.harness import SPANS, LocalSwarm, local_swarm

pytestmark = pytest.mark.swarm


def peer_at(swarm: LocalSwarm, cache: Any, index: int) -> RunningPeer:
    """The peer that is the hop at `index` of a running session."""
    return next(peer for peer in swarm.peers if peer.endpoint == cache.session.hops[index].endpoint)


@pytest.mark.default_cases(index=(1,))
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_peer_that_leaves_hands_its_session_over(
    twins: LocalSwarm, local: Any, index: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # On a slow machine, the session may find a better route before the peer leaves.
    monkeypatch.setattr("splitnet.session.driver.Routes.better_route", lambda *_: None)
    model = twins.model()
    drained: list[float] = []

    def drain() -> None:
        began = time.monotonic()
        leavers[0].drain(30.0)
        drained.append(time.monotonic() - began)

    def leave() -> None:
        leavers.append(peer_at(twins, cache, index))
        thread.start()

    leavers: list[RunningPeer] = []
    thread = threading.Thread(target=drain)
    with model.session() as cache:
        got = model.generate(**prompt(), **GREEDY, streamer=After(10, leave))
        # The text may have ended before the thread ran, so one more token follows once the peer is leaving.
        while not leavers[0].service.leaving:
            time.sleep(0.01)
        more = model.generate(got, attention_mask=torch.ones_like(got), **{**GREEDY, "max_new_tokens": 1})
        thread.join()
        assert cache.session is not None
        causes = [cause for recovery in cache.session.recoveries for cause in recovery.lost]
        assert Cause.LEAVING in [recovery.cause for recovery in cache.session.recoveries]
    assert any("leaving" in cause for cause in causes), causes
    assert "leaving" in [event.kind for event in model.swarm.events.since(0)]
    assert not [record for record in caplog.records if record.name == "splitnet.session.driver"], "nothing is wrong"
    assert leavers[0].counters.ended[SessionEnd.HANDED_OVER] == 1
    assert drained[0] < 10.0
    expected = local.generate(**prompt(), **{**GREEDY, "max_new_tokens": GREEDY["max_new_tokens"] + 1})
    assert torch.equal(more, expected)


def test_a_peer_that_leaves_is_not_in_the_directory_and_takes_no_sessions(twins: LocalSwarm, local: Any) -> None:
    leavers = twins.peers[:2]
    for leaver in leavers:
        leaver.drain(5.0)
    swarm = twins.connect()
    gone = {leaver.endpoint.key for leaver in leavers}
    assert gone.isdisjoint(record.key for record in swarm.peers(fresh=True))
    model = twins.model()
    assert torch.equal(model.generate(**prompt(), **GREEDY), local.generate(**prompt(), **GREEDY))


def test_idle_sessions_do_not_delay_a_leaving_peer(
    node: DhtDirectory, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "IN_USE_S", 0.5)
    with local_swarm(own_folder, SPANS, node=node) as swarm:
        model = swarm.model()
        with model.session():
            model.generate(**prompt(), **{**GREEDY, "max_new_tokens": 2})
            began = time.monotonic()
            swarm.peers[1].drain(60.0)
            assert time.monotonic() - began < 30.0


@pytest.mark.full
def test_a_session_leaves_a_hop_that_has_become_slow(
    twins: LocalSwarm, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**GREEDY, "max_new_tokens": 60}

    def slow_down() -> None:
        slow.append(peer_at(twins, cache, 1))
        prepare = slow[0].service.rows.prepare_step

        def slowly(work: Any) -> None:
            time.sleep(0.15)
            prepare(work)

        monkeypatch.setattr(slow[0].service.rows, "prepare_step", slowly)

    slow: list[RunningPeer] = []
    model = twins.model()
    with model.session() as cache:
        got = model.generate(**prompt(), **options, streamer=After(20, slow_down))
        assert cache.session is not None
        assert slow[0].endpoint not in [hop.endpoint for hop in cache.session.hops]
        assert cache.session.recoveries[0].lost == ("there is a better route",)
        assert cache.session.recoveries[0].cause is Cause.BETTER_ROUTE
    assert torch.equal(got, local.generate(**prompt(), **options))
