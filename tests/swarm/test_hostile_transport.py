"""Attacks on a peer's socket: memory is bounded, and other clients are served."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import zmq
from transformers.generation.streamers import BaseStreamer

from peers.counters import SessionEnd
from peers.running_peer import RunningPeer
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import NotAuthorized
from splitnet.security.identity import Identity
from splitnet.transport.connections import MAX_MESSAGE_BYTES
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Failure, FailureCode, Open, Opened
from tests.attacks import transport as attacks
from tests.swarm.harness import LocalSwarm, local_swarm

pytestmark = pytest.mark.swarm

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
PROMPT = torch.tensor([[5, 17, 3, 44, 8]])
BLOCKS = 6
CUT_OFF_AT = MAX_MESSAGE_BYTES + 128 * 2**20
"""The longest message, and the bytes that arrive until the peer notices that there are more."""


@pytest.fixture(scope="module")
def running(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with local_swarm(folder, [(0, BLOCKS)], node=node) as swarm:
        swarm.join()
        yield swarm


@contextmanager
def honest(swarm: LocalSwarm, local: Any) -> Iterator[list[bool]]:
    """Runs a client that generates during the test; the list says of each answer whether it was right."""
    right: list[bool] = []
    over = threading.Event()
    model = swarm.model()
    want = local.generate(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), **GREEDY)

    def go_on() -> None:
        while not over.is_set():
            answer = model.generate(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), **GREEDY)
            right.append(torch.equal(answer, want))

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield right
    finally:
        over.set()
        thread.join()
    assert right
    assert all(right)


def most_while(process: Any, measure: Any) -> int:
    most = measure()
    while process.is_alive():
        most = max(most, measure())
        time.sleep(0.01)
    return most


def test_messages_that_do_not_end_take_bounded_memory(running: LocalSwarm, local: Any) -> None:
    peer, here = running.peers[0], psutil.Process()
    with honest(running, local), attacks.in_background(attacks.endless_message, peer.endpoint, seconds=4) as attack:
        before = here.memory_info().rss
        most = most_while(attack, lambda: here.memory_info().rss) - before
    assert peer.transport.connections.ended["endless_message"] > 0
    assert most < CUT_OFF_AT


@pytest.mark.default_cases(attack=(attacks.silent_connections,))
@pytest.mark.parametrize("attack", [attacks.silent_connections, attacks.connections_of_one_key])
def test_connections_leave_room_for_others(running: LocalSwarm, local: Any, attack: Callable[..., None]) -> None:
    peer, here = running.peers[0], psutil.Process()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.socket(zmq.DEALER).close()  # the context opens its files while there is room
    few = here.num_fds() + 250
    with context, honest(running, local), attacks.in_background(attack, peer.endpoint, seconds=60):
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
        try:
            deadline = time.monotonic() + 45  # the process of the attack starts while other tests run
            ended = sum(peer.transport.connections.ended.values())
            while sum(peer.transport.connections.ended.values()) < ended + 100:
                assert time.monotonic() < deadline, "the attack comes through"
                time.sleep(0.01)
            for _ in range(3):
                assert reached_within(20, peer.endpoint, context), "one who connects again, as clients do, is answered"
            assert here.num_fds() < few - 50
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def reached_within(seconds: float, endpoint: Endpoint, context: zmq.Context[zmq.Socket[bytes]]) -> bool:
    """Whether a new client is answered. It shares the peer's limit of open files, so its own sockets may have to
    wait."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(TimeoutError, zmq.ZMQError), attacks.Client(endpoint, context=context) as newcomer:
            return newcomer.ping(5.0) < 5.0
    return False


def test_a_removed_key_is_not_served(node: DhtDirectory, own_folder: Path, tmp_path: Path) -> None:
    removed, kept = Identity.generate(), Identity.generate()
    keys = tmp_path / "authorized_keys"
    keys.write_text(f"{removed.public.text}\n{kept.public.text}\n")
    with local_swarm(own_folder, [(0, BLOCKS)], authorized_keys=keys, node=node) as swarm:
        endpoint = swarm.peers[0].endpoint
        with attacks.Client(endpoint, removed) as gone, attacks.Client(endpoint, kept) as other:
            gone.ping()
            other.ping()
            keys.write_text(f"{kept.public.text}\n")
            deadline = time.monotonic() + 10
            while not swarm.peers[0].transport.connections.ended["revoked"]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(TimeoutError):
                gone.ping(1.0)
            other.ping()
        assert swarm.peers[0].transport.connections.ended == {"revoked": 1}


