"""Every message of the wire protocol, and its encoding as frames.

A message travels as one or two ZeroMQ frames:

    frame 0   b"SN", version (1 byte), tag (1 byte), msgpack array of the fields in the order of the dataclass
    frame 1   only for messages with a payload: the encoded tensor, an adapter, or padding of a ping

The first three bytes have the same layout in every version, so that each side can name the other's version. Every
length is bounded in this module and checked before memory is allocated; a message that breaks a bound raises
`ProtocolError`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple, cast, get_args

from splitnet.errors import ProtocolError, ProtocolVersionError
from splitnet.wire.endpoints import Relay
from splitnet.wire.fields import (
    MessageLayout,
    appended_field,
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
    wire_field,
)

PROTOCOL_VERSION = 1
MAGIC = b"SN"

MAX_HEADER_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
MAX_ROWS = 1024  # rows of a batch in one message
MAX_POSITIONS = 1 << 24  # positions of one row, or of a session's reservation
MAX_BLOCKS = 4096  # blocks of a model
MAX_TAPS = 8  # boundaries of one hop whose hidden states a client may ask for
MAX_TEXT = 2048  # characters of a text

MAX_DEPTH = 2  # peers over which a question or a record may be passed on
MAX_FOUND = 256  # messages in one answer to a `LookUp`
ENTRY_BYTES = 19  # bytes of the entry of one known record in a `LookUp`
MAX_KNOWN = 512  # entries of known records in a `LookUp`
MAX_CHANGES_BYTES = 60_000  # bytes of records in an answer that holds only changes

FINGERPRINT = re.compile(r"[0-9a-f]{8,128}")  # of a checkpoint

SESSION_BYTES = 16
KEY_BYTES = 32
DIGEST_BYTES = 32
SIGNATURE_BYTES = 64
LABEL_BYTES = 16
MAX_LABELS = 3072  # labels of pages in one message

MAX_PART_BYTES = 1 << 20  # bytes of a manifest or piece in one message
MAX_WEIGHTS_BYTES = 256 << 20  # bytes of a whole manifest or piece

MAX_TEXT_BYTES = 16 << 30  # bytes of the hidden states of a text, or of a file of its compression

MAX_IMAGES = 64  # images of one `ReadImages`
MAX_LEVELS = 32  # blocks before which features of an image are added, and one more

MAX_RECEIPT = 1 << 18  # positions of one receipt

MAX_ROUNDS = 1 << 20  # rounds of a joint tuning
MAX_OWNERS = 256  # owners of examples that take part in a joint tuning
MAX_ATTEMPT = (1 << 32) - 1  # number of an attempt at a round of joint tuning

Payload = bytes | memoryview


class FailureCode(IntEnum):
    """Reasons of a `Failure`; clients turn each code into an exception of `splitnet.errors`."""

    INTERNAL = 1
    BAD_MESSAGE = 2
    BUSY = 3
    UNKNOWN_SESSION = 4
    OUT_OF_ORDER = 5
    WRONG_MODEL = 6
    WRONG_BLOCKS = 7
    TOO_LONG = 8
    STALE_EPOCH = 9
    LEAVING = 10  # answers no request: the peer will end soon, and serves the session until another peer replaces it
    NOT_FINITE = 11  # the hop's blocks computed inf, NaN or too large values from finite input


class Chunk(NamedTuple):
    """New positions of one row in a step."""

    row: int
    start: int  # absolute position of the first new position; the hop first drops its cached positions from `start` on
    length: int
    keep: int  # how many of the last positions the tail returns to the client (0: none)


class Timing(NamedTuple):
    """Times of a step at one hop, in microseconds."""

    wait_us: int  # from the arrival of the step until its first pass
    compute_us: int  # over all passes of the step
    next_rtt_us: int  # latest round trip to the next hop; 0: not measured


class LoadReport(NamedTuple):
    """Recent load of a device, see `scheduler.batching`. Records hold the same values, seconds to a minute later."""

    wait_ms: float  # queue wait of decode steps
    batch: float  # positions of other sessions in the pass of a decode step
    at: float  # Unix time in seconds by the peer's clock, as in its records


class Fork(NamedTuple):
    """Row `row` continues from the cache of row `source`; with equal ids the row stays."""

    row: int
    source: int


class BlockInput(NamedTuple):
    """Values that blocks read besides the hidden states of a step, for consecutive positions of one row; see
    `splitnet.wire.block_inputs`."""

    name: str
    block: int  # the only block that reads the values; `EVERY_BLOCK`: all blocks
    row: int
    start: int
    length: int
    size: int  # bytes of one position
    codec: int  # of the values


EVERY_BLOCK = MAX_BLOCKS  # no block has this number
MAX_INPUTS = 512  # block inputs of one step
MAX_INPUT_BYTES = 1 << 20  # bytes of one position in one block input

MAX_ROW_ID = (1 << 48) - 1  # number of a row
_NUMBER = uint((1 << 48) - 1)
_UNIX_S = number(0, 1e11)
_SHARE = number(0, 1)
_BITS = number(0, 8)
_MAX_US = (1 << 48) - 1
_MAX_HOPS = 256


_EPOCH = uint((1 << 31) - 1)


@dataclass(frozen=True, slots=True)
class _OfSession:
    session: bytes = wire_field(blob(SESSION_BYTES))
    epoch: int = wire_field(_EPOCH)


@dataclass(frozen=True, slots=True)
class _Numbered(_OfSession):
    number: int = wire_field(_NUMBER)


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for a `Pong`; the payload is padding, with which the sender measures bandwidth."""

    TAG: ClassVar[int] = 1
    nonce: int = wire_field(_NUMBER)
    payload: Payload = b""
    session: bytes = appended_field(blob(0, SESSION_BYTES), b"")
    """Id of a session of the sender to report on; empty: none."""
    load: bool = appended_field(flag, False)  # asks for a `LoadReport`


