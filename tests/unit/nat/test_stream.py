"""Ways to unreachable peers over real sockets: a relay joins two streams, ZeroMQ connects, better ways take over."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from splitnet import limits
from splitnet.errors import AddressInUse
from splitnet.nat import punch, stream
from splitnet.nat import relay as helper_module
from splitnet.nat import unreachable as hidden_module
from splitnet.nat.punch import PathKind
from splitnet.nat.relay import RelayBounds, RelayServer
from splitnet.nat.relay_messages import (
    Beat,
    Call,
    Join,
    Joined,
    Refused,
    Reserve,
    Reserved,
    StreamPurpose,
    Tried,
    Try,
    Welcome,
    pack,
    unpack,
)
from splitnet.nat.stream import Dialing, StreamLoop
from splitnet.nat.unreachable import UnreachablePeer
from splitnet.security.identity import AuthorizedKeys, Identity, PublicKey
from splitnet.transport.connections import Connections, TcpConnection
from splitnet.wire.endpoints import Endpoint, LinkState, Relay
from tests.attacks.relay import Drops, Floods, TakesNoCalls
from tests.unit.transport.test_transport import ANY_PORT, WAIT_S, Node, echo

HOST = "127.0.0.1"


def wait_until(condition: Callable[[], Any]) -> None:
    """Polls a condition, because other threads change it without a notification."""
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until
        threading.Event().wait(0.005)


class World:
    """Relays, and nodes that are reached through relays or use them."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.helpers: list[RelayServer] = []
        self.hosts: dict[RelayServer, str] = {}

    def helper(self, kind: type[RelayServer] = RelayServer, host: str = HOST, **options: Any) -> RelayServer:
        loop = StreamLoop()
        self.stack.callback(loop.close)
        made = kind(loop, Identity.generate(), f"tcp://{host}:0", **options)
        self.stack.callback(made.close)
        made.start()
        self.helpers.append(made)
        self.hosts[made] = host
        return made

    def node(self, listen: str | None = None, **options: Any) -> Node:
        node = Node(listen, **options)
        self.stack.callback(node.transport.close)
        node.transport.start()
        return node

    def relays(self) -> list[Relay]:
        return [helper.relay_at(self.hosts[helper]) for helper in self.helpers]

    def hidden(
        self, *, helpers: int | None = None, vouched: Callable[[Relay], bool] = lambda _: False, **options: Any
    ) -> tuple[Node, UnreachablePeer]:
        """A node that answers messages which arrive through the relays."""
        node = self.node(ANY_PORT, **options)
        node.answer = echo
        return node, self.hidden_at(node, helpers=helpers, vouched=vouched)

    def hidden_at(
        self, node: Node, *, helpers: int | None = None, vouched: Callable[[Relay], bool] = lambda _: False
    ) -> UnreachablePeer:
        hidden = UnreachablePeer(
            node.tunnels.loop,
            node.identity,
            f"tcp://{HOST}:{node.transport.port}",
            node.tunnels.behind,
            self.relays,
            lambda: None,
            vouched,
        )
        hidden.start()
        self.stack.callback(hidden.stop_relaying)
        wait_until(lambda: len(hidden.relays) == (len(self.helpers) if helpers is None else helpers))
        wait_until(lambda: not any(helper.streams.taken for helper in self.helpers))  # its test calls have ended
        return hidden


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(hidden_module, "LOOK_S", 0.1)
    monkeypatch.setattr(hidden_module, "FIRST_PAUSE_S", 0.1)
    with ExitStack() as stack:
        yield World(stack)


