"""Attacks in which one client's key tries to take a running peer's resources from all other keys.

The protocol allows every message that these functions send; meanwhile the peer must give other keys their share.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from splitnet.security.identity import Identity
from splitnet.swarm.swarm import ModelFacts
from splitnet.transport.transport import Transport
from splitnet.wire.codecs import CODECS
from splitnet.wire.endpoints import Destination, Endpoint
from splitnet.wire.messages import (
    Chunk,
    Close,
    Failure,
    FetchKV,
    Forward,
    Gradient,
    Message,
    Open,
    Payload,
    Ping,
    Pong,
    Result,
    Step,
    decode,
    encode,
)

PLAIN = CODECS["none"].code
ANSWER_S = 60.0


class Client:
    """A client that sends protocol messages to one peer, with many sessions under one key. A context manager.

    Args:
        endpoint: the peer.
        facts: its model.
        blocks: the blocks of its sessions; None: all blocks of the model.
        identity: its key; None: a new one.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        facts: ModelFacts,
        blocks: tuple[int, int] | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.facts = facts
        self.endpoint = endpoint
        self.start, self.end = blocks or (0, facts.num_blocks)
        self._heard: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.positions: dict[bytes, int] = {}
        """How many positions each session has sent."""
        self._nonces = itertools.count(1)
        self._transport = Transport(identity or Identity.generate(), on_message=self._hear, max_backlog=None)
        self._transport.start()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(TimeoutError):
            self.say(*(Close(session) for session in self.positions))
            self.ping_ms()
        self._transport.close()

    def say(self, *messages: Message) -> None:
        for message in messages:
            self._transport.send(self.endpoint, encode(message))

    def hear(self, timeout_s: float = ANSWER_S) -> Message | None:
        """The next message of the peer; None: no message came within `timeout_s`."""
        try:
            return self._heard.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None

    def open(self, reservation: int, session: bytes | None = None, *, epoch: int = 1) -> tuple[bytes, Message | None]:
        """Opens a session; returns its id and the answer."""
        session = session or os.urandom(16)
        self.say(self.opening(session, reservation, epoch=epoch))
        return session, self.hear()

    def opening(self, session: bytes, reservation: int, *, epoch: int = 1) -> Open:
        """The message that opens a session."""
        self.positions[session] = 0
        return Open(session, epoch, self.facts.fingerprint, self.start, self.end, reservation, PLAIN, b"", b"", "")

    def ping_ms(self) -> float:
        """The time that the peer takes to answer a ping, in ms. Drops other messages of the peer."""
        nonce, began = next(self._nonces), time.perf_counter()
        self.say(Ping(nonce))
        while (answer := self.hear()) is not None:
            if isinstance(answer, Pong) and answer.nonce == nonce:
                return (time.perf_counter() - began) * 1000
        raise TimeoutError(f"no answer to a ping in {ANSWER_S:.0f} s")

    def step(self, session: bytes, positions: int = 1) -> None:
        """Sends the next positions of a session, and asks the peer for the output of the last one."""
        start = self.positions[session]
        self.positions[session] = start + positions
        part = Chunk(1, start, positions, 1)
        self.say(Step(session, 1, start + positions, (part,), None, 0, PLAIN, self.hidden(positions)))

    def forward(self, session: bytes, number: int, lengths: Sequence[int], *, kept: bool = False) -> None:
        """Sends a forward pass over whole sequences."""
        payload = self.hidden(sum(lengths))
        self.say(Forward(session, 1, number, 0, tuple(lengths), kept, 0, PLAIN, PLAIN, payload, self.start))

    def gradient(self, session: bytes, number: int, positions: int) -> None:
        """Sends the gradient with respect to the output of a forward pass."""
        self.say(Gradient(session, 1, number, self.end, number, False, PLAIN, self.hidden(positions)))

    def decode(self, session: bytes, *, seconds: float = float("inf"), steps: int = 1 << 30) -> list[float]:
        """Decodes in one session, one step after the other; returns the duration of each step, in ms."""
        took: list[float] = []
        until = time.monotonic() + seconds
        while len(took) < steps and time.monotonic() < until:
            began = time.perf_counter()
            self.step(session)
            answer = self.hear()
            if not isinstance(answer, Result):
                raise AssertionError(f"a decode step was answered with {answer}")
            took.append((time.perf_counter() - began) * 1000)
        return took

    def hidden(self, positions: int) -> bytes:
        return b"\x00\x00\x80\x3f" * (positions * self.facts.hidden_size)

    def _hear(self, source: Destination, frames: Sequence[Payload]) -> None:
        self._heard.put(decode(frames))