@dataclass(frozen=True, slots=True)
class Pong:
    """Answers `Ping` at once, even while the device computes."""

    TAG: ClassVar[int] = 2
    nonce: int = wire_field(_NUMBER)
    queue_ms: float = wire_field(milliseconds)
    kv_free_positions: int = wire_field(_NUMBER)
    waiting: int = appended_field(_NUMBER, 0)
    """Steps and passes of the session (`Ping.session`) that wait or run at this peer. If there are none: 1 while the
    next hop may not have received the output that was sent to it, else 0."""
    done: int = appended_field(_NUMBER, 0)  # positions of the session that this peer has computed so far; it only grows
    holds: bool = appended_field(flag, False)  # the peer holds the session, and the asking side has opened it
    last: int = appended_field(_NUMBER, 0)
    """Highest number of a step or pass of the session's epoch that this peer has finished, without replays."""
    timing: tuple[Timing, ...] = appended_field(records(Timing, (_MAX_US,) * 3, most=1), ())
    """Times of the session's last decode step at this peer; empty: there was none."""
    load: tuple[LoadReport, ...] = appended_field(
        several(row(LoadReport, number(0, 1e9), number(0, 1e9), _UNIX_S), most=1), ()
    )
    """The load of the device; empty: the ping did not ask."""


@dataclass(frozen=True, slots=True)
class Open(_OfSession):
    """Opens a session at a hop, or changes an open one: a larger reservation, another next hop, a newer epoch."""

    TAG: ClassVar[int] = 3
    model: str = wire_field(text(64))  # fingerprint of the checkpoint
    start: int = wire_field(uint(MAX_BLOCKS))
    end: int = wire_field(uint(MAX_BLOCKS))
    reservation: int = wire_field(uint(MAX_POSITIONS))  # positions of KV cache to reserve, over all rows
    codec: int = wire_field(uint(255))  # codec of this hop's output
    previous: bytes = wire_field(blob(0, KEY_BYTES))
    """Public key of the hop that may push steps of this session; empty: only the client may."""
    next_key: bytes = wire_field(blob(0, KEY_BYTES))  # public key of the next hop; empty: results go to the client
    next_address: str = wire_field(text(256))
    next_relays: tuple[Relay, ...] = appended_field(several(row(Relay, text(64), blob(KEY_BYTES)), most=3), ())
    """Relays through which the next hop is reached; empty: the next hop is reached at its address."""
    asks_weights: bool = appended_field(flag, default=False)  # `Opened` must state `weights`
    taps: tuple[int, ...] = appended_field(several(uint(MAX_BLOCKS), most=MAX_TAPS), ())
    """Boundaries after blocks of this hop, in rising order, whose hidden states the client wants, see `Tapped`."""
    tap_codec: int = appended_field(uint(255), 0)
    context: bytes = appended_field(blob(0, LABEL_BYTES), b"")
    """The client's digest of everything besides the text on which keys and values depend: the hops before, their
    weights and codecs, the adapter. The hop stores pages of the session under this digest, see `Step.labels`; empty:
    the hop stores no pages."""
    row: int = appended_field(uint(MAX_ROW_ID), 0)  # the row to fill from stored pages
    labels: tuple[bytes, ...] = appended_field(joined(LABEL_BYTES, most=MAX_LABELS), (), b"".join)
    """Labels of the first pages of `row`, in order."""
    # other keys of a group that the peer's owner has named may use the pages
    shared: bool = appended_field(flag, default=False)