@pytest.fixture
def no_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables hole punching. On loopback every node reaches every other, so a direct way would always be found."""
    monkeypatch.setattr(punch, "PUNCH_S", 0.0)


def to(node: Node, relays: tuple[Relay, ...]) -> Endpoint:
    """The endpoint of an unreachable node; nothing listens at its address."""
    return Endpoint("tcp://127.0.0.1:9", node.identity.public, relays)


def ask(client: Node, endpoint: Endpoint, *texts: bytes) -> None:
    """Sends messages, and waits until all have come back in order."""
    before = len(client.received)
    for each in texts:
        client.transport.send(endpoint, [each, each])
    client.wait(lambda: len(client.received) == before + len(texts))
    assert client.received[before:] == [(endpoint, [each, each]) for each in texts]


@pytest.mark.usefixtures("no_holes")
def test_a_hidden_peer_answers_through_a_helper(world: World) -> None:
    helper = world.helper()
    node, hidden = world.hidden()
    client = world.node()
    endpoint = to(node, hidden.relays)
    ask(client, endpoint, b"small", bytes(3 << 20), b"last")
    assert client.tunnels.path_kind(endpoint) is PathKind.RELAYED and client.states == [(endpoint, LinkState.UP)]
    wait_until(lambda: helper.passed_bytes > 4 * (3 << 20))  # bytes are counted after they are sent
    assert helper.streams.taken == hidden.streams.taken == 1
    client.transport.disconnect(endpoint)
    wait_until(lambda: not helper.streams.taken and not hidden.streams.taken)
    assert not node.tunnels.behind


@pytest.mark.usefixtures("no_holes")
def test_a_helper_that_dies_is_replaced_by_another(world: World) -> None:
    for _ in range(2):
        world.helper()
    node, hidden = world.hidden()
    client = world.node()
    endpoint = to(node, hidden.relays)
    ask(client, endpoint, b"one")
    used = next(helper for helper in world.helpers if helper.streams.taken)
    used.close()
    client.wait_for_state(endpoint, LinkState.DOWN)
    ask(client, endpoint, b"two")
    wait_until(lambda: len(hidden.relays) == 1)


@pytest.mark.usefixtures("no_holes")
def test_helpers_that_come_later_are_learned_from_the_endpoint(world: World) -> None:
    world.helper()
    node, hidden = world.hidden()
    client = world.node()
    endpoint = to(node, hidden.relays)
    ask(client, endpoint, b"one")
    world.helpers.pop().close()
    wait_until(lambda: not hidden.relays)
    client.wait_for_state(endpoint, LinkState.DOWN)
    world.helper()
    wait_until(lambda: hidden.relays)
    ask(client, to(node, hidden.relays), b"two")


def test_a_better_way_continues_the_stream_without_a_gap(world: World) -> None:
    helper = world.helper()
    node, hidden = world.hidden()
    client = world.node()
    endpoint = to(node, hidden.relays)
    ask(client, endpoint, b"first")
    wait_until(
        lambda: ask(client, endpoint, b"x", bytes(100_000)) or client.tunnels.path_kind(endpoint) != PathKind.RELAYED
    )
    wait_until(lambda: ask(client, endpoint, b"y") or not helper.streams.taken)
    before = helper.passed_bytes
    ask(client, endpoint, *(bytes(size) for size in range(0, 300_000, 20_000)))
    assert helper.passed_bytes == before
    assert client.states == [(endpoint, LinkState.UP)]  # ZeroMQ has not noticed the change
    world.helpers[0].close()
    ask(client, endpoint, b"without it")


@pytest.mark.usefixtures("no_holes")
def test_a_peer_that_is_gone_is_down_and_comes_back(world: World) -> None:
    world.helper()
    node, hidden = world.hidden()
    client = world.node()
    endpoint = to(node, hidden.relays)
    relays = hidden.relays
    hidden.stop_relaying()
    wait_until(lambda: not world.helpers[0].reservations)
    client.transport.connect(endpoint)
    client.wait_for_state(endpoint, LinkState.DOWN)
    hidden.start()
    client.wait_for_state(to(node, relays), LinkState.UP)


@pytest.mark.usefixtures("no_holes")
def test_keys_are_checked_at_the_ends(world: World, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{Identity.generate().public}\n")
    world.helper()
    node, hidden = world.hidden(authorized=AuthorizedKeys(keys))
    client = world.node()
    endpoint = to(node, hidden.relays)
    client.transport.connect(endpoint)
    client.wait_for_state(endpoint, LinkState.REFUSED)
    other = Endpoint(endpoint.address, Identity.generate().public, hidden.relays)
    client.transport.connect(other)
    client.wait_for_state(other, LinkState.DOWN)


@pytest.mark.usefixtures("no_holes")
def test_a_relay_with_authorized_keys_accepts_the_test_call_of_a_member(world: World, tmp_path: Path) -> None:
    node, client = world.node(ANY_PORT), world.node()
    node.answer = echo
    keys = tmp_path / "keys"
    keys.write_text(f"{node.identity.public}\n{client.identity.public}\n")
    for _ in range(2):
        world.helper(authorized=AuthorizedKeys(keys))
    ask(client, to(node, world.hidden_at(node).relays), b"one")


@pytest.mark.usefixtures("no_holes")
def test_relayed_connections_do_not_count_as_connections_from_this_machine(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections without a key are bounded by host, and all relayed connections come from loopback."""
    counted: list[str] = []
    named = Connections.named

    def count(*args: Any) -> TcpConnection | None:
        known = named(*args)
        if known is not None:
            counted.append(known.host)
        return known

    monkeypatch.setattr(Connections, "named", count)
    world.helper()
    node, hidden = world.hidden()
    ask(world.node(), to(node, hidden.relays), b"relayed")
    ask(world.node(), node.endpoint, b"direct")
    assert counted == [f"{HOST}, through a relay", HOST]


