"""Every message of the wire protocol, and how it becomes frames.

A message travels as one or two ZeroMQ frames:

    frame 0   b"SN", version (1 byte), tag (1 byte), msgpack array of the fields in the order of the dataclass
    frame 1   only for messages with a payload: the encoded tensor, an adapter, or padding of a ping

The first three bytes are the same in every version, so that each side can name the other's version. Every length is
bounded here and checked before anything is allocated; whatever breaks a bound raises `ProtocolError`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, NamedTuple, cast, get_args

from splitnet.errors import ProtocolError, ProtocolVersionError
from splitnet.wire.endpoints import Relay
from splitnet.wire.fields import (
    Layout,
    appended,
    blob,
    flag,
    joined,
    matching,
    milliseconds,
    number,
    optional,
    packb,
    records,
    row,
    several,
    text,
    uint,
    unpack_array,
    wire,
)

PROTOCOL_VERSION = 1
MAGIC = b"SN"

MAX_HEADER_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
MAX_ROWS = 1024
MAX_POSITIONS = 1 << 24
MAX_BLOCKS = 4096
MAX_TAPS = 8
MAX_TEXT = 2048

MAX_DEPTH = 2
MAX_FOUND = 256
ENTRY_BYTES = 19
MAX_KNOWN = 512
MAX_CHANGES_BYTES = 60_000

FINGERPRINT = re.compile(r"[0-9a-f]{8,128}")  # of a model's weights

SESSION_BYTES = 16
KEY_BYTES = 32
DIGEST_BYTES = 32
LABEL_BYTES = 16
MAX_LABELS = 3072  # of pages, in one message

MAX_PART_BYTES = 1 << 20  # of weights in one message, such as a piece
MAX_WEIGHTS_BYTES = 256 << 20  # of weights of one name, such as a manifest

MAX_ROUNDS = 1 << 20
MAX_OWNERS = 256  # of a joint tuning
MAX_ATTEMPT = (1 << 32) - 1

Payload = bytes | memoryview


class FailureCode(IntEnum):
    """Why a peer refused; clients turn each into an exception of `splitnet.errors`."""

    INTERNAL = 1
    BAD_MESSAGE = 2
    BUSY = 3
    UNKNOWN_SESSION = 4
    OUT_OF_ORDER = 5
    WRONG_MODEL = 6
    WRONG_BLOCKS = 7
    TOO_LONG = 8
    STALE_EPOCH = 9
    LEAVING = 10  # not about a request: the peer is about to end, and serves the session until it is replaced
    NOT_FINITE = 11  # the blocks of the hop make values of finite ones that are inf, NaN or too large


class Chunk(NamedTuple):
    """New positions of one row in a step."""

    row: int
    start: int  # absolute position of the first new one; what the hop has cached from there on is dropped first
    length: int
    keep: int  # how many of the last positions the tail returns to the client (0: none)


class Timing(NamedTuple):
    """What a step met at one hop, in microseconds."""

    wait_us: int  # from its arrival until its first pass
    compute_us: int  # over all its passes
    next_rtt_us: int  # latest round trip to the next hop; 0: not measured


class LoadReport(NamedTuple):
    """How busy a device has been lately, see `scheduler.batching`; records tell the same, seconds to a minute later."""

    wait_ms: float  # of decode steps
    batch: float  # positions of others in the pass of a decode step
    at: float  # Unix time in seconds by the clock of the peer, as in its records


class Fork(NamedTuple):
    """Row `row` continues from the cache of row `source` (the same id: it simply stays)."""

    row: int
    source: int


_ROW_ID = (1 << 48) - 1
_NUMBER = uint((1 << 48) - 1)
_UNIX_S = number(0, 1e11)
_SHARE = number(0, 1)
_MAX_US = (1 << 48) - 1
_MAX_HOPS = 256


_EPOCH = uint((1 << 31) - 1)


@dataclass(frozen=True, slots=True)
class _OfSession:
    session: bytes = wire(blob(SESSION_BYTES))
    epoch: int = wire(_EPOCH)


@dataclass(frozen=True, slots=True)
class _Numbered(_OfSession):
    number: int = wire(_NUMBER)


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for a `Pong`; the payload is padding that makes bandwidth measurable."""

    TAG: ClassVar[int] = 1
    nonce: int = wire(_NUMBER)
    payload: Payload = b""
    session: bytes = appended(blob(0, SESSION_BYTES), b"")
    """Asks also about this session of the sender; empty: about none."""
    load: bool = appended(flag, False)  # Asks also how busy the device is.