@dataclass(frozen=True, slots=True)
class Opened(_OfSession):
    """Answers `Open`: the memory is reserved."""

    TAG: ClassVar[int] = 4
    next_reachable: bool = wire_field(flag)
    cached_positions: int = wire_field(_NUMBER)  # positions in the hop's KV cache of the session, over all rows
    weights: str = appended_field(text(64), "")  # weight format as in `PeerRecord.dtype`; empty: `Open` did not ask
    taps: bool = appended_field(flag, default=False)  # the hop sends a `Tapped` for each of `Open.taps`
    looked_up: bool = appended_field(flag, default=False)
    """The session is new at the hop: `cached_positions` come from its stored pages."""
    stores: bool = appended_field(flag, default=False)  # the hop stores pages of the session


@dataclass(frozen=True, slots=True)
class Close:
    """Ends a session and frees its memory; only the session's owner may send it."""

    TAG: ClassVar[int] = 5
    session: bytes = wire_field(blob(SESSION_BYTES))


_BLOCK_INPUTS = several(
    row(
        BlockInput,
        text(32),
        uint(EVERY_BLOCK),
        uint(MAX_ROW_ID),
        *(uint(MAX_POSITIONS),) * 2,
        uint(MAX_INPUT_BYTES),
        uint(255),
    ),
    most=MAX_INPUTS,
)


def chunks_of(lengths: Sequence[int]) -> tuple[Chunk, ...]:
    """Whole sequences as chunks of rows, which have the numbers of the sequences."""
    return tuple(Chunk(index, 0, length, length) for index, length in enumerate(lengths))


class _Activations:
    """A payload of encoded activations, followed by the values of block inputs in the order of `inputs`."""

    __slots__ = ()

    @property
    def activations(self: Any) -> Payload:
        """The payload without block inputs."""
        return self.payload if not self.inputs else memoryview(self.payload)[: self._activation_bytes]

    @property
    def input_bytes(self: Any) -> Payload:
        """The values of the block inputs, concatenated."""
        return memoryview(self.payload)[self._activation_bytes :] if self.inputs else b""

    @property
    def _activation_bytes(self: Any) -> int:
        """Zero if the payload is shorter than its block inputs."""
        return max(0, len(self.payload) - sum(each.length * each.size for each in self.inputs))


@dataclass(frozen=True, slots=True)
class Step(_Numbered, _Activations):
    """New positions of one or more rows, with their encoded boundary activations `[positions, hidden]` as payload.

    A step is idempotent: positions are absolute, a hop first crops its cached positions from `start` on, and does
    not repeat forks that the hop has already made.
    """

    TAG: ClassVar[int] = 6
    parts: tuple[Chunk, ...] = wire_field(records(Chunk, (MAX_ROW_ID, *(MAX_POSITIONS,) * 3), most=MAX_ROWS))
    forks: tuple[Fork, ...] | None = wire_field(optional(records(Fork, (MAX_ROW_ID, MAX_ROW_ID), most=MAX_ROWS)))
    """Applied before the new positions; rows that no fork names are dropped. None: all rows stay."""
    replay_until: int = wire_field(uint(MAX_BLOCKS))
    """0 for new positions. In a replay, hops whose span ends at this block or later log their output and do not send
    the output on."""
    codec: int = wire_field(uint(255))
    payload: Payload = b""
    boundary: int = wire_field(uint(MAX_BLOCKS), default=0)
    """The boundary of the payload, set by a hop that pushes, so that hops cannot form a circle."""
    timings: tuple[Timing, ...] = wire_field(records(Timing, (_MAX_US,) * 3, most=_MAX_HOPS), default=())
    """Times of the step at the hops before, in order."""
    rope_length: int = appended_field(uint(MAX_POSITIONS), 0)
    """Length of text, in positions with the prefix of an adapter, for models whose rotary frequencies depend on it. A
    position has the frequencies of this length, or of the text that ends with the position if that is longer."""
    labels: tuple[bytes, ...] = appended_field(joined(LABEL_BYTES, most=MAX_LABELS), (), b"".join)
    """Labels of the pages that end within the parts, in order, see `splitnet.wire.sent_log`; empty: no page is
    stored."""
    inputs: tuple[BlockInput, ...] = appended_field(_BLOCK_INPUTS, ())

    @property
    def positions(self) -> int:
        return sum(part.length for part in self.parts)


