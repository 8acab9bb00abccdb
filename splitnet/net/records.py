"""What a peer announces about itself in the DHT: one small signed record, and where the DHT may hold it.

On the wire a record is msgpack `[payload, signature]`. The payload is a msgpack array of the fields of `PeerRecord` in
their order, behind the number of this layout; later versions may append fields, which older readers ignore. The
signature covers a prefix of its own, so that a signature made for another purpose is never taken for one of these.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple, cast

import msgpack  # pyright: ignore[reportMissingTypeStubs]

from scheduler.coordinates import DIMENSIONS
from scheduler.swarm import PASS_SIZES
from splitnet.errors import KeyFileError, NotAuthorized, ProtocolError, ProtocolVersionError
from splitnet.net.endpoints import is_address
from splitnet.net.identity import Identity, PublicKey

RECORD_LAYOUT: Final = 1
MAX_RECORD_BYTES: Final = 3072
DEFAULT_TTL_S: Final = 60.0
MAX_TTL_S: Final = 3600.0

MAX_SEEN_LINKS: Final = 16
KEY_PREFIX_BYTES: Final = 8

MAX_CLOCK_SKEW_S: Final = 300.0
MODELS_KEY: Final = "splitnet.models"
FINGERPRINT: Final = re.compile(r"[0-9a-f]{8,128}")

_SIGNED_PREFIX = b"splitnet peer record\0"
_MAX_BLOCKS = 4096
_MAX_COUNT = 1 << 48
_MAX_MS = 1e9
_MAX_UNIX_S = 1e11
_MAX_CODECS = 32

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:+/ -]{0,63}")


class SeenLink(NamedTuple):
    """A link to another peer, as the publisher has measured it."""

    peer: bytes
    """The first 8 bytes of the other's raw key."""
    rtt_ms: float
    bytes_per_ms: float


