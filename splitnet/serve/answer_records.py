"""Records of answers by idempotency key, so that an answer goes on after its connection or its gateway is lost.

A record holds the tokens so far and the seed. Everything that clients see is a function of the request, the seed and
the tokens, so the repeated request gets the same stream, without the events that its client has.
"""

from __future__ import annotations

import random
import re
import secrets
import time
from array import array
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from splitnet.limits import FairAccount, Holding
from splitnet.serve.admission import ApiClient
from splitnet.serve.failures import ApiError
from splitnet.serve.shared_state import PREFIX, RECORD_S, SharedState, digest_of

KEY_HEADER, LAST_HEADER = "idempotency-key", "last-event-id"
MOST_KEY = 255  # Maximum characters of an idempotency key
MOST_TOKENS = 2**22  # Maximum tokens of the records of a gateway; one client can use half of these
KEY = rf"[!-~]{{1,{MOST_KEY}}}"
EVENT_ID = rf"(?P<begin>(?P<name>{KEY})\.[0-9a-f]{{8}}\.)(?P<number>[0-9]{{1,9}})"
LEAST_TOKENS = 64  # A record counts as at least so many tokens
TOKEN = "I"  # type of tokens in `array`
UNKNOWN = "nothing is kept of this answer: send the request without Last-Event-ID, and it begins anew"


@dataclass(eq=False)
class AnswerRecord:
    """The record of one answer. One connection writes it: the last one that has asked for this answer.

    tokens: of all answers of the request, in the order in which clients get them. passed: how many of these tokens
    this connection has computed again or sent. skips: how many events of the stream the client has.
    """

    key: str
    digest: str  # of the request
    seed: int
    created: int  # seconds since 1970
    name: str  # the idempotency key, with which event ids begin
    skips: int = 0
    tokens: array[int] = field(default_factory=lambda: array(TOKEN))
    state: SharedState | None = None
    holding: Holding | None = None
    writer: str = field(default_factory=lambda: secrets.token_hex(8))
    passed: int = 0
    moved: bool = False  # another connection has asked for this answer

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    @property
    def event_prefix(self) -> str:
        """The beginning of the ids of this answer's events; an answer that has begun anew has another one."""
        return f"{self.name}.{digest_of(str(self.seed))[:8]}."

    async def pass_tokens(self, tokens: Sequence[int]) -> bool:
        """Keeps tokens, or compares them with the kept ones, before the client gets them; returns whether one is new.

        Raises ApiError if another connection goes on with this answer, or the tokens differ from the kept ones.
        """
        before, kept = len(self.tokens), self.tokens[self.passed : self.passed + len(tokens)]
        if list(kept) != list(tokens[: len(kept)]):
            raise ApiError(409, "the answer cannot go on with the same tokens: send it with a new Idempotency-Key")
        self.tokens.extend(tokens[len(kept) :])
        self.passed += len(tokens)
        if self.holding is not None and len(self.tokens) > max(before, LEAST_TOKENS):
            self.holding.grow(len(self.tokens) - max(before, LEAST_TOKENS))
        if self.state is not None and len(self.tokens) > before and not self.moved:
            await self._keep_from(before, self.state)
        if self.moved:
            raise ApiError(409, "this answer goes on in another connection", code="answer_moved")
        return len(self.tokens) > before

    async def _keep_from(self, before: int, state: SharedState) -> None:
        keys, size = _keys_of(self.key), self.tokens.itemsize
        data = self.tokens[before:].tobytes()
        result = await state.run("append", keys, [self.writer, size * before, data, RECORD_S])
        if result == b"missing":
            whole = [self.digest, self.seed, self.created, self.writer, RECORD_S, self.tokens.tobytes()]
            result = await state.run("restore", keys, whole)
        self.moved |= result == b"moved"


def _keys_of(key: str) -> list[str]:
    # The braces keep both keys on one server of a cluster.
    return [f"{PREFIX}:{{{key}}}:answer", f"{PREFIX}:{{{key}}}:tokens"]


RECORD: ContextVar[AnswerRecord | None] = ContextVar("RECORD", default=None)
"""The record of the request that this task answers; None: the request has no idempotency key."""


def random_hex(nbytes: int) -> str:
    """Random digits for an id; the same again if the request repeats one with a record."""
    record = RECORD.get()
    return secrets.token_hex(nbytes) if record is None else record.random.randbytes(nbytes).hex()


