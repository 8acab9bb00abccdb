"""The transport: frames from authorized keys arrive complete and in order, and the states of links are reported."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq

from splitnet.errors import AddressInUse, SplitnetError
from splitnet.limits import Budget
from splitnet.nat.tunnel import Tunnels
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.transport import flow
from splitnet.transport.connections import Connections, TcpConnection
from splitnet.transport.flow import LARGE_BYTES, TRACKED_BYTES
from splitnet.transport.transport import Transport
from splitnet.wire.endpoints import Connection, Destination, Endpoint, LinkState, is_address
from splitnet.wire.messages import MAX_PAYLOAD_BYTES, Payload

ANY_PORT = "tcp://127.0.0.1:0"
WAIT_S = 20.0


class Node:
    """A transport that records its events, so that a test can wait for them."""

    def __init__(
        self,
        listen: str | None = None,
        authorized: AuthorizedKeys | None = None,
        max_backlog: int | None = 1 << 30,
        identity: Identity | None = None,
    ) -> None:
        self.identity = identity or Identity.generate()
        self.received: list[tuple[Destination, list[bytes]]] = []
        self.states: list[tuple[Endpoint, LinkState]] = []
        self.lost: list[Connection] = []
        self.dropped: list[tuple[Destination, list[Payload], str]] = []
        self.ticks = 0
        self.answer: Callable[[Destination, list[bytes]], Sequence[Payload] | None] = lambda source, frames: None
        self.on_tick: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self.tunnels = Tunnels(self.identity)
        self.transport = Transport(
            self.identity,
            on_message=self._message,
            on_link=self._link,
            on_lost=self._lost,
            on_dropped=self._dropped,
            on_tick=self._tick,
            max_backlog=max_backlog,
            authorized=authorized,
            listen=listen,
            tunnels=self.tunnels,
        )

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(f"tcp://127.0.0.1:{self.transport.port}", self.identity.public)

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_S)

    def wait_for_state(self, endpoint: Endpoint, state: LinkState) -> None:
        self.wait(lambda: (endpoint, state) in self.states)

    def frames(self) -> list[list[bytes]]:
        return [frames for _, frames in self.received]

    def _message(self, source: Destination, frames: Sequence[Payload]) -> None:
        copied = [bytes(frame) for frame in frames]
        with self._changed:
            self.received.append((source, copied))
            self._changed.notify_all()
        reply = self.answer(source, copied)
        if reply is not None:
            self.transport.send(source, reply)

    def _link(self, endpoint: Endpoint, state: LinkState) -> None:
        with self._changed:
            self.states.append((endpoint, state))
            self._changed.notify_all()

    def _lost(self, connection: Connection) -> None:
        with self._changed:
            self.lost.append(connection)
            self._changed.notify_all()

    def _dropped(self, destination: Destination, frames: Sequence[Payload], reason: str) -> None:
        with self._changed:
            self.dropped.append((destination, list(frames), reason))
            self._changed.notify_all()

    def _tick(self) -> None:
        self.on_tick()
        with self._changed:
            self.ticks += 1
            self._changed.notify_all()


@pytest.fixture
def node() -> Iterator[Callable[..., Node]]:
    with ExitStack() as stack:

        def start(*args: Any, **options: Any) -> Node:
            made = Node(*args, **options)
            stack.callback(made.transport.close)
            made.transport.start()
            return made

        yield start


Start = Callable[..., Node]


def echo(source: Destination, frames: list[bytes]) -> list[bytes]:
    return frames


def until(event: threading.Event, timeout_s: float = WAIT_S) -> Callable[[Destination, list[bytes]], None]:
    """A handler that blocks the transport's thread until an event."""

    def wait(source: Destination, frames: list[bytes]) -> None:
        event.wait(timeout_s)

    return wait