def decodes(
    endpoint: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float,
    sessions: int = 64,
    reservation: int = 512,
    blocks: tuple[int, int] | None = None,
    began: Callable[[], None] = lambda: None,
) -> int:
    """Decodes with many sessions of one key, each as fast as the peer answers.

    Args:
        began: called when all sessions are open.

    Returns:
        The number of tokens that all sessions got.
    """
    with Client(endpoint, facts, blocks) as client:
        ids = [client.open(reservation)[0] for _ in range(sessions)]
        for session in ids:
            client.step(session)
        began()
        tokens, until = 0, time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            answer = client.hear(left)
            if isinstance(answer, Result):
                tokens += 1
                if client.positions[answer.session] < reservation:
                    client.step(answer.session)
        return tokens


def prefills(
    endpoint: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float,
    sessions: int = 8,
    length: int = 1024,
    blocks: tuple[int, int] | None = None,
    began: Callable[[], None] = lambda: None,
) -> int:
    """Sends long prompts in sessions of one key; each session sends its next prompt when the last one is answered.
    Returns how many positions were computed."""
    piece = min(512, length)
    with Client(endpoint, facts, blocks) as client:

        def begin() -> None:
            session = os.urandom(16)
            client.say(client.opening(session, length))
            for _ in range(length // piece):
                client.step(session, piece)

        for _ in range(sessions):
            begin()
        began()
        computed, until = 0, time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            answer = client.hear(left)
            if isinstance(answer, Result):
                computed += piece
                if answer.number >= length // piece * piece:
                    client.say(Close(answer.session))
                    begin()
        return computed


def trains(
    endpoint: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float,
    lengths: Sequence[int] = (512,) * 8,
    waiting: int = 6,
    backward: bool = True,
    blocks: tuple[int, int] | None = None,
    began: Callable[[], None] = lambda: None,
) -> int:
    """Sends passes over whole sequences, and gradients for them, in one session. Returns how many were answered."""
    with Client(endpoint, facts, blocks) as client:
        session, _ = client.open(64)
        numbers = itertools.count(1)
        for _ in range(waiting):
            client.forward(session, next(numbers), lengths, kept=backward)
        began()
        answered, until = 0, time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            answer = client.hear(left)
            if isinstance(answer, Result) and backward:
                client.gradient(session, answer.number, sum(lengths))
            if isinstance(answer, (Result, Gradient, Failure)):
                answered += not isinstance(answer, Failure)
                if not backward or not isinstance(answer, Result):
                    client.forward(session, next(numbers), lengths, kept=backward)
        return answered


def recalls(
    endpoint: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float,
    count: int = 60_000,
    blocks: tuple[int, int] | None = None,
) -> float:
    """Queues requests for keys and values of two sessions after forward passes. Then a newer epoch of each session
    cancels its requests, first those of the session whose requests were queued last.

    Returns the longest round trip of another client's pings during the attack, in ms.
    """
    worst = 0.0
    until, epoch = time.monotonic() + seconds, 0
    with Client(endpoint, facts, blocks) as client, Client(endpoint, facts, blocks) as victim:
        sessions = os.urandom(16), os.urandom(16)
        lengths = (128,) * 32
        payload = client.hidden(sum(lengths))
        while time.monotonic() < until:
            epoch += 1
            for session in sessions:
                client.open(64, session, epoch=epoch)
            passes = [Forward(sessions[0], epoch, 1 + n, 0, lengths, False, 0, PLAIN, PLAIN, payload) for n in range(4)]
            client.say(*(replace(forward, boundary=client.start) for forward in passes))
            for session in sessions:
                client.say(*(FetchKV(session, epoch, 10**6, 1, 1) for _ in range(count // 2)))
            worst = max(worst, victim.ping_ms())
            client.ping_ms()  # when the ping is answered, all messages have arrived
            epoch += 1
            client.say(*(client.opening(session, 64, epoch=epoch) for session in reversed(sessions)))
            worst = max(worst, victim.ping_ms())
            client.ping_ms()
    return worst


def squats(
    endpoint: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float,
    reservation: int,
    blocks: tuple[int, int] | None = None,
    began: Callable[[], None] = lambda: None,
) -> int:
    """Reserves `reservation` positions of KV memory in a session that it opens repeatedly. Returns how often."""
    opened = 0
    with Client(endpoint, facts, blocks) as client:
        session, until, epoch = os.urandom(16), time.monotonic() + seconds, 0
        while time.monotonic() < until:
            epoch += 1
            _, answer = client.open(reservation, session, epoch=epoch)
            opened += not isinstance(answer, Failure)
            if epoch == 1:
                began()
            time.sleep(0.05)
    return opened


def crowds(
    endpoint: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float,
    sessions: int = 1024,
    blocks: tuple[int, int] | None = None,
    began: Callable[[], None] = lambda: None,
) -> int:
    """Opens sessions of the smallest size until the peer refuses, and keeps them open. Returns their number."""
    opened = 0
    with Client(endpoint, facts, blocks) as client:
        until = time.monotonic() + seconds
        for _ in range(sessions):
            opened += not isinstance(client.open(0)[1], Failure)
        began()
        time.sleep(max(0.0, until - time.monotonic()))
    return opened
