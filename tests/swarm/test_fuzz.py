"""Fuzzing of a live peer: thousands of hostile frames from a client with an authorized key."""

from __future__ import annotations

import dataclasses
import math
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import zmq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from peers.peer_links import MAX_NEXT_HOPS
from peers.rows import room_for
from peers.sessions import MAX_SESSIONS
from splitnet.blocks.adapters import write_tensors
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.security.identity import Identity
from splitnet.wire.codecs import CODECS
from splitnet.wire.messages import (
    Adapter,
    AdapterGradient,
    AdapterLoaded,
    Announce,
    Announced,
    Chunk,
    Close,
    Failure,
    FetchedKV,
    FetchKV,
    Fork,
    Forward,
    Found,
    Gradient,
    LookUp,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    Replay,
    Result,
    Step,
    Tapped,
    WeightsPart,
    decode,
    encode,
)
from tests.swarm.harness import LocalSwarm, local_swarm
from tests.tiers import examples
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

BLOCKS = 6
HIDDEN = 64
KV_MEMORY = 16 * 2**20
ANSWER_S = 20.0

MEMORY_BOUND = 160 * 2**20
"""Allowed growth of the whole process: four times the KV memory for rows that are allocated ahead, activations and logs
of the same sessions, and memory that Python, torch and ZeroMQ free late."""

GREEDY = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

# Few sessions, so that most messages name an open session.
ANSWERS = (
    Pong
    | Failure
    | Opened
    | Result
    | Gradient
    | AdapterLoaded
    | AdapterGradient
    | FetchedKV
    | Found
    | Announced
    | WeightsPart
    | Tapped
)

SESSIONS = [bytes([number]) * 16 for number in range(6)]
HOSTILE_KEYS = [Identity.generate().public.raw for _ in range(4)]


@dataclass
class Attacker:
    """An authenticated client that sends any frames."""

    swarm: LocalSwarm
    identity: Identity = field(default_factory=Identity.generate)
    context: zmq.Context[Any] = field(default_factory=zmq.Context)
    nonce: int = 0
    answers: dict[type[Message], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        peer = self.swarm.peers[0]
        self.model = peer.checkpoint.fingerprint
        self.peer_key = peer.identity.public.raw
        self.peer_address = peer.endpoint.address
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.curve_publickey = self.identity.curve_public
        self.socket.curve_secretkey = self.identity.curve_secret
        self.socket.curve_serverkey = peer.identity.public.curve
        self.socket.linger = 0
        self.socket.sndtimeo = self.socket.rcvtimeo = int(ANSWER_S * 1000)
        self.socket.connect(self.peer_address)

    def send(self, frames: Sequence[Any]) -> None:
        self.socket.send_multipart([bytes(frame) for frame in frames] or [b""])

    def say(self, *messages: Message) -> None:
        for message in messages:
            self.send(encode(message))

    def ping(self) -> float:
        """Waits for the answer to a ping, and returns the round trip in ms. All other answers must be valid
        messages."""
        self.nonce += 1
        began = time.perf_counter()
        self.say(Ping(self.nonce))
        while True:
            message = decode(self.socket.recv_multipart())
            self.answers[type(message)] = self.answers.get(type(message), 0) + 1
            assert isinstance(message, ANSWERS)
            if isinstance(message, Pong) and message.nonce == self.nonce:
                return (time.perf_counter() - began) * 1000

    def wait_until_idle(self) -> None:
        """Waits until all steps that were sent are finished."""
        deadline = time.monotonic() + ANSWER_S
        self.ping()
        queues = [peer.service.queue for peer in self.swarm.peers]
        while any(queue.queued_positions or queue.pass_positions for queue in queues):
            assert time.monotonic() < deadline
            self.ping()

    def open(self, session: bytes, **changes: Any) -> Open:
        message = Open(session, 1, self.model, 0, 3, 512, CODECS["none"].code, b"", b"", "")
        return dataclasses.replace(message, **changes)

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("llama"), blocks=BLOCKS, hidden=HIDDEN)