@pytest.mark.usefixtures("no_holes")
def test_relays_that_pass_on_no_calls_are_replaced(world: World) -> None:
    for _ in range(6):
        world.helper(TakesNoCalls)
    honest = [world.helper() for _ in range(2)]
    node, hidden = world.hidden(helpers=2)
    assert {relay.key for relay in hidden.relays} == {one.identity.public.raw for one in honest}
    ask(world.node(), to(node, hidden.relays), b"x")


@pytest.mark.usefixtures("no_holes")
def test_a_flood_of_one_relay_delays_no_other_relay(world: World) -> None:
    world.helper(Floods)
    world.helper()
    node, hidden = world.hidden(helpers=1)
    client = world.node()
    for _ in range(20):
        ask(client, to(node, hidden.relays), b"x")
    loop, most = node.tunnels.loop, 2 * hidden_module.MESSAGES_AT_ONCE

    async def answering() -> int:
        return len(hidden._answering)

    assert loop.run(answering()).result(WAIT_S) < most


def test_a_relay_that_ends_reservations_is_tried_less_and_less_often(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_module, "RETRY_S", 0.01)
    helper = world.helper(Drops)
    _, hidden = world.hidden(helpers=0)
    pauses: list[float] = []

    def pause() -> float:
        return hidden._pauses.get(world.relays()[0], (0.0, 0.0))[1]

    while len(pauses) < 4:
        wait_until(lambda: pause() not in (0.0, *pauses))
        pauses.append(pause())
    assert pauses == [0.1, 0.2, 0.4, 0.8] and helper.events["reserved"] >= 4
    assert not hidden.relays, "nobody is told of a helper through which no call has come"


def test_relays_of_other_networks_and_vouched_relays_are_preferred(world: World) -> None:
    crowd = [world.helper(TakesNoCalls if index < 6 else RelayServer) for index in range(9)]
    elsewhere = [world.helper(host=f"127.0.{index}.1") for index in (1, 2)]
    known = crowd[-1].identity.public.raw
    _, hidden = world.hidden(helpers=3, vouched=lambda relay: relay.key == known)
    assert {known, *(one.identity.public.raw for one in elsewhere)} == {relay.key for relay in hidden.relays}


def test_every_helper_is_tried_before_one_that_has_failed_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_module, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(hidden_module, "RETRY_S", 0.01)
    order: list[RelayServer] = []

    class Noted(Drops):
        async def _reserve(self, sock: socket.socket, host: str, key: PublicKey) -> None:
            order.append(self)
            await super()._reserve(sock, host, key)

    for _ in range(12):
        world.helper(Noted)
    world.hidden(helpers=0)
    wait_until(lambda: len(order) >= 12)
    before = 12 - hidden_module.WANTED + 1  # attempts at the other relays may be under way
    assert len(set(order[:before])) == before


