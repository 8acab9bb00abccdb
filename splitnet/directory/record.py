"""The signed record that a peer publishes about itself, and the keys of the DHT under which it is stored.

On the wire a record is msgpack `[payload, signature]`. The payload is a msgpack array: the number of the layout, then
the fields of `PeerRecord` in their order. Later versions append fields, see `splitnet.wire.fields`. The signature
covers a prefix for records only, so that a signature made for another purpose is never valid for a record.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Final, NamedTuple, cast

from scheduler.facts import (
    CLIENT,
    CONTEXTS,
    DIMENSIONS,
    MAX_WATTS,
    PASS_SIZES,
    ContextCost,
    Coordinate,
    Link,
    Network,
    NetworkPlace,
    Peer,
    Speed,
)
from splitnet.errors import KeyFileError, NotAuthorized, ProtocolError, ProtocolVersionError
from splitnet.security.identity import MAX_PROOF, Identity, PublicKey, has_worked
from splitnet.wire.endpoints import Endpoint, Relay, is_address
from splitnet.wire.fields import (
    MessageLayout,
    appended_field,
    blob,
    flag,
    matching,
    number,
    optional,
    packb,
    row,
    several,
    uint,
    unpack_array,
    wire_field,
)
from splitnet.wire.messages import FINGERPRINT, PROTOCOL_VERSION

RECORD_LAYOUT: Final = 1
MAX_RECORD_BYTES: Final = 3072
DEFAULT_TTL_S: Final = 60.0
MAX_TTL_S: Final = 300.0

MAX_SEEN_LINKS: Final = 16  # largest number of measured links in one record
KEY_PREFIX_BYTES: Final = 8  # bytes of a peer's key with which a record or an entry names the peer

MAX_CLOCK_SKEW_S: Final = 300.0  # a record issued later than this in the future is refused
MODELS_KEY: Final = "splitnet.models"
SHARDS: Final = 8  # keys of the DHT over which the records of one model are spread

HELPERS: Final = "72656c617973"  # replaces the model in records of relays that serve no blocks
ROUNDS: Final = "726f756e6473"  # prefix that replaces the model in records of coordinators of joint tunings
DEMAND: Final = HELPERS + "64656d616e64"  # replaces the model in records of gateways; older versions skip the prefix
MAX_RELAYS: Final = 3  # largest number of relays of one unreachable peer
MAX_WANTED: Final = 16  # largest number of models in one gateway's record
WANTED_NAME: Final = 80  # largest number of bytes of a model's name in such a record, so that all names fit
MAX_WANTED_TOKENS: Final = 1000.0  # demand per model, and per key over all models, in tokens/s

_SIGNED_PREFIX = b"splitnet peer record\0"
_MOST = 1e9
_LEAST = math.ulp(0.0)
_BLOCK = uint(4096)
_COUNT = uint(1 << 48)
_MS = number(0, _MOST)
_UNIX_S = number(0, 1e11)
_WORD = matching(re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:+/ -]{0,63}"))


class SeenLink(NamedTuple):
    """A link to another peer, as measured by the publisher. peer: the first bytes of the other peer's raw key."""

    peer: bytes
    rtt_ms: float
    bytes_per_ms: float


class Wanted(NamedTuple):
    """A gateway's demand for a model. model: fingerprint in bytes. tokens_per_s: tokens per second."""

    model: bytes
    name: str
    num_blocks: int
    tokens_per_s: float


def _key(value: Any) -> PublicKey:
    if isinstance(value, PublicKey):
        return value
    if type(value) is not bytes:
        raise ProtocolError("expected a key of 32 bytes")
    try:
        return PublicKey(value)
    except KeyFileError as error:
        raise ProtocolError(f"not a valid key: {error}") from None


def _name(value: Any) -> str:
    # Names are printed on terminals, where a control character could change other text.
    if type(value) is not str or not 1 <= len(value) <= 200 or not value.isprintable():
        raise ProtocolError("expected 1 to 200 printable characters")
    return value


