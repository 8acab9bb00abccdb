"""`splitnet doctor` on set-ups with one fault each: it names this fault and no other."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from peers.sessions import SessionTable
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.mdns import LocalNetwork
from splitnet.directory.record import PeerRecord
from splitnet.quant.native import Kernels
from splitnet.security.identity import Identity
from splitnet.session.options import ConnectionOptions
from splitnet.tools.doctor.examination import Setup, examine
from splitnet.tools.doctor.machine_checks import CheckResult, Status, passed
from tests.multicast import lan_host, use_network_of_its_own
from tests.swarm.harness import LOOPBACK, LocalSwarm, dht_node, local_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWG1v6rQ3nQ2Cvp5RdrM5EezFqUsDh7yHZiTWFcYGn7gyU"


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with local_swarm(folder, [(0, 3), (3, 6)], node=node) as running:
        yield running


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "key"
    Identity.load_or_create(path)
    return path


@pytest.fixture
def sound(folder: Path, swarm: LocalSwarm, key_file: Path) -> Setup:
    """A set-up without a fault."""
    options = ConnectionOptions(initial_peers=swarm.addresses, lan=False, key_file=key_file)
    return Setup(model=str(folder), options=options, listen=LOOPBACK)


def joining(setup: Setup, addresses: Sequence[str], **others: Any) -> Setup:
    """The same set-up with other addresses to join with."""
    return dataclasses.replace(setup, options=dataclasses.replace(setup.options, initial_peers=addresses), **others)


def examined(setup: Setup) -> dict[str, list[CheckResult]]:
    """The findings of each check."""
    found: dict[str, list[CheckResult]] = {}
    for finding in examine(setup):
        found.setdefault(finding.check, []).append(finding)
    return found


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result must not depend on a compiler on this machine."""
    monkeypatch.setattr("splitnet.quant.native.kernels_here", lambda: Kernels.FAST)


def wrong(found: dict[str, list[CheckResult]]) -> dict[str, CheckResult]:
    """The finding of each check that did not pass; each check has at most one."""
    bad = [finding for findings in found.values() for finding in findings if finding.status is not Status.passed]
    assert len({finding.check for finding in bad}) == len(bad), bad
    return {finding.check: finding for finding in bad}


@contextmanager
def announced(node: DhtDirectory, record: PeerRecord, identity: Identity) -> Iterator[None]:
    """Publishes a record in the DHT for some time."""
    assert node.announce(record, identity)
    try:
        yield
    finally:
        assert node.withdraw(record, identity)


def test_a_sound_set_up_passes_every_check(sound: Setup, folder: Path) -> None:
    found = examined(sound)
    assert wrong(found) == {}
    checks = ["python", "libraries", "devices", "kernels", "model", "memory", "disk", "key", "join", "clock", "swarm"]
    assert list(found) == [*checks, "peer", "coverage", "port", "reach"]
    assert len(found["peer"]) == 2
    assert "2 of 2 peers reach this machine at tcp://127.0.0.1:" in found["reach"][0].text
    assert folder.name in found["swarm"][0].text


@pytest.mark.full
def test_the_check_of_a_context_passes_only_if_it_fits(sound: Setup, swarm: LocalSwarm) -> None:
    fits, too_long = (examined(dataclasses.replace(sound, context=positions)) for positions in (256, 257))
    assert wrong(fits) == {}
    assert "a session of 256 positions fits: " in fits["context"][0].text
    assert "made for 256 positions" in wrong(too_long)["context"].text
    small = swarm.peers[1].service.sessions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SessionTable, "capacity", property(lambda self: 100 if self is small else 200))
        patch.setattr(SessionTable, "free_positions", property(lambda self: 90))
        for each in swarm.peers:
            each._announcer.publish()
        found = wrong(examined(dataclasses.replace(sound, context=95)))["context"]
        assert found.status is Status.warned and "blocks 0..5 have room for 90 at most now" in found.text
        found = wrong(examined(dataclasses.replace(sound, context=101)))["context"]
        assert found.status is Status.failed and "blocks 3..5 hold 100 at most" in found.text
    for each in swarm.peers:
        each._announcer.publish()


def test_a_second_examination_can_use_the_same_port(sound: Setup) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    for _ in range(2):
        assert wrong(examined(dataclasses.replace(sound, model=None, listen=listen))) == {}