def test_a_relay_is_replaced_by_one_of_another_network_or_if_it_is_unused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        world.helper()
    _, hidden = world.hidden()
    monkeypatch.setattr(hidden_module, "LOOK_S", 0.01)
    monkeypatch.setattr(hidden_module, "MOST_PAUSE_S", 0.0)
    later = world.helper(host="127.0.1.1")
    wait_until(lambda: later.identity.public.raw in {relay.key for relay in hidden.relays})
    before = hidden.relays
    wait_until(lambda: len(hidden.relays) == 3)
    assert {hidden_module.network_of(relay) for relay in hidden.relays} != {hidden_module.network_of(before[0])}
    seen = set(hidden.relays)
    monkeypatch.setattr(hidden_module, "UNUSED_S", 0.05)
    wait_until(lambda: seen.update(hidden.relays) or len(seen) == 4)


def test_a_relay_connects_only_to_the_host_that_asks(world: World) -> None:
    helper = world.helper()
    node, hidden = world.hidden()
    relays = world.relays()
    began = time.monotonic()
    assert hidden.reached_by(f"tcp://{HOST}:{node.transport.port}", relays) == [True]
    assert HOST in node.transport.connections.hosts(began)
    with socket.create_server(("127.0.0.2", 0)) as other:
        assert hidden.reached_by(f"tcp://127.0.0.2:{other.getsockname()[1]}", relays) == [False]
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()
    assert hidden.reached_by(f"tcp://[::1]:{node.transport.port}", relays) == [], "it is seen at an IPv4 address"
    with socket.create_server((HOST, 0)) as silent:
        port = silent.getsockname()[1]
    assert hidden.reached_by(f"tcp://{HOST}:{port}", relays) == [False]
    wait_until(lambda: not helper._trying.taken)


def test_too_many_requests_to_try_are_refused(world: World, stranger: Connect) -> None:
    helper = world.helper(bounds=RelayBounds(tries_of_host=1))
    node = world.node(ANY_PORT)
    question = Try(f"tcp://{HOST}:{node.transport.port}")
    first = stranger(helper)
    assert first.ask(StreamPurpose.TRY, question) == Tried(True)
    assert isinstance(stranger(helper).ask(StreamPurpose.TRY, question), Refused)
    first.sock.close()
    wait_until(lambda: not helper._trying.taken)
    assert stranger(helper).ask(StreamPurpose.TRY, question) == Tried(True)


@pytest.mark.usefixtures("no_holes")
def test_a_key_that_is_removed_from_the_list_loses_its_streams_at_a_relay(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper_module, "KEYS_S", 0.01)
    keys = tmp_path / "keys"
    keys.write_text("anyone\n")
    authorized = AuthorizedKeys(keys)
    helper = world.helper(authorized=authorized)
    node, hidden = world.hidden()
    client, other = world.node(), world.node()
    endpoint = to(node, hidden.relays)
    ask(client, endpoint, b"one")
    ask(other, endpoint, b"two")
    keys.write_text(f"{node.identity.public}\n{other.identity.public}\n")
    client.wait_for_state(endpoint, LinkState.DOWN)
    wait_until(lambda: helper.streams.taken == 1)
    ask(other, endpoint, b"three")
    keys.write_text(f"{other.identity.public}\n{client.identity.public}\n")
    other.wait_for_state(endpoint, LinkState.DOWN)
    wait_until(lambda: not helper.streams.taken and not helper.reservations)


def test_callers_have_proven_their_keys_before_ports_are_tried(world: World, stranger: Connect) -> None:
    helper = world.helper()
    node, _ = world.hidden()
    call = Call(node.identity.public.raw, "tcp://127.0.0.3:9")
    silent = [stranger(helper) for _ in range(punch.AT_ONCE)]
    assert all(isinstance(each.ask(StreamPurpose.CALL, call), Joined) for each in silent)
    assert not punch._places.taken


