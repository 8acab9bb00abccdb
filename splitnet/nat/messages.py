"""What the ends of streams say to each other before the streams carry ZeroMQ's bytes.

A message is two bytes with its length, and so much msgpack: an array of its tag and of its fields. Fields that later
versions append are ignored, as `splitnet.wire.fields` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Final

from splitnet.errors import ProtocolError
from splitnet.wire.endpoints import is_address
from splitnet.wire.fields import Layout, blob, flag, packb, text, uint, unpack_array, wire

VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 1024
LENGTH_BYTES: Final = 2
TOKEN_BYTES: Final = 16
KEY_BYTES: Final = 32
NONCE_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64


class Purpose(IntEnum):
    """What a stream is opened for; both sides sign it."""

    RESERVE = 1  # a hidden peer wants to be called through this helper
    CALL = 2  # somebody wants to reach a peer that is hidden
    JOIN = 3  # a hidden peer that was called wants to be joined to the caller
    TUNNEL = 4  # caller and hidden peer, through whatever lies between
    MOVE = 5  # the same two by a better way, which takes over from the first
    TRY = 6  # somebody asks whether it can be connected to


def _address(value: Any) -> str:
    if type(value) is not str or (value and not is_address(value)):
        raise ProtocolError("expected tcp://IP:PORT, or nothing")
    return value


@dataclass(frozen=True, slots=True)
class Hello:
    """Who connects begins."""

    TAG: ClassVar[int] = 1
    version: int = wire(uint(255))
    purpose: int = wire(uint(255))
    key: bytes = wire(blob(KEY_BYTES))
    nonce: bytes = wire(blob(NONCE_BYTES))


@dataclass(frozen=True, slots=True)
class Welcome:
    """Who was connected to proves its key."""

    TAG: ClassVar[int] = 2
    key: bytes = wire(blob(KEY_BYTES))
    nonce: bytes = wire(blob(NONCE_BYTES))
    signature: bytes = wire(blob(SIGNATURE_BYTES))


@dataclass(frozen=True, slots=True)
class Proof:
    """Who connects proves its key."""

    TAG: ClassVar[int] = 3
    signature: bytes = wire(blob(SIGNATURE_BYTES))


@dataclass(frozen=True, slots=True)
class Reserve:
    """Calls for this key are to come by this stream."""

    TAG: ClassVar[int] = 4


@dataclass(frozen=True, slots=True)
class Reserved:
    """They will."""

    TAG: ClassVar[int] = 5


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life, which the helper answers with another."""

    TAG: ClassVar[int] = 6


@dataclass(frozen=True, slots=True)
class Call:
    """The hidden peer with this key is wanted."""

    TAG: ClassVar[int] = 7
    key: bytes = wire(blob(KEY_BYTES))
    here: str = wire(_address)  # this end of the stream, as the caller itself sees it


@dataclass(frozen=True, slots=True)
class Called:
    """Somebody wants the peer that has reserved: it may join with this token."""

    TAG: ClassVar[int] = 8
    token: bytes = wire(blob(TOKEN_BYTES))
    caller: bytes = wire(blob(KEY_BYTES))  # its key
    seen: str = wire(_address)  # where the caller's stream to the helper comes from


@dataclass(frozen=True, slots=True)
class Join:
    """The hidden peer takes a call."""

    TAG: ClassVar[int] = 9
    token: bytes = wire(blob(TOKEN_BYTES))
    here: str = wire(_address)


@dataclass(frozen=True, slots=True)
class Joined:
    """From the next byte on, the other end is no longer the helper. Both are told at the same moment."""

    TAG: ClassVar[int] = 10
    token: bytes = wire(blob(TOKEN_BYTES))
    you: str = wire(_address)  # where the stream of the receiver of this comes from, as the relay sees it
    seen: str = wire(_address)  # where the other's stream comes from, as the helper sees it
    here: str = wire(_address)  # the same as the other sees it itself


@dataclass(frozen=True, slots=True)
class Refused:
    """Not now, or never."""

    TAG: ClassVar[int] = 11
    text: str = wire(text(200))


@dataclass(frozen=True, slots=True)
class Moved:
    """What follows goes on where the way before has ended."""

    TAG: ClassVar[int] = 12
    sent: int = wire(uint((1 << 63) - 1))  # bytes that were sent by that one


@dataclass(frozen=True, slots=True)
class Try:
    """The helper is to connect to an address: one of the host that asks, or it is not tried."""

    TAG: ClassVar[int] = 13
    address: str = wire(_address)


@dataclass(frozen=True, slots=True)
class Tried:
    """The helper could, or could not."""

    TAG: ClassVar[int] = 14
    reached: bool = wire(flag)


Message = (
    Hello | Welcome | Proof | Reserve | Reserved | Beat | Call | Called | Join | Joined | Refused | Moved | Try | Tried
)
KINDS: Final[tuple[type[Message], ...]] = Message.__args__  # pyright: ignore[reportAttributeAccessIssue]
_BY_TAG = {kind.TAG: (kind, Layout(kind)) for kind in KINDS}


def pack(message: Message) -> bytes:
    """The message as it travels, its length in front."""
    body = packb([message.TAG, *_BY_TAG[message.TAG][1].write(message)])
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def unpack(body: bytes) -> Message:
    """The message in `body`, which may be hostile. Raises ProtocolError."""
    if len(body) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message about ways has at most {MAX_MESSAGE_BYTES} bytes, not {len(body)}")
    values = unpack_array(body, most_items=16, most_text=MAX_MESSAGE_BYTES, most_bytes=MAX_MESSAGE_BYTES)
    if not values or type(values[0]) is not int or values[0] not in _BY_TAG:
        raise ProtocolError("not a message about ways")
    kind, layout = _BY_TAG[values[0]]
    return kind(**layout.read(values[1:]))
