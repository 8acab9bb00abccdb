"""Every message of the wire protocol, and how it becomes frames.

A message travels as one or two ZeroMQ frames:

    frame 0   b"SN", version (1 byte), tag (1 byte), msgpack array of the fields in the order of the dataclass
    frame 1   only for messages with a payload: the encoded tensor, or padding of a ping

The first three bytes are the same in every version, so that each side can name the other's version. Every length is
bounded here and checked before anything is allocated; whatever breaks a bound raises `ProtocolError`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple, cast

import msgpack  # pyright: ignore[reportMissingTypeStubs]

from splitnet.errors import ProtocolError, ProtocolVersionError

PROTOCOL_VERSION = 1
MAGIC = b"SN"

MAX_HEADER_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
MAX_ROWS = 1024
MAX_POSITIONS = 1 << 24
MAX_BLOCKS = 4096
MAX_TEXT = 2048

# msgpack comes without types.
_packb = cast("Callable[[list[Any]], bytes]", msgpack.packb)  # pyright: ignore[reportUnknownMemberType]
_unpackb = cast("Callable[..., Any]", msgpack.unpackb)  # pyright: ignore[reportUnknownMemberType]

SESSION_BYTES = 16
KEY_BYTES = 32

Payload = bytes | memoryview
Check = Callable[[Any], Any]


class FailureCode(IntEnum):
    """Why a peer refused; the client turns each into an exception of `splitnet.errors`."""

    INTERNAL = 1
    BAD_MESSAGE = 2
    BUSY = 3
    UNKNOWN_SESSION = 4
    OUT_OF_ORDER = 5
    WRONG_MODEL = 6
    WRONG_BLOCKS = 7
    TOO_LONG = 8
    STALE_EPOCH = 9
    LEAVING = 10
    """Not about a request: the peer is about to end, and serves the session until its client has replaced it."""


class Part(NamedTuple):
    """New positions of one row in a step."""

    row: int
    start: int
    """Absolute position of the first new one; what the hop has cached from there on is dropped first."""
    length: int
    keep: int
    """How many of the last positions the tail returns to the client (0: none)."""


class Timing(NamedTuple):
    """What a step met at one hop, in microseconds."""

    wait_us: int
    """From its arrival until its first pass began."""
    compute_us: int
    """On the device, over all its passes."""
    next_rtt_us: int
    """Round trip to the next hop, as this one has seen it lately; 0: not measured."""


class Fork(NamedTuple):
    """Row `row` continues from the cache of row `source` (the same id: it simply stays)."""

    row: int
    source: int


def _uint(limit: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not 0 <= value <= limit:
            raise ProtocolError(f"expected an integer in 0..{limit}")
        return value

    return check


def _blob(*lengths: int) -> Check:
    def check(value: Any) -> bytes:
        if type(value) is not bytes or len(value) not in lengths:
            raise ProtocolError(f"expected {' or '.join(map(str, lengths))} bytes")
        return value

    return check


def _text(limit: int) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or len(value) > limit:
            raise ProtocolError(f"expected text of at most {limit} characters")
        return value

    return check


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ProtocolError("expected a boolean")
    return value


def _milliseconds(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ProtocolError("expected a non-negative number of milliseconds")
    return float(value)


def _records(kind: Callable[..., Any], limits: Sequence[int], *, most: int = MAX_ROWS) -> Check:
    width = len(limits)

    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(cast("list[Any]", value)) > most:
            raise ProtocolError(f"expected a list of at most {most} records")
        records: list[Any] = []
        for record in cast("list[Any]", value):
            if type(record) is not list or len(cast("list[Any]", record)) != width:
                raise ProtocolError(f"expected records of {width} integers")
            for number, limit in zip(cast("list[Any]", record), limits, strict=True):
                if type(number) is not int or not 0 <= number <= limit:
                    raise ProtocolError(f"expected an integer in 0..{limit}")
            records.append(kind(*cast("list[int]", record)))
        return tuple(records)

    return check


def _optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


_ROW_ID = (1 << 48) - 1
_NUMBER = _uint((1 << 48) - 1)
_MAX_US = (1 << 48) - 1
_MAX_HOPS = 256


def _wire(check: Check, **options: Any) -> Any:
    return field(metadata={"check": check}, **options)


def _session() -> Any:
    return _wire(_blob(SESSION_BYTES))


def _epoch() -> Any:
    return _wire(_uint((1 << 31) - 1))


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for a `Pong`; the payload is padding that makes bandwidth measurable."""

    TAG: ClassVar[int] = 1
    nonce: int = _wire(_NUMBER)
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class Pong:
    """Answers `Ping` at once, whatever the device is doing."""

    TAG: ClassVar[int] = 2
    nonce: int = _wire(_NUMBER)
    queue_ms: float = _wire(_milliseconds)
    kv_free_positions: int = _wire(_NUMBER)