def test_streams_take_no_more_descriptors_than_a_process_has(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    bounds = world.helper().bounds
    used = 2 * bounds.streams + bounds.reservations + bounds.handshakes + 2 * bounds.tries
    _, hidden = world.hidden()
    used += hidden.streams._most * hidden_module.DESCRIPTORS
    assert used + limits.most_connections() <= 1024 - 256
    assert hidden.streams._most_of["relay"] * hidden_module.WANTED <= hidden.streams._most
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert world.helper().bounds == RelayBounds()


def test_few_attempts_to_punch_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punch, "PUNCH_S", 0.2)

    async def check(sock: socket.socket, claim: Callable[[], bool]) -> None:
        raise AssertionError("nobody listens there")

    async def many(*hosts: int) -> list[Any]:
        tried = [
            punch.punch((HOST, 0), [punch.ConnectAttempt((HOST, 0), f"tcp://127.0.0.{host}:9")], check)
            for host in hosts
        ]
        tasks = [asyncio.ensure_future(each) for each in tried]
        await asyncio.sleep(0)
        done = sum(task.done() for task in tasks)
        return [done, *await asyncio.gather(*tasks)]

    at_once, of_host = punch.AT_ONCE, punch.AT_ONCE_OF_HOST
    assert asyncio.run(many(*range(1, at_once + 4))) == [3, *[None] * (at_once + 3)]
    assert asyncio.run(many(*[1] * (of_host + 2), 2)) == [2, *[None] * (of_host + 3)]


class Stranger:
    """Sends any messages to a relay."""

    def __init__(self, helper: RelayServer, identity: Identity | None = None) -> None:
        self.identity = identity or Identity.generate()
        self.helper = helper
        self.sock = socket.create_connection((HOST, helper.port), timeout=WAIT_S)

    def say(self, *messages: Any) -> None:
        self.sock.sendall(b"".join(map(pack, messages)))

    def hear(self) -> Any:
        """The next message of the relay; None: it has ended the stream."""
        with suppress(ConnectionError):
            size = self.sock.recv(2, socket.MSG_WAITALL)
            return unpack(self.sock.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)) if size else None
        return None

    def ask(self, purpose: StreamPurpose, *request: Any) -> Any:
        dialing = Dialing(self.identity, self.helper.identity.public, purpose)
        self.say(dialing.hello)
        welcome = self.hear()
        if not isinstance(welcome, Welcome):
            return welcome
        self.say(dialing.prove(welcome), *request)
        return self.hear()


@pytest.fixture
def stranger(world: World) -> Callable[..., Stranger]:
    def connect(helper: RelayServer, identity: Identity | None = None) -> Stranger:
        made = Stranger(helper, identity)
        world.stack.enter_context(closing(made.sock))
        return made

    return connect


Connect = Callable[..., Stranger]


def test_silent_streams_end_and_block_no_other(world: World, stranger: Connect) -> None:
    helper = world.helper(bounds=RelayBounds(handshakes_of_host=4, handshake_s=0.3))
    silent = [stranger(helper) for _ in range(40)]
    assert stranger(helper).ask(StreamPurpose.RESERVE, Reserve()) == Reserved()
    assert all(each.hear() is None for each in silent)


@pytest.mark.parametrize(
    "data", [b"\0\0", b"\xff\xff" + bytes(2000), b"\0\x05hello", pack(Reserve()), b"GET / HTTP/1.1\r\n\r\n"], ids=repr
)
def test_invalid_bytes_end_a_stream(world: World, stranger: Connect, data: bytes) -> None:
    one = stranger(world.helper())
    one.sock.sendall(data)
    assert one.hear() is None


def test_a_key_that_is_not_authorized_is_refused_by_a_relay(world: World, stranger: Connect, tmp_path: Path) -> None:
    member, keys = Identity.generate(), tmp_path / "keys"
    keys.write_text(f"{member.public}\n")
    helper = world.helper(authorized=AuthorizedKeys(keys))
    for purpose, request in ((StreamPurpose.RESERVE, Reserve()), (StreamPurpose.CALL, Call(member.public.raw, ""))):
        assert isinstance(stranger(helper).ask(purpose, request), Refused)
    assert stranger(helper, member).ask(StreamPurpose.RESERVE, Reserve()) == Reserved()