@dataclass(frozen=True, slots=True)
class Pong:
    """Answers `Ping` at once, whatever the device is doing."""

    TAG: ClassVar[int] = 2
    nonce: int = wire(_NUMBER)
    queue_ms: float = wire(milliseconds)
    kv_free_positions: int = wire(_NUMBER)
    waiting: int = appended(_NUMBER, 0)
    """Steps and passes of the session asked about that wait here or are being computed, and 1 for all that was sent on
    and, as far as is known, has not arrived."""
    done: int = appended(_NUMBER, 0)  # positions of the session that were computed here so far; it only grows
    holds: bool = appended(flag, False)  # the peer holds the session, and the asking side has opened it
    last: int = appended(_NUMBER, 0)
    """Highest number of a step or pass of the session's epoch that was finished here, without replays."""
    timing: tuple[Timing, ...] = appended(records(Timing, (_MAX_US,) * 3, most=1), ())
    """Of the last decode step of the session here; empty: there was none."""
    load: tuple[LoadReport, ...] = appended(
        several(row(LoadReport, number(0, 1e9), number(0, 1e9), _UNIX_S), most=1), ()
    )
    """Empty: not asked."""


@dataclass(frozen=True, slots=True)
class Open(_OfSession):
    """Opens a session at a hop, or changes an open one: a larger reservation, another next hop, a newer epoch."""

    TAG: ClassVar[int] = 3
    model: str = wire(text(64))  # fingerprint of the weights
    start: int = wire(uint(MAX_BLOCKS))
    end: int = wire(uint(MAX_BLOCKS))
    reservation: int = wire(uint(MAX_POSITIONS))  # positions of KV cache to reserve, over all rows
    codec: int = wire(uint(255))  # codec of what this hop sends on
    previous: bytes = wire(blob(0, KEY_BYTES))
    """Public key of the hop that may push steps of this session; empty: only the client does."""
    next_key: bytes = wire(blob(0, KEY_BYTES))  # public key of the next hop; empty: results go to the client
    next_address: str = wire(text(256))
    next_relays: tuple[Relay, ...] = appended(several(row(Relay, text(64), blob(KEY_BYTES)), most=3), ())
    """Through which the next hop is reached; none: at its address."""
    asks_weights: bool = appended(flag, default=False)  # `Opened` shall have `weights`; clients always ask
    taps: tuple[int, ...] = appended(several(uint(MAX_BLOCKS), most=MAX_TAPS), ())
    """Boundaries behind blocks of this hop, in rising order, at which the client wants hidden states, see `Tapped`."""
    tap_codec: int = appended(uint(255), 0)
    context: bytes = appended(blob(0, LABEL_BYTES), b"")
    """All that keys and values depend on besides the text, as the client names it: the hops before, their weights and
    codecs, the adapter. Pages of the session are stored under it, see `Step.labels`; empty: none is."""
    row: int = appended(uint(_ROW_ID), 0)  # of which the hop may hold pages from before
    labels: tuple[bytes, ...] = appended(joined(LABEL_BYTES, most=MAX_LABELS), (), b"".join)  # of its first pages
    shared: bool = appended(flag, default=False)  # with other keys that the owner of the peer lets share


@dataclass(frozen=True, slots=True)
class Opened(_OfSession):
    """Answers `Open`: memory is reserved."""

    TAG: ClassVar[int] = 4
    next_reachable: bool = wire(flag)
    cached_positions: int = wire(_NUMBER)  # over all rows; 0 tells the client that this hop begins with nothing
    weights: str = appended(text(64), "")  # what they are held as, as in `PeerRecord.dtype`; empty: it was not asked
    taps: bool = appended(flag, default=False)  # the hop sends a `Tapped` for each of `Open.taps`
    recalled: bool = appended(flag, default=False)
    """The hop held nothing of the session: `cached_positions` are those of pages that it has stored before."""
    stores: bool = appended(flag, default=False)  # it stores pages of the session