@dataclass(frozen=True)
class PeerRecord:
    """The facts that one peer publishes. Raises ProtocolError when a value is out of its range.

    key: signs the record and gives the CURVE key of the link.
    model: fingerprint of the weights, 8 to 128 hex digits. model_name: for people, one line.
    address: `tcp://host:port` that clients and other peers connect to; an IPv6 host stands in brackets.
    start, end, num_blocks: serves blocks [start, end) of num_blocks; start == end says that the peer has left.
    protocol: version of the wire protocol. codecs: names, at most 32. device, dtype (what weights are held
    as, such as int8), version: for people and planners.
    block_ms: ms per block of a pass with as many positions as `scheduler.swarm.PASS_SIZES` says, observed.
    queue_ms: wait of a decode step for its pass. batch: positions of others that share the pass of a decode step.
    kv_free_positions: positions that new sessions may still take. sessions: open sessions.
    max_blocks: how many blocks this peer has memory for; 0: it stays where it is. placed_at: Unix time in seconds when
    it took its span. moving_to: the span [start, end) that it means to serve next. serves: it takes sessions.
    coordinate: in ms, and behind it the height; coordinate_error: relative, see `scheduler.coordinates`.
    bytes_per_ms: the best bandwidth it has seen on any link, 0: none yet. links: to other peers, at most 16.
    issued_at: Unix time in seconds. ttl_s: the record is void ttl_s after issued_at.
    """

    key: PublicKey
    model: str
    model_name: str
    address: str
    start: int
    end: int
    num_blocks: int
    protocol: int
    codecs: tuple[str, ...]
    device: str
    dtype: str
    block_ms: tuple[float, ...]
    queue_ms: float
    batch: float
    kv_free_positions: int
    sessions: int
    max_blocks: int
    placed_at: float
    moving_to: tuple[int, int] | None
    serves: bool
    coordinate: tuple[float, ...]
    coordinate_error: float
    bytes_per_ms: float
    links: tuple[SeenLink, ...]
    version: str
    issued_at: float
    ttl_s: float = DEFAULT_TTL_S

    def __post_init__(self) -> None:
        _require(_is_text(self.model) and FINGERPRINT.fullmatch(self.model), "model")
        _require(_is_text(self.model_name) and 1 <= len(self.model_name) <= 200, "model_name")
        # Names are printed on terminals: a control character could rewrite what the user sees.
        _require(self.model_name.isprintable(), "model_name")
        _require(_is_text(self.address) and is_address(self.address), "address")
        _require(_is_count(self.num_blocks, 1, _MAX_BLOCKS), "num_blocks")
        _require(_is_count(self.end, 0, self.num_blocks), "end")
        _require(_is_count(self.start, 0, self.end), "start")
        _require(_is_count(self.protocol, 0, 1 << 16), "protocol")
        _require(type(self.codecs) is tuple and len(self.codecs) <= _MAX_CODECS, "codecs")
        for name in (*self.codecs, self.device, self.dtype, self.version):
            _require(_is_text(name) and _WORD.fullmatch(name), "codecs, device, dtype or version")
        for field in ("queue_ms", "batch", "coordinate_error", "bytes_per_ms"):
            _require(_is_number(getattr(self, field), _MAX_MS), field)
        _require(type(self.serves) is bool, "serves")
        if self.moving_to is not None:
            _require(type(self.moving_to) is tuple and len(self.moving_to) == 2, "moving_to")
            _require(_is_count(self.moving_to[1], 1, self.num_blocks), "moving_to")
            _require(_is_count(self.moving_to[0], 0, self.moving_to[1] - 1), "moving_to")
        _require(type(self.block_ms) is tuple and len(self.block_ms) == len(PASS_SIZES), "block_ms")
        _require(all(_is_number(value, _MAX_MS) for value in self.block_ms), "block_ms")
        _require(type(self.coordinate) is tuple and len(self.coordinate) == DIMENSIONS + 1, "coordinate")
        _require(all(_is_number(value, _MAX_MS, low=-_MAX_MS) for value in self.coordinate), "coordinate")
        _require(self.coordinate[DIMENSIONS] >= 0, "coordinate")
        _require(type(self.links) is tuple and len(self.links) <= MAX_SEEN_LINKS, "links")
        for link in self.links:
            _require(len(link) == 3 and type(link[0]) is bytes and len(link[0]) == KEY_PREFIX_BYTES, "links")
            _require(_is_number(link[1], _MAX_MS) and _is_number(link[2], _MAX_MS) and link[2] > 0, "links")
        for field in ("kv_free_positions", "sessions", "max_blocks"):
            _require(_is_count(getattr(self, field), 0, _MAX_COUNT), field)
        for field in ("placed_at", "issued_at"):
            _require(_is_number(getattr(self, field), _MAX_UNIX_S), field)
        _require(_is_number(self.ttl_s, MAX_TTL_S) and self.ttl_s > 0, "ttl_s")

    @property
    def expires_at(self) -> float:
        """Unix time in seconds after which the record is void."""
        return self.issued_at + self.ttl_s

    @property
    def has_left(self) -> bool:
        """Whether this record only says that the peer serves no longer."""
        return self.start == self.end

    def farewell(self, now: float | None = None) -> PeerRecord:
        """A record for the same peer that says it has left; it outlives this record by a moment."""
        issued_at = max(time.time() if now is None else now, self.issued_at)
        ttl_s = min(self.ttl_s + 1.0, MAX_TTL_S)
        if issued_at + ttl_s <= self.expires_at:
            issued_at = self.issued_at + 1.0
        return dataclasses.replace(self, start=0, end=0, issued_at=issued_at, ttl_s=ttl_s)

    def pack(self, identity: Identity) -> bytes:
        """The record signed by `identity`. Raises NotAuthorized for a key other than the record's."""
        if identity.public != self.key:
            raise NotAuthorized("A record is signed with the key that it names; use the identity of this peer.")
        values: list[Any] = [getattr(self, field.name) for field in dataclasses.fields(self)]
        values[0] = self.key.raw
        # A reader expects floats where the record has them, so a whole number is not written as an integer.
        values = [float(value) if kind == "float" else value for value, kind in zip(values, _TYPES, strict=True)]
        payload = _packb([RECORD_LAYOUT, *values])
        data = _packb([payload, identity.sign(_SIGNED_PREFIX + payload)])
        if len(data) > MAX_RECORD_BYTES:
            raise ProtocolError(f"A peer record has at most {MAX_RECORD_BYTES} bytes, not {len(data)}; shorten names.")
        return data

    @classmethod
    def unpack(cls, data: bytes) -> PeerRecord:
        """The record in `data`, from anybody. Raises ProtocolError if malformed, NotAuthorized if badly signed."""
        if len(data) > MAX_RECORD_BYTES:
            raise ProtocolError(f"A peer record has at most {MAX_RECORD_BYTES} bytes, not {len(data)}.")
        envelope = _unpack_array(data)
        if len(envelope) != 2 or not all(type(part) is bytes for part in envelope) or _packb(envelope) != data:
            raise ProtocolError("A peer record consists of a payload and its signature.")
        payload, signature = cast(list[bytes], envelope)
        values = _unpack_array(payload)
        if not values or type(values[0]) is not int:
            raise ProtocolError("A peer record begins with the number of its layout.")
        if values[0] != RECORD_LAYOUT:
            raise ProtocolVersionError(f"The peer record has layout {values[0]}, this version reads {RECORD_LAYOUT}.")
        values = values[1 : len(_TYPES) + 1]
        if len(values) < len(_TYPES) or type(values[0]) is not bytes:
            raise ProtocolError("The peer record lacks fields.")
        try:
            key = PublicKey(values[0])
        except KeyFileError as error:
            raise ProtocolError(f"The key of the peer record is not valid: {error}") from error
        if not key.verify(_SIGNED_PREFIX + payload, signature):
            raise NotAuthorized("The peer record is not signed by the key that it names.")
        for value, expected in zip(values[1:], _TYPES[1:], strict=True):
            if expected == "float" and type(value) is not float:
                raise ProtocolError("The peer record holds a value of the wrong type.")
        for index, expected in enumerate(_TYPES):
            if expected.startswith("tuple") and not (values[index] is None and expected.endswith("None")):
                values[index] = _tuple_of(values[index])
        values[_LINKS] = tuple(SeenLink(*_tuple_of(link, 3)) for link in values[_LINKS])
        return cls(key, *values[1:])


