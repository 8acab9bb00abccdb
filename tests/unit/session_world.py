"""A simulated world around a session's state machine: peers, links that lose and repeat messages, a planner, a clock.

Each simulated block is a hash of all earlier input, so that a wrong cache changes all later values. In a `Kind.ROUGH`
world any fault may happen, and a request may fail. In worlds of other kinds no request may fail.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from scheduler.liveness import BAN_S, PingAnswer
from splitnet.blocks.adapters import AdapterTensors, read_tensors, write_tensors
from splitnet.errors import CoverageError, PeerLost, ProtocolError, SplitnetError
from splitnet.security.identity import Identity
from splitnet.session.events import (
    Abandon,
    AskAlive,
    AskRoute,
    Backward,
    BanPeer,
    CloseSession,
    Distrust,
    Effect,
    Event,
    LinkFailed,
    LookUpPrefix,
    Note,
    Phase,
    Received,
    RouteFailed,
    RoutePlanned,
    Send,
    Submit,
    Tick,
    Unban,
    Use,
)
from splitnet.session.machine import SessionState
from splitnet.session.prefix_lookup import LookUpNamespace
from splitnet.session.requests import BackwardState, Batch, PassRequest, StepRequest
from splitnet.swarm.plan import PlannedHop
from splitnet.wire.codecs import codec_by_name
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Adapter as AdapterMessage
from splitnet.wire.messages import (
    AdapterGradient,
    AdapterLoaded,
    Chunk,
    Failure,
    FailureCode,
    Fork,
    Forward,
    Gradient,
    Message,
    Open,
    Opened,
    Replay,
    Result,
    Step,
    Tapped,
)
from splitnet.wire.messages import Close as CloseMessage
from splitnet.wire.sent_log import SentLog, fork_rows, page_ends

SID = b"s" * 16
BLOCKS = 4
SPANS = [(0, 2), (0, 2), (2, 4), (2, 4), (0, 4), (1, 3), (3, 4), (0, 1), (1, 2)]
PLAIN = codec_by_name("none")
SIZE = PLAIN.bytes_per_position(1)
NOT_FINITE = b"\xff" * SIZE
"""A value that is not finite, which every client recognises as wrong."""
CLIENT = "client"
PAGE = 3
"""Positions of a page of the prefix store in these worlds."""

_KEYS = [Identity.generate().public for _ in SPANS]

Values = tuple[bytes, ...]
Tags = tuple[int, ...]
"""For each block of the model, the tag of the adapter that it runs with; 0: no adapter."""


@lru_cache(1 << 16)
def run_block(block: int, tag: int, values: Values) -> bytes:
    """The output of a block for the last position of its input values."""
    if NOT_FINITE in values:
        return NOT_FINITE
    return _digest(bytes((block, tag)), *values)


def run_blocks(start: int, end: int, tags: Tags, values: Values) -> Values:
    """The outputs of blocks `[start, end)` for all positions of a row."""
    for block in range(start, end):
        values = tuple(run_block(block, tags[block], values[: index + 1]) for index in range(len(values)))
    return values


def cut(payload: Any) -> list[bytes]:
    return [bytes(payload[at : at + SIZE]) for at in range(0, len(payload), SIZE)]


def sequences_of(message: Forward) -> list[Values]:
    """The sequences of a forward pass."""
    values = cut(message.payload)
    sequences: list[Values] = []
    for length in message.lengths:
        sequences.append(tuple(values[:length]))
        values = values[length:]
    return sequences


def go_back(
    start: int, end: int, tags: Tags, sequences: Sequence[Values], gradient: bytes, sums: dict[int, bytes]
) -> bytes:
    """The gradient with respect to the input, which depends on all blocks; `sums` collects the simulated gradients of
    blocks with an adapter."""
    for block in reversed(range(start, end)):
        at_input = b"".join(b"".join(run_blocks(start, block, tags, values)) for values in sequences)
        if tags[block]:
            sums[block] = _digest(sums.get(block, b""), at_input, gradient)
        gradient = b"".join(_digest(bytes((block, tags[block])), at_input, piece) for piece in cut(gradient))
    return gradient


def _digest(*parts: bytes) -> bytes:
    """A hash of the parts, as a finite value."""
    return hashlib.blake2b(b"".join(parts), digest_size=SIZE - 1).digest() + b"\0"


def adapter(tag: int) -> AdapterTensors:
    """Adapter parameters for blocks 1 and 2; their only effect is the tag."""
    tensors = {}
    for block in (1, 2):
        for side in "AB":
            tensors[f"{block}.q.lora_{side}"] = torch.full((1, 1), float(tag))
    return AdapterTensors(tensors)


def tags_of(which: AdapterTensors | None) -> Tags:
    if which is None:
        return (0,) * BLOCKS
    tag = int(next(iter(which.tensors.values())))
    return tuple(tag if which.of_blocks(block, block + 1) else 0 for block in range(BLOCKS))


class Kind(Enum):
    """The faults that can happen in a world."""

    ROUGH = "rough"
    """Any fault, at any time."""
    CALM = "calm"
    """Peers leave and return, connections break and recover, and peers restart between requests. No peer lies, and no
    message is lost."""
    LIAR = "liar"
    """As `CALM`, but all peers stay, and one peer begins to lie."""


class StoredPage(NamedTuple):
    """A page kept by a peer: all input values up to its end, and its own outputs."""

    values: Values
    output: bytes
    reach: int
    label: bytes


@dataclass
class Held:
    """A session at a peer."""

    epoch: int
    start: int
    end: int
    reservation: int
    codec: int
    previous: bytes
    next: Endpoint | None
    log: SentLog
    taps: tuple[int, ...] = ()
    context: bytes = b""
    recalled: tuple[int, list[StoredPage]] | None = None
    contexts: dict[int, bytes] = field(default_factory=dict)
    """By row, the context in which the whole row was computed; empty: in several contexts."""
    rows: dict[int, Values] = field(default_factory=dict)
    tags: Tags = (0,) * BLOCKS
    version: int = 0
    done: int = 0
    last: int = 0
    kept: dict[int, tuple[Forward, str]] = field(default_factory=dict)
    """Forward passes for which a gradient may come, with the sender of the input of each."""
    sums: dict[int, dict[int, bytes]] = field(default_factory=dict)
    """The simulated sum of gradients, by the number of the first pass and by block."""


class Faulty:
    """Faults of a peer's handling of a step."""

    KINDS = (
        "internal",
        "busy",
        "too long",
        "no session",
        "out of order",
        "short",
        "codec",
        "swallow",
        "other end",
        "for the tail",
    )
    WITH_STEPS = (
        "not finite",
        "pushes short",
        "pushes gaps",
        "keeps taps",
        "short taps",
        "other codec of taps",
        "claims pages",
    )
    OTHERS = ("refuses adapters", "fails replays", "forgets in replays")