@dataclass(frozen=True, slots=True)
class Result(_Numbered):
    """Output for the client: from the tail, or from a hop that has no next hop."""

    TAG: ClassVar[int] = 7
    end: int = wire_field(uint(MAX_BLOCKS))  # the boundary of the payload
    codec: int = wire_field(uint(255))
    # times of the step at all hops so far, in order
    timings: tuple[Timing, ...] = wire_field(records(Timing, (_MAX_US,) * 3, most=_MAX_HOPS))
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class Failure:
    """Refuses a request; `number` is 0 if the request was not a step."""

    TAG: ClassVar[int] = 8
    session: bytes = wire_field(blob(0, SESSION_BYTES))
    epoch: int = wire_field(_EPOCH)
    number: int = wire_field(_NUMBER)
    code: int = wire_field(uint(255))
    text: str = wire_field(text(MAX_TEXT))


@dataclass(frozen=True, slots=True)
class Replay(_Numbered):
    """Asks a hop to send its log of encoded activations to its next hop again (`Open` sets a new next hop). The last
    step of the replay has this `number`; the hop whose span ends at `until` answers it with an empty `Result`."""

    TAG: ClassVar[int] = 9
    until: int = wire_field(uint(MAX_BLOCKS))
    since: int = appended_field(uint(MAX_POSITIONS), 0)  # the first position of each row to send


@dataclass(frozen=True, slots=True)
class Forward(_Numbered, _Activations):
    """Whole sequences, with their encoded boundary activations `[positions, hidden]`. Hops keep no KV cache of them.

    Hops push the message on like a step, and the tail answers with a `Result` of all positions. The message is
    idempotent.
    """

    TAG: ClassVar[int] = 10
    oldest: int = wire_field(_NUMBER)  # hops may forget passes with lower numbers
    lengths: tuple[int, ...] = wire_field(several(uint(MAX_POSITIONS), most=MAX_ROWS))  # positions of each sequence
    kept: bool = wire_field(flag)  # each hop keeps its input, so that a `Gradient` can follow
    adapter: int = wire_field(_NUMBER)  # version of the adapter that the blocks run with; 0: none
    gradient_codec: int = wire_field(uint(255))  # codec of the gradients that hops send back
    codec: int = wire_field(uint(255))
    payload: Payload = b""
    boundary: int = wire_field(uint(MAX_BLOCKS), default=0)  # as in `Step`
    timings: tuple[Timing, ...] = wire_field(records(Timing, (_MAX_US,) * 3, most=_MAX_HOPS), default=())
    """Times of the pass at the hops before, in order."""
    # as in `Step`, but compared with the length of the whole sequence
    rope_length: int = appended_field(uint(MAX_POSITIONS), 0)
    inputs: tuple[BlockInput, ...] = appended_field(_BLOCK_INPUTS, ())  # a sequence's index is the number of its row

    @property
    def positions(self) -> int:
        return sum(self.lengths)

    @property
    def parts(self) -> tuple[Chunk, ...]:
        """The sequences as chunks of rows."""
        return chunks_of(self.lengths)


@dataclass(frozen=True, slots=True)
class Gradient(_Numbered):
    """The gradient of the loss with respect to the activations at a boundary. It passes the hops of the `Forward` with
    the same number in reverse order."""

    TAG: ClassVar[int] = 11
    boundary: int = wire_field(uint(MAX_BLOCKS))
    since: int = wire_field(_NUMBER)  # number of the first pass whose adapter gradient hops add to their sum
    held: bool = wire_field(flag)  # more passes follow; after the last one hops send the sum to the client
    codec: int = wire_field(uint(255))
    payload: Payload = b""
    timings: tuple[Timing, ...] = appended_field(records(Timing, (_MAX_US,) * 3, most=_MAX_HOPS), ())
    """Times at the hops that the gradient has passed, in that order."""