class RecordValidator:
    """Which values a node of the DHT stores, and believes when another node returns them.

    hivemind asks `validate` (as it does of its `RecordValidatorBase`); whatever it answers False to is dropped. A value
    counts only if it is a signed record that stands where it belongs and expires when it says: so nobody can replace
    the record of another key, nor keep an old record in force by storing it again with a later expiration.

    key_id: the DHT's hash of a key, 20 bytes.
    """

    def __init__(self, key_id: Callable[[str], bytes], clock: Callable[[], float] = time.time) -> None:
        self._key_id = key_id
        self._clock = clock
        self._models_id = key_id(MODELS_KEY)

    def validate(self, record: Any) -> bool:
        """Whether the hivemind `DHTRecord` (key hash, msgpack subkey, msgpack value, expiration time) may be held."""
        try:
            subkey, value = _unpack_scalar(record.subkey), _unpack_scalar(record.value)
            if type(subkey) is not str or type(value) is not bytes:
                return False
            peer = verified_record(value)
            if peer.expires_at != record.expiration_time or peer.issued_at > self._clock() + MAX_CLOCK_SKEW_S:
                return False
            if record.key == self._models_id:
                return subkey == peer.model and not peer.has_left
            return subkey == peer.key.text and record.key == self._key_id(peers_key(peer.model))
        except (ProtocolError, NotAuthorized):
            return False

    def sign_value(self, record: Any) -> bytes:
        """The value as it is: records are signed before they reach the DHT."""
        return record.value

    def strip_value(self, record: Any) -> bytes:
        """The value as it is: the signature stays part of it."""
        return record.value


def peers_key(model: str) -> str:
    """The DHT key of the records of all peers that serve the model with this fingerprint."""
    return f"splitnet.peers.{model}"


@lru_cache(maxsize=4096)
def verified_record(data: bytes) -> PeerRecord:
    """`PeerRecord.unpack` that remembers: a lookup meets each record once per replica, a signature costs 0.1 ms."""
    return PeerRecord.unpack(data)


_TYPES = [str(field.type) for field in dataclasses.fields(PeerRecord)]
_LINKS = [field.name for field in dataclasses.fields(PeerRecord)].index("links")


_unpackb = cast("Callable[..., Any]", msgpack.unpackb)  # pyright: ignore[reportUnknownMemberType]


def _packb(value: list[Any]) -> bytes:
    return cast(bytes, msgpack.packb(value, use_bin_type=True))  # pyright: ignore[reportUnknownMemberType]


def _unpack_array(data: bytes) -> list[Any]:
    try:
        value: Any = _unpackb(
            data,
            raw=False,
            use_list=True,
            max_str_len=MAX_RECORD_BYTES,
            max_bin_len=MAX_RECORD_BYTES,
            max_array_len=64,
            max_map_len=0,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises many unrelated classes on hostile input; all mean the same here
        raise ProtocolError("The peer record is not valid msgpack.") from error
    if type(value) is not list:
        raise ProtocolError("The peer record is not a msgpack array.")
    return cast(list[Any], value)


def _tuple_of(value: Any, length: int | None = None) -> tuple[Any, ...]:
    if type(value) is not list or length not in (None, len(cast(list[Any], value))):
        raise ProtocolError("The peer record holds a list of the wrong length, or something else in its place.")
    return tuple(cast(list[Any], value))


def _unpack_scalar(data: bytes) -> object:
    items = _unpack_array(b"\x91" + data)  # as the only element of an array
    return items[0]


def _require(condition: object, field: str) -> None:
    if not condition:
        raise ProtocolError(f"The peer record has a bad value in {field}.")


def _is_text(value: object) -> bool:
    return type(value) is str


def _is_count(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: object, high: float, *, low: float = 0.0) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
