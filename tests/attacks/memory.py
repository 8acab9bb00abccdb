"""Attacks in which one client's key tries to make a peer allocate, send or log more than its limits.

Each function attacks a running peer for some seconds, and ends its sessions before it returns. The protocol allows the
messages that it sends, or the peer must refuse them.
"""

from __future__ import annotations

import itertools
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from splitnet.blocks.adapters import write_groups
from splitnet.security.identity import Identity
from splitnet.swarm.swarm import ModelFacts
from splitnet.transport.transport import Transport
from splitnet.wire.codecs import CODECS
from splitnet.wire.endpoints import Destination, Endpoint
from splitnet.wire.messages import (
    Adapter,
    Chunk,
    Close,
    Failure,
    FetchKV,
    Fork,
    Forward,
    Gradient,
    Message,
    Open,
    Opened,
    Payload,
    Ping,
    Pong,
    Replay,
    Result,
    Step,
    decode,
    encode,
)

PLAIN, INT8 = CODECS["none"].code, CODECS["int8"].code
ANSWER_S = 60.0
ROUNDS = 100
"""Rounds of requests for replays, in each epoch."""
REPLAYS = 20
"""The number of replays that are requested at a time; as many requests for keys and values are sent."""

AT_ONCE = 500
"""The number of messages to send before the next wait for the peer."""


class Stranger:
    """A client that sends messages to one peer, in its own sessions. A context manager.

    Args:
        blocks: the blocks of the sessions.
    """

    def __init__(self, endpoint: Endpoint, facts: ModelFacts, blocks: tuple[int, int] | None) -> None:
        self.hidden_size = facts.hidden_size
        self.blocks = blocks or (0, facts.num_blocks)
        self.answers: list[Message] = []
        """Answers that have arrived and that `wait_for` has not returned yet."""
        self._model = facts.fingerprint
        self._endpoint = endpoint
        self._heard: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._nonces = itertools.count(1)
        self._open: set[bytes] = set()
        self._transport = Transport(Identity.generate(), on_message=self._hear, max_backlog=None)
        self._transport.start()

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(*self._open)
        self._transport.close()

    def say(self, *messages: Message) -> None:
        for count, message in enumerate(messages, 1):
            self._transport.send(self._endpoint, encode(message))
            if not count % AT_ONCE:
                self.settle()

    def settle(self) -> None:
        """Waits until the peer has read all messages."""
        nonce = next(self._nonces)
        self._transport.send(self._endpoint, encode(Ping(nonce)))
        while not (isinstance(answer := self._next(), Pong) and answer.nonce == nonce):
            self.answers.append(answer)

    def wait_for(self, session: bytes, *kinds: type[Message]) -> Message:
        """Waits for the next answer about a session that is a `Failure` or of one of `kinds`."""
        while True:
            answer = self.answers.pop(0) if self.answers else self._next()
            if isinstance(answer, (*kinds, Failure)) and getattr(answer, "session", b"") == session:
                return answer

    def open(
        self,
        reservation: int,
        session: bytes | None = None,
        *,
        epoch: int = 1,
        codec: int = PLAIN,
        onward: Open | None = None,
    ) -> bytes:
        """Opens a session, which the peer may refuse. onward: an `Open` from which the next hop is taken."""
        session = session or os.urandom(16)
        key, address = (onward.next_key, onward.next_address) if onward is not None else (b"", "")
        self.say(Open(session, epoch, self._model, *self.blocks, reservation, PLAIN, b"", key, address))
        self._open.add(session)
        self.wait_for(session, Opened)
        return session

    def close(self, *sessions: bytes) -> None:
        self.say(*(Close(session) for session in sessions))
        self._open.difference_update(sessions)
        self.settle()
        self.answers.clear()

    def positions(self, count: int) -> bytes:
        return b"\x00\x00\x80\x3f" * (count * self.hidden_size)

    def step(self, session: bytes, number: int, *parts: Chunk, forks: Sequence[Fork] | None = None) -> Step:
        count = sum(part.length for part in parts)
        named = tuple(forks) if forks is not None else None
        return Step(session, 1, number, parts, named, 0, PLAIN, self.positions(count))

    def _next(self) -> Message:
        return self._heard.get(timeout=ANSWER_S)

    def _hear(self, source: Destination, frames: Sequence[Payload]) -> None:
        self._heard.put(decode(frames))


Began = Callable[[], None]


def _nothing() -> None: ...


def _rounds(seconds: float) -> Iterator[int]:
    """Yields 0, 1, 2, ... until the time is over; at least 0."""
    until = time.monotonic() + seconds
    yield 0
    for number in itertools.count(1):
        if time.monotonic() > until:
            return
        yield number