def _address(value: Any) -> str:
    if type(value) is not str or not is_address(value):
        raise ProtocolError("expected tcp://IP:PORT, not the name of a host")
    return value


def _floats(*values: float) -> tuple[float, ...]:
    return values


_relay = row(Relay, _address, lambda value: _key(value).raw)
_seen_link = row(SeenLink, blob(KEY_PREFIX_BYTES), _MS, number(_LEAST, _MOST))
_wanted = row(Wanted, blob(32), lambda name: _name(name)[:WANTED_NAME], _BLOCK, number(0, MAX_WANTED_TOKENS))


@dataclass(frozen=True)
class PeerRecord:
    """The facts that one peer publishes. Raises ProtocolError: a value is out of its range.

    key: signs the record and gives the CURVE key of the link.
    model: fingerprint of the checkpoint, 8 to 128 hex digits. model_name: text for people, one line.
    address: `tcp://IP:port` to which clients and other peers connect; an IPv6 address is in brackets.
    start, end, num_blocks: the peer serves blocks [start, end) of num_blocks; start == end: the peer has left.
    protocol: version of the wire protocol. codecs: names, at most 32. device, version: texts for people.
    dtype: the weight format, then after a slash the type in which blocks compute if it is another one, such as
    float16/float32, then after KV the value of `kv` if it is not auto.
    block_ms: observed ms per block of a pass, for the numbers of positions in `scheduler.facts.PASS_SIZES`.
    queue_ms: queue wait of a decode step. batch: positions of other sessions in the pass of a decode step.
    kv_free_positions: positions that new sessions may take. sessions: open sessions.
    max_blocks: how many blocks fit into the peer's memory; 0: the peer does not move. placed_at: Unix time in seconds
    since which the peer has its span. moving_to: the span [start, end) to which the peer will move. serves: whether the
    peer accepts sessions.
    coordinate: network coordinate in ms, with the height last; coordinate_error: relative error, see `scheduler.facts`.
    bytes_per_ms: the highest bandwidth measured on any link; 0: none measured. links: at most 16 links to other peers.
    issued_at: Unix time in seconds. ttl_s: the record is void ttl_s after issued_at.
    state_bytes: bytes of a sequence in all blocks, in addition to the bytes of its positions. proof: proof of work, see
    `splitnet.security.identity`. watts: power of the device while it computes; 0: not known. relay_port: port of the
    peer's relay, on the host of its address; 0: the peer is not a relay. relays: at most 3 relays through which the
    peer is reached; empty: the peer is reached at its address. demand: of a gateway, see `DEMAND`.
    kv_capacity: positions that one session of one row may take if it is the only one; 0: not known.
    past_ms: by how many ms per block passes of 1 and of 512 positions take longer after 1,024, 8,192 and 32,768
    positions of context, as far as the peer can hold this context, see `scheduler.facts.ContextCost`.
    kv: format of keys and values, of `splitnet.wire.kv_forms.KV_BITS`; auto: the type in which blocks
    compute, which is always that of latents, states and keys of indexers.
    reads_images: whether the peer computes features of images, see `splitnet.blocks.vision`.
    """

    signed: ClassVar[bytes] = b""  # the signed bytes from which this record was read; empty if this process made it

    key: PublicKey = wire_field(_key)  # noqa: RUF009 (`wire_field` makes a field)
    model: str = wire_field(matching(FINGERPRINT))
    model_name: str = wire_field(_name)
    address: str = wire_field(_address)
    start: int = wire_field(_BLOCK)
    end: int = wire_field(_BLOCK)
    num_blocks: int = wire_field(_BLOCK)
    protocol: int = wire_field(uint(1 << 16))
    codecs: tuple[str, ...] = wire_field(several(_WORD, most=32))
    device: str = wire_field(_WORD)
    dtype: str = wire_field(_WORD)
    block_ms: tuple[float, ...] = wire_field(several(_MS, least=len(PASS_SIZES), most=len(PASS_SIZES)))
    queue_ms: float = wire_field(_MS)
    batch: float = wire_field(_MS)
    kv_free_positions: int = wire_field(_COUNT)
    sessions: int = wire_field(_COUNT)
    max_blocks: int = wire_field(_COUNT)
    placed_at: float = wire_field(_UNIX_S)
    moving_to: tuple[int, int] | None = wire_field(optional(several(_BLOCK, least=2, most=2)))
    serves: bool = wire_field(flag)
    coordinate: tuple[float, ...] = wire_field(row(_floats, *(number(-_MOST, _MOST),) * DIMENSIONS, _MS))
    coordinate_error: float = wire_field(_MS)
    bytes_per_ms: float = wire_field(_MS)
    links: tuple[SeenLink, ...] = wire_field(several(_seen_link, most=MAX_SEEN_LINKS))
    version: str = wire_field(_WORD)
    issued_at: float = wire_field(_UNIX_S)
    ttl_s: float = wire_field(number(_LEAST, MAX_TTL_S), default=DEFAULT_TTL_S)
    state_bytes: int = appended_field(_COUNT, 0)
    proof: int = appended_field(uint(MAX_PROOF), 0)
    watts: float = appended_field(number(0, MAX_WATTS), 0.0)
    relays: tuple[Relay, ...] = appended_field(several(_relay, most=MAX_RELAYS), ())
    relay_port: int = appended_field(uint(65535), 0)
    demand: tuple[Wanted, ...] = appended_field(several(_wanted, most=MAX_WANTED), ())
    kv_capacity: int = appended_field(_COUNT, 0)
    past_ms: tuple[tuple[float, float], ...] = appended_field(several(row(_floats, _MS, _MS), most=len(CONTEXTS)), ())
    kv: str = appended_field(_WORD, "auto")
    reads_images: bool = appended_field(flag, False)

    def __post_init__(self) -> None:
        for name, value in _LAYOUT.read_fields([getattr(self, name) for name in _LAYOUT.names]).items():
            object.__setattr__(self, name, value)
        if not self.start <= self.end <= self.num_blocks or not self.num_blocks:
            raise ProtocolError("PeerRecord.start, end, num_blocks: expected start <= end <= num_blocks, and a block")
        if self.moving_to is not None and not self.moving_to[0] < self.moving_to[1] <= self.num_blocks:
            raise ProtocolError("PeerRecord.moving_to: expected start < end <= num_blocks")

    @cached_property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.address, self.key, self.relays)

    @property
    def helper(self) -> Relay | None:
        """The peer as a relay; None: the peer is not a relay."""
        if not self.relay_port or self.relays:
            return None
        return Relay(f"{self.address.rpartition(':')[0]}:{self.relay_port}", self.key.raw)

    @property
    def expires_at(self) -> float:
        """Unix time in seconds after which the record is void."""
        return self.issued_at + self.ttl_s

    @property
    def has_left(self) -> bool:
        """Whether the peer has left."""
        return self.start == self.end

    @property
    def is_of_model(self) -> bool:
        """Whether the record belongs to a peer of a model, not to a relay, coordinator or gateway."""
        return not self.model.startswith((HELPERS, ROUNDS))

    @property
    def is_proven(self) -> bool:
        """Whether the key has a valid proof of work."""
        return has_worked(self.key, self.proof)

    def is_valid_at(self, now: float) -> bool:
        """Whether at `now`, Unix time in seconds, the record is neither void nor issued in the future."""
        return self.expires_at > now and self.issued_at <= now + MAX_CLOCK_SKEW_S

    def farewell(self, now: float | None = None) -> PeerRecord:
        """A record that says that the peer has left. It expires a moment after this record."""
        issued_at = max(time.time() if now is None else now, self.issued_at)
        ttl_s = min(self.ttl_s + 1.0, MAX_TTL_S)
        if issued_at + ttl_s <= self.expires_at:
            issued_at = self.issued_at + 1.0
        return dataclasses.replace(self, start=0, end=0, issued_at=issued_at, ttl_s=ttl_s)

    def pack(self, identity: Identity) -> bytes:
        """The record signed by `identity`, as bytes. Raises NotAuthorized: the identity has another key."""
        if identity.public != self.key:
            raise NotAuthorized("A record is signed with the key that it names; use the identity of this peer.")
        payload = packb([RECORD_LAYOUT, self.key.raw, *_LAYOUT.write_fields(self)[1:]])
        data = packb([payload, identity.sign(_SIGNED_PREFIX + payload)])
        if len(data) > MAX_RECORD_BYTES:
            raise ProtocolError(f"A peer record has at most {MAX_RECORD_BYTES} bytes, not {len(data)}; shorten names.")
        return data

    @classmethod
    def idle(cls, **facts: Any) -> PeerRecord:
        """A record of an idle peer without measurements: `facts`, and neutral values for all other fields. `facts`
        needs at least the key, the model and its name, the address and the number of blocks."""
        measured = ("queue_ms", "batch", "kv_free_positions", "sessions", "coordinate_error", "bytes_per_ms")
        nothing: dict[str, Any] = dict.fromkeys((*measured, "start", "max_blocks", "placed_at", "issued_at"), 0)
        nothing |= dict.fromkeys(("device", "dtype", "version"), "none") | dict.fromkeys(("codecs", "links"), ())
        nothing |= {"block_ms": (0.0,) * len(PASS_SIZES), "coordinate": (0.0,) * (DIMENSIONS + 1)}
        nothing |= {"end": facts["num_blocks"], "protocol": PROTOCOL_VERSION, "moving_to": None, "serves": False}
        return cls(**nothing | facts)

    @classmethod
    def unpack(cls, data: bytes) -> PeerRecord:
        """The record in untrusted `data`. Raises ProtocolError: it is malformed; NotAuthorized: the signature is
        wrong."""
        if len(data) > MAX_RECORD_BYTES:
            raise ProtocolError(f"A peer record has at most {MAX_RECORD_BYTES} bytes, not {len(data)}.")
        envelope = _unpack_array(data)
        if len(envelope) != 2 or not all(type(part) is bytes for part in envelope) or packb(envelope) != data:
            raise ProtocolError("A peer record consists of a payload and its signature.")
        payload, signature = cast(list[bytes], envelope)
        values = _unpack_array(payload)
        if not values or type(values[0]) is not int:
            raise ProtocolError("A peer record begins with the number of its layout.")
        if values[0] != RECORD_LAYOUT:
            raise ProtocolVersionError(f"The peer record has layout {values[0]}, this version reads {RECORD_LAYOUT}.")
        fields = _LAYOUT.read_fields(values[1:])
        if not fields["key"].verify(_SIGNED_PREFIX + payload, signature):
            raise NotAuthorized("The peer record is not signed by the key that it names.")
        record = cls(**fields)
        object.__setattr__(record, "signed", data)
        return record