@dataclass(frozen=True, slots=True)
class Open:
    """Opens a session at a hop, or changes an open one: a larger budget, another next hop, a newer epoch."""

    TAG: ClassVar[int] = 3
    session: bytes = _session()
    epoch: int = _epoch()
    model: str = _wire(_text(64))
    """Fingerprint of the weights."""
    start: int = _wire(_uint(MAX_BLOCKS))
    end: int = _wire(_uint(MAX_BLOCKS))
    budget: int = _wire(_uint(MAX_POSITIONS))
    """Positions of KV cache to reserve, over all rows."""
    codec: int = _wire(_uint(255))
    """Codec of what this hop sends on."""
    previous: bytes = _wire(_blob(0, KEY_BYTES))
    """Public key of the hop that may push steps of this session; empty: only the client does."""
    next_key: bytes = _wire(_blob(0, KEY_BYTES))
    """Public key of the next hop; empty: results go to the client."""
    next_address: str = _wire(_text(256))


@dataclass(frozen=True, slots=True)
class Opened:
    """Answers `Open`: memory is reserved."""

    TAG: ClassVar[int] = 4
    session: bytes = _session()
    epoch: int = _epoch()
    next_reachable: bool = _wire(_flag)
    cached_positions: int = _wire(_NUMBER)
    """Over all rows; 0 tells the client that this hop begins with nothing."""


@dataclass(frozen=True, slots=True)
class Close:
    """Ends a session and frees its memory; sent by its owner."""

    TAG: ClassVar[int] = 5
    session: bytes = _session()


@dataclass(frozen=True, slots=True)
class Step:
    """New positions of some rows, with their encoded boundary activations `[positions, hidden]` as payload.

    A step is idempotent: positions are absolute, a hop crops what it has cached beyond `start` first, and forks that
    were made already are left as they are.
    """

    TAG: ClassVar[int] = 6
    session: bytes = _session()
    epoch: int = _epoch()
    number: int = _wire(_NUMBER)
    parts: tuple[Part, ...] = _wire(_records(Part, (_ROW_ID, MAX_POSITIONS, MAX_POSITIONS, MAX_POSITIONS)))
    forks: tuple[Fork, ...] | None = _wire(_optional(_records(Fork, (_ROW_ID, _ROW_ID))))
    """Applied before the new positions; rows that are not named are dropped. None: the rows stay."""
    replay_until: int = _wire(_uint(MAX_BLOCKS))
    """0 for new positions. In a replay: hops that end at this block or later log their output and send nothing on."""
    codec: int = _wire(_uint(255))
    payload: Payload = b""
    boundary: int = _wire(_uint(MAX_BLOCKS), default=0)
    """The block that the payload stands before, as a hop that pushes names it: so that no chain can be a circle."""
    timings: tuple[Timing, ...] = _wire(_records(Timing, (_MAX_US,) * 3, most=_MAX_HOPS), default=())
    """Of the hops before, in order."""

    @property
    def positions(self) -> int:
        return sum(part.length for part in self.parts)


