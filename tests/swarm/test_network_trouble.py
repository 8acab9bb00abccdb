"""Networks that stop, cut connections or deliver late: the text is the same."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scheduler import liveness
from scheduler.facts import Speed
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.record import facts_of
from splitnet.session import machine
from splitnet.session.driver import Routes
from splitnet.session.events import Cause, RouteFailed, RoutePlanned
from splitnet.session.inference import Session
from splitnet.swarm import measure as measurements
from splitnet.swarm import swarm
from splitnet.swarm.measure import Measurer
from tests.swarm.generation import GREEDY, After, prompt
from tests.swarm.harness import SPANS, LocalSwarm, local_swarm
from tests.swarm.proxy import Proxy, proxies

pytestmark = pytest.mark.swarm

LONG_S = 60.0
"""Longer than any step on a busy machine, for limits that must not be reached."""


@dataclass
class Network:
    """Peers that are only reached through proxies."""

    swarm: LocalSwarm
    proxies: list[Proxy]

    def before(self, cache: Any, index: int) -> Proxy:
        """The proxy before the hop with this index."""
        return self.at(cache.session.hops[index].endpoint.address)

    def at(self, address: str) -> Proxy:
        return next(proxy for proxy in self.proxies if address.endswith(f":{proxy.port}"))


@pytest.fixture(scope="module")
def reached_by_proxies(folder: Path, node: DhtDirectory) -> Iterator[Network]:
    """A network with two peers for every span."""
    with proxies(2 * len(SPANS)) as made, local_swarm(folder, [], node=node) as swarm:
        for proxy, span in zip(made, SPANS * 2, strict=True):
            peer = swarm.add(*span, public_host=f"127.0.0.1:{proxy.port}")
            proxy.target = peer.transport.port
        yield Network(swarm, made)


@pytest.fixture
def network(reached_by_proxies: Network) -> Iterator[Network]:
    """The network for a test; changes of the network are undone after the test."""
    with reached_by_proxies.swarm.newcomer() as swarm:
        yield Network(swarm, reached_by_proxies.proxies)
    for proxy in reached_by_proxies.proxies:
        proxy.mend()


class Then:
    """A streamer that runs actions, by the number of tokens after which each is run."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        self._streamers = [After(tokens, action) for tokens, action in actions.items()]

    def put(self, value: torch.Tensor) -> None:
        for streamer in self._streamers:
            streamer.put(value)

    def end(self) -> None:
        pass


@pytest.mark.full
@pytest.mark.parametrize("index", [0, 1, 2])
def test_late_messages_of_a_lost_hop_change_nothing(network: Network, local: Any, index: int) -> None:
    held: list[Proxy] = []

    def hold() -> None:
        held.append(network.before(cache, index))
        held[0].hold()

    def release() -> None:
        held[0].release()

    model = network.swarm.model()
    with model.session() as cache:
        got = model.generate(**prompt(), **GREEDY, streamer=Then({10: hold, 13: release}), speculate="off")
        assert cache.session is not None
        # On a busy machine steps may be so slow that the session also looks for a better route.
        lost = [each for each in cache.session.recoveries if each.cause is not Cause.BETTER_ROUTE]
        assert len(lost) == 1
        assert held[0] is not network.before(cache, index)
    assert held[0].late_bytes > 0
    assert torch.equal(got, local.generate(**prompt(), **GREEDY))


@pytest.mark.default_cases(index=(0,))
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_stopped_network_is_detected_in_time(
    network: Network, local: Any, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "MAX_SILENCE_S", LONG_S)
    stopped: list[float] = []

    def hold() -> None:
        stopped.append(time.monotonic())
        network.before(cache, index).hold()

    def goes_on() -> None:
        stopped.append(time.monotonic())

    model = network.swarm.model()
    with model.session() as cache:
        got = model.generate(**prompt(), **GREEDY, streamer=Then({12: hold, 13: goes_on}))
        assert isinstance(cache.session, Session)
        usual_s = cache.session.state.usual_ms / 1000
    # The usual time of a step decides how long a hop may be silent, not the upper bound.
    assert usual_s < LONG_S / 4
    assert stopped[1] - stopped[0] < LONG_S / 2
    assert torch.equal(got, local.generate(**prompt(), **GREEDY))