_LAYOUT = MessageLayout(PeerRecord)


class RecordValidator:
    """A record validator of hivemind: decides which values a node of the DHT stores and accepts from other nodes.

    A value is valid only if it is a signed record under its own key of the DHT, with its own expiration. So nobody can
    replace the record of another key, nor keep an old record valid by storing it with a later expiration.

    key_id: the DHT's hash of a key, 20 bytes.
    """

    def __init__(self, key_id: Callable[[str], bytes], clock: Callable[[], float] = time.time) -> None:
        self._key_id = key_id
        self._clock = clock
        self._models_id = key_id(MODELS_KEY)

    def validate(self, record: Any) -> bool:
        """Whether the hivemind `DHTRecord` (key hash, msgpack subkey, msgpack value, expiration time) may be held."""
        try:
            subkey, peer = _unpack_scalar(record.subkey), stored_record(record.value)
            if peer.expires_at != record.expiration_time or peer.issued_at > self._clock() + MAX_CLOCK_SKEW_S:
                return False
            if record.key == self._models_id:
                return subkey == peer.model and not peer.has_left
            return subkey == peer.key.text and record.key == self._key_id(shard_key(peer.model, peer.key))
        except (ProtocolError, NotAuthorized):
            return False

    def sign_value(self, record: Any) -> bytes:
        return record.value  # the record is signed already

    strip_value = sign_value  # the signature stays part of the value