class TakenAway(BaseStreamer):
    """Removes the client's key from a peer's list after some tokens, and waits until the peer has noticed."""

    def __init__(self, keys: Path, left: str, peer: RunningPeer, tokens: int = 3) -> None:
        self.keys, self.left, self.peer, self.tokens = keys, left, peer, tokens

    def put(self, value: Any) -> None:
        self.tokens -= 1
        if not self.tokens:
            self.keys.write_text(self.left)
            deadline = time.monotonic() + 20
            while len(self.peer.service.sessions):
                assert time.monotonic() < deadline, "its session is still there, for the hop before to send it steps"
                time.sleep(0.01)

    def end(self) -> None:
        pass


def test_a_session_of_a_removed_key_ends_at_once_with_an_error(
    node: DhtDirectory, own_folder: Path, tmp_path: Path
) -> None:
    client, keys = Identity.generate(), tmp_path / "authorized_keys"
    with local_swarm(own_folder, [(0, 3)], node=node) as swarm:
        left = f"{swarm.peers[0].identity.public.text}\n"
        keys.write_text(f"{left}{client.public.text} train=no,tokens-per-minute=1000\n")
        peer = swarm.add(3, BLOCKS, authorized_keys=keys)
        model = swarm.model(identity=client, recovery_timeout_s=180)
        began = time.monotonic()
        with pytest.raises(NotAuthorized, match="does not accept this client's key"):
            model.generate(
                input_ids=PROMPT,
                attention_mask=torch.ones_like(PROMPT),
                streamer=TakenAway(keys, left, peer),
                **GREEDY | {"max_new_tokens": 40},
            )
        assert time.monotonic() - began < 90, "nothing is waited for"
        assert peer.counters.ended[SessionEnd.REVOKED] == 1


def test_next_hops_with_host_names_are_refused_and_stall_no_session(running: LocalSwarm, local: Any) -> None:
    peer = running.peers[0]
    with honest(running, local):
        answers = attacks.hosts_by_name(peer.endpoint, seconds=1, model=peer.checkpoint.fingerprint, blocks=BLOCKS)
    for answer in answers:
        assert isinstance(answer, Failure)
        assert answer.code == FailureCode.BAD_MESSAGE
        assert "IP" in answer.text


def test_a_peer_does_not_reveal_open_ports(running: LocalSwarm) -> None:
    peer = running.peers[0]
    with _listener(b"") as silent, _listener(b"SSH-2.0-OpenSSH_9.6\r\n") as talking, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        ports = (closed.getsockname()[1], silent, talking)
        found = attacks.scan(
            peer.endpoint,
            [f"tcp://127.0.0.1:{port}" for port in ports],
            model=peer.checkpoint.fingerprint,
            blocks=BLOCKS,
        )
    assert [reached for reached, _ in found] == [False] * 3
    seconds = [after for _, after in found]
    assert max(seconds) - min(seconds) < 1.0, "a tick of the peer lies between them, and a busy machine"
    assert min(seconds) > 2.5


def test_a_hop_can_take_a_session_id_before_its_owner(running: LocalSwarm) -> None:
    """A known limit: hops know the id of a session, and a peer gives the id to the client that opens it first.

    The owner gets an error, so that its client uses another peer or begins again. The other client learns nothing of
    the session.
    """
    peer = running.peers[0]
    model, session = peer.checkpoint.fingerprint, b"known to all hop"
    with attacks.Client(peer.endpoint) as thief, attacks.Client(peer.endpoint) as owner:
        thief.say(Open(session, 1, model, 0, BLOCKS, 64, 0, b"", b"", ""))
        assert isinstance(thief.hear(), Opened)
        owner.say(Open(session, 1, model, 0, BLOCKS, 64, 0, b"", b"", ""))
        answer = owner.hear()
        assert isinstance(answer, Failure)
        assert answer.code == FailureCode.UNKNOWN_SESSION
        assert _owner_of(peer, session) == thief.identity.public.curve_raw


def _owner_of(peer: RunningPeer, session: bytes) -> bytes:
    found = peer.service.sessions.get(session)
    assert found is not None
    return found.owner


@contextmanager
def _listener(banner: bytes) -> Iterator[int]:
    """A port that accepts connections, and sends the banner."""
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                kept.append(connection)
                connection.sendall(banner)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in kept:
                connection.close()