def random_seed() -> int:
    """A random seed of 64 bits; the same again if the request repeats one with a record."""
    record = RECORD.get()
    return secrets.randbits(64) if record is None else record.random.getrandbits(64)


def created_at() -> int:
    """When the answer began, in seconds since 1970."""
    record = RECORD.get()
    return int(time.time()) if record is None else record.created


class AnswerRecords:
    """The records of a gateway, in its memory and in the state that it shares with others."""

    def __init__(self, state: SharedState | None = None, clock: Callable[[], float] = time.time) -> None:
        self._state = state
        self._clock = clock
        self._kept: dict[str, AnswerRecord] = {}  # the oldest first
        self._account = FairAccount(MOST_TOKENS, MOST_TOKENS // 2)
        self.resumed = 0  # how many answers have gone on from kept tokens

    @asynccontextmanager
    async def recorded(
        self, client: ApiClient, headers: Mapping[str, str], path: str, body: bytes
    ) -> AsyncIterator[None]:
        """Within the `with`, `RECORD` is the record of a request, if its headers ask for one.

        Raises ApiError if the headers are wrong, the key belongs to another request, or nothing is kept of the answer.
        """
        if KEY_HEADER not in headers and LAST_HEADER not in headers:
            yield
            return
        name, begin, skips = _asked(headers)
        key = digest_of("answer", client.shared_name, name)
        record = await self._claimed(client, key, digest_of(path, body), name)
        record.skips = skips
        if begin and begin != record.event_prefix:
            raise ApiError(409, UNKNOWN, code="answer_unknown")
        self.resumed += bool(record.tokens)
        token = RECORD.set(record)
        try:
            yield
        finally:
            RECORD.reset(token)

    async def _claimed(self, client: ApiClient, key: str, digest: str, name: str) -> AnswerRecord:
        self._expire()
        known = self._kept.get(key)
        if known is not None and known.digest != digest:
            raise _other()
        record = AnswerRecord(key, digest, secrets.randbits(64), int(self._clock()), name, state=self._state)
        if known is not None:
            record = AnswerRecord(key, digest, known.seed, known.created, name, 0, known.tokens[:], self._state)
        if self._state is not None:
            asked = [digest, record.seed, record.created, record.writer, RECORD_S]
            answer = await self._state.run("claim", _keys_of(key), asked)
            if answer is not None and answer[0] == b"other":
                raise _other()
            if answer is not None:
                seed, created, tokens = int(answer[1]), int(answer[2]), array(TOKEN, answer[3])
                if known is None or seed != known.seed or len(tokens) > len(known.tokens):
                    record = AnswerRecord(key, digest, seed, created, name, 0, tokens, self._state, None, record.writer)
        if (last := self._kept.get(key)) is not None:
            last.moved = True
            self._forget(last)
        self._kept[key] = record
        amount = max(LEAST_TOKENS, len(record.tokens))
        record.holding = self._account.make_holding(client, lambda: self._forget(record), amount)
        return record

    def _forget(self, record: AnswerRecord) -> None:
        if record.holding is not None:
            record.holding.release()
            record.holding = None
        if self._kept.get(record.key) is record:
            del self._kept[record.key]

    def _expire(self) -> None:
        for record in list(self._kept.values()):
            if record.created > self._clock() - RECORD_S:
                break
            self._forget(record)


def _other() -> ApiError:
    return ApiError(409, "this Idempotency-Key belongs to another request: send a new key", code="key_reused")


def _asked(headers: Mapping[str, str]) -> tuple[str, str, int]:
    """The idempotency key, the beginning of the last event's id, and how many events of the stream the client has.

    Raises ApiError if the headers are wrong.
    """
    name, last = headers.get(KEY_HEADER, ""), headers.get(LAST_HEADER, "")
    found = re.fullmatch(EVENT_ID, last)
    if last and (found is None or found["name"] != (name or found["name"])):
        raise ApiError(400, "Last-Event-ID is not the id of an event of this answer: leave it out")
    name = name or (found["name"] if found else "")
    if not re.fullmatch(KEY, name):
        raise ApiError(400, f"Idempotency-Key must have 1 to {MOST_KEY} printable characters without spaces")
    return (name, found["begin"], int(found["number"])) if found else (name, "", 0)