@pytest.fixture(scope="module")
def running(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with local_swarm(folder, [(0, 3), (3, 6)], node=node, kv_memory=KV_MEMORY) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def attacker(running: LocalSwarm) -> Iterator[Attacker]:
    attacker = Attacker(running)
    yield attacker
    attacker.close()


@pytest.fixture(scope="module", autouse=True)
def memory_stays_bounded(running: LocalSwarm, attacker: Attacker) -> Iterator[None]:
    process = psutil.Process()
    attacker.ping()
    before = process.memory_info().rss
    yield
    grown = process.memory_info().rss - before
    assert grown < MEMORY_BOUND, f"the process grew by {grown / 2**20:.0f} MiB"


@pytest.fixture(autouse=True)
def honest_clients_are_served(running: LocalSwarm, folder: Path, attacker: Attacker) -> Iterator[None]:
    """Checks after every test, while the attacker is connected, that an honest client is served."""
    yield
    attacker.say(*(Close(session) for session in SESSIONS))
    attacker.wait_until_idle()
    for peer in running.peers:
        peer._announcer.publish()  # the last record may be of a moment at which the attacker held all memory
    ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(1))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with running.newcomer() as visitor:
        assert torch.equal(visitor.model().generate(**inputs), local.generate(**inputs))  # pyright: ignore