@dataclass(frozen=True, slots=True)
class Result:
    """Output of a hop for the client: of the tail, or of a hop whose next is the client."""

    TAG: ClassVar[int] = 7
    session: bytes = _session()
    epoch: int = _epoch()
    number: int = _wire(_NUMBER)
    end: int = _wire(_uint(MAX_BLOCKS))
    """The boundary that the payload stands at."""
    codec: int = _wire(_uint(255))
    timings: tuple[Timing, ...] = _wire(_records(Timing, (_MAX_US,) * 3, most=_MAX_HOPS))
    """Of all hops so far, in order."""
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request could not be served; `number` is 0 if it was not about a step."""

    TAG: ClassVar[int] = 8
    session: bytes = _wire(_blob(0, SESSION_BYTES))
    epoch: int = _epoch()
    number: int = _wire(_NUMBER)
    code: int = _wire(_uint(255))
    text: str = _wire(_text(MAX_TEXT))


@dataclass(frozen=True, slots=True)
class Replay:
    """Asks a hop to send its log of encoded activations to its next hop again (see `Open` for a new next hop)."""

    TAG: ClassVar[int] = 9
    session: bytes = _session()
    epoch: int = _epoch()
    number: int = _wire(_NUMBER)
    """Number of the last step of the replay; the hop that ends at `until` answers it with an empty `Result`."""
    until: int = _wire(_uint(MAX_BLOCKS))


Message = Ping | Pong | Open | Opened | Close | Step | Result | Failure | Replay

MESSAGES: tuple[type[Message], ...] = (Ping, Pong, Open, Opened, Close, Step, Result, Failure, Replay)

_BY_TAG: dict[int, type[Message]] = {kind.TAG: kind for kind in MESSAGES}
assert len(_BY_TAG) == len(MESSAGES), "two messages share a tag"

_CHECKS: dict[type[Message], tuple[tuple[str, Check], ...]] = {
    kind: tuple((item.name, item.metadata["check"]) for item in dataclasses.fields(kind) if "check" in item.metadata)
    for kind in MESSAGES
}
_HAS_PAYLOAD = frozenset(kind for kind in MESSAGES if any(item.name == "payload" for item in dataclasses.fields(kind)))
_PREFIX = {kind: MAGIC + bytes((PROTOCOL_VERSION, kind.TAG)) for kind in MESSAGES}


def encode(message: Message) -> list[Payload]:
    """The frames of a message."""
    kind = type(message)
    fields = [getattr(message, name) for name, _ in _CHECKS[kind]]
    header = _PREFIX[kind] + _packb(fields)
    if kind in _HAS_PAYLOAD:
        payload = cast("Ping | Step | Result", message).payload
        if len(payload):
            return [header, payload]
    return [header]


def decode(frames: Sequence[Payload]) -> Message:
    """The message in `frames`.

    Raises:
        ProtocolVersionError: the sender speaks another version.
        ProtocolError: anything else that is not exactly a message.
    """
    if not 1 <= len(frames) <= 2:
        raise ProtocolError(f"expected 1 or 2 frames, got {len(frames)}")
    header = memoryview(frames[0])
    if not 4 <= len(header) <= MAX_HEADER_BYTES:
        raise ProtocolError(f"a header has 4 to {MAX_HEADER_BYTES} bytes, got {len(header)}")
    if bytes(header[:2]) != MAGIC:
        raise ProtocolError("not a splitnet message")
    if header[2] != PROTOCOL_VERSION:
        raise ProtocolVersionError(
            f"the other side speaks protocol {header[2]}, this one {PROTOCOL_VERSION}: upgrade the older of the two"
        )
    kind = _BY_TAG.get(header[3])
    if kind is None:
        raise ProtocolError(f"unknown message tag {header[3]}")
    fields = _unpack(header[4:])
    checks = _CHECKS[kind]
    if len(fields) != len(checks):
        raise ProtocolError(f"{kind.__name__} has {len(checks)} fields, got {len(fields)}")
    values: dict[str, Any] = {}
    for (name, check), value in zip(checks, fields, strict=True):
        try:
            values[name] = check(value)
        except ProtocolError as error:
            raise ProtocolError(f"{kind.__name__}.{name}: {error}") from None
    if kind in _HAS_PAYLOAD:
        values["payload"] = _payload(frames)
    elif len(frames) > 1:
        raise ProtocolError(f"{kind.__name__} has no payload")
    return kind(**values)


def _payload(frames: Sequence[Payload]) -> Payload:
    if len(frames) == 1:
        return b""
    if len(frames[1]) > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"a payload has at most {MAX_PAYLOAD_BYTES} bytes, got {len(frames[1])}")
    return frames[1]


def _unpack(body: memoryview) -> list[Any]:
    try:
        fields = _unpackb(
            body,
            max_array_len=MAX_ROWS,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=MAX_TEXT * 4,
            max_bin_len=256,
        )
    except Exception as error:  # msgpack documents no common base class for what bad input can raise
        raise ProtocolError(f"the header is not valid msgpack: {error}") from None
    if type(fields) is not list:
        raise ProtocolError("the header is not an array")
    return cast("list[Any]", fields)