def test_reservations_are_bounded_by_host_and_a_key_has_one(world: World, stranger: Connect) -> None:
    helper = world.helper(bounds=RelayBounds(reservations_of_host=3))
    kept = [stranger(helper) for _ in range(3)]
    assert all(each.ask(StreamPurpose.RESERVE, Reserve()) == Reserved() for each in kept)
    assert isinstance(stranger(helper).ask(StreamPurpose.RESERVE, Reserve()), Refused)
    again = stranger(helper, kept[0].identity)
    assert again.ask(StreamPurpose.RESERVE, Reserve()) == Reserved()
    assert kept[0].hear() is None
    assert helper.reservations == 3


def test_reservations_end_after_silence_and_after_a_flood(world: World, stranger: Connect) -> None:
    helper = world.helper(bounds=RelayBounds(silent_s=0.2))
    silent = stranger(helper)
    assert silent.ask(StreamPurpose.RESERVE, Reserve()) == Reserved()
    assert silent.hear() is None
    helper = world.helper()
    loud = stranger(helper)
    assert loud.ask(StreamPurpose.RESERVE, Reserve()) == Reserved()
    with suppress(ConnectionError):
        loud.say(*[Beat()] * 1000)
    answers = 0
    while loud.hear() is not None:
        answers += 1
    assert answers < 20
    wait_until(lambda: not helper.reservations)


def test_calls_are_bounded_by_key_and_only_the_called_peer_joins(world: World, stranger: Connect) -> None:
    helper = world.helper(bounds=RelayBounds(streams_of_key=2, join_s=0.5))
    hidden, caller = stranger(helper), Identity.generate()
    assert hidden.ask(StreamPurpose.RESERVE, Reserve()) == Reserved()
    call = Call(hidden.identity.public.raw, "")
    waiting = [stranger(helper, caller) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda each=each: answers.append(each.ask(StreamPurpose.CALL, call)))
        for each in waiting
    ]
    answers: list[Any] = []
    for thread in threads:
        thread.start()
    tokens = [hidden.hear().token for _ in waiting]
    third = stranger(helper, caller).ask(StreamPurpose.CALL, call)
    assert isinstance(third, Refused) and "no room" in third.text
    assert isinstance(stranger(helper).ask(StreamPurpose.JOIN, Join(tokens[0], "")), Refused)  # another peer was called
    assert isinstance(stranger(helper, hidden.identity).ask(StreamPurpose.JOIN, Join(b"?" * 16, "")), Refused)
    for thread in threads:
        thread.join()
    assert [answer.text for answer in answers] == ["that peer does not answer calls"] * 2
    wait_until(lambda: not helper.streams.taken and not helper._waiting)
    nobody = stranger(helper).ask(StreamPurpose.CALL, Call(Identity.generate().public.raw, ""))
    assert isinstance(nobody, Refused)


def joined(helper: RelayServer, stranger: Connect) -> tuple[Stranger, Stranger]:
    """Both sides of a stream that the relay has joined."""
    hidden, caller = stranger(helper), stranger(helper)
    assert hidden.ask(StreamPurpose.RESERVE, Reserve()) == Reserved()
    dialing = Dialing(caller.identity, helper.identity.public, StreamPurpose.CALL)
    caller.say(dialing.hello)
    caller.say(dialing.prove(caller.hear()), Call(hidden.identity.public.raw, "tcp://192.168.0.2:7"))
    token = hidden.hear().token
    other = stranger(helper, hidden.identity)
    told = other.ask(StreamPurpose.JOIN, Join(token, "tcp://10.0.0.2:8"))
    heard = caller.hear()
    assert (told.here, heard.here) == ("tcp://192.168.0.2:7", "tcp://10.0.0.2:8")
    assert (told.you, told.seen) == (heard.seen, heard.you)
    assert told.seen == f"tcp://{HOST}:{caller.sock.getsockname()[1]}"
    world_keeps = hidden.sock  # the reservation lives as long as the test
    assert world_keeps.fileno() >= 0
    return caller, other