def shard_key(model: str, key: PublicKey) -> str:
    """The DHT key of a peer's record."""
    return shard_keys(model)[key.raw[0] % SHARDS]


def shard_keys(model: str) -> list[str]:
    """The DHT keys over which the records of a model's peers are spread. model: fingerprint."""
    return [f"splitnet.peers.{model}.{shard}" for shard in range(SHARDS)]


@lru_cache(maxsize=4096)
def verified_record(data: bytes) -> PeerRecord:
    """`PeerRecord.unpack` with a cache: a lookup gets each record once per replica, and checking a signature takes
    0.1 ms."""
    return PeerRecord.unpack(data)


def stored_record(value: bytes) -> PeerRecord:
    """The record in a value of the DHT: msgpack of the record's bytes. Raises ProtocolError, NotAuthorized."""
    data = _unpack_scalar(value)
    if type(data) is not bytes:
        raise ProtocolError("expected the bytes of a record")
    return verified_record(data)


def _unpack_array(data: bytes) -> list[Any]:
    return unpack_array(data, most_items=64, most_text=MAX_RECORD_BYTES, most_bytes=MAX_RECORD_BYTES)


def _unpack_scalar(data: bytes) -> object:
    return _unpack_array(b"\x91" + data)[0]  # reads the record as the only element of an array


