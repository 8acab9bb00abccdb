"""Energy through real peers: from files in the format of Linux to records, metrics and routes of clients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peers.peer_metrics import registry_of
from peers.running_peer import RunningPeer
from peers.speed import ObservedSpeed
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.session.inference import Session
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.swarm import Overview, Swarm, token_ms
from tests.swarm.generation import GREEDY, prompt
from tests.swarm.harness import LocalSwarm, local_swarm, wait_until

pytestmark = pytest.mark.swarm

FAST_MS, THRIFTY_MS = 100.0, 130.0


@pytest.fixture(scope="module")
def sensor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A /sys with one sensor, of 5 W; the folder of the sensor."""
    chip = tmp_path_factory.mktemp("sys") / "class/hwmon/hwmon0"
    chip.mkdir(parents=True)
    (chip / "name").write_text("ina226\n")
    (chip / "power1_input").write_text("5000000\n")
    return chip


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory, sensor: Path) -> Iterator[LocalSwarm]:
    """A fast peer with 200 W, a slower peer with the sensor, and a peer without published watts; each serves all
    blocks."""
    with local_swarm(folder, [], node=node) as swarm:
        swarm.add(0, 6, watts=200.0)
        swarm.add(0, 6, sysfs=sensor.parents[2])
        swarm.add(0, 6, sysfs=sensor)
        yield swarm


@pytest.fixture
def peers(swarm: LocalSwarm) -> list[RunningPeer]:
    """Peers with published speeds that no client has measured yet."""
    for peer, block_ms in zip(swarm.peers, (FAST_MS, THRIFTY_MS, THRIFTY_MS), strict=True):
        peer.server.speed.replace(ObservedSpeed((block_ms,) * 5))
        peer._announcer.publish()
    return swarm.peers


@pytest.fixture
def client(swarm: LocalSwarm, peers: list[RunningPeer]) -> Iterator[Swarm]:
    with swarm.newcomer() as visitor:
        yield visitor.join()


def told(peer: RunningPeer, name: str) -> float | None:
    return registry_of(peer).get_sample_value(f"splitnet_peer_{name}")


def test_records_and_metrics_have_the_energy_per_token(client: Swarm, peers: list[RunningPeer]) -> None:
    status = Overview.of(client, client.peers(fresh=True)).as_json()
    by_key = {peer["key"]: peer for peer in status["peers"]}
    given, read, silent = (by_key[peer.identity.public.text] for peer in peers)
    assert (given["watts"], read["watts"], silent["watts"]) == (200.0, 5.0, None)
    assert given["joules_per_token"] == pytest.approx(200.0 * 6 * FAST_MS / 1000)
    assert read["joules_per_token"] == pytest.approx(5.0 * 6 * THRIFTY_MS / 1000)
    assert silent["joules_per_token"] is None
    for peer, shown in zip(peers, (given, read, silent), strict=True):
        assert told(peer, "watts") == shown["watts"]
        assert told(peer, "token_joules") == shown["joules_per_token"]
        record = peer.record()
        assert shown["joules_per_token"] in (None, pytest.approx(record.watts * token_ms(record) / 1000))
    assert all((told(peer, "joules_total") or 0) > 0 for peer in peers[:2])  # Timing the device has taken energy.
    assert told(peers[2], "joules_total") == 0


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, 0),
        ({"prefer": "energy"}, 1),
        ({"prefer": "energy", "energy_slowdown": 1.1}, 0),
    ],
)
def test_a_client_takes_its_preferred_route(
    client: Swarm, peers: list[RunningPeer], options: dict[str, Any], chosen: int
) -> None:
    session = Session(client, ConnectionOptions(codec="none", **options), reservation=16)
    session.open()
    assert [hop.name for hop in session.hops] == [peers[chosen].identity.public.text]
    session.close()


def test_the_route_of_least_energy_gives_the_same_tokens_and_counts_energy(
    swarm: LocalSwarm, peers: list[RunningPeer], local: Any
) -> None:
    asked = prompt(5) | GREEDY
    before = [told(peer, "joules_total") or 0.0 for peer in peers]
    with swarm.newcomer() as visitor:
        model = visitor.model(prefer="energy")
        assert model.generate(**asked).tolist() == local.generate(**asked).tolist()
    taken = [(told(peer, "joules_total") or 0.0) - joules for peer, joules in zip(peers, before, strict=True)]
    assert taken[0] == taken[2] == 0.0
    passes = registry_of(peers[1]).get_sample_value("splitnet_peer_pass_seconds_sum", {"work": "steps"}) or 0.0
    # The counter of the pass runs inside the counter of energy.
    assert taken[1] > 0 and (told(peers[1], "joules_total") or 0) >= 5.0 * passes * 0.99


def test_a_sensor_may_vanish_and_return(peers: list[RunningPeer], sensor: Path) -> None:
    peer, file = peers[1], sensor / "power1_input"
    file.unlink()
    peer._look_around()
    assert peer.record().watts == 0.0 and told(peer, "watts") is None
    file.write_text("7000000\n")
    peer._look_around()
    assert peer.record().watts == 0.0  # No pass has run since.
    with peer.counters.energy.computing():
        pass
    assert peer.record().watts == pytest.approx(7.0)


@pytest.mark.default_cases(watts=((200.0, None),))
@pytest.mark.parametrize("watts", [(200.0, 10.0), (200.0, None)])
def test_a_trained_model_counts_the_energy_of_its_peers(
    folder: Path, node: DhtDirectory, tmp_path: Path, watts: tuple[float | None, ...]
) -> None:
    with local_swarm(folder, [], node=node) as swarm:
        for start, each in zip((0, 3), watts, strict=True):
            swarm.add(start, start + 3, watts=each, sysfs=tmp_path)
        model = swarm.model()
        before = [told(peer, "joules_total") or 0.0 for peer in swarm.peers]
        ids = prompt(12)["input_ids"]
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=ids).loss.backward()

        def spent() -> list[float]:
            return [(told(peer, "joules_total") or 0.0) - was for peer, was in zip(swarm.peers, before, strict=True)]

        if None in watts:
            assert math.isnan(model.training_joules)
        else:
            assert model.training_joules > 0
            wait_until(lambda: min(spent()) > 0 and sum(spent()) >= model.training_joules)