@dataclass(frozen=True, slots=True)
class Close:
    """Ends a session and frees its memory; sent by its owner."""

    TAG: ClassVar[int] = 5
    session: bytes = wire(blob(SESSION_BYTES))


@dataclass(frozen=True, slots=True)
class Step(_Numbered):
    """New positions of some rows, with their encoded boundary activations `[positions, hidden]` as payload.

    A step is idempotent: positions are absolute, a hop crops what it has cached beyond `start` first, and forks that
    were made already are left as they are.
    """

    TAG: ClassVar[int] = 6
    parts: tuple[Chunk, ...] = wire(records(Chunk, (_ROW_ID, *(MAX_POSITIONS,) * 3), most=MAX_ROWS))
    forks: tuple[Fork, ...] | None = wire(optional(records(Fork, (_ROW_ID, _ROW_ID), most=MAX_ROWS)))
    """Applied before the new positions; rows that are not named are dropped. None: the rows stay."""
    replay_until: int = wire(uint(MAX_BLOCKS))
    """0 for new positions. In a replay: hops that end at this block or later log their output and send nothing on."""
    codec: int = wire(uint(255))
    payload: Payload = b""
    boundary: int = wire(uint(MAX_BLOCKS), default=0)
    """The block that the payload stands before, as a hop that pushes names it: so that no chain can be a circle."""
    timings: tuple[Timing, ...] = wire(records(Timing, (_MAX_US,) * 3, most=_MAX_HOPS), default=())
    """Of the hops before, in order."""
    reach: int = appended(uint(MAX_POSITIONS), 0)
    """Where rotary frequencies depend on the length of a text, a position has those of the longer one: a text that ends
    with it, or one of so many positions (with the prefix of an adapter)."""
    labels: tuple[bytes, ...] = appended(joined(LABEL_BYTES, most=MAX_LABELS), (), b"".join)
    """Of the pages of each part that end within it, see `splitnet.wire.sent_log`; empty: none is stored."""

    @property
    def positions(self) -> int:
        return sum(part.length for part in self.parts)