@dataclass(frozen=True)
class _Ping:
    """Asks a peer about a session."""

    session: bytes


class PeerModel:
    """A peer as specified in docs/protocol.md; `fault`: what the peer does at every step instead."""

    def __init__(self, world: World, index: int) -> None:
        self.world = world
        self.span = SPANS[index]
        self.endpoint = Endpoint(f"tcp://127.0.0.1:{index + 1}", _KEYS[index])
        self.record: Any = SimpleNamespace(
            address=self.endpoint.address, key=_KEYS[index], endpoint=self.endpoint, version="new", dtype="float32"
        )
        self.weights = "float32"
        self.name = self.record.key.text
        self.sessions: dict[bytes, Held] = {}
        self.pages: dict[tuple[bytes, bytes, int, int, int], StoredPage] = {}
        self.id = SID
        """The session of the current message."""
        self.alive = True
        self.leaves = False
        self.full = False
        self.fault: str | None = None
        self.dams = False
        """The peer takes no step or replay, and answers no ping of the previous hop, which therefore believes that its
        messages are in transit."""

    @property
    def held(self) -> Held | None:
        return self.sessions.get(self.id)

    @held.setter
    def held(self, held: Held | None) -> None:
        self.sessions.pop(self.id, None)
        if held is not None:
            self.sessions[self.id] = held

    def forget(self) -> None:
        self.sessions.clear()

    def to_client(self, message: Message | PingAnswer) -> None:
        self.world.post(self.name, CLIENT, message)

    def leave(self) -> None:
        """Takes no new sessions, and tells the owner of the held session."""
        self.world.gone.add(self.name)
        for session, held in self.sessions.items() if not self.leaves else ():
            self.to_client(Failure(session, held.epoch, 0, FailureCode.LEAVING, "leaving"))
        self.leaves = True

    def fail(self, epoch: int, number: int, code: FailureCode) -> None:
        self.to_client(Failure(self.id, epoch, number, code, code.name))

    def receive(self, source: str, message: Message | _Ping) -> None:
        self.id = getattr(message, "session", SID)
        held = self.held
        match message:
            case _Ping():
                holds = held is not None
                waiting = int(held is not None and held.next is not None and self.world.at(held.next).dams)
                self.to_client(
                    PingAnswer(self.endpoint, False, holds, waiting, held.done if held else 0, held.last if held else 0)
                )
            case Open():
                self._open(message)
            case CloseMessage():
                self.held = None
            case Step():
                self._step(source, message)
            case Forward():
                self._forward(source, message)
            case Gradient() if held is not None and message.epoch == held.epoch:
                self._back(held, message)
            case AdapterMessage() if self.fault == "refuses adapters":
                self.fail(message.epoch, 0, FailureCode.BAD_MESSAGE)
            case AdapterMessage() if held is not None and message.epoch == held.epoch:
                tags = list(held.tags)
                for name, tensor in read_tensors(message.payload).items():
                    tags[int(name.split(".")[0])] = int(tensor)
                held.tags, held.version = tuple(tags), message.version
                self.to_client(AdapterLoaded(self.id, held.epoch, message.version))
            case Replay() if held is not None and message.epoch == held.epoch:
                self._replay(held, message)
            case Failure():  # The failure comes from the next hop, which knows no other receiver.
                self.to_client(message)
            case _:
                pass

    def _open(self, message: Open) -> None:
        held = self.held
        if held is not None and message.epoch < held.epoch:
            self.fail(message.epoch, 0, FailureCode.STALE_EPOCH)
        elif held is not None and (held.start, held.end, held.codec) != (message.start, message.end, message.codec):
            self.fail(message.epoch, 0, FailureCode.WRONG_BLOCKS)
        elif held is None and (self.leaves or self.full):
            self.fail(message.epoch, 0, FailureCode.LEAVING if self.leaves else FailureCode.BUSY)
        elif held is not None and message.reservation > held.reservation and self.full:
            self.fail(message.epoch, 0, FailureCode.BUSY)
        else:
            if held is None:
                log = SentLog(message.codec, SIZE)
                self.held = held = Held(
                    message.epoch, message.start, message.end, message.reservation, message.codec, b"", None, log
                )
            if message.epoch > held.epoch:
                held.last = 0
                held.kept.clear()
                held.sums.clear()
            held.epoch, held.reservation = message.epoch, max(held.reservation, message.reservation)
            following = self.world.at_key(message.next_key) if message.next_key else None
            reachable = following is None or (self.name, following.name) not in self.world.apart
            held.next = following.endpoint if following is not None and reachable else None
            held.previous = message.previous
            self._find_pages(held, message)
            pages = held.recalled[1] if held.recalled is not None else []
            cached = PAGE * len(pages) or sum(map(len, held.rows.values()))
            if self.fault == "claims pages" and message.labels:
                pages, cached = [None], 1000
            held.taps = message.taps
            self.to_client(Opened(self.id, held.epoch, reachable, cached, self.weights, bool(held.taps), bool(pages)))

    def _key(self, held: Held, label: bytes) -> tuple[bytes, bytes, int, int, int]:
        return held.context, label, held.start, held.end, held.codec

    def _find_pages(self, held: Held, message: Open) -> None:
        if message.context != held.context or message.labels:
            held.recalled = None
        held.context = message.context
        if not message.context or not message.labels or message.row in held.rows:
            return
        pages: list[StoredPage] = []
        while len(pages) < len(message.labels) and len(pages) < held.reservation // PAGE:
            page = self.pages.get(self._key(held, message.labels[len(pages)]))
            if page is None:
                break
            pages.append(page)
        held.recalled = (message.row, pages) if pages else None

    def _recall(self, held: Held, step: Step) -> None:
        """Starts a row with the pages found in the store."""
        recalled, held.recalled = held.recalled, None
        part = step.parts[0]
        if recalled is not None and part.row == recalled[0] and part.start:
            pages = recalled[1][: -(-part.start // PAGE)]
            held.rows = {part.row: pages[-1].values}
            held.contexts = {part.row: held.context}
            held.log.restore_row(part.row, [(page.output, page.reach, page.label) for page in pages])

    def _keep_pages(self, held: Held, step: Step) -> None:
        labels = iter(step.labels)
        for part in step.parts:
            first = part.start // PAGE
            for index in range(first, first + page_ends(part)):
                label = next(labels, None)
                if label is None or not held.context or held.contexts.get(part.row) != held.context:
                    continue
                output, reach = held.log.page(part.row, index) if held.end != BLOCKS else (b"", 0)
                values = held.rows[part.row][: (index + 1) * PAGE]
                if NOT_FINITE not in (*values, *run_blocks(held.start, held.end, held.tags, values)):
                    self.pages.setdefault(self._key(held, label), StoredPage(values, output, reach, label))

    def _step(self, source: str, step: Step) -> None:
        held = self.held
        if held is None:
            failure = Failure(self.id, step.epoch, step.number, FailureCode.UNKNOWN_SESSION, "no session")
            self.world.post(self.name, source, failure)
            return
        if step.epoch != held.epoch or self.dams:
            return
        if self.fault in Faulty.KINDS and not step.replay_until and self._misbehave(held, step):
            return
        if len(step.payload) != SIZE * step.positions:
            self.fail(step.epoch, step.number, FailureCode.BAD_MESSAGE)
            return
        if self.fault in Faulty.OTHERS and step.replay_until:
            if self.fault == "fails replays":
                self.fail(step.epoch, step.number or max(self.world.state._replays, default=0), FailureCode.INTERNAL)
                return
            if self.fault == "forgets in replays":
                self.fail(
                    step.epoch, step.number or max(self.world.state._replays, default=0), FailureCode.UNKNOWN_SESSION
                )
                self.held = None
                return
        self._recall(held, step)
        try:
            rows = dict(held.rows) if step.forks is None else fork_rows(held.rows, step.forks, lambda row: row)
            if step.forks is not None:
                held.contexts = {each.row: held.contexts.get(each.source, b"") for each in step.forks}
        except ProtocolError:
            self.fail(step.epoch, step.number, FailureCode.OUT_OF_ORDER)
            return
        values = cut(step.payload)
        outputs: list[bytes] = []
        kept: list[bytes] = []
        for part in step.parts:
            before = rows.get(part.row, ())
            if part.start > len(before):
                self.fail(step.epoch, step.number, FailureCode.OUT_OF_ORDER)
                return
            rows[part.row] = before[: part.start] + tuple(values[: part.length])
            if not part.start:
                held.contexts[part.row] = held.context
            elif held.contexts.get(part.row) != held.context:
                held.contexts[part.row] = b""
            values = values[part.length :]
            made = run_blocks(held.start, held.end, held.tags, rows[part.row])[part.start :]
            outputs += made
            kept += made[len(made) - part.keep :]
        if sum(map(len, rows.values())) > held.reservation:
            self.fail(step.epoch, step.number, FailureCode.TOO_LONG)
            return
        if self.fault == "not finite":
            outputs, kept = [NOT_FINITE] * len(outputs), [NOT_FINITE] * len(kept)
        held.rows = rows
        held.done += step.positions
        held.last = max(held.last, 0 if step.replay_until else step.number)
        if held.end != BLOCKS:
            held.log.record_step(step.parts, step.forks, b"".join(outputs), step.rope_length, step.labels)
        self._keep_pages(held, step)
        self._send_on(held, step, outputs, kept)
        if kept and not step.replay_until and self.fault != "keeps taps":
            for tap in held.taps:
                self._send_tap(held, step, tap)

    def _send_tap(self, held: Held, step: Step, tap: int) -> None:
        states: list[bytes] = []
        for part in step.parts:
            made = run_blocks(held.start, tap, held.tags, held.rows[part.row])
            states += made[len(made) - part.keep :]
        if self.fault == "not finite":
            states = [NOT_FINITE] * len(states)
        payload = b"x" if self.fault == "short taps" else b"".join(states)
        codec = 99 if self.fault == "other codec of taps" else PLAIN.code
        self.to_client(Tapped(self.id, step.epoch, step.number, tap, codec, payload))

    def _send_on(self, held: Held, step: Step, outputs: Sequence[bytes], kept: Sequence[bytes]) -> None:
        replayed = step.replay_until != 0 and held.end >= step.replay_until
        if held.next is not None and not replayed:
            onward = replace(step, codec=held.codec, payload=b"".join(outputs), boundary=held.end)
            if self.fault == "pushes short":
                onward = replace(onward, payload=b"x")
            elif self.fault == "pushes gaps":
                onward = replace(onward, parts=tuple(part._replace(start=part.start + 1000) for part in step.parts))
            self.world.post(self.name, self.world.at(held.next).name, onward)
        elif not replayed or step.number:
            body = b"" if replayed else b"".join(kept if held.end == BLOCKS else outputs)
            self.to_client(Result(self.id, step.epoch, step.number, held.end, held.codec, (), body))

    def _misbehave(self, held: Held, step: Step | Forward) -> bool:
        def result(**changes: Any) -> None:
            whole = Result(self.id, step.epoch, step.number, BLOCKS, held.codec, (), bytes(SIZE * step.positions))
            self.to_client(replace(whole, **changes))

        codes = {
            "internal": FailureCode.INTERNAL,
            "busy": FailureCode.BUSY,
            "too long": FailureCode.TOO_LONG,
            "no session": FailureCode.UNKNOWN_SESSION,
            "out of order": FailureCode.OUT_OF_ORDER,
        }
        if self.fault == "for the tail" and held.end == BLOCKS:
            return False  # Nobody can distinguish made-up values of the last hop from real ones.
        if self.fault in codes:
            self.fail(step.epoch, step.number, codes[self.fault])
        elif self.fault == "short":
            result(payload=b"x", end=held.end)
        elif self.fault == "codec":
            result(codec=99, end=held.end)
        elif self.fault == "other end":
            # The end must be wrong, too: with the correct end, only the values would be wrong.
            result(end=held.end - 1 if held.end > 1 else held.end + 1)
        elif self.fault == "for the tail":
            kept = step.positions if isinstance(step, Forward) else sum(part.keep for part in step.parts)
            result(payload=bytes(SIZE * kept))
        return True

    def _forward(self, source: str, message: Forward) -> None:
        held = self.held
        if held is None:
            failure = Failure(self.id, message.epoch, message.number, FailureCode.UNKNOWN_SESSION, "no session")
            self.world.post(self.name, source, failure)
            return
        if message.epoch != held.epoch or (self.fault in Faulty.KINDS and self._misbehave(held, message)):
            return
        if message.adapter not in (0, held.version):
            self.fail(message.epoch, message.number, FailureCode.OUT_OF_ORDER)
            return
        tags = held.tags if message.adapter else (0,) * BLOCKS
        outputs = b"".join(b"".join(run_blocks(held.start, held.end, tags, values)) for values in sequences_of(message))
        held.kept = {number: kept for number, kept in held.kept.items() if number >= message.oldest}
        if message.kept:
            held.kept[message.number] = message, source
        held.done += message.positions
        held.last = max(held.last, message.number)
        if held.next is not None:
            onward = replace(message, codec=held.codec, payload=outputs, boundary=held.end)
            self.world.post(self.name, self.world.at(held.next).name, onward)
        else:
            self.to_client(Result(self.id, message.epoch, message.number, held.end, held.codec, (), outputs))

    def _back(self, held: Held, message: Gradient) -> None:
        forward, source = held.kept.pop(message.number, (None, ""))
        if forward is None:
            self.fail(message.epoch, message.number, FailureCode.OUT_OF_ORDER)
            return
        tags = held.tags if forward.adapter else (0,) * BLOCKS
        sums = held.sums.setdefault(message.since, {})
        gradient = go_back(held.start, held.end, tags, sequences_of(forward), bytes(message.payload), sums)
        if not message.held and forward.adapter and any(held.tags[held.start : held.end]):
            values = {block: torch.frombuffer(bytearray(value), dtype=torch.float32) for block, value in sums.items()}
            payload = write_tensors(
                {f"{block}.q.lora_{side}": value.view(1, 1).clone() for block, value in values.items() for side in "AB"}
            )
            self.to_client(AdapterGradient(self.id, message.epoch, message.number, 0, payload))
        onward = replace(message, boundary=held.start, payload=gradient)
        self.world.post(self.name, source, onward)

    def _replay(self, held: Held, message: Replay) -> None:
        if held.recalled is not None:
            row, pages = held.recalled
            held.log.restore_row(row, [(page.output, page.reach, page.label) for page in pages])
        steps = list(held.log.replay(2, message.since))
        if held.next is None:
            self.fail(message.epoch, message.number, FailureCode.STALE_EPOCH)
            return
        if not steps:
            self.to_client(Result(self.id, held.epoch, message.number, message.until, held.codec, ()))
        for index, (parts, payload, reach, labels, _) in enumerate(steps):
            number = message.number if index == len(steps) - 1 else 0
            forks = () if not index and not message.since else None
            again = self.id, held.epoch, number, parts, forks, message.until, held.log.codec, payload
            step = Step(*again, held.end, (), reach, labels if held.context else ())
            self.world.post(self.name, self.world.at(held.next).name, step)


@dataclass
class Asked:
    """A step of the caller, and its expected result."""

    request: StepRequest
    wanted: bytes
    tapped: dict[int, bytes]
    useless: int = 0
    """The number of answers that the caller could not use."""


@dataclass
class AskedBatch:
    """A batch of the caller, and its expected result."""

    batch: Batch
    adapter: AdapterTensors | None
    outputs: list[bytes]
    gradients: list[bytes] = field(default_factory=list)
    sums: dict[int, bytes] = field(default_factory=dict)
    goes_back: bool = False

    @property
    def answered(self) -> bool:
        return all(each.is_done or each.error is not None for each in self.batch.passes)

    @property
    def is_forward(self) -> bool:
        """Whether all forward passes are done and no gradient has been sent."""
        return not self.goes_back and all(each.is_done and each.error is None for each in self.batch.passes)

    @property
    def failed(self) -> bool:
        return any(each.error is not None for each in self.batch.passes)


class _Watched(SessionState):
    """Records every change of phase."""

    seen: set[tuple[Phase, Phase]]

    def _enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.seen.add((self.phase, phase))
        super()._enter(phase)


class World:
    """A session, its peers, and the messages in transit between them."""

    def __init__(
        self,
        *,
        reservation: int = 64,
        seed: int = 0,
        kind: Kind = Kind.ROUGH,
        any_weights: bool = False,
        taps: tuple[int, ...] = (),
        stores: bool = True,
    ) -> None:
        self.kind = kind
        self.now = 0.0
        self.peers = [PeerModel(self, index) for index in range(len(SPANS))]
        self.links: dict[tuple[str, str], deque[Any]] = {}
        self.apart: set[tuple[str, str]] = set()
        """Pairs that cannot reach each other."""
        self.gone: set[str] = set()
        """Names of the peers that have failed or left at any time."""
        self.banned: dict[str, float] = {}
        self.questions: deque[AskRoute] = deque()
        self.asked: list[Asked] = []
        self.batches: list[AskedBatch] = []
        self.rows: dict[int, Values] = {}
        self.tags: Tags = (0,) * BLOCKS
        self.restarts = True
        self.untold: set[str] = set()
        """Peers that did not get the `Close` of the session; they drop the session after a long idle time."""
        self.seen: set[tuple[Phase, Phase]] = set()
        self._row_ids = iter(range(1, 1 << 30))
        self._token = 0
        self._choose = random.Random(seed)
        self._events: deque[Event] = deque()
        self.told: list[Note] = []
        self.state = _Watched(
            SID, model="m", blocks=(0, BLOCKS), hidden_size=1, reservation=reservation, any_weights=any_weights
        )
        self.state.seen = self.seen
        self.state.prefixes.namespace = LookUpNamespace(b"salt" if stores else None)
        self.text: tuple[int, Values] | None = None
        """The text for which the caller asked the hops for stored pages: its row and its values."""
        self.recalled = 0
        """The number of texts that continued from stored pages."""
        self.state.taps = taps

    # The environment of the state machine.

    def feed(self, event: Event) -> None:
        self._events.append(event)
        while self._events:
            for effect in self.state.handle(self._events.popleft(), self.now):
                self._perform(effect)
            if not self._events:
                self._events.extend(self._distrusts())
        self.check()

    def _distrusts(self) -> list[Event]:
        """The caller decodes the arrived results, and distrusts hops whose values are not finite."""
        distrusts: list[Event] = []
        for each in self.asked:
            if each.request.result is None or not each.request.is_done:
                continue
            came = {**each.request.tapped, BLOCKS: each.request.result}
            wrong = [boundary for boundary, message in came.items() if NOT_FINITE in cut(message.payload)]
            if wrong:
                each.useless += 1
                why = "answered with values that are not finite"
                distrusts.append(Distrust(each.request, self.state.maker_of(min(wrong)), why))
        return distrusts

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send(endpoint, message):
                self.post(CLIENT, self.at(endpoint).name, message)
            case AskAlive(endpoint):
                self.post(CLIENT, self.at(endpoint).name, _Ping(self.state.session))
            case AskRoute():
                self.questions.append(effect)
            case BanPeer(name, _):
                self.banned[name] = self.now + BAN_S
                assert self.kind is not Kind.CALM or name in self.gone, "a peer that never failed was banned"
            case Unban(name):
                self.banned.pop(name, None)
            case Note():
                self.told.append(effect)

    def post(self, source: str, target: str, message: Any) -> None:
        self.links.setdefault((source, target), deque()).append(message)

    def at(self, endpoint: Endpoint) -> PeerModel:
        return next(peer for peer in self.peers if peer.endpoint == endpoint)

    def at_key(self, key: bytes) -> PeerModel:
        return next(peer for peer in self.peers if peer.record.key.raw == key)

    def busy_links(self) -> list[tuple[str, str]]:
        return [link for link, messages in self.links.items() if messages]

    def deliver(self, link: tuple[str, str], *, keep: bool = False) -> None:
        """Delivers the first message of a link; `keep`: the message stays on the link and will be delivered again."""
        messages = self.links[link]
        message = messages[0] if keep else messages.popleft()
        source, target = link
        if target == CLIENT:
            sender = next(peer for peer in self.peers if peer.name == source)
            if getattr(message, "session", self.state.session) != self.state.session:
                return  # No session with this id is registered.
            if isinstance(message, PingAnswer):
                self.feed(message)
            else:
                self.feed(Received(sender.endpoint, message))
        else:
            peer = next(peer for peer in self.peers if peer.name == target)
            if peer.alive:
                peer.receive(source, message)

    def lose(self, link: tuple[str, str], *, newest: bool = False) -> None:
        """Loses the first message of a link, or the last one if `newest`."""
        messages = self.links[link]
        if isinstance(messages.pop() if newest else messages.popleft(), CloseMessage):
            self.untold.add(link[1])

    def answer(self) -> None:
        """Lets the planner answer the oldest question."""
        asked = self.questions.popleft()
        if asked.unban:
            self.banned = {name: until for name, until in self.banned.items() if not self._peer(name).alive}
        usable = [
            peer
            for peer in self.peers
            if peer.alive
            and not peer.leaves
            and peer.name not in asked.excluded
            and self.banned.get(peer.name, 0.0) <= self.now
        ]
        route = self._route(list(asked.kept), usable)
        if route is None and asked.kept:
            kept = [self.at(hop.record.endpoint) for hop in asked.kept]
            route = self._route([], [*usable, *[peer for peer in kept if peer not in usable]])
            route = [next((hop for hop in asked.kept if hop == new), new) for new in route] if route else None
        if route is None:
            self.feed(
                RouteFailed(asked.number, CoverageError("nobody"), frozenset(peer.name for peer in self.peers), True)
            )
        else:
            self.feed(RoutePlanned(asked.number, tuple(route), (PLAIN,) * (len(route) + 1)))

    def _peer(self, name: str) -> PeerModel:
        return next(peer for peer in self.peers if peer.name == name)

    def _route(self, kept: list[PlannedHop], usable: list[PeerModel]) -> list[PlannedHop] | None:
        names = {hop.name for hop in kept}
        route: list[PlannedHop] = []
        position = 0
        while position < BLOCKS:
            stays = next((hop for hop in kept if hop.start == position), None)
            if stays is not None:
                route.append(stays)
                position = stays.end
                continue
            until = min((hop.start for hop in kept if hop.start > position), default=BLOCKS)
            able = [peer for peer in usable if peer.span[0] <= position < peer.span[1] and peer.name not in names]
            if not able:
                return None
            chosen = self._choose.choice(able)
            names.add(chosen.name)
            end = min(chosen.span[1], until)
            route.append(PlannedHop(chosen.record, position, end))
            position = end
        return route

    # The caller.

    @property
    def ready(self) -> bool:
        return self.state.is_open and self.state.is_settled and self.text is None

    def submit(
        self,
        new: Sequence[tuple[int | None, int, int, int]],
        forks: tuple[Fork, ...] | None = None,
        tokens: Values = (),
    ) -> None:
        """Sends chunks of new positions: (row or None for a new row, start, length, keep). tokens: the tokens of
        the first chunk."""
        given = tokens
        parts: list[Chunk] = []
        payload: list[bytes] = []
        wanted: dict[int, list[bytes]] = {boundary: [] for boundary in (*self.state.taps, BLOCKS)}
        if forks is not None:
            self.rows = fork_rows(self.rows, forks, lambda row: row)
        if self.restarts:
            forks, self.rows, self.restarts = (), {}, False
        for row, start, length, keep in new:
            row_id = row if row is not None else next(self._row_ids)
            tokens, given = given or tuple(self._new_token() for _ in range(length)), ()
            self.rows[row_id] = self.rows.get(row_id, ())[:start] + tokens
            parts.append(Chunk(row_id, start, length, keep))
            payload += tokens
            for boundary, states in wanted.items():
                made = run_blocks(0, boundary, self.tags, self.rows[row_id])
                states += made[len(made) - keep :]
        number = self.state.next_number()
        step = Step(self.state.session, self.state.epoch, number, tuple(parts), forks, 0, PLAIN.code, b"".join(payload))
        kept = sum(part.keep for part in parts)
        request = StepRequest(step, kept, self.state.taps if kept else ())
        output, *tapped = (b"".join(wanted.pop(boundary)) for boundary in (BLOCKS, *self.state.taps))
        self.asked.append(Asked(request, output, dict(zip(self.state.taps, tapped, strict=True))))
        self.feed(Submit((request,)))

    def begin_text(self, tokens: Values) -> None:
        """Asks the hops for stored pages of a text, and requests a route."""
        self.text, self.rows = (self.new_row_id(), tokens), {}
        most = (len(tokens) - 1) // PAGE * PAGE
        if most and self.state.prefixes.namespace.salt is not None:
            self.feed(LookUpPrefix(Chunk(self.text[0], 0, most, 0), lambda codec: (b"".join(tokens[:most]), ())))
        self.feed(Use())

    def send_text(self, keep: int = 1) -> int:
        """Sends the positions of the text that the hops do not hold, once the route is open; returns the number of
        positions held."""
        assert self.text is not None and self.state.is_open
        (row, tokens), self.text = self.text, None
        finds = len(tokens) > PAGE and self.state.prefixes.namespace.salt is not None
        recalled = self.state.prefixes.hit if finds else 0
        self.rows = {row: tokens[:recalled]} if recalled else {}
        self.restarts = not recalled
        self.recalled += recalled > 0
        self.submit([(row, recalled, len(tokens) - recalled, keep)], tokens=tokens[recalled:])
        return recalled

    def _new_token(self) -> bytes:
        self._token += 1
        return self._token.to_bytes(SIZE, "big")

    def submit_batch(self, batch: Sequence[Sequence[int]], which: AdapterTensors | None) -> None:
        """Sends the forward passes of a batch; `batch` has the lengths of the sequences of each pass."""
        version = self.state.adapter_version if which is not None else 0
        passes: list[PassRequest] = []
        outputs: list[bytes] = []
        for lengths in batch:
            values = [tuple(self._new_token() for _ in range(length)) for length in lengths]
            payload = b"".join(b"".join(sequence) for sequence in values)
            forward = Forward(
                self.state.session,
                self.state.epoch,
                self.state.next_number(),
                0,
                tuple(lengths),
                True,
                version,
                0,
                PLAIN.code,
                payload,
            )
            passes.append(PassRequest(forward))
            outputs.append(b"".join(b"".join(run_blocks(0, BLOCKS, tags_of(which), each)) for each in values))
        self.batches.append(AskedBatch(Batch(passes), which, outputs))
        self.feed(Submit(tuple(passes)))

    def send_back(self, asked: AskedBatch) -> None:
        """Sends the gradients of a batch whose forward passes are done."""
        asked.goes_back = True
        for each in asked.batch.passes:
            gradient = b"".join(self._new_token() for _ in range(each.message.positions))
            each.back = BackwardState(asked.batch, PLAIN.code, gradient)
            tags = tags_of(asked.adapter)
            asked.gradients.append(go_back(0, BLOCKS, tags, sequences_of(each.message), gradient, asked.sums))
        version = self.state.adapter_version if asked.adapter is not None else 0
        self.feed(Backward(asked.batch, version))

    def new_row_id(self) -> int:
        return next(self._row_ids)

    def abandon_from(self, index: int) -> None:
        """Abandons the steps from `index` on; the next step undoes their positions."""
        dropped, self.asked = self.asked[index:], self.asked[:index]
        self.feed(Abandon(tuple(each.request.number for each in dropped)))

    def can_spare(self, peer: PeerModel) -> bool:
        """Whether the peers that were always present serve all blocks without this peer, even if another peer fails."""
        stay = [each for each in self.peers if each.name not in self.gone and each is not peer]
        return all(sum(each.span[0] <= block < each.span[1] for each in stay) > 1 for block in range(BLOCKS))

    def kill(self, peer: PeerModel) -> None:
        self.gone.add(peer.name)
        peer.alive = False
        peer.forget()
        self.feed(LinkFailed(peer.endpoint, PeerLost("gone")))

    def tick(self) -> bool:
        """Advances the clock to the time at which the machine wants to wake; False: it has no such time."""
        at = self.state.wake_at
        if at == float("inf"):
            return False
        self.now = max(self.now, at)
        self.feed(Tick())
        return True

    # Checks.

    def check(self) -> None:
        for each in self.asked:
            result = each.request.result
            if result is not None and each.request.is_done:
                assert bytes(result.payload) == each.wanted, "a wrong value was delivered"
                for tap, message in each.request.tapped.items():
                    assert bytes(message.payload) == each.tapped[tap], "a wrong hidden state was delivered"
            assert each.useless <= 2 or self.kind is not Kind.LIAR, "the caller got too many unusable answers"
        for asked in self.batches:
            self._check_batch(asked)
        if self.kind is not Kind.ROUGH:
            self._check_that_none_failed()
        if self.state.phase is Phase.CLOSED:
            assert not self.state.in_flight_count and self.state.log is None

    def _check_that_none_failed(self) -> None:
        passes = (each for asked in self.batches for each in asked.batch.passes)
        for request in (*(each.request for each in self.asked), *passes):
            error = request.error  # An error of the base class is the caller's own fault.
            assert error is None or type(error) is SplitnetError, f"a request failed: {error!r}"

    def _check_batch(self, asked: AskedBatch) -> None:
        for each, output in zip(asked.batch.passes, asked.outputs, strict=True):
            assert each.result is None or bytes(each.result.payload) == output, "a wrong output was delivered"
        if asked.goes_back and not asked.failed and asked.batch.is_done:
            for each, gradient in zip(asked.batch.passes, asked.gradients, strict=True):
                assert each.gradient is not None
                assert bytes(each.gradient.payload) == gradient, "a wrong gradient was delivered"
            found = asked.batch.by_adapter.items()
            told = {int(name.partition(".")[0]): tensor.numpy().tobytes() for name, tensor in found}
            assert told == asked.sums, "a wrong sum of gradients was delivered"

    @property
    def is_at_rest(self) -> bool:
        """Whether no message is in transit and no answer is awaited."""
        waits = self.state.in_flight_count or not self.state.is_settled
        return not waits and not self.busy_links() and not self.questions

    def settle(self, most: int = 4000) -> None:
        """Runs the world until the machine waits for nothing and no request is in flight."""
        for _ in range(most):
            links = self.busy_links()
            if links:
                self.deliver(self._choose.choice(links))
            elif self.questions:
                self.answer()
            elif self.state.is_settled and not self.state.in_flight_count:
                return
            elif not self.tick():
                raise AssertionError(f"the machine waits for nothing in {self.state.phase}")
        raise AssertionError(f"the machine does not come to rest in {self.state.phase}")

    def reaches(self, phase: Phase) -> bool:
        """Delivers messages in order until the machine is in `phase`; False: the machine comes to rest before that."""
        while self.state.phase is not phase:
            if links := self.busy_links():
                self.deliver(links[0])
            elif self.questions:
                self.answer()
            elif (self.state.is_settled and not self.state.in_flight_count) or not self.tick():
                return False
        return True

    def close(self) -> None:
        """Closes the session, and checks that no living peer holds it."""
        self.feed(CloseSession())
        while links := self.busy_links():
            self.deliver(links[0])
        holds = {peer.name for peer in self.peers if peer.alive and peer.sessions}
        assert holds <= self.untold, "a peer was not told that the session has ended"
        assert all(each.request.is_done or each.request.error is not None for each in self.asked)
        assert all(each.answered for each in self.batches)