def facts_of(record: PeerRecord, position_bytes: float = 0.0) -> Peer:
    """A peer for the planner. position_bytes: bytes of a position on links, needed only for `Peer.sending_ms`."""
    return Peer(
        id=record.key.text,
        start=record.start,
        end=record.end,
        speed=Speed(record.block_ms),
        queue_ms=record.queue_ms,
        batch=record.batch,
        kv_free=record.kv_free_positions,
        watts=record.watts,
        sending_ms=position_bytes / record.bytes_per_ms if record.bytes_per_ms else 0.0,
        context_cost=ContextCost(record.past_ms),
        kv_capacity=record.kv_capacity,
    )


def expected_facts_of(record: PeerRecord, position_bytes: float = 0.0) -> Peer:
    """A peer for the planner, as it will be after its announced move."""
    facts = facts_of(record, position_bytes)
    return replace(facts, start=record.moving_to[0], end=record.moving_to[1]) if record.moving_to else facts


def place_of(record: PeerRecord) -> NetworkPlace:
    coordinate = Coordinate(record.coordinate[:DIMENSIONS], record.coordinate[DIMENSIONS], record.coordinate_error)
    return NetworkPlace(coordinate, record.bytes_per_ms)


def places_of(records: Iterable[PeerRecord]) -> dict[str, NetworkPlace]:
    """The places of the peers whose coordinates are known, by key."""
    return {record.key.text: place_of(record) for record in records if record.coordinate_error < 1.0}


def network_of(
    records: Iterable[PeerRecord], links: Mapping[tuple[str, str], Link], places: Mapping[str, NetworkPlace]
) -> Network:
    """The links between peers according to their records.

    A measured link also counts for the reverse direction, unless the other peer has measured that direction itself.

    links: measured by this process; they override records. places: places of other processes, such as the client.
    """
    records = list(records)
    to = {receiver: link.latency_ms for (sender, receiver), link in links.items() if sender == CLIENT}
    names = {record.key.raw[:KEY_PREFIX_BYTES]: record.key.text for record in records}
    there: dict[tuple[str, str], Link] = {}
    back: dict[tuple[str, str], Link] = {}
    for record in records:
        for seen in record.links:
            other = names.get(seen.peer)
            if other is not None and other != record.key.text:
                # Triangle inequality: a link is no shorter than the difference of the client's distances to its ends.
                ends = (to.get(record.key.text), to.get(other))
                least_ms = abs(ends[0] - ends[1]) if ends[0] is not None and ends[1] is not None else 0.0
                link = Link(max(seen.rtt_ms / 2, least_ms), seen.bytes_per_ms)
                there[record.key.text, other] = back[other, record.key.text] = link
    return Network({**back, **there, **links}, places={**places_of(records), **places})