@pytest.mark.full
def test_a_client_without_an_open_port_is_only_warned(sound: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitnet.tools.doctor.examination.public_address", lambda *_: "tcp://127.0.0.1:9")
    bad = wrong(examined(dataclasses.replace(sound, model=None, listen=None)))
    assert bad["reach"].status is Status.warned and "a client needs no open port" in bad["reach"].text


@pytest.mark.full
def test_a_swarm_on_the_local_network_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_network_of_its_own(monkeypatch)
    setup = Setup(model=str(folder), options=ConnectionOptions())
    with DhtDirectory.start(listen=[f"/ip4/{lan_host()}/tcp/0"]) as directory:
        with LocalNetwork(Checkpoint.open(folder).fingerprint) as presence:
            presence.announce_node(directory.addresses)
            found = examined(setup)
        assert found["lan"] == [passed("lan", "found 1 peer on this network")]
        assert [finding.status for finding in found["join"]] == [Status.passed]
        bad = wrong(examined(setup))
    assert list(bad) == ["lan"] and "no swarm for" in bad["lan"].text


class TestPort:
    def test_a_port_that_is_taken(self, sound: Setup) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            listen = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
            found = examined(joining(sound, (), listen=listen))
        assert wrong(found)["port"] == CheckResult(
            "port", f"{listen} is taken: choose another port with --listen, or 0 for any free one", Status.failed
        )

    @pytest.mark.full
    def test_a_port_taken_by_the_peer_with_the_same_key(self, sound: Setup, swarm: LocalSwarm, key_file: Path) -> None:
        own = Identity.load_or_create(key_file)
        peer = swarm.peers[0]
        record = dataclasses.replace(peer.record(), key=own.public)
        assert swarm.node is not None
        with announced(swarm.node, record, own):
            found = examined(dataclasses.replace(sound, listen=peer.endpoint.address))
        assert "is taken by the peer that has the key of this machine" in found["port"][0].text

    @pytest.mark.full
    def test_a_port_that_is_blocked(self, sound: Setup) -> None:
        bad = wrong(examined(dataclasses.replace(sound, public_host="127.0.0.1:9")))
        assert list(bad) == ["reach"] and bad["reach"].status is Status.failed
        assert "no peer reaches this machine at tcp://127.0.0.1:9: open the port in firewalls" in bad["reach"].text

    def test_a_port_that_leads_to_another_peer(self, sound: Setup, swarm: LocalSwarm) -> None:
        elsewhere = swarm.peers[1].endpoint.address.removeprefix("tcp://")
        bad = wrong(examined(dataclasses.replace(sound, public_host=elsewhere)))
        assert list(bad) == ["reach"] and f"no peer reaches this machine at tcp://{elsewhere}" in bad["reach"].text


class TestWrongKey:
    def test_a_wrong_key_in_the_join_address(self, sound: Setup) -> None:
        where, _, there = sound.options.initial_peers[0].rpartition("/p2p/")
        address = f"{where}/p2p/{NOBODY.rpartition('/')[2]}"
        bad = wrong(examined(joining(sound, [address])))
        assert list(bad) == ["join"] and bad["join"].status is Status.failed
        assert f"{address}: what answers there has another key, {there}:" in bad["join"].text

    def test_a_peer_with_another_key_than_its_record(self, sound: Setup, swarm: LocalSwarm) -> None:
        impostor = Identity.generate()
        lie = dataclasses.replace(swarm.peers[0].record(), key=impostor.public)
        assert swarm.node is not None
        with announced(swarm.node, lie, impostor):
            bad = wrong(examined(sound))
        assert list(bad) == ["peer"] and bad["peer"].status is Status.failed
        assert "as if it had another key than the record of the peer there" in bad["peer"].text
        assert impostor.public.text[:9] in bad["peer"].text

    def test_a_key_of_this_machine_that_a_peer_does_not_accept(self, sound: Setup, tmp_path: Path) -> None:
        guests = tmp_path / "authorized_keys"
        guests.write_text(Identity.generate().public.text)
        # This is another model, so that other tests do not find its peers.
        other = random_checkpoint("llama", tmp_path / "private", seed=3)
        with dht_node() as node, local_swarm(other, [(0, 6)], node=node, authorized_keys=guests) as private:
            bad = wrong(examined(joining(sound, private.addresses, model=str(other))))
        assert list(bad) == ["peer", "coverage", "reach"]
        assert "does not accept this client's key: ask its owner" in bad["peer"].text

    @pytest.mark.parametrize("fault", ["readable", "damaged", "a folder"])
    def test_a_key_file_that_cannot_be_used(self, fault: str, tmp_path: Path) -> None:
        path = tmp_path / "key"
        Identity.load_or_create(path)
        if fault == "readable":
            path.chmod(0o644)
            expected = f"Others can read the secret key in {path}; run: chmod 600 {path}"
        elif fault == "damaged":
            path.write_text("no key")
            expected = f"{path} does not hold a splitnet key; move the file away, and a new key will be made"
        else:
            path = tmp_path
            expected = f"The key file {path} cannot be used (Is a directory); set SPLITNET_KEY_FILE"
        bad = wrong(examined(Setup(options=ConnectionOptions(lan=False, key_file=path))))
        assert list(bad) == ["key"] and bad["key"].status is Status.failed
        assert bad["key"].text.startswith(expected)


class TestNoRoute:
    def test_an_unreachable_join_address(self, sound: Setup) -> None:
        bad = wrong(examined(joining(sound, [NOBODY])))
        assert list(bad) == ["join"]
        assert bad["join"].text.startswith(f"{NOBODY}: nothing listens there: check that the peer runs")

    def test_one_of_two_unreachable_join_addresses_is_only_a_warning(self, sound: Setup) -> None:
        bad = wrong(examined(joining(sound, [NOBODY, *sound.options.initial_peers])))
        assert list(bad) == ["join"] and bad["join"].status is Status.warned

    def test_a_join_host_without_an_address(self, sound: Setup) -> None:
        address = NOBODY.replace("/ip4/127.0.0.1/", "/dns4/no-such-host.invalid/")
        bad = wrong(examined(joining(sound, [address])))
        assert bad["join"].text == f"{address}: its host name has no address: check the name"

    def test_an_announced_peer_that_is_unreachable(self, sound: Setup, swarm: LocalSwarm) -> None:
        gone = Identity.generate()
        record = dataclasses.replace(swarm.peers[1].record(), key=gone.public, address="tcp://127.0.0.1:9")
        assert swarm.node is not None
        with announced(swarm.node, record, gone):
            bad = wrong(examined(sound))
        assert list(bad) == ["peer"], "another peer serves the same blocks"
        assert bad["peer"].status is Status.warned and "nothing listens there" in bad["peer"].text

    @pytest.mark.full
    def test_an_unreachable_peer_that_alone_serves_some_blocks(self, sound: Setup, tmp_path: Path) -> None:
        model = random_checkpoint("llama", tmp_path / "holed", seed=4)
        gone = Identity.generate()
        with dht_node() as node, local_swarm(model, [(0, 4)], node=node) as holed:
            record = holed.peers[0].record()
            record = dataclasses.replace(record, key=gone.public, address="tcp://127.0.0.1:9", start=4, end=6)
            with announced(node, record, gone):
                bad = wrong(examined(joining(sound, holed.addresses, model=str(model))))
        assert list(bad) == ["peer", "coverage"] and bad["coverage"].status is Status.failed
        assert "blocks 4..5 of holed are served only by peers that do not answer" in bad["coverage"].text


class TestModel:
    def test_a_model_of_another_name(self, sound: Setup, folder: Path, tmp_path: Path) -> None:
        mine = random_checkpoint("llama", tmp_path / "mine", blocks=2)
        bad = wrong(examined(dataclasses.replace(sound, model=str(mine))))
        assert list(bad) == ["swarm"] and bad["swarm"].status is Status.failed
        assert bad["swarm"].text.startswith(f"serves {folder.name}, not your mine: use that model")

    @pytest.mark.full
    def test_a_model_in_another_revision(self, sound: Setup, folder: Path, tmp_path: Path) -> None:
        revised = random_checkpoint("llama", tmp_path / folder.name, seed=5)
        bad = wrong(examined(dataclasses.replace(sound, model=str(revised))))
        assert list(bad) == ["swarm"] and bad["swarm"].status is Status.failed
        assert bad["swarm"].text.startswith(f"serves another revision of {folder.name}: its fingerprint is")


@pytest.mark.default_cases(seconds=(600,))
@pytest.mark.parametrize(("seconds", "direction"), [(600, "ahead of"), (-600, "behind")])
def test_a_wrong_clock(sound: Setup, seconds: int, direction: str) -> None:
    bad = wrong(examined(dataclasses.replace(sound, clock=lambda: time.time() + seconds)))
    assert list(bad) == ["clock"] and bad["clock"].status is Status.failed
    assert f"this machine is 600 s {direction} the swarm's, and 3 s are allowed: set it" in bad["clock"].text