# The peer keeps its state between examples, so a failing example can be neither repeated nor shrunk.
many = settings(
    max_examples=examples(150),
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

session_ids = st.sampled_from(SESSIONS)
epochs = st.sampled_from([*[1] * 12, 0, 2, 2**31 - 1])
counts = st.one_of(st.integers(0, 8), st.sampled_from([255, 256, 257, 511, 513, 2**16, 2**24 - 1, 2**24]))
rows = st.one_of(st.integers(0, 4), st.just(2**48 - 1))
codecs = st.sampled_from([*(codec.code for codec in CODECS.values()), 0, 0, 7, 255])
addresses = st.sampled_from(
    [
        "tcp://192.0.2.1:9",
        "tcp://127.0.0.1:1",
        "tcp://[::1]:1",
        "tcp://0.0.0.0:1",
        "tcp://localhost:1",
        "tcp://127.0.0.1:99999",
        "tcp://*:1",
        "inproc://zeromq.zap.01",
        "ipc:///tmp/x",
        "tcp://a;b:1",
        "",
        "tcp://" + "x" * 200 + ":1",
    ]
)
floats = st.sampled_from(
    [struct.pack("<f", value) for value in (math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, 1.0)]
)


@st.composite
def payloads(draw: st.DrawFn, codec: int, positions: int) -> bytes:
    """A payload, mostly of the length that the positions take."""
    known = [other for other in CODECS.values() if other.code == codec]
    size = positions * known[0].bytes_per_position(HIDDEN) if known else positions
    if size > 2**20 or draw(st.integers(0, 9)) == 0:
        size = draw(st.integers(0, 4000))
    pattern = draw(floats | st.binary(min_size=1, max_size=8))
    return (pattern * (size // len(pattern) + 1))[:size]


numbers = st.integers(0, 12)
taps = st.sampled_from([(), (1,), (1, 2, 3), (3,), (2, 1), (0,), (4096,), tuple(range(1, 9))])
"""Boundaries at which hidden states are wanted."""
versions = st.integers(0, 3)
tensor_names = st.sampled_from(
    [
        "0.self_attn.q_proj.lora_A",
        "0.self_attn.q_proj.lora_B",
        "2.mlp.down_proj.lora_A",
        "2.mlp.down_proj.lora_B",
        "2.mlp.down_proj.scale_in",
        "0.self_attn.q_proj.scale_out",
        "1.self_attn.k_proj.scale_out",
        "1.prefix_keys",
        "1.prefix_values",
        "5.prefix_keys",
        "0.self_attn.lora_A",
        "0.no.such.layer.lora_A",
        "-1.prefix_keys",
        "weight",
    ]
)
sizes = [(2, 64), (64, 2), (2, 128), (2, 3, 16), (2, 0, 16), (1, 3, 16), (), (5,), (64,), (128,), (0, 64), (64, 0)]
shapes = st.sampled_from(sizes)
tensors = st.builds(lambda shape, value: torch.full(shape, value), shapes, st.sampled_from([0.5, math.nan, math.inf]))


@st.composite
def training(draw: st.DrawFn) -> Message:
    """Messages of training that an honest client would not send, or not at this time."""
    session, epoch, number = draw(session_ids), draw(epochs), draw(numbers)
    lengths = tuple(draw(st.lists(st.integers(1, 9) | counts, max_size=4)))
    codec = draw(codecs)
    match draw(st.integers(0, 4)):
        case 0:
            boundary = draw(st.sampled_from([3, 3, 3, 0, 6]))
            return Gradient(
                session,
                epoch,
                number,
                boundary,
                draw(numbers),
                draw(st.booleans()),
                codec,
                draw(payloads(codec, draw(st.integers(1, 9)))),
            )
        case 1:
            names = draw(st.dictionaries(tensor_names, tensors, max_size=4))
            payload = write_tensors(names) if draw(st.integers(0, 4)) else draw(st.binary(max_size=99))
            return Adapter(session, epoch, draw(versions), draw(st.sampled_from([0, 0, 0, 1, 2**48 - 1])), payload)
        case 2:
            return FetchKV(session, epoch, number, draw(st.integers(0, 3) | counts), draw(st.integers(0, 9) | counts))
        case _:
            return Forward(
                session,
                epoch,
                number,
                draw(numbers | st.just(2**48 - 1)),
                lengths,
                draw(st.booleans()),
                draw(versions),
                draw(codecs),
                codec,
                draw(payloads(codec, sum(lengths))),
                draw(st.sampled_from([0, 0, 3, 4096])),
            )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Steps with values that an honest client would not send; many are valid enough to reach the device."""
    parts = tuple(draw(st.lists(st.builds(Chunk, rows, counts, counts, counts), max_size=4)))
    if draw(st.booleans()):
        parts = tuple(Chunk(row, start % 2, 1 + length % 40, 1) for row, start, length, _ in parts)
    forks = draw(st.none() | st.none() | st.lists(st.builds(Fork, rows, rows), max_size=6).map(tuple))
    codec = draw(codecs)
    positions = sum(part.length for part in parts)
    payload = draw(payloads(codec, positions))
    number = draw(st.integers(0, 2**48 - 1))
    until = draw(st.sampled_from([0, 0, 0, 3, 6, 4096]))
    return Step(draw(session_ids), draw(epochs), number, parts, forks, until, codec, payload, draw(counts) % 4097)


def beginnings(attacker: Attacker) -> st.SearchStrategy[list[Message]]:
    """The first messages of an honest session, up to a step that is computed if the peer has room."""
    return st.builds(
        lambda session, reservation, taps: [
            Close(session),
            attacker.open(session, reservation=reservation, taps=taps),
            Step(session, 1, 1, (Chunk(1, 0, 3, 1),), None, 0, CODECS["none"].code, bytes(3 * 4 * HIDDEN)),
        ],
        session_ids,
        st.integers(3, 600),
        st.sampled_from([(), (1, 3)]),
    )


def hostile_messages(attacker: Attacker) -> st.SearchStrategy[Message]:
    keys = st.sampled_from([b"", b"\xff" * 32, bytes(32), attacker.peer_key, *HOSTILE_KEYS])
    opens = st.builds(
        Open,
        session_ids,
        epochs,
        st.sampled_from([attacker.model, attacker.model, attacker.model, "other", ""]),
        st.integers(0, 4),
        st.sampled_from([3, 3, 2, 0, 6, 4096]),
        counts,
        codecs,
        keys,
        keys,
        addresses | st.just(attacker.peer_address),
        taps=taps,
        tap_codec=codecs,
    )
    reserved = st.integers(0, 600)
    useful = st.builds(attacker.open, session_ids, epoch=epochs, reservation=reserved, taps=taps, tap_codec=codecs)
    return st.one_of(
        opens,
        useful,
        useful,
        steps(),
        steps(),
        steps(),
        training(),
        training(),
        training(),
        st.builds(Close, session_ids),
        st.builds(Replay, session_ids, epochs, st.integers(0, 9), st.integers(0, 4096)),
        st.builds(Ping, st.integers(0, 9), st.binary(max_size=2000)),
        st.builds(Result, session_ids, epochs, counts, st.just(3), codecs, st.just(0.0), st.binary(max_size=9)),
        st.builds(Failure, session_ids, epochs, counts, st.just(1), st.just("x")),
    )


def test_hostile_values(attacker: Attacker) -> None:
    @many
    @given(beginnings(attacker), st.lists(hostile_messages(attacker), min_size=20, max_size=40))
    def attack(beginning: list[Message], messages: list[Message]) -> None:
        attacker.say(*beginning, *messages)
        attacker.ping()

    attack()
    attacker.wait_until_idle()
    # Not all messages were refused at once: some steps were computed.
    assert attacker.answers.get(Result, 0) > 0
    assert attacker.answers.get(Tapped, 0) > 0
    assert attacker.answers.get(Opened, 0) > 0
    assert attacker.answers.get(Failure, 0) > 0


def test_mutated_frames(attacker: Attacker) -> None:
    payload = bytes(3 * 4 * HIDDEN)
    valid = [
        attacker.open(SESSIONS[0]),
        attacker.open(SESSIONS[0], taps=(1, 3)),
        Step(SESSIONS[0], 1, 1, (Chunk(1, 0, 3, 1),), None, 0, 0, payload),
        Step(SESSIONS[0], 1, 2, (Chunk(1, 0, 1, 1), Chunk(2, 0, 2, 1)), (Fork(2, 1),), 0, 0, payload),
        Forward(SESSIONS[0], 1, 1, 0, (2, 1), True, 0, 0, 0, payload),
        Gradient(SESSIONS[0], 1, 1, 3, 1, False, 0, payload),
        Adapter(SESSIONS[0], 1, 1, 0, write_tensors({"0.prefix_keys": torch.ones(2, 3, 16)})),
        FetchKV(SESSIONS[0], 1, 1, 1, 3),
        Replay(SESSIONS[0], 1, 1, 6),
        Close(SESSIONS[0]),
        Ping(1, b"padding"),
        LookUp(1, attacker.model, 2),
        Announce(1, 2, attacker.swarm.peers[0].record().pack(attacker.swarm.peers[0].identity)),
    ]

    @st.composite
    def mutated(draw: st.DrawFn) -> list[bytes]:
        frames = [bytearray(frame) for frame in encode(draw(st.sampled_from(valid)))]
        for _ in range(draw(st.integers(0, 3))):
            frame = draw(st.sampled_from(frames))
            if frame:
                where = draw(st.integers(0, min(len(frame) - 1, 80)))
                frame[where : where + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
        change = draw(st.integers(0, 9))
        if change == 0:
            frames.append(bytearray(b"surplus"))
        elif change == 1:
            frames.pop()
        elif change == 2:
            frames.reverse()
        return [bytes(frame) for frame in frames]

    @many
    @given(st.lists(mutated(), min_size=20, max_size=40))
    def attack(batch: list[list[bytes]]) -> None:
        for frames in batch:
            attacker.send(frames)
        attacker.ping()

    attack()


def test_random_frames(attacker: Attacker) -> None:
    random = st.lists(st.binary(max_size=60), max_size=3)
    nearly = st.builds(lambda tag, body: [b"SN\1" + bytes([tag]) + body], st.integers(0, 16), st.binary(max_size=60))

    @many
    @given(st.lists(random | nearly, min_size=20, max_size=40))
    def attack(batch: list[list[bytes]]) -> None:
        for frames in batch:
            attacker.send(frames)
        attacker.ping()

    attack()


def test_thousands_of_sessions(running: LocalSwarm, attacker: Attacker) -> None:
    names = [number.to_bytes(16, "big") for number in range(3000)]
    before = running.peers[0].service.sessions.free_positions
    for first in range(0, len(names), 100):
        attacker.say(*(attacker.open(name, reservation=0) for name in names[first : first + 100]))
        attacker.ping()
    assert len(running.peers[0].service.sessions) <= MAX_SESSIONS
    for first in range(0, len(names), 100):
        attacker.say(*(Close(name) for name in names[first : first + 100]))
        attacker.ping()
    assert running.peers[0].service.sessions.free_positions == before


def test_thousands_of_next_hops(running: LocalSwarm, attacker: Attacker) -> None:
    transport = running.peers[0].transport
    sockets = psutil.Process().num_fds()
    for number in range(2000):
        attacker.say(
            attacker.open(SESSIONS[0], epoch=2 + number, reservation=64, next_key=HOSTILE_KEYS[0], next_address=target)
            if (target := f"tcp://192.0.2.1:{1 + number}")
            else Close(SESSIONS[0])
        )
    names = [number.to_bytes(16, "big") for number in range(2 * MAX_NEXT_HOPS)]
    for number, name in enumerate(names):
        address = f"tcp://192.0.2.2:{1 + number}"
        attacker.say(attacker.open(name, reservation=64, next_key=HOSTILE_KEYS[1], next_address=address))
    attacker.ping()
    assert len(transport._links) <= MAX_NEXT_HOPS
    assert psutil.Process().num_fds() - sockets < 8 * MAX_NEXT_HOPS
    attacker.say(*(Close(name) for name in names), Close(SESSIONS[0]))
    attacker.ping()
    deadline = time.monotonic() + ANSWER_S
    while len(transport._links) > 1:  # the link to the other peer of the swarm may stay open
        assert time.monotonic() < deadline
        attacker.ping()


def test_peers_cannot_be_made_to_push_in_a_circle(running: LocalSwarm, attacker: Attacker) -> None:
    first = running.peers[0]
    circle = attacker.open(
        SESSIONS[0], previous=attacker.peer_key, next_key=attacker.peer_key, next_address=attacker.peer_address
    )
    attacker.say(circle)
    deadline = time.monotonic() + ANSWER_S
    before = attacker.answers.get(Opened, 0)
    while attacker.answers.get(Opened, 0) == before:
        assert time.monotonic() < deadline
        attacker.ping()
    refused = attacker.answers.get(Failure, 0)
    attacker.say(Step(SESSIONS[0], 1, 5, (Chunk(1, 0, 1, 1),), None, 0, 0, bytes(4 * HIDDEN)))
    # The step runs once; its output returns to the same peer, which refuses it.
    while attacker.answers.get(Failure, 0) == refused:
        assert time.monotonic() < deadline
        attacker.ping()
    held = first.service.sessions.get(SESSIONS[0])
    assert held is not None
    attacker.wait_until_idle()
    assert {row: cache.length for row, cache in held.row_state.caches.items()} == {1: 1}


def test_rows_that_were_cropped_are_not_collected(running: LocalSwarm, attacker: Attacker) -> None:
    attacker.say(attacker.open(SESSIONS[0], reservation=600))
    held = running.peers[0].service.sessions
    for row in range(1, 40):
        parts = (Chunk(row, 0, 500, 0), *((Chunk(row - 1, 0, 1, 0),) if row > 1 else ()))
        positions = sum(part.length for part in parts)
        attacker.say(Step(SESSIONS[0], 1, row, parts, None, 0, 0, bytes(positions * 4 * HIDDEN)))
        attacker.wait_until_idle()
    session = held.get(SESSIONS[0])
    assert session is not None
    per_position = running.peers[0].span.kv_bytes_per_position
    assert sum(row.nbytes for row in session.row_state.caches.values()) <= room_for(session.reservation) * per_position


def test_a_fork_bomb_copies_nothing(running: LocalSwarm, attacker: Attacker) -> None:
    attacker.say(attacker.open(SESSIONS[0], reservation=2200))
    hidden = bytes(200 * 4 * HIDDEN)
    attacker.say(Step(SESSIONS[0], 1, 1, (Chunk(1, 0, 200, 0),), None, 0, 0, hidden))
    bomb = tuple(Fork(row, 1) for row in range(2, 1000))
    attacker.say(Step(SESSIONS[0], 1, 2, (Chunk(2, 200, 1, 0),), bomb, 0, 0, bytes(4 * HIDDEN)))
    attacker.wait_until_idle()
    session = running.peers[0].service.sessions.get(SESSIONS[0])
    assert session is not None
    assert list(session.row_state.caches) == [1]


@pytest.mark.full
def test_the_queue_of_small_steps_is_bounded(attacker: Attacker) -> None:
    attacker.say(attacker.open(SESSIONS[0], reservation=2000))
    forks = tuple(Fork(1, 1) for _ in range(900))
    slowest = 0.0
    for _ in range(10):
        for number in range(300):
            attacker.say(
                Step(SESSIONS[0], 1, number, (Chunk(1, 0, 1, 1),), forks if number % 2 else None, 0, 0, bytes(256))
            )
        slowest = max(slowest, attacker.ping())
    assert slowest < ANSWER_S * 1000


def test_an_attack_does_not_disturb_another_client(running: LocalSwarm, folder: Path, attacker: Attacker) -> None:
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(4))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
    expected = local.generate(**inputs)  # pyright: ignore
    nan = b"\x00\x00\xc0\x7f" * HIDDEN
    with running.newcomer() as visitor:
        model = visitor.model()
        attacker.say(attacker.open(SESSIONS[0]), attacker.open(SESSIONS[1]))
        for attempt in range(3):
            for number in range(60):
                session = SESSIONS[number % 2]
                # NaN, a gap, a repeated row, and a close while the device computes steps.
                attacker.say(
                    Step(session, 1, number, (Chunk(1, 0, 4, 4),), None, 0, 0, nan * 4),
                    Step(session, 1, number, (Chunk(1, 99, 1, 1),), None, 0, 0, nan),
                    Step(session, 1, number, (Chunk(2, 0, 1, 1), Chunk(2, 0, 1, 1)), None, 0, 0, nan * 2),
                )
                if number % 20 == 19:
                    attacker.say(Close(session), attacker.open(session))
            assert torch.equal(model.generate(**inputs), expected), f"attempt {attempt}"
            attacker.ping()