@dataclass(frozen=True, slots=True)
class Adapter(_OfSession):
    """Adapter parameters of the client for the blocks of a hop, for later requests of this session only.

    The payload is in the safetensors format; `splitnet.blocks.adapters` defines the names of tensors. A large adapter
    is sent in several messages.
    """

    TAG: ClassVar[int] = 12
    version: int = wire_field(_NUMBER)
    remaining: int = wire_field(_NUMBER)  # how many messages of this version follow
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class AdapterLoaded(_OfSession):
    """Answers the last `Adapter` of a version."""

    TAG: ClassVar[int] = 13
    version: int = wire_field(_NUMBER)


@dataclass(frozen=True, slots=True)
class AdapterGradient(_Numbered):
    """A hop's gradient with respect to the adapter of its blocks, with the names and shapes of the adapter, sent
    directly to the client. It is the sum over several passes, and has the number of the last `Forward` among them."""

    TAG: ClassVar[int] = 14
    remaining: int = wire_field(_NUMBER)  # how many messages of this gradient follow
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class FetchKV(_Numbered):
    """Asks a hop for the keys and values of the first `length` positions of a row, as a prefix for later texts."""

    TAG: ClassVar[int] = 15
    row: int = wire_field(uint(MAX_ROW_ID))
    length: int = wire_field(uint(MAX_POSITIONS))


@dataclass(frozen=True, slots=True)
class FetchedKV(_Numbered):
    """Answers a `FetchKV` for the blocks of a hop, with tensors named as in an adapter."""

    TAG: ClassVar[int] = 16
    remaining: int = wire_field(_NUMBER)  # how many messages of this answer follow
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class LookUp:
    """Asks a peer for the records of a model's peers, or for one record of each model."""

    TAG: ClassVar[int] = 17
    number: int = wire_field(_NUMBER)  # number of the question; the answer has the same number
    model: str = wire_field(matching(re.compile(rf"(?:{FINGERPRINT.pattern})?")))
    """Fingerprint of the checkpoint; empty: all models."""
    depth: int = wire_field(uint(MAX_DEPTH))
    """Over how many further peers the question may be passed on, by a peer that cannot answer alone."""
    known: tuple[bytes, ...] = appended_field(several(blob(ENTRY_BYTES), most=MAX_KNOWN), ())
    """Entries of records that the sender knows (`splitnet/directory/ask.py:entry_of`), the most needed first."""
    since: float = appended_field(_UNIX_S, 0.0)
    """Other records are sent only if the peer has served its span since this Unix time (seconds) or later."""
    most: int = appended_field(uint(MAX_CHANGES_BYTES), 0)
    """Asks only for changes, in at most this many bytes of records; 0: asks for all records."""