def test_a_receiver_that_does_not_read_takes_no_memory(world: World, stranger: Connect) -> None:
    helper = world.helper()
    caller, _ = joined(helper, stranger)
    caller.sock.settimeout(0.5)
    sent = 0
    with suppress(TimeoutError):
        while sent < 1 << 30:
            sent += caller.sock.send(bytes(1 << 20))
    assert sent < 64 << 20  # only the kernel's buffers fill


def test_idle_and_half_open_streams_end(world: World, stranger: Connect) -> None:
    helper = world.helper(bounds=RelayBounds(idle_s=0.3, half_open_s=0.3))
    caller, other = joined(helper, stranger)
    assert caller.sock.recv(1) == other.sock.recv(1) == b""
    helper = world.helper(bounds=RelayBounds(half_open_s=0.3))
    caller, other = joined(helper, stranger)
    caller.sock.shutdown(socket.SHUT_WR)
    assert other.sock.recv(1) == b""
    other.sock.sendall(b"still")
    assert caller.sock.recv(5) == b"still"
    assert caller.sock.recv(1) == b""


def test_bytes_per_second_are_bounded(world: World, stranger: Connect) -> None:
    helper = world.helper(bounds=RelayBounds(bytes_per_s=4 << 20))
    caller, other = joined(helper, stranger)
    size = 5 << 20
    sending = threading.Thread(target=caller.sock.sendall, args=(bytes(size),))
    begin = time.monotonic()
    sending.start()
    while size:
        size -= len(other.sock.recv(1 << 20))
    sending.join()
    assert time.monotonic() - begin > 0.8  # a burst of 1 MiB, then 4 MiB/s


def test_a_relay_reports_that_its_port_is_taken(world: World) -> None:
    taken = world.helper()
    loop = StreamLoop()
    with closing(loop), pytest.raises(AddressInUse):
        RelayServer(loop, Identity.generate(), f"tcp://{HOST}:{taken.port}")


def test_a_flood_of_connections_does_not_block_the_loop(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = RelayBounds()
    helper = world.helper(bounds=bounds)
    make_room, held = helper._make_room, list[int]()
    monkeypatch.setattr(helper, "_make_room", lambda host: held.append(len(helper._served)) or make_room(host))
    connected = threading.Event()

    async def wait() -> None:
        connected.wait(WAIT_S)  # blocks the event loop

    waiting = helper.loop.run(wait())
    with ExitStack() as stack:
        for _ in range(5 * bounds.handshakes_of_host):
            stack.enter_context(socket.create_connection((HOST, helper.port), WAIT_S))
        connected.set()
        waiting.result()
        wait_until(lambda: len(held) == 5 * bounds.handshakes_of_host)
    assert max(held) < 2 * bounds.handshakes_of_host


def test_a_fast_sender_delays_no_other_stream() -> None:
    order: list[str] = []

    async def copies() -> None:
        async def one(name: str) -> None:
            def passed(_: int) -> float:
                order.append(name)
                return 0.0

            async def pick(_: int) -> socket.socket:
                return drain

            await stream.copy(source, pick, passed)

        with ExitStack() as stack:
            copying: list[asyncio.Task[None]] = []
            for name in "ab":
                (full, source), (drain, end) = socket.socketpair(), socket.socketpair()
                for sock in (full, source, drain, end):
                    stack.enter_context(sock).setblocking(False)
                full.send(bytes(100_000))
                full.shutdown(socket.SHUT_WR)
                copying.append(asyncio.ensure_future(one(name)))
                await asyncio.sleep(0)
            await asyncio.gather(*copying)

    asyncio.run(copies())
    assert len(order) > 4 and order != sorted(order)


def test_ending_a_task_does_not_wait_for_a_hanging_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that ends a task is the one that announces the peer, so it must not hang."""
    monkeypatch.setattr(stream, "END_S", 0.05)
    over, loop = threading.Event(), StreamLoop()

    async def hang() -> None:
        over.wait(WAIT_S)

    task = loop.start_task(asyncio.sleep(WAIT_S))
    assert task is not None
    loop.run(hang())
    loop.cancel_task(task)
    assert not over.is_set()
    over.set()
    loop.close()
    assert task.cancelled()
