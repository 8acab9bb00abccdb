"""Messages at the beginning of TCP streams to relays and unreachable peers, before the streams carry ZeroMQ's bytes.

A message is its length (two bytes) and a msgpack array of its tag and fields. Fields that later versions append are
ignored, see `splitnet.wire.fields`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Final

from splitnet.errors import ProtocolError
from splitnet.wire.endpoints import is_address
from splitnet.wire.fields import MessageLayout, blob, flag, packb, text, uint, unpack_array, wire_field

VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 1024
LENGTH_BYTES: Final = 2
TOKEN_BYTES: Final = 16
KEY_BYTES: Final = 32
NONCE_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64


class StreamPurpose(IntEnum):
    """The purpose of a stream, which both sides sign."""

    RESERVE = 1  # unreachable peer to relay: asks the relay to pass on calls
    CALL = 2  # caller to relay: asks for a stream to an unreachable peer
    JOIN = 3  # unreachable peer to relay: accepts a call
    TUNNEL = 4  # caller to unreachable peer, through the joined streams of a relay or directly
    MOVE = 5  # caller to unreachable peer: a better way that continues the tunnel
    TRY = 6  # peer to relay: asks whether the relay can connect to the peer


def _address(value: Any) -> str:
    if type(value) is not str or (value and not is_address(value)):
        raise ProtocolError("expected tcp://IP:PORT, or nothing")
    return value


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message, from the side that connects."""

    TAG: ClassVar[int] = 1
    version: int = wire_field(uint(255))
    purpose: int = wire_field(uint(255))
    key: bytes = wire_field(blob(KEY_BYTES))
    nonce: bytes = wire_field(blob(NONCE_BYTES))


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answers `Hello`: the side that was connected to proves its key."""

    TAG: ClassVar[int] = 2
    key: bytes = wire_field(blob(KEY_BYTES))
    nonce: bytes = wire_field(blob(NONCE_BYTES))
    signature: bytes = wire_field(blob(SIGNATURE_BYTES))


@dataclass(frozen=True, slots=True)
class Proof:
    """Answers `Welcome`: the side that connects proves its key."""

    TAG: ClassVar[int] = 3
    signature: bytes = wire_field(blob(SIGNATURE_BYTES))


@dataclass(frozen=True, slots=True)
class Reserve:
    """Asks a relay to send calls for the sender's key over this stream."""

    TAG: ClassVar[int] = 4


@dataclass(frozen=True, slots=True)
class Reserved:
    """Answers `Reserve`: the relay will send calls over this stream."""

    TAG: ClassVar[int] = 5


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life from an unreachable peer, which the relay answers with a `Beat`."""

    TAG: ClassVar[int] = 6


@dataclass(frozen=True, slots=True)
class Call:
    """Asks a relay for a stream to the unreachable peer with this key."""

    TAG: ClassVar[int] = 7
    key: bytes = wire_field(blob(KEY_BYTES))
    here: str = wire_field(_address)  # the caller's end of the stream, as the caller sees it


@dataclass(frozen=True, slots=True)
class Called:
    """Informs an unreachable peer of a call, which it may accept by a `Join` with this token."""

    TAG: ClassVar[int] = 8
    token: bytes = wire_field(blob(TOKEN_BYTES))
    caller: bytes = wire_field(blob(KEY_BYTES))  # the caller's key
    seen: str = wire_field(_address)  # the caller's end of its stream, as the relay sees it


@dataclass(frozen=True, slots=True)
class Join:
    """The unreachable peer accepts a call."""

    TAG: ClassVar[int] = 9
    token: bytes = wire_field(blob(TOKEN_BYTES))
    here: str = wire_field(_address)


@dataclass(frozen=True, slots=True)
class Joined:
    """The stream is joined to that of the other side: later bytes come from the other side, not from the relay. The
    relay sends this to both sides at the same moment."""

    TAG: ClassVar[int] = 10
    token: bytes = wire_field(blob(TOKEN_BYTES))
    you: str = wire_field(_address)  # the receiver's end of its stream, as the relay sees it
    seen: str = wire_field(_address)  # the other side's end of its stream, as the relay sees it
    here: str = wire_field(_address)  # the other side's end of its stream, as the other side sees it


@dataclass(frozen=True, slots=True)
class Refused:
    """Refuses a request."""

    TAG: ClassVar[int] = 11
    text: str = wire_field(text(200))


@dataclass(frozen=True, slots=True)
class Moved:
    """Begins a better way: the bytes on this way follow the last byte on the former way."""

    TAG: ClassVar[int] = 12
    sent: int = wire_field(uint((1 << 63) - 1))  # bytes that the sender sent over the former way


@dataclass(frozen=True, slots=True)
class Try:
    """Asks a relay to connect to an address, which must belong to the host of the sender."""

    TAG: ClassVar[int] = 13
    address: str = wire_field(_address)


@dataclass(frozen=True, slots=True)
class Tried:
    """Answers `Try`: whether the relay could connect."""

    TAG: ClassVar[int] = 14
    is_reachable: bool = wire_field(flag)


Message = (
    Hello | Welcome | Proof | Reserve | Reserved | Beat | Call | Called | Join | Joined | Refused | Moved | Try | Tried
)
KINDS: Final[tuple[type[Message], ...]] = Message.__args__  # pyright: ignore[reportAttributeAccessIssue]
_BY_TAG = {kind.TAG: (kind, MessageLayout(kind)) for kind in KINDS}


def pack(message: Message) -> bytes:
    """The bytes of a message, with its length first."""
    body = packb([message.TAG, *_BY_TAG[message.TAG][1].write_fields(message)])
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def unpack(body: bytes) -> Message:
    """The message in `body`, which may be hostile. Raises ProtocolError: it is not a valid message."""
    if len(body) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of a stream has at most {MAX_MESSAGE_BYTES} bytes, not {len(body)}")
    values = unpack_array(body, most_items=16, most_text=MAX_MESSAGE_BYTES, most_bytes=MAX_MESSAGE_BYTES)
    if not values or type(values[0]) is not int or values[0] not in _BY_TAG:
        raise ProtocolError("not a message of a stream")
    kind, layout = _BY_TAG[values[0]]
    return kind(**layout.read_fields(values[1:]))