@dataclass(frozen=True, slots=True)
class Result(_Numbered):
    """Output of a hop for the client: of the tail, or of a hop whose next is the client."""

    TAG: ClassVar[int] = 7
    end: int = wire(uint(MAX_BLOCKS))  # the boundary that the payload stands at
    codec: int = wire(uint(255))
    timings: tuple[Timing, ...] = wire(records(Timing, (_MAX_US,) * 3, most=_MAX_HOPS))  # of all hops so far, in order
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request could not be served; `number` is 0 if it was not about a step."""

    TAG: ClassVar[int] = 8
    session: bytes = wire(blob(0, SESSION_BYTES))
    epoch: int = wire(_EPOCH)
    number: int = wire(_NUMBER)
    code: int = wire(uint(255))
    text: str = wire(text(MAX_TEXT))


@dataclass(frozen=True, slots=True)
class Replay(_Numbered):
    """Asks a hop to send its log of encoded activations to its next hop again (see `Open` for a new next hop). The hop
    that ends at `until` answers the last step of it, which has this number, with an empty `Result`."""

    TAG: ClassVar[int] = 9
    until: int = wire(uint(MAX_BLOCKS))
    since: int = appended(uint(MAX_POSITIONS), 0)  # the first position of each row that is wanted


@dataclass(frozen=True, slots=True)
class Forward(_Numbered):
    """Whole sequences of which no KV cache is kept, with their encoded boundary activations `[positions, hidden]`.

    Answered as a step is: pushed from hop to hop, and by the tail with a `Result` of all positions. Sent again, it does
    the same again.
    """

    TAG: ClassVar[int] = 10
    oldest: int = wire(_NUMBER)  # the client needs nothing any more of what has a lower number
    lengths: tuple[int, ...] = wire(several(uint(MAX_POSITIONS), most=MAX_ROWS))  # positions of each sequence
    kept: bool = wire(flag)  # each hop keeps its input, so that a `Gradient` can follow
    adapter: int = wire(_NUMBER)  # version of the adapter that the blocks run with; 0: none
    gradient_codec: int = wire(uint(255))  # codec of the gradients that come back this way
    codec: int = wire(uint(255))
    payload: Payload = b""
    boundary: int = wire(uint(MAX_BLOCKS), default=0)  # as in `Step`
    timings: tuple[Timing, ...] = wire(records(Timing, (_MAX_US,) * 3, most=_MAX_HOPS), default=())
    """Of the hops before, in order."""
    reach: int = appended(uint(MAX_POSITIONS), 0)  # as in `Step`, but a sequence counts as a whole

    @property
    def positions(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class Gradient(_Numbered):
    """Goes the way of a `Forward` back, with its number: the gradient of the loss by the activations at a boundary."""

    TAG: ClassVar[int] = 11
    boundary: int = wire(uint(MAX_BLOCKS))
    since: int = wire(_NUMBER)  # number of the first of the passes over which hops add up the gradients by the adapter
    held: bool = wire(flag)  # more of them follow; with the last one the sum goes to the client
    codec: int = wire(uint(255))
    payload: Payload = b""
    timings: tuple[Timing, ...] = appended(records(Timing, (_MAX_US,) * 3, most=_MAX_HOPS), ())
    """Of the hops that it has passed, in that order."""


@dataclass(frozen=True, slots=True)
class Adapter(_OfSession):
    """Parameters of the client that the blocks of a hop run with from now on, in this session alone.

    The payload is in the safetensors format; `splitnet.blocks.adapters` says how the tensors are named. A large adapter
    comes in several messages.
    """

    TAG: ClassVar[int] = 12
    version: int = wire(_NUMBER)
    remaining: int = wire(_NUMBER)  # how many messages of this version follow
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class AdapterLoaded(_OfSession):
    """Answers the last `Adapter` of a version."""

    TAG: ClassVar[int] = 13
    version: int = wire(_NUMBER)


@dataclass(frozen=True, slots=True)
class AdapterGradient(_Numbered):
    """A hop's gradient by the adapter of its blocks, with the same names and shapes; straight to the client. It is
    summed over several passes, and has the number of the last `Forward` of these."""

    TAG: ClassVar[int] = 14
    remaining: int = wire(_NUMBER)  # how many messages of it follow
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class FetchKV(_Numbered):
    """Asks a hop for the keys and values of the first positions of a row, which the client may use as a prefix."""

    TAG: ClassVar[int] = 15
    row: int = wire(uint(_ROW_ID))
    length: int = wire(uint(MAX_POSITIONS))


@dataclass(frozen=True, slots=True)
class FetchedKV(_Numbered):
    """Answers a `FetchKV` for the blocks of a hop, with tensors that are named as those of an adapter."""

    TAG: ClassVar[int] = 16
    remaining: int = wire(_NUMBER)  # how many messages of it follow
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class LookUp:
    """Asks a peer for the records of a model's peers, or for one record of each model."""

    TAG: ClassVar[int] = 17
    number: int = wire(_NUMBER)  # of the question; its answer has the same
    model: str = wire(matching(re.compile(rf"(?:{FINGERPRINT.pattern})?")))
    """Fingerprint of the weights; empty: all models."""
    depth: int = wire(uint(MAX_DEPTH))
    """Over how many further peers the question may go, where the one asked has to ask others itself."""
    known: tuple[bytes, ...] = appended(several(blob(ENTRY_BYTES), most=MAX_KNOWN), ())
    """Entries of the records that are known already (`splitnet/directory/ask.py:entry_of`), the most needed first."""
    since: float = appended(_UNIX_S, 0.0)
    """Of other peers only those are told that have their span since then, Unix time in seconds."""
    most: int = appended(uint(MAX_CHANGES_BYTES), 0)
    """Only what has changed, in so many bytes of records; 0: everything."""