def test_messages_arrive_in_order_and_answers_come_back(node: Start) -> None:
    server, client = node(ANY_PORT), node()
    server.answer = echo
    sent = [[b"%d" % number, bytes([number % 256]) * (number % 7)] for number in range(500)]
    for frames in sent:
        client.transport.send(server.endpoint, frames)
    client.wait(lambda: len(client.received) == len(sent))
    assert server.frames() == sent
    assert client.frames() == sent
    assert {source for source, _ in client.received} == {server.endpoint}
    assert {getattr(source, "curve", None) for source, _ in server.received} == {client.identity.public.curve_raw}


def test_the_largest_payload_arrives(node: Start) -> None:
    server, client = node(ANY_PORT), node()
    server.answer = lambda source, frames: [b"%d" % len(frames[1]), frames[1][-5:]]
    client.transport.send(server.endpoint, [b"header", bytes(MAX_PAYLOAD_BYTES - 5) + b"tail!"])
    client.wait(lambda: bool(client.received))
    assert client.frames() == [[b"%d" % MAX_PAYLOAD_BYTES, b"tail!"]]


def test_a_too_large_payload_ends_the_connection_and_the_next_works(node: Start) -> None:
    server, client = node(ANY_PORT), node()
    client.transport.send(server.endpoint, [b"header", bytes(MAX_PAYLOAD_BYTES + 1024)])
    client.wait_for_state(server.endpoint, LinkState.DOWN)
    client.wait(lambda: client.states[-1] == (server.endpoint, LinkState.UP))
    client.transport.send(server.endpoint, [b"small"])
    server.wait(lambda: bool(server.received))
    assert server.frames() == [[b"small"]]


def test_many_threads_send_at_once(node: Start) -> None:
    server, client = node(ANY_PORT), node()
    threads, each = 8, 100

    def send(thread: int) -> None:
        for number in range(each):
            client.transport.send(server.endpoint, [b"%d" % thread, b"%d" % number])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(send, range(threads)))
    server.wait(lambda: len(server.received) == threads * each)
    for thread in range(threads):
        mine = [frames[1] for frames in server.frames() if frames[0] == b"%d" % thread]
        assert mine == [b"%d" % number for number in range(each)]


def test_answers_go_to_the_client_that_asked(node: Start) -> None:
    server, clients = node(ANY_PORT), [node() for _ in range(4)]
    server.answer = echo
    for number, client in enumerate(clients):
        for _ in range(20):
            client.transport.send(server.endpoint, [b"%d" % number])
    for number, client in enumerate(clients):
        client.wait(lambda client=client: len(client.received) == 20)
        assert client.frames() == [[b"%d" % number]] * 20


def test_a_key_that_is_not_listed_is_refused(node: Start, tmp_path: Path) -> None:
    friend, stranger = node(), node()
    keys = tmp_path / "keys"
    keys.write_text(friend.identity.public.text + "\n")
    server = node(ANY_PORT, authorized=AuthorizedKeys(keys))
    stranger.transport.send(server.endpoint, [b"let me in"])
    stranger.wait_for_state(server.endpoint, LinkState.REFUSED)
    assert stranger.transport.link_state(server.endpoint) is LinkState.REFUSED
    friend.transport.send(server.endpoint, [b"hello"])
    server.wait(lambda: bool(server.received))
    assert server.frames() == [[b"hello"]]
    assert (server.endpoint, LinkState.UP) not in stranger.states


def test_a_server_with_another_key_gets_no_messages(node: Start) -> None:
    server, client = node(ANY_PORT), node()
    expected = Endpoint(server.endpoint.address, Identity.generate().public)
    client.transport.send(expected, [b"secret"])
    client.wait_for_state(expected, LinkState.WRONG_KEY)
    assert (expected, LinkState.UP) not in client.states
    assert not server.received