@dataclass(frozen=True, slots=True)
class Found:
    """Answers a `LookUp` in one message or several; each payload is a msgpack array of signed records."""

    TAG: ClassVar[int] = 18
    number: int = wire_field(_NUMBER)
    remaining: int = wire_field(uint(MAX_FOUND - 1))  # how many messages of this answer follow
    payload: Payload = b""
    present: bytes = appended_field(blob(*range(MAX_KNOWN // 8 + 1)), b"")
    """One bit for each entry of `LookUp.known`, the lowest bit of a byte first: whether the peer is still in the
    directory. Empty: the answer holds all records, as from a version without this field."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Asks a peer to publish a record; the payload is the signed record."""

    TAG: ClassVar[int] = 19
    number: int = wire_field(_NUMBER)
    depth: int = wire_field(uint(MAX_DEPTH))  # as in `LookUp`
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class Announced:
    """Answers an `Announce`."""

    TAG: ClassVar[int] = 20
    number: int = wire_field(_NUMBER)
    taken: bool = wire_field(flag)  # False: the record is invalid, or the peer has no room for it


class WeightsKind(IntEnum):
    """What `AskWeights` asks for, and the meaning of its `name`."""

    MANIFEST = 0  # the manifest of the model `name`
    HELD = 1  # which pieces of the model the peer has: one bit each in manifest order, the lowest bit of a byte first
    PIECE = 2  # the piece with the digest `name`
    PAGE = 3  # a page of keys and values; `name` is its name, from the client of the session, and as many zeros


@dataclass(frozen=True, slots=True)
class AskWeights:
    """Asks a peer for a part of its weights, of their manifest or of a page, see `WeightsKind`."""

    TAG: ClassVar[int] = 21
    number: int = wire_field(_NUMBER)  # number of the question; the answer has the same number
    kind: int = wire_field(uint(255))  # a `WeightsKind`
    name: bytes = wire_field(blob(DIGEST_BYTES))
    """Fingerprint of the model, or SHA-256 of the piece; in a closed swarm, an HMAC of this value under the swarm
    key."""
    offset: int = wire_field(uint(MAX_WEIGHTS_BYTES))  # first byte of the part
    length: int = wire_field(uint(MAX_PART_BYTES))  # largest number of bytes of the part


@dataclass(frozen=True, slots=True)
class WeightsPart:
    """Answers `AskWeights` with a part of `total` bytes."""

    TAG: ClassVar[int] = 22
    number: int = wire_field(_NUMBER)
    total: int = wire_field(uint(MAX_WEIGHTS_BYTES))
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class Tapped(_Numbered):
    """Hidden states at a boundary of `Open.taps`, sent to the client by the hop that computes them: for the positions
    that a step returns (`Chunk.keep`), and for no step of a replay."""

    TAG: ClassVar[int] = 23
    boundary: int = wire_field(uint(MAX_BLOCKS))
    codec: int = wire_field(uint(255))
    payload: Payload = b""


class RoundWish(IntEnum):
    """The purpose of an `AskRound`."""

    LOOK = 0  # to read the state of the tuning
    JOIN = 1  # to take part; answered with the settings, and with the parameters after the last round
    READY = 2  # the owner has a gradient; answered when the round needs it, or with the parameters after later rounds
    END = 3  # to end the round with the gradients so far; only the coordinator's own key may ask for this


@dataclass(frozen=True, slots=True)
class AskRound:
    """A request from an owner of examples to the coordinator of a joint tuning, see `splitnet.tools.tune.rounds`."""

    TAG: ClassVar[int] = 24
    name: str = wire_field(text(64))
    model: str = wire_field(matching(FINGERPRINT))
    wish: int = wire_field(uint(255))  # a `RoundWish`
    number: int = wire_field(uint(MAX_ROUNDS))  # the round after which the owner's parameters were computed
    examples: int = wire_field(uint(1 << 31))
    size: int = wire_field(uint(MAX_PAYLOAD_BYTES // 4))  # numbers in the owner's gradient
    payload: Payload = b""  # settings as JSON, with JOIN, only from the coordinator's own key


@dataclass(frozen=True, slots=True)
class RoundState:
    """Answers an `AskRound`, and informs owners that a round has ended; the payload is the settings as JSON."""

    TAG: ClassVar[int] = 25
    number: int = wire_field(uint(MAX_ROUNDS))  # rounds that have ended
    rounds: int = wire_field(uint(MAX_ROUNDS))  # rounds of the whole tuning
    owners: int = wire_field(uint(MAX_OWNERS))  # owners that take part
    ready: int = wire_field(uint(MAX_OWNERS))  # owners whose gradient is ready
    following: bool = wire_field(flag)  # a `RoundNumbers` follows
    refused: str = wire_field(text(MAX_TEXT))  # why the request is refused; empty: it is not refused
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class WantGradient:
    """The coordinator asks an owner for the owner's gradient, multiplied by `share`, its weight in the mean."""

    TAG: ClassVar[int] = 26
    number: int = wire_field(uint(MAX_ROUNDS))
    attempt: int = wire_field(uint(MAX_ATTEMPT))
    share: float = wire_field(_SHARE)
    norm: float = wire_field(milliseconds)  # longer gradients are scaled to this norm; 0: no bound
    # standard deviation of the noise that the owner adds per number, at a share of 1
    noise: float = wire_field(milliseconds)
    members: tuple[bytes, ...] = wire_field(several(blob(KEY_BYTES), most=MAX_OWNERS))
    """CURVE keys of all owners whose gradients are masked with shared secrets; empty: no masks."""


@dataclass(frozen=True, slots=True)
class RoundNumbers:
    """An owner's gradient; or, with attempt 0, the parameters after `number` rounds (0: the initial parameters). Four
    bytes per number."""

    TAG: ClassVar[int] = 27
    number: int = wire_field(uint(MAX_ROUNDS))
    attempt: int = wire_field(uint(MAX_ATTEMPT))
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class CopyPages:
    """Asks a peer to copy pages of the sender's session from the hop that holds them; see `Open`."""

    TAG: ClassVar[int] = 28
    session: bytes = wire_field(blob(SESSION_BYTES))
    rate: float = wire_field(number(1, 1e12))  # upper bound in bytes/s
    if_faster: bool = wire_field(flag)  # the session waits: copy only while copying is faster than computing the pages
    number: int = wire_field(_NUMBER)
    start: int = wire_field(uint(MAX_BLOCKS))
    end: int = wire_field(uint(MAX_BLOCKS))
    codec: int = wire_field(uint(255))  # as in `Open`
    context: bytes = wire_field(blob(LABEL_BYTES))
    labels: tuple[bytes, ...] = wire_field(joined(LABEL_BYTES, least=1, most=MAX_LABELS), b"".join)
    source_key: bytes = wire_field(blob(KEY_BYTES))
    source_address: str = wire_field(text(256))
    source_relays: tuple[Relay, ...] = wire_field(several(row(Relay, text(64), blob(KEY_BYTES)), most=3))


@dataclass(frozen=True, slots=True)
class CopiedPages:
    """Answers `CopyPages`: how many pages, from the first one on, the peer holds, and how many bytes it received."""

    TAG: ClassVar[int] = 29
    session: bytes = wire_field(blob(SESSION_BYTES))
    number: int = wire_field(_NUMBER)
    pages: int = wire_field(uint(MAX_LABELS))
    nbytes: int = wire_field(_NUMBER)


class CompressionWish(IntEnum):
    """The purpose of an `AskCompression`."""

    COMPRESS = 0  # to bring a part of the hidden states, or to learn the state; compression begins when all are there
    BLOCK = 1  # a part of the file with the compressed tensors of `block`
    STATES = 2  # a part of the file with the hidden states after block `end - 1`


@dataclass(frozen=True, slots=True)
class AskCompression:
    """Asks a peer to compress blocks `[start, end)` by the hidden states of a text before block `start`,
    `[positions, hidden]` in bfloat16. The payload is a part of these."""

    TAG: ClassVar[int] = 30
    number: int = wire_field(_NUMBER)
    wish: int = wire_field(uint(255))  # a `CompressionWish`
    model: str = wire_field(matching(FINGERPRINT))
    start: int = wire_field(uint(MAX_BLOCKS))
    end: int = wire_field(uint(MAX_BLOCKS))
    bits: float = wire_field(_BITS)  # mean of the weights of each block
    group: int = wire_field(uint(128))
    positions: int = wire_field(uint(MAX_POSITIONS))
    length: int = wire_field(uint(MAX_POSITIONS))  # positions of each sequence; the last sequence may be shorter
    states: bytes = wire_field(blob(DIGEST_BYTES))  # SHA-256 of all hidden states
    block: int = wire_field(uint(MAX_BLOCKS))
    offset: int = wire_field(uint(MAX_TEXT_BYTES))  # first byte of the payload, or of the part that is asked for
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class CompressionState:
    """Answers an `AskCompression`; the payload is a part of the file that was asked for."""

    TAG: ClassVar[int] = 31
    number: int = wire_field(_NUMBER)
    received: int = wire_field(uint(MAX_TEXT_BYTES))  # bytes of the hidden states that the peer has
    done: int = wire_field(uint(MAX_BLOCKS))  # the end of the blocks that are compressed
    total: int = wire_field(uint(MAX_TEXT_BYTES))  # bytes of the file that was asked for
    error: str = wire_field(text(MAX_TEXT))  # why the compression has ended; empty: it has not ended, or all is done
    payload: Payload = b""


class ImageTensor(NamedTuple):
    """A tensor of images, see `splitnet.blocks.vision`."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReadImages(_Numbered):
    """Asks a peer with the vision tower of a model for the features of images. `session` is a name that the client has
    chosen for its questions. The payload holds the values of all tensors, concatenated."""

    TAG: ClassVar[int] = 32
    model: str = wire_field(matching(FINGERPRINT))
    codec: int = wire_field(uint(255))  # of the pixels
    features_codec: int = wire_field(uint(255))
    tensors: tuple[ImageTensor, ...] = wire_field(
        several(row(ImageTensor, text(32), several(uint(MAX_PAYLOAD_BYTES), least=1, most=5)), least=1, most=3)
    )
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class ImageFeatures(_Numbered):
    """Answers `ReadImages`. The payload holds the features of each image in turn, then those that are added before
    blocks, level by level."""

    TAG: ClassVar[int] = 33
    codec: int = wire_field(uint(255))
    lengths: tuple[int, ...] = wire_field(several(uint(MAX_POSITIONS), least=1, most=MAX_IMAGES))  # features by image
    levels: int = wire_field(uint(MAX_LEVELS))  # 1, and the number of blocks before which features are added
    stacked: bool = wire_field(flag)  # the family's code gives one tensor, `[images, length, hidden]`, and no list
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class AskReceipt(_Numbered):
    """Asks a hop for a `Receipt` of the first `length` positions of a row."""

    TAG: ClassVar[int] = 34
    row: int = wire_field(uint(MAX_ROW_ID))
    length: int = wire_field(uint(MAX_RECEIPT))


@dataclass(frozen=True, slots=True)
class Receipt(_Numbered):
    """What a hop has received and sent for the first positions of a row, signed with its key
    (`splitnet/wire/receipts.py`). The payload holds the digests of all received positions, then of all sent ones."""

    TAG: ClassVar[int] = 35
    row: int = wire_field(uint(MAX_ROW_ID))
    length: int = wire_field(uint(MAX_RECEIPT))
    codec: int = wire_field(uint(255))  # of what the hop sent
    weights: str = wire_field(text(64))  # as in `Opened`
    adapted: bool = wire_field(flag)  # whether outputs depend on an adapter or on block inputs, too
    signature: bytes = wire_field(blob(SIGNATURE_BYTES))
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class FetchSent(_Numbered):
    """Asks a hop for what it has sent on for the first `length` positions of a row, as the hop has logged it."""

    TAG: ClassVar[int] = 36
    row: int = wire_field(uint(MAX_ROW_ID))
    length: int = wire_field(uint(MAX_RECEIPT))


@dataclass(frozen=True, slots=True)
class FetchedSent(_Numbered):
    """Answers a `FetchSent`. The payload holds the encoded positions."""

    TAG: ClassVar[int] = 37
    codec: int = wire_field(uint(255))
    payload: Payload = b""


_Passing = Open | Opened | Close | Step | Result | Failure | Replay | Forward | Gradient
_Tensors = Adapter | AdapterLoaded | AdapterGradient | FetchKV | FetchedKV
_Asking = LookUp | Found | Announce | Announced | AskWeights | WeightsPart
_Compressing = AskCompression | CompressionState
_Rounds = AskRound | RoundState | WantGradient | RoundNumbers
_Pages = CopyPages | CopiedPages
_Images = ReadImages | ImageFeatures
_Audits = AskReceipt | Receipt | FetchSent | FetchedSent
Message = Ping | Pong | _Passing | _Tensors | _Asking | Tapped | _Rounds | _Pages | _Compressing | _Images | _Audits
MESSAGES: tuple[type[Message], ...] = get_args(Message)

_BY_TAG: dict[int, type[Message]] = {kind.TAG: kind for kind in MESSAGES}
assert len(_BY_TAG) == len(MESSAGES), "two messages share a tag"

_LAYOUTS = {kind: MessageLayout(kind) for kind in MESSAGES}
_HAS_PAYLOAD = frozenset(kind for kind in MESSAGES if any(item.name == "payload" for item in dataclasses.fields(kind)))
_PREFIX = {kind: MAGIC + bytes((PROTOCOL_VERSION, kind.TAG)) for kind in MESSAGES}


def encode(message: Message) -> list[Payload]:
    """The ZeroMQ frames of a message."""
    kind = type(message)
    header = _PREFIX[kind] + packb(_LAYOUTS[kind].write_fields(message))
    if kind in _HAS_PAYLOAD:
        payload = cast("Step", message).payload
        if len(payload):
            return [header, payload]
    return [header]


def decode(frames: Sequence[Payload]) -> Message:
    """The message in `frames`. Raises ProtocolVersionError: the sender uses another protocol version; ProtocolError:
    the frames are not a valid message for another reason."""
    if not 1 <= len(frames) <= 2:
        raise ProtocolError(f"expected 1 or 2 frames, got {len(frames)}")
    header = memoryview(frames[0])
    if not 4 <= len(header) <= MAX_HEADER_BYTES:
        raise ProtocolError(f"a header has 4 to {MAX_HEADER_BYTES} bytes, got {len(header)}")
    if bytes(header[:2]) != MAGIC:
        raise ProtocolError("not a splitnet message")
    if header[2] != PROTOCOL_VERSION:
        raise ProtocolVersionError(
            f"the other side speaks protocol {header[2]}, this side speaks {PROTOCOL_VERSION}: upgrade the older side"
        )
    kind = _BY_TAG.get(header[3])
    if kind is None:
        raise ProtocolError(f"unknown message tag {header[3]}")
    body = unpack_array(header[4:], most_items=MAX_ROWS, most_text=MAX_TEXT * 4, most_bytes=MAX_LABELS * LABEL_BYTES)
    values = _LAYOUTS[kind].read_fields(body)
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