def prefix_rows(
    endpoint: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float,
    heads: int,
    head_size: int,
    reservation: int,
    rows: int = 100,
    blocks: tuple[int, int] | None = None,
    began: Began = _nothing,
) -> int:
    """Makes rows begin with a long prefix in the middle of a step that has room only without the prefix, and forks
    them.

    Args:
        heads, head_size: number of heads of keys and values, and their size.
        reservation: positions of a session; half of the reservation takes several passes.

    Returns:
        The number of rounds.
    """
    rounds = 0
    with Stranger(endpoint, facts, blocks) as stranger:
        start, end = stranger.blocks
        shape = heads, min(4096, reservation // 2), head_size
        kinds = [f"{block}.prefix_{kind}" for block in range(start, end) for kind in ("keys", "values")]
        prefix = write_groups({kind: torch.zeros(shape) for kind in kinds})
        for _ in _rounds(seconds):
            session = stranger.open(reservation)
            late = [Chunk(2 + row, 0, 1, 0) for row in range(rows)]
            stranger.say(stranger.step(session, 1, Chunk(1, 0, reservation // 2, 1), *late))
            stranger.say(*(Adapter(session, 1, 1, len(prefix) - 1 - i, part) for i, part in enumerate(prefix)))
            stranger.wait_for(session, Result)
            forks = [Fork(5000 + row, 2) for row in range(1000)]
            stranger.say(stranger.step(session, 2, Chunk(5000, 1, 1, 1), forks=forks))
            stranger.wait_for(session, Result)
            began()
            stranger.close(session)
            rounds += 1
    return rounds


def tiny_rows(
    endpoint: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float,
    reservation: int,
    blocks: tuple[int, int] | None = None,
    began: Began = _nothing,
) -> int:
    """Begins new rows of one position all the time, because a row takes more memory than its position.

    Returns:
        The number of rows.
    """
    rows = 0
    with Stranger(endpoint, facts, blocks) as stranger:
        for _ in _rounds(seconds):
            session = stranger.open(reservation)
            for number in range(1, reservation // 1000 + 2):
                parts = [Chunk(1000 * number + row, 0, 1, 0) for row in range(min(1000, reservation))]
                stranger.say(stranger.step(session, number, *parts))
                if isinstance(stranger.wait_for(session, Result), Failure):
                    break
                rows += len(parts)
            began()
            stranger.close(session)
    return rows


def lost_logs(
    endpoint: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float,
    reservation: int,
    rounds: int = 1 << 30,
    blocks: tuple[int, int],
    began: Began = _nothing,
) -> int:
    """Sends steps that drop full rows and whose payload cannot be decoded: the peer must drop the rows from its logs as
    from its caches.

    Args:
        blocks: blocks without the last one, because the tail keeps no log.

    Returns:
        The number of positions that were sent.
    """
    sent = 0
    with Stranger(endpoint, facts, blocks) as stranger:
        session, numbers = stranger.open(reservation), itertools.count(1)
        forged = b"\xff" * CODECS["int8"].bytes_per_position(facts.hidden_size)
        length = min(512, reservation // 2)
        for row in itertools.islice(_rounds(seconds), rounds):
            for start in range(0, reservation - length, length):
                stranger.say(stranger.step(session, next(numbers), Chunk(2 * row + 2, start, length, 1)))
                stranger.wait_for(session, Result)
                sent += length
            forks, part = (), Chunk(2 * row + 3, 0, 1, 1)
            stranger.say(Step(session, 1, next(numbers), (part,), forks, 0, INT8, forged))
            stranger.wait_for(session, Result)
            began()
    return sent


def waiting_steps(
    endpoint: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float,
    reservation: int,
    blocks: tuple[int, int] | None = None,
    began: Began = _nothing,
) -> int:
    """Sends steps of one position faster than any device computes them. Returns their number."""
    sent = 0
    with Stranger(endpoint, facts, blocks) as stranger:
        session = stranger.open(reservation)
        for _ in _rounds(seconds):
            steps = [
                stranger.step(session, sent + i, Chunk(sent + i, 0, 1, 0), forks=()) for i in range(1, AT_ONCE + 1)
            ]
            stranger.say(*steps)
            sent += len(steps)
            began()
            stranger.answers.clear()
    return sent


def long_passes(
    endpoint: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float,
    length: int,
    backward: bool = True,
    blocks: tuple[int, int] | None = None,
    began: Began = _nothing,
) -> int:
    """Sends sequences as long as the context, and their gradients. Returns how many were computed."""
    computed = 0
    with Stranger(endpoint, facts, blocks) as stranger:
        session, numbers = stranger.open(64), itertools.count(1)
        payload = stranger.positions(length)
        for _ in _rounds(seconds):
            number = next(numbers)
            forward = Forward(session, 1, number, number, (length,), backward, 0, PLAIN, PLAIN, payload)
            stranger.say(forward)
            began()
            computed += isinstance(stranger.wait_for(session, Result), Result)
            if backward:
                stranger.say(Gradient(session, 1, number, stranger.blocks[1], number, False, PLAIN, payload))
                computed += isinstance(stranger.wait_for(session, Gradient), Gradient)
    return computed


def tiny_passes(
    endpoint: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float,
    count: int = 1 << 40,
    blocks: tuple[int, int] | None = None,
    began: Began = _nothing,
) -> int:
    """Sends passes of one position, which the peer keeps for gradients that never come, and asks for keys and values.
    Returns the number of passes."""
    sent = 0
    with Stranger(endpoint, facts, blocks) as stranger:
        session = stranger.open(64)
        payload = bytes(CODECS["int4"].bytes_per_position(facts.hidden_size))
        code = CODECS["int4"].code
        for _ in _rounds(seconds):
            if sent >= count:
                break
            for number in range(sent + 1, sent + AT_ONCE, 2):
                stranger.say(Forward(session, 1, number, 0, (1,), True, 0, PLAIN, code, payload))
                stranger.say(FetchKV(session, 1, number + 1, 1, 1))
            while not sent and not isinstance(stranger.wait_for(session, Result), Result):
                pass  # keys and values are refused
            sent += AT_ONCE
            stranger.settle()
            began()
            stranger.answers.clear()
    return sent


def replays(
    endpoint: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float,
    reservation: int,
    blocks: tuple[int, int],
    least: int = 1,
    began: Began = _nothing,
) -> tuple[int, int, int]:
    """Asks repeatedly for replays of the peer's log, and for keys and values, in one epoch and in new epochs.

    Args:
        blocks: blocks without the last one.
        least: minimum number of requests for the log, even if these take longer than `seconds`.

    Returns:
        The number of requested replays, the bytes uploaded before them, and the bytes that the peer sent.
    """
    came = 0

    def count(_: Destination, frames: Sequence[Payload]) -> None:
        nonlocal came
        came += sum(map(len, frames))

    until = time.monotonic() + seconds
    asked, uploaded = 0, 0
    identity = Identity.generate()
    following = Transport(identity, on_message=count, listen="tcp://127.0.0.1:0")
    following.start()
    try:
        with Stranger(endpoint, facts, blocks) as stranger:
            address = f"tcp://127.0.0.1:{following.port}"
            onward = Open(bytes(16), 1, "", 0, 1, 0, 0, b"", identity.public.raw, address)
            session = stranger.open(reservation, onward=onward)
            length = min(512, reservation)
            for number, start in enumerate(range(0, reservation - length + 1, length), 1):
                stranger.say(stranger.step(session, number, Chunk(1, start, length, 0)))
                uploaded += len(stranger.positions(length))
            deadline = time.monotonic() + ANSWER_S
            while came < uploaded and time.monotonic() < deadline:
                stranger.settle()
                time.sleep(0.01)
            came = 0
            began()
            epoch = 1
            while asked < least or time.monotonic() < until:
                requests: list[Message] = [Replay(session, epoch, 1, facts.num_blocks)] * REPLAYS
                requests += [FetchKV(session, epoch, 2, 1, length)] * REPLAYS
                for _ in range(ROUNDS):
                    stranger.say(*requests)
                    asked += REPLAYS
                    stranger.settle()
                    came += sum(len(getattr(each, "payload", b"")) for each in stranger.answers)
                    stranger.answers.clear()
                    if asked >= least and time.monotonic() > until:
                        break
                epoch += 1
                stranger.open(reservation, session, epoch=epoch, onward=onward)
    finally:
        following.close()
    return asked, uploaded, came


def adapters(
    endpoint: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float,
    layer: str,
    width: tuple[int, int],
    blocks: tuple[int, int] | None = None,
    began: Began = _nothing,
) -> int:
    """Sends adapters of mixed types: one directly after the other, with empty parts, and incomplete, with steps between
    the adapters.

    Args:
        layer: a layer of every block, such as `self_attn.q_proj`.
        width: number of the layer's inputs, which is also that of its outputs.

    Returns:
        The number of parts.
    """
    sent, version = 0, 0
    with Stranger(endpoint, facts, blocks) as stranger:
        name = f"{stranger.blocks[0]}.{layer}.lora"
        session, numbers = stranger.open(2048), itertools.count(1)

        def low_rank(a: torch.dtype, b: torch.dtype) -> bytes:
            pair = torch.zeros(1, width[0], dtype=a), torch.zeros(width[1], 1, dtype=b)
            return write_groups({f"{name}_{which}": tensor for which, tensor in zip("AB", pair, strict=True)})[0]

        half, plain = low_rank(torch.float16, torch.float32), low_rank(torch.float32, torch.float32)
        eight = low_rank(torch.float8_e4m3fn, torch.float8_e4m3fn)
        for _ in _rounds(seconds):
            for payload in (half, eight, plain, plain):
                version += 1
                stranger.say(*(Adapter(session, 1, version, 0, payload) for _ in range(3)))
                stranger.say(*(stranger.step(session, next(numbers), Chunk(1, 0, 1, 1)) for _ in range(20)))
            version += 1
            stranger.say(*(Adapter(session, 1, version, 1, b"") for _ in range(200)))
            stranger.say(*(Adapter(session, 1, version, 1000 - i, b"x") for i in range(200)))
            sent += 412
            stranger.settle()
            began()
            stranger.answers.clear()
    return sent