@dataclass(frozen=True, slots=True)
class Found:
    """Answers a `LookUp` in one message or several; each payload is a msgpack array of signed records."""

    TAG: ClassVar[int] = 18
    number: int = wire(_NUMBER)
    remaining: int = wire(uint(MAX_FOUND - 1))  # how many messages of this answer follow
    payload: Payload = b""
    present: bytes = appended(blob(*range(MAX_KNOWN // 8 + 1)), b"")
    """For each entry of `LookUp.known` a bit: the peer is still there; the lowest of a byte first. Empty: the answer
    is everything, as of a peer that does not know this field."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Asks a peer to tell others of a record; the payload is the signed record."""

    TAG: ClassVar[int] = 19
    number: int = wire(_NUMBER)
    depth: int = wire(uint(MAX_DEPTH))  # as in `LookUp`
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class Announced:
    """Answers an `Announce`."""

    TAG: ClassVar[int] = 20
    number: int = wire(_NUMBER)
    taken: bool = wire(flag)  # False: the record is not valid, or there is no place for it


class WeightsKind(IntEnum):
    """What `AskWeights` asks for."""

    MANIFEST = 0  # of the model that is named
    HELD = 1  # which pieces of it the peer has: a bit for each in the order of the manifest, the lowest of a byte first
    PIECE = 2  # the piece that is named, by its digest
    PAGE = 3  # a page of keys and values, by its name and as many zeros; the client of the session has told it


@dataclass(frozen=True, slots=True)
class AskWeights:
    """Asks a peer for weights of its model, or what they are."""

    TAG: ClassVar[int] = 21
    number: int = wire(_NUMBER)  # of the question; its answer has the same
    kind: int = wire(uint(255))  # a `WeightsKind`
    name: bytes = wire(blob(DIGEST_BYTES))
    """Fingerprint of the model, or SHA-256 of the piece; in a closed swarm as its members name it."""
    offset: int = wire(uint(MAX_WEIGHTS_BYTES))  # the answer begins there
    length: int = wire(uint(MAX_PART_BYTES))  # the answer has at most so many bytes


@dataclass(frozen=True, slots=True)
class WeightsPart:
    """Answers `AskWeights` with a part of `total` bytes."""

    TAG: ClassVar[int] = 22
    number: int = wire(_NUMBER)
    total: int = wire(uint(MAX_WEIGHTS_BYTES))
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class Tapped(_Numbered):
    """Hidden states at a boundary of `Open.taps`, straight from the hop that computes them: of the positions of a step
    that the client wants back. A step of a replay has none."""

    TAG: ClassVar[int] = 23
    boundary: int = wire(uint(MAX_BLOCKS))
    codec: int = wire(uint(255))
    payload: Payload = b""


class RoundWish(IntEnum):
    """What `AskRound` is for."""

    LOOK = 0  # how far it is
    JOIN = 1  # to take part; answered with the settings, and with the parameters after the rounds so far
    READY = 2  # its gradient is there; answered when that is wanted, or with the parameters after later rounds
    END = 3  # to end the round with what there is; of the coordinator's own key alone


@dataclass(frozen=True, slots=True)
class AskRound:
    """From an owner of examples to the coordinator of a joint tuning, see `splitnet.tools.tune.rounds`."""

    TAG: ClassVar[int] = 24
    name: str = wire(text(64))
    model: str = wire(matching(FINGERPRINT))
    wish: int = wire(uint(255))  # a `RoundWish`
    number: int = wire(uint(MAX_ROUNDS))  # rounds after which the owner has the parameters
    examples: int = wire(uint(1 << 31))
    size: int = wire(uint(MAX_PAYLOAD_BYTES // 4))  # numbers in its gradient
    payload: Payload = b""  # settings as JSON, with JOIN, of the coordinator's own key alone


@dataclass(frozen=True, slots=True)
class RoundState:
    """Answers an `AskRound`, and tells owners that a round has ended; the payload is the settings as JSON."""

    TAG: ClassVar[int] = 25
    number: int = wire(uint(MAX_ROUNDS))  # rounds so far
    rounds: int = wire(uint(MAX_ROUNDS))  # in all
    owners: int = wire(uint(MAX_OWNERS))  # that take part
    ready: int = wire(uint(MAX_OWNERS))
    following: bool = wire(flag)  # a `RoundNumbers` follows
    refused: str = wire(text(MAX_TEXT))  # why; empty: it is not
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class WantGradient:
    """From the coordinator: the owner shall send its gradient, as so much of the average."""

    TAG: ClassVar[int] = 26
    number: int = wire(uint(MAX_ROUNDS))
    attempt: int = wire(uint(MAX_ATTEMPT))
    share: float = wire(_SHARE)
    norm: float = wire(milliseconds)  # the longest gradient; 0: any
    noise: float = wire(milliseconds)  # standard deviation of what the owner adds to each number, for a share of 1
    members: tuple[bytes, ...] = wire(several(blob(KEY_BYTES), most=MAX_OWNERS))
    """CURVE keys of all owners that add masks for each other; none: without masks."""


@dataclass(frozen=True, slots=True)
class RoundNumbers:
    """An owner's gradient; or with attempt 0 the parameters after `number` rounds, and what they begin as. Four bytes
    per number."""

    TAG: ClassVar[int] = 27
    number: int = wire(uint(MAX_ROUNDS))
    attempt: int = wire(uint(MAX_ATTEMPT))
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class CopyPages:
    """Asks a peer to hold pages of a session of the sender, copied from the hop that has them; see `Open`."""

    TAG: ClassVar[int] = 28
    session: bytes = wire(blob(SESSION_BYTES))
    rate: float = wire(number(1, 1e12))  # bytes per second at most
    if_faster: bool = wire(flag)  # the session waits: only as long as to compute them takes longer
    number: int = wire(_NUMBER)
    start: int = wire(uint(MAX_BLOCKS))
    end: int = wire(uint(MAX_BLOCKS))
    codec: int = wire(uint(255))  # as in `Open`
    context: bytes = wire(blob(LABEL_BYTES))
    labels: tuple[bytes, ...] = wire(joined(LABEL_BYTES, least=1, most=MAX_LABELS), b"".join)
    source_key: bytes = wire(blob(KEY_BYTES))
    source_address: str = wire(text(256))
    source_relays: tuple[Relay, ...] = wire(several(row(Relay, text(64), blob(KEY_BYTES)), most=3))


@dataclass(frozen=True, slots=True)
class CopiedPages:
    """Answers `CopyPages`: how many of the pages, from the first one on, the peer holds now, and bytes that it got."""

    TAG: ClassVar[int] = 29
    session: bytes = wire(blob(SESSION_BYTES))
    number: int = wire(_NUMBER)
    pages: int = wire(uint(MAX_LABELS))
    nbytes: int = wire(_NUMBER)


_Passing = Open | Opened | Close | Step | Result | Failure | Replay | Forward | Gradient
_Tensors = Adapter | AdapterLoaded | AdapterGradient | FetchKV | FetchedKV
_Asking = LookUp | Found | Announce | Announced | AskWeights | WeightsPart
_Rounds = AskRound | RoundState | WantGradient | RoundNumbers
_Pages = CopyPages | CopiedPages
Message = Ping | Pong | _Passing | _Tensors | _Asking | Tapped | _Rounds | _Pages
MESSAGES: tuple[type[Message], ...] = get_args(Message)

_BY_TAG: dict[int, type[Message]] = {kind.TAG: kind for kind in MESSAGES}
assert len(_BY_TAG) == len(MESSAGES), "two messages share a tag"

_LAYOUTS = {kind: Layout(kind) for kind in MESSAGES}
_HAS_PAYLOAD = frozenset(kind for kind in MESSAGES if any(item.name == "payload" for item in dataclasses.fields(kind)))
_PREFIX = {kind: MAGIC + bytes((PROTOCOL_VERSION, kind.TAG)) for kind in MESSAGES}


def encode(message: Message) -> list[Payload]:
    """The frames of a message."""
    kind = type(message)
    header = _PREFIX[kind] + packb(_LAYOUTS[kind].write(message))
    if kind in _HAS_PAYLOAD:
        payload = cast("Step", message).payload
        if len(payload):
            return [header, payload]
    return [header]


def decode(frames: Sequence[Payload]) -> Message:
    """The message in `frames`. Raises ProtocolVersionError: the sender speaks another version; ProtocolError: anything
    else that is not exactly a message."""
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
    body = unpack_array(header[4:], most_items=MAX_ROWS, most_text=MAX_TEXT * 4, most_bytes=MAX_LABELS * LABEL_BYTES)
    values = _LAYOUTS[kind].read(body)
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