@pytest.mark.full
def test_a_route_through_a_part_of_the_network_that_has_stopped_is_left_before_it_is_opened_again(
    network: Network, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, measure = Routes.answer_query, Measurer.measure_peers
    routes: list[set[str]] = []
    asked: set[str] = set()

    def planned(routes_of: Routes, *args: Any) -> RoutePlanned | RouteFailed:
        answer = plan(routes_of, *args)
        if isinstance(answer, RouteFailed):  # on a busy machine other peers may answer late, too, and are asked again
            return answer
        if not routes:  # all links stop at the same moment
            asked.clear()
            for hop in answer.route:
                network.at(hop.record.endpoint.address).hold()
        routes.append({hop.name for hop in answer.route})
        return answer

    def measured(facts: Measurer, records: Any, others: Any = (), **options: Any) -> None:
        asked.update(record.key.text for record in [*records, *others])
        measure(facts, records, others, **options)

    monkeypatch.setattr(Routes, "answer_query", planned)
    monkeypatch.setattr(Measurer, "measure_peers", measured)
    monkeypatch.setattr(swarm, "LOST_S", 0.0)  # measurements of a moment ago do not count
    monkeypatch.setattr(machine, "OPEN_TIMEOUT_S", LONG_S)
    began = time.monotonic()
    model = network.swarm.model()
    with model.session(max_length=64) as cache:
        got = model(**prompt(), past_key_values=cache).logits
    assert time.monotonic() - began < LONG_S / 2
    assert len(routes) == 2 and not routes[0] & routes[1]
    assert routes[1] <= asked, "as several are silent, all hops of the next route are asked first"
    assert torch.allclose(got, local(**prompt()).logits, atol=1e-4)


@pytest.mark.default_cases(index=(2,))
@pytest.mark.parametrize("index", [0, 1, 2])
def test_connections_that_are_cut(network: Network, local: Any, index: int) -> None:
    model = network.swarm.model()
    with model.session() as cache:
        got = model.generate(**prompt(), **GREEDY, streamer=After(12, lambda: network.before(cache, index).cut()))
        assert cache.session is not None
        assert cache.session.recoveries
    assert torch.equal(got, local.generate(**prompt(), **GREEDY))


@pytest.mark.default_cases(index=(1,))
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_hop_that_is_lost_during_a_prefill(
    network: Network, local: Any, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "MAX_SILENCE_S", 0.5)  # the usual time of such a step is not known
    monkeypatch.setattr(Session, "step_positions", lambda *_: 32)  # so that several steps are under way
    longer = torch.cat([prompt()["input_ids"], prompt(length=150)["input_ids"]], dim=1)
    options = {**GREEDY, "max_new_tokens": 4}
    model = network.swarm.model()
    with model.session(max_length=longer.shape[1] + 8) as cache:
        model(**prompt(), past_key_values=cache)
        network.before(cache, index).hold()
        got = model.generate(longer, attention_mask=torch.ones_like(longer), **options)
        assert cache.session is not None
        # The session may also change to a better route.
        lost = [repair for repair in cache.session.recoveries if repair.cause is not Cause.BETTER_ROUTE]
        assert len(lost) == 1
    assert torch.equal(got, local.generate(longer, attention_mask=torch.ones_like(longer), **options))


def test_a_prompt_on_a_slow_uplink_does_not_count_as_lost(
    network: Network, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "MAX_SILENCE_S", 0.3)
    longer = prompt(length=150)["input_ids"]
    options = {**GREEDY, "max_new_tokens": 4}
    model = network.swarm.model()
    with model.session(max_length=longer.shape[1] + 8) as cache:
        model(longer[:, :1], past_key_values=cache)
        assert isinstance(cache.session, Session)
        position = cache.session.state.hops[0].codec.bytes_per_position(network.swarm.client.facts.hidden_size)
        network.before(cache, 1).bytes_per_s = 149 * position / 3.0
        began = time.monotonic()
        got = model.generate(longer, attention_mask=torch.ones_like(longer), **options)
        assert time.monotonic() - began > 3.0
        assert [each.cause for each in cache.session.recoveries if each.cause is not Cause.BETTER_ROUTE] == []
    assert torch.equal(got, local.generate(longer, attention_mask=torch.ones_like(longer), **options))


@pytest.mark.full
def test_a_peer_without_a_replacement_is_used_again_when_it_answers(folder: Path, local: Any) -> None:
    with proxies(1) as (proxy,), local_swarm(folder, [SPANS[0]]) as swarm:
        middle = swarm.add(*SPANS[1], public_host=f"127.0.0.1:{proxy.port}")
        proxy.target = middle.transport.port
        swarm.add(*SPANS[2])
        model = swarm.model(recovery_timeout_s=15.0)  # less than a ban
        timer = threading.Timer(4.0, proxy.release)

        def hold() -> None:
            proxy.hold()
            timer.start()

        with model.session():
            got = model.generate(**prompt(), **GREEDY, streamer=After(12, hold))
        assert not timer.is_alive()
        assert torch.equal(got, local.generate(**prompt(), **GREEDY))


def test_a_link_that_has_become_slow_is_left(network: Network, local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine peers measure themselves as slow, and the other route would then look slow, too.
    monkeypatch.setattr(measurements, "facts_of", lambda record: replace(facts_of(record), speed=Speed.of(1.0, 0.1)))

    options = {**GREEDY, "max_new_tokens": 60}

    def slow_down() -> None:
        slow.append(network.before(cache, 0))
        slow[0].delay_s = 0.5  # far more than busy processors add to a step

    slow: list[Proxy] = []
    client = network.swarm.client
    peers = client.peers()
    while client.measurements.silent_peers() or client.measurements.unprobed(peers):
        client.measurer.measure_peers(peers)  # on a busy machine a peer may have answered the first ping late
    for sender, receiver in itertools.permutations(peers, 2):  # nor have published links
        client.measurements.link_seen(sender.key.text, receiver.key.text, 1.0)
    model = network.swarm.model()
    with model.session() as cache:
        got = model.generate(**prompt(), **options, streamer=After(20, slow_down))
        assert cache.session is not None
        assert slow[0] is not network.before(cache, 0)
    assert torch.equal(got, local.generate(**prompt(), **options))