def test_a_suspended_server_is_down_and_up_again_after_it_resumes(node: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system accepts connections for a suspended process, and ZeroMQ reports the timeout of a handshake like its
    end."""
    monkeypatch.setattr("splitnet.transport.transport._HANDSHAKE_MS", 300)
    monkeypatch.setattr("splitnet.transport.transport._REFUSES_S", 0.15)
    client = node()
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as still:
        address = f"tcp://127.0.0.1:{still.getsockname()[1]}"
        identity = Identity.generate()
        expected = Endpoint(address, identity.public)
        client.transport.connect(expected)
        client.wait_for_state(expected, LinkState.DOWN)
    node(address, identity=identity)
    client.wait_for_state(expected, LinkState.UP)
    assert (expected, LinkState.WRONG_KEY) not in client.states


def test_a_server_that_ends_is_noticed_and_one_that_comes_back_is_found(node: Start) -> None:
    server, client = node(ANY_PORT), node()
    endpoint = server.endpoint
    client.transport.connect(endpoint)
    client.wait_for_state(endpoint, LinkState.UP)
    server.transport.close()
    client.wait_for_state(endpoint, LinkState.DOWN)
    assert client.transport.link_state(endpoint) is LinkState.DOWN


def test_an_address_without_a_listener_is_down(node: Start) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = Endpoint(f"tcp://127.0.0.1:{free.getsockname()[1]}", Identity.generate().public)
        client = node()
        client.transport.connect(endpoint)
        client.wait_for_state(endpoint, LinkState.DOWN)


def test_a_client_that_is_gone_is_reported_when_something_is_sent_to_it(node: Start) -> None:
    server, client = node(ANY_PORT), node()
    client.transport.send(server.endpoint, [b"hello"])
    server.wait(lambda: bool(server.received))
    connection = server.received[0][0]
    assert isinstance(connection, Connection)
    client.transport.close()
    # Messages are accepted until the end of the socket has arrived.
    server.on_tick = lambda: server.transport.send(connection, [b"are you there?"])
    server.wait(lambda: bool(server.lost))
    assert set(server.lost) == {connection}


def test_a_port_that_is_taken_is_named(node: Start) -> None:
    address = node(ANY_PORT).endpoint.address
    before = threading.active_count()
    with pytest.raises(AddressInUse, match=address):
        Node(address)
    assert threading.active_count() == before


@pytest.mark.parametrize("address", ["tcp://192.0.2.7:0", "tcp://127.0.0.1", "udp://127.0.0.1:0", "nonsense", ""])
def test_an_address_that_cannot_be_listened_on_is_named(address: str) -> None:
    with pytest.raises(SplitnetError, match="--listen"):
        Node(address)


def test_an_address_that_cannot_be_connected_to_harms_nothing(node: Start) -> None:
    server, client = node(ANY_PORT), node()
    key = Identity.generate().public
    for address in ["tcp://127.0.0.1:99999", "tcp://", "nonsense", "tcp://;;:1", "inproc://x", "tcp://a b:1", ""]:
        client.transport.send(Endpoint(address, key), [b"lost"])
    client.transport.send(server.endpoint, [b"found"])
    server.wait(lambda: bool(server.received))
    assert server.frames() == [[b"found"]]


def test_a_link_that_is_closed_is_forgotten_and_can_be_opened_again(node: Start) -> None:
    server, client = node(ANY_PORT), node()
    for number in range(3):
        client.transport.send(server.endpoint, [b"%d" % number])
        server.wait(lambda number=number: len(server.received) == number + 1)
        client.transport.disconnect(server.endpoint)
    client.transport.disconnect(server.endpoint)
    assert len({source for source, _ in server.received}) == 3, "each time it is another connection"
    client.wait(lambda: client.transport.link_state(server.endpoint) is LinkState.CONNECTING)


def test_closing_sends_what_is_queued_and_leaves_no_thread(node: Start) -> None:
    server, client = node(ANY_PORT), node()
    client.transport.connect(server.endpoint)
    client.wait_for_state(server.endpoint, LinkState.UP)
    for number in range(100):
        client.transport.send(server.endpoint, [b"%d" % number])
    client.transport.close()
    assert not any(thread is client.transport._thread for thread in threading.enumerate())
    server.wait(lambda: len(server.received) == 100)
    client.transport.close()
    client.transport.send(server.endpoint, [b"too late"])
    client.transport.connect(server.endpoint)


def test_closing_does_not_wait_for_links_that_are_down(node: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitnet.transport.transport._CLOSE_LINGER_MS", int(1000 * WAIT_S))
    server, client = node(ANY_PORT), node()
    client.transport.connect(server.endpoint)
    client.wait_for_state(server.endpoint, LinkState.UP)
    server.transport.close()
    client.wait_for_state(server.endpoint, LinkState.DOWN)
    client.transport.send(server.endpoint, [b"are you there?"])
    began = time.monotonic()
    client.transport.close()
    assert time.monotonic() - began < WAIT_S / 2


def test_closing_before_the_start() -> None:
    Node(ANY_PORT).transport.close()


def test_closing_while_others_send(node: Start) -> None:
    server, client = node(ANY_PORT), node()
    going, stop = threading.Barrier(5), threading.Event()

    def send() -> None:
        going.wait(WAIT_S)
        while not stop.is_set():
            client.transport.send(server.endpoint, [b"x"])

    with ThreadPoolExecutor(4) as pool:
        senders = [pool.submit(send) for _ in range(4)]
        going.wait(WAIT_S)
        client.transport.close()
        stop.set()
        for sender in senders:
            sender.result(timeout=WAIT_S)


def test_an_error_in_a_handler_ends_nothing(node: Start) -> None:
    server, client = node(ANY_PORT), node()

    def fail(*_: object) -> None:
        raise RuntimeError("a bug in a handler")

    server.answer = fail
    server.on_tick = fail
    for number in range(3):
        client.transport.send(server.endpoint, [b"%d" % number])
    server.wait(lambda: len(server.received) == 3)
    server.answer = echo
    client.transport.send(server.endpoint, [b"again"])
    client.wait(lambda: client.frames() == [[b"again"]])


def test_a_message_sent_in_a_tick_does_not_wait_for_the_next_event(
    node: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = node(ANY_PORT), node()
    poller, outbox = client.transport._poller, client.transport._outbox
    left: list[int] = []

    def poll(timeout: int) -> list[Any]:
        left.append(len(outbox.items))
        return zmq.Poller.poll(poller, timeout)

    monkeypatch.setattr(poller, "poll", poll)
    client.on_tick = lambda: client.transport.send(server.endpoint, [b"tick"])
    server.wait(lambda: len(server.received) >= 3)
    assert not any(left), "nothing is left when the thread goes to sleep"


def test_messages_sent_together_go_out_at_the_end(node: Start) -> None:
    server, client = node(ANY_PORT), node()
    client.transport.connect(server.endpoint)
    client.wait_for_state(server.endpoint, LinkState.UP)
    with client.transport.together():
        for number in range(3):
            client.transport.send(server.endpoint, [bytes([number])])
        assert not client.transport._outbox.awake
    assert client.transport._outbox.awake or not client.transport._outbox.items
    server.wait(lambda: len(server.frames()) == 3)
    assert server.frames() == [[bytes([number])] for number in range(3)]


def test_ticks_do_not_come_with_every_message(node: Start) -> None:
    server, client = node(ANY_PORT), node()
    server.answer = echo
    client.wait(lambda: client.ticks > 0)
    before = server.ticks
    for number in range(300):
        client.transport.send(server.endpoint, [b"%d" % number])
        client.wait(lambda number=number: len(client.received) == number + 1)
    assert server.ticks - before < 100


def test_a_receiver_that_does_not_read_takes_bounded_memory(node: Start, caplog: pytest.LogCaptureFixture) -> None:
    limit = 64 * TRACKED_BYTES
    server = node(ANY_PORT, max_backlog=limit)
    reader, sleeper = node(), node()
    asleep = threading.Event()

    sleeper.answer = until(asleep)
    try:
        for client in (sleeper, reader):
            client.transport.send(server.endpoint, [b"hello"])
        server.wait(lambda: len(server.received) == 2)
        by_key = {getattr(source, "curve", b""): source for source, _ in server.received}
        to_sleeper, to_reader = (by_key[client.identity.public.curve_raw] for client in (sleeper, reader))
        large = bytes(4 * TRACKED_BYTES)
        # Far more than the kernel's buffers and the limit together.
        for _ in range(400):
            server.transport.send(to_sleeper, [b"header", large])
        server.transport.send(to_reader, [b"header", large])
        reader.wait(lambda: len(reader.received) == 1)
        assert server.transport.sending.used <= limit
        assert "its receiver is too slow" in caplog.text
        dropped = list(server.dropped)
        assert all(item == (to_sleeper, [b"header", large], "its receiver is too slow") for item in dropped)
    finally:
        asleep.set()
    sleeper.wait(lambda: len(sleeper.received) == 400 - len(dropped))


def test_unsent_bytes_of_a_link_are_reported_until_they_are_sent(node: Start) -> None:
    sleeper, sender = node(ANY_PORT), node()
    asleep = threading.Event()
    sleeper.answer = until(asleep)
    large = bytes(4 * TRACKED_BYTES)
    assert sender.transport.unsent(sleeper.endpoint) == 0
    try:
        for _ in range(100):
            sender.transport.send(sleeper.endpoint, [b"header", large])
        sender.wait(lambda: sender.transport.unsent(sleeper.endpoint) > len(large))
    finally:
        asleep.set()
    sleeper.wait(lambda: len(sleeper.received) == 100)
    sender.wait(lambda: sender.transport.unsent(sleeper.endpoint) == 0)


def test_traffic_of_a_link_is_reported(node: Start) -> None:
    sleeper, sender = node(ANY_PORT), node()
    assert sender.transport.traffic(sleeper.endpoint) is None and not sender.transport.queues()
    asleep = threading.Event()
    sleeper.answer = until(asleep)
    try:
        sender.transport.send(sleeper.endpoint, [b"header", b"small"])
        sleeper.wait(lambda: len(sleeper.received) == 1)
        before = sender.transport.traffic(sleeper.endpoint)
        if before is None:
            pytest.skip("this system does not tell what a connection has carried")
        for _ in range(100):
            sender.transport.send(sleeper.endpoint, [b"header", bytes(1 << 20)])
        deadline = time.monotonic() + WAIT_S
        passed = before
        while not passed.has_sent(before) and time.monotonic() < deadline:
            sender.transport.tick_soon()
            passed = sender.transport.queues().get(sleeper.endpoint, before)
        assert passed.has_sent(before), "the kernel of the receiver takes some of it"
    finally:
        asleep.set()
    sleeper.wait(lambda: len(sleeper.received) == 101)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        passed = sender.transport.traffic(sleeper.endpoint)
        # The bytes handed to the kernel may arrive before ZeroMQ hands over the rest.
        if passed is None or (not passed.unsent and passed.acked - before.acked > 100 << 20):
            break
        sender.transport.tick_soon()
    assert not sender.transport.queues()
    assert passed is not None and passed.acked - before.acked > 100 << 20
    assert not passed.has_sent(before), "nothing waits any more, so nothing is held up"
    sender.transport.disconnect(sleeper.endpoint)
    sender.wait(lambda: sender.transport.traffic(sleeper.endpoint) is None)


def test_small_messages_to_a_receiver_that_does_not_read_are_counted(node: Start) -> None:
    server, sleeper = node(ANY_PORT, max_backlog=16 * TRACKED_BYTES), node()
    asleep = threading.Event()
    sleeper.answer = until(asleep)
    sleeper.transport.send(server.endpoint, [b"hello"])
    server.wait(lambda: bool(server.received))
    to_sleeper = server.received[0][0]
    try:
        # The kernel has room for some of them.
        for _ in range(1500):
            server.transport.send(to_sleeper, [b"header", bytes(LARGE_BYTES // 2)])
        server.wait(lambda: len(server.dropped) > 50)
        assert 0 < server.transport.sending.used <= 9 * TRACKED_BYTES, "one receiver gets half"
        assert server.transport.sending.refused > 0
    finally:
        asleep.set()
    sleeper.wait(lambda: len(sleeper.received) + len(server.dropped) == 1500)


def test_small_messages_to_a_receiver_that_reads_late_all_arrive(node: Start) -> None:
    """The bound is on bytes, so that a large number of small messages does not make a peer drop answers to pings."""
    server, sleeper = node(ANY_PORT), node()
    asleep = threading.Event()
    sleeper.answer = until(asleep)
    sleeper.transport.send(server.endpoint, [b"hello"])
    server.wait(lambda: bool(server.received))
    count = 30_000  # more than the kernel's buffers at both ends hold
    try:
        for number in range(count):
            server.transport.send(server.received[0][0], [b"%d" % number, bytes(200)])
        server.wait(lambda: bool(server.dropped) or not server.transport._outbox.items)
    finally:
        asleep.set()
    sleeper.wait(lambda: len(sleeper.received) + len(server.dropped) == count)
    assert not server.dropped
    assert [int(frames[0]) for frames in sleeper.frames()] == list(range(count))


@pytest.mark.parametrize("to_the_client", [False, True])
def test_a_message_of_many_frames_is_cut_off(node: Start, to_the_client: bool) -> None:
    server, client, other = node(ANY_PORT), node(max_backlog=None), node()
    endless = [bytes(1 << 20)] * 700
    receiver = client if to_the_client else server
    if to_the_client:
        server.answer = lambda source, frames: endless if frames == [b"hello"] else frames
        client.transport.send(server.endpoint, [b"hello"])
    else:
        server.answer = echo
        client.transport.send(server.endpoint, endless)
    most = 0

    def is_cut_off() -> bool:
        nonlocal most
        most = max(most, receiver.transport.receiving.used)
        return bool(receiver.transport.connections.ended)

    receiver.wait(is_cut_off)
    assert most < 256 * 2**20
    assert not receiver.frames()
    receiver.wait(lambda: receiver.transport.receiving.used == 0)
    other.transport.send(server.endpoint, [b"still there?"])
    other.wait(lambda: other.frames() == [[b"still there?"]])


def test_many_large_messages_do_not_count_as_an_endless_one(node: Start) -> None:
    server, client = node(ANY_PORT), node(max_backlog=None)
    server.answer = until(threading.Event(), 0.5)
    for number in range(6):
        client.transport.send(server.endpoint, [b"%d" % number, bytes(40 << 20)])
    server.wait(lambda: len(server.received) == 6)
    assert not server.transport.connections.ended
    assert (server.endpoint, LinkState.DOWN) not in client.states


def test_an_address_with_a_host_name_is_refused(node: Start) -> None:
    server, client = node(ANY_PORT), node()
    named = Endpoint(f"tcp://localhost:{server.transport.port}", server.identity.public)
    client.transport.send(named, [b"look me up"])
    client.wait(lambda: bool(client.dropped))
    [(destination, frames, reason)] = client.dropped
    assert (destination, frames) == (named, [b"look me up"])
    assert named.address in reason


def test_connections_of_a_key_are_few_and_the_silent_ones_go_first(
    node: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitnet.transport.connections.MOST_OF_KEY", 3)
    identity = Identity.generate()
    monkeypatch.setattr(Identity, "generate", lambda: identity)
    server = node(ANY_PORT)
    server.answer = echo
    clients = [node() for _ in range(4)]
    for number, client in enumerate(clients):
        client.transport.send(server.endpoint, [b"%d" % number])
        client.wait(lambda client=client: bool(client.received))
    clients[0].wait_for_state(server.endpoint, LinkState.DOWN)
    assert dict(server.transport.connections.ended) == {"too_many_of_key": 1}
    clients[3].transport.send(server.endpoint, [b"again"])
    clients[3].wait(lambda: len(clients[3].received) == 2)


def test_silent_connections_leave_room_for_others(node: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitnet.transport.connections.most_connections", lambda: 16)
    server, client = node(ANY_PORT), node()
    server.answer = echo
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.transport.port), WAIT_S))
            for _ in range(40)
        ]
        server.wait(lambda: server.transport.connections.ended["handshakes"] == 32)
        assert silent[0].recv(100), "ZeroMQ has greeted"
        assert not silent[0].recv(100), "and hung up"
        client.transport.send(server.endpoint, [b"hello"])
        client.wait(lambda: bool(client.received))


def test_a_handshake_under_way_outlives_silent_connections_that_are_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitnet.transport.connections.most_connections", lambda: 16)
    table = Connections(Budget(1 << 20), drained=lambda: 0, drain=lambda: None)
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0), backlog=64) as server:

        def connect() -> tuple[socket.socket, TcpConnection]:
            there = stack.enter_context(socket.create_connection(server.getsockname(), WAIT_S))
            here = stack.enter_context(server.accept()[0])
            made = table.connection_made(here.fileno())
            assert made is not None
            return there, made

        speaks, newcomer = connect()
        speaks.sendall(b"a greeting")
        silent = [connect()[1] for _ in range(12)]
        assert not newcomer.ended and [one.ended for one in silent[:5]] == ["handshakes"] * 5
        spoken = [connect() for _ in range(8)]
        for there, _ in spoken:
            there.sendall(b"a greeting")
        for _ in range(24):
            connect()[0].sendall(b"a greeting")
        assert newcomer.ended, "it is spared once"


def test_a_new_connection_replaces_one_of_the_key_with_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitnet.transport.connections.most_connections", lambda: 8)
    table = Connections(Budget(1 << 20), drained=lambda: 0, drain=lambda: None)
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0), backlog=64) as server:

        def connect() -> TcpConnection:
            stack.enter_context(socket.create_connection(server.getsockname(), WAIT_S))
            here = stack.enter_context(server.accept()[0])
            made = table.connection_made(here.fileno())
            assert made is not None
            return made

        named = [connect() for _ in range(6)]
        for number, one in enumerate(named):
            table.named(one.descriptor, Connection(bytes([number]), b"k" * 32))
        comers = [connect() for _ in range(4)]
        assert not any(one.ended for one in comers)
        assert [bool(one.ended) for one in named] == [True, True, False, False, False, False]


def test_a_key_that_is_taken_away_loses_its_connections(node: Start, tmp_path: Path) -> None:
    friend, other = node(), node()
    keys = tmp_path / "keys"
    keys.write_text(f"{friend.identity.public.text}\n{other.identity.public.text}\n")
    server = node(ANY_PORT, authorized=AuthorizedKeys(keys))
    server.answer = echo
    for client in (friend, other):
        client.transport.send(server.endpoint, [b"hello"])
        client.wait(lambda client=client: bool(client.received))
    keys.write_text(other.identity.public.text + "\n")
    friend.wait_for_state(server.endpoint, LinkState.REFUSED)
    server.wait(lambda: bool(server.lost))
    assert {connection.curve for connection in server.lost} == {friend.identity.public.curve_raw}
    other.transport.send(server.endpoint, [b"still there?"])
    other.wait(lambda: len(other.received) == 2)
    assert (server.endpoint, LinkState.DOWN) not in other.states


@pytest.mark.skipif(sys.platform not in ("linux", "android"), reason="connections are looked at on Linux")
def test_links_from_a_lost_address_are_opened_again(node: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise they would hang for half a minute, because no error reports that packets from the lost address
    vanish."""
    monkeypatch.setattr("splitnet.transport.connections._MOVED_S", 0.05)
    server, client = node(ANY_PORT), node()
    server.answer = echo
    client.transport.send(server.endpoint, [b"one"])
    client.wait(lambda: bool(client.received))
    with monkeypatch.context() as patch:
        patch.setattr(flow, "is_own_address", lambda host: False)
        client.wait_for_state(server.endpoint, LinkState.DOWN)
    client.transport.send(server.endpoint, [b"two"])
    client.wait(lambda: client.frames() == [[b"one"], [b"two"]])


def test_an_address_that_is_lost_for_a_moment_ends_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    connections = Connections(Budget(1), drained=lambda: 0, drain=lambda: None)
    monkeypatch.setattr(connections, "end_connection", lambda known, reason: ended.append(f"{known.own_host} {reason}"))
    present = [TcpConnection(-1, b"", "192.0.2.1", 0.0, None, own_host=own) for own in ("192.0.2.7", "192.0.2.8")]
    gone: set[str] = set()
    monkeypatch.setattr(flow, "is_own_address", lambda host: host not in gone)
    for now, away in enumerate((set[str](), {"192.0.2.7"}, {"192.0.2.8"}, set[str](), {"192.0.2.7"}, {"192.0.2.7"})):
        gone = away
        assert not ended
        connections._end_moved(present, 10.0 * now)
    assert ended == ["192.0.2.7 moved"]


def test_a_connection_that_zeromq_has_closed_is_hung_up_without_an_error() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
        descriptor = one.fileno()
    flow.shut_down(descriptor, b"\0" * 8)


def test_addresses_of_this_machine_are_recognised() -> None:
    assert flow.is_own_address("127.0.0.1") and flow.is_own_address("::ffff:127.0.0.1")
    assert not flow.is_own_address("192.0.2.7") and not flow.is_own_address("2001:db8::7")


def test_a_receiver_that_reads_nothing_for_long_is_cut_off(node: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitnet.transport.connections.STALLED_S", 1.0)
    server = node(ANY_PORT)
    context = zmq.Context()
    identity = Identity.generate()
    sleeper = context.socket(zmq.DEALER)
    try:
        sleeper.curve_publickey, sleeper.curve_secretkey = identity.curve_public, identity.curve_secret
        sleeper.curve_serverkey = server.identity.public.curve
        sleeper.rcvhwm, sleeper.linger = 1, 0
        sleeper.connect(server.endpoint.address)
        sleeper.send(b"hello")
        server.wait(lambda: bool(server.received))
        for _ in range(200):
            server.transport.send(server.received[0][0], [bytes(1 << 20)])
        server.wait(lambda: server.transport.connections.ended["stalled"] == 1)
        server.transport.send(server.received[0][0], [b"are you there?"])
        server.wait(lambda: bool(server.lost))
        server.on_tick = lambda: server.transport._backlog._forget_sent()
        server.wait(lambda: server.transport.sending.used == 0)
    finally:
        context.destroy(linger=0)


def test_a_client_without_a_bound_loses_no_message_to_a_slow_receiver(node: Start) -> None:
    server, client = node(ANY_PORT), node(max_backlog=None)
    asleep = threading.Event()

    server.answer = until(asleep)
    numbers = [number.to_bytes(4, "big") for number in range(12_000)]
    try:
        for number in numbers:  # far more than ZeroMQ's queues and the kernel's buffers take
            client.transport.send(server.endpoint, [number, bytes(1024)])
        client.transport.send(server.endpoint, [b"last", bytes(4 * TRACKED_BYTES)])
        server.wait(lambda: bool(server.received))
    finally:
        asleep.set()
    server.wait(lambda: len(server.received) == len(numbers) + 1)
    assert [frames[0] for frames in server.frames()] == [*numbers, b"last"]
    assert not client.dropped


def test_a_message_to_an_invalid_address_is_reported_as_dropped(node: Start) -> None:
    client = node()
    nowhere = Endpoint("tcp://nowhere", Identity.generate().public)
    client.transport.send(nowhere, [b"header", b"payload"])
    client.wait(lambda: bool(client.dropped))
    [(destination, frames, reason)] = client.dropped
    assert (destination, frames) == (nowhere, [b"header", b"payload"]) and reason


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tcp://peer.example.org:65535", False),
        ("tcp://[::1]:4000", True),
        ("tcp://host:0", False),
        ("tcp://host:65536", False),
        ("tcp://host:٤٢", False),
        ("tcp://*:1", False),
        ("tcp://127.0.0.1;127.0.0.2:1", False),
        ("tcp://a b:1", False),
        ("tcp://host", False),
        ("tcp://:1", False),
        ("ipc:///tmp/socket", False),
        ("inproc://zeromq.zap.01", False),
        ("tcp://host:1\n", False),
        ("", False),
    ],
)
def test_addresses(text: str, valid: bool) -> None:
    assert is_address(text) is valid
