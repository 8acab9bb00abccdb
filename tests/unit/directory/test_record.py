from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.facts import MAX_WATTS
from splitnet.directory.record import MAX_CLOCK_SKEW_S, MAX_RECORD_BYTES, MAX_TTL_S, RECORD_LAYOUT, PeerRecord, SeenLink
from splitnet.errors import NotAuthorized, ProtocolError, ProtocolVersionError
from splitnet.security.identity import Identity
from splitnet.wire.endpoints import Relay

IDENTITY = Identity.generate()
STRANGER = Identity.generate()
RECORD = PeerRecord(
    key=IDENTITY.public,
    model="0123456789abcdef",
    model_name="SmolLM2-135M-Instruct",
    address="tcp://192.0.2.7:31330",
    start=3,
    end=17,
    num_blocks=30,
    protocol=1,
    codecs=("none", "int8-rotated"),
    device="cuda:0",
    dtype="bfloat16",
    block_ms=(0.5, 0.5, 0.75, 2.0, 8.0),
    queue_ms=0.0,
    batch=1.5,
    kv_free_positions=8192,
    sessions=2,
    max_blocks=20,
    placed_at=1_740_000_000.0,
    moving_to=(5, 20),
    serves=True,
    coordinate=(1.0, -2.5, 0.0, 3.0),
    coordinate_error=0.25,
    bytes_per_ms=1250.0,
    links=(SeenLink(b"8 bytes!", 20.5, 1000.0), SeenLink(bytes(8), 0.5, 9e5)),
    version="0.2.0",
    issued_at=1_750_000_000.25,
)
PACKED = RECORD.pack(IDENTITY)
PAYLOAD: list[Any] = msgpack.unpackb(msgpack.unpackb(PACKED)[0])

APPENDED = [field for field in dataclasses.fields(PeerRecord) if "appended" in field.metadata]

words = st.text(alphabet="abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=30).filter(
    lambda word: not word.startswith("-")
)
relays = st.builds(
    Relay, st.just("tcp://[2001:db8::1]:31332"), st.sampled_from([IDENTITY.public.raw, STRANGER.public.raw])
)
milliseconds = st.floats(min_value=0, max_value=1e9)
seen_links = st.builds(SeenLink, st.binary(min_size=8, max_size=8), milliseconds, st.floats(0, 1e9, exclude_min=True))


@st.composite
def records(draw: st.DrawFn) -> PeerRecord:
    num_blocks = draw(st.integers(1, 200))
    end = draw(st.integers(0, num_blocks))
    host = draw(st.sampled_from(["192.0.2.7", "[2001:db8::1]", "127.0.0.1"]))
    return PeerRecord(
        key=IDENTITY.public,
        model=draw(st.text(alphabet="0123456789abcdef", min_size=8, max_size=64)),
        model_name=draw(st.text(min_size=1, max_size=200).filter(str.isprintable)),
        address=f"tcp://{host}:{draw(st.integers(1, 65535))}",
        start=draw(st.integers(0, end)),
        end=end,
        num_blocks=num_blocks,
        protocol=draw(st.integers(0, 100)),
        codecs=tuple(draw(st.lists(words, max_size=8))),
        device=draw(words),
        dtype=draw(words),
        block_ms=tuple(draw(milliseconds) for _ in range(5)),
        queue_ms=draw(milliseconds),
        batch=draw(milliseconds),
        kv_free_positions=draw(st.integers(0, 1 << 48)),
        sessions=draw(st.integers(0, 1 << 20)),
        max_blocks=draw(st.integers(0, 200)),
        placed_at=draw(st.floats(min_value=0, max_value=1e11)),
        moving_to=draw(st.none() | st.integers(1, num_blocks).map(lambda end: (end - 1, end))),
        serves=draw(st.booleans()),
        coordinate=(*(draw(st.floats(-1e6, 1e6)) for _ in range(3)), draw(milliseconds)),
        coordinate_error=draw(milliseconds),
        bytes_per_ms=draw(milliseconds),
        links=tuple(draw(st.lists(seen_links, max_size=16))),
        version=draw(words),
        issued_at=draw(st.floats(min_value=0, max_value=1e11)),
        ttl_s=draw(st.floats(min_value=0, max_value=MAX_TTL_S, exclude_min=True)),
        watts=draw(st.sampled_from([0.0, 15.0]) | st.floats(0, MAX_WATTS)),
        relays=tuple(draw(st.lists(relays, max_size=3))),
        relay_port=draw(st.integers(0, 65535)),
        kv_capacity=draw(st.integers(0, 1 << 48)),
        past_ms=tuple(draw(st.lists(st.tuples(milliseconds, milliseconds), max_size=3))),
        kv=draw(st.sampled_from(("auto", "float16", "int8", "int8-int4", "int4"))),
    )


def pack(value: object) -> bytes:
    data = msgpack.packb(value)
    assert data is not None
    return data


def sign(payload: object, identity: Identity = IDENTITY, prefix: bytes = b"splitnet peer record\0") -> bytes:
    packed = pack(payload)
    return pack([packed, identity.sign(prefix + packed)])


@given(records())
def test_round_trip(record: PeerRecord) -> None:
    data = record.pack(IDENTITY)
    assert len(data) <= MAX_RECORD_BYTES
    assert PeerRecord.unpack(data) == record


@given(position=st.integers(0, len(PACKED) - 1), change=st.integers(1, 255))
def test_any_changed_byte_is_refused(position: int, change: int) -> None:
    data = bytearray(PACKED)
    data[position] ^= change
    with pytest.raises((ProtocolError, NotAuthorized)):
        PeerRecord.unpack(bytes(data))


@given(st.integers(0, len(PACKED) - 1))
def test_a_cut_or_padded_record_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError):
        PeerRecord.unpack(PACKED[:length])
    with pytest.raises(ProtocolError):
        PeerRecord.unpack(PACKED + bytes(length + 1))


@given(st.binary(max_size=300))
def test_random_bytes_raise_only_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        PeerRecord.unpack(data)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=5,
)


@given(index=st.integers(0, len(PAYLOAD) - 1), value=json_like)
def test_a_signed_field_of_any_other_value_is_valid_or_refused(index: int, value: Any) -> None:
    payload = [*PAYLOAD]
    payload[index] = value
    data = sign(payload)
    try:
        record = PeerRecord.unpack(data)
    except (ProtocolError, NotAuthorized):
        return
    assert PeerRecord.unpack(record.pack(IDENTITY)) == record


@given(json_like)
def test_a_signed_payload_of_any_shape_is_refused(payload: Any) -> None:
    with pytest.raises((ProtocolError, NotAuthorized)):
        PeerRecord.unpack(sign(payload))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "XYZ"),
        ("model", "0123"),
        ("model_name", ""),
        ("model_name", "a\x1b[2Jb"),
        ("address", "tcp://*:31330"),
        ("address", "tcp://peer.example.org:31330"),
        ("address", "tcp://localhost:31330"),
        ("address", "tcp://0.0.0.0:31330"),
        ("address", "tcp://[::]:31330"),
        ("address", "tcp://192.0.2.7:0"),
        ("address", "tcp://192.0.2.7:65536"),
        ("address", "tcp://192.0.2:80"),
        ("address", "tcp://[abc]:80"),
        ("address", "tcp://eth0;192.0.2.7:80"),
        ("address", "ipc:///tmp/socket"),
        ("address", "tcp://host:80\n"),
        ("start", -1),
        ("start", 18),
        ("end", 31),
        ("end", True),
        ("num_blocks", 0),
        ("num_blocks", 1 << 20),
        ("codecs", ("bad\ncodec",)),
        ("codecs", ("none",) * 33),
        ("device", ""),
        ("dtype", "x" * 65),
        ("block_ms", (1.0, 1.0, 1.0, 1.0, float("nan"))),
        ("block_ms", (-1.0, 1.0, 1.0, 1.0, 1.0)),
        ("block_ms", (1.0, 1.0, 1.0, 1.0)),
        ("queue_ms", 1e12),
        ("batch", float("inf")),
        ("coordinate", (1.0, 1.0, 1.0)),
        ("coordinate", (1.0, 1.0, 1.0, -0.5)),
        ("coordinate", (1.0, float("nan"), 1.0, 1.0)),
        ("links", (SeenLink(b"short", 1.0, 1.0),)),
        ("links", (SeenLink(bytes(8), -1.0, 1.0),)),
        ("links", (SeenLink(bytes(8), 1.0, 0.0),)),
        ("links", (SeenLink(bytes(8), 1.0, 1.0),) * 17),
        ("max_blocks", -1),
        ("moving_to", (5, 5)),
        ("moving_to", (5, 31)),
        ("moving_to", (5,)),
        ("serves", 1),
        ("kv_free_positions", -1),
        ("sessions", 1 << 60),
        ("issued_at", float("inf")),
        ("ttl_s", 0.0),
        ("ttl_s", MAX_TTL_S + 1),
    ],
)
def test_values_out_of_range_are_refused_on_both_sides(field: str, value: Any) -> None:
    with pytest.raises(ProtocolError, match=field):
        dataclasses.replace(RECORD, **{field: value})
    index = 1 + [f.name for f in dataclasses.fields(PeerRecord)].index(field)
    with pytest.raises(ProtocolError):
        PeerRecord.unpack(sign([*PAYLOAD[:index], value, *PAYLOAD[index + 1 :]]))


@pytest.mark.parametrize("watts", [-1.0, MAX_WATTS * 1.01, float("inf"), float("nan"), "15", None, True])
def test_impossible_watts_are_refused_on_both_sides(watts: Any) -> None:
    with pytest.raises(ProtocolError, match="watts"):
        dataclasses.replace(RECORD, watts=watts)
    with pytest.raises(ProtocolError, match="watts"):
        PeerRecord.unpack(sign([*PAYLOAD, RECORD.state_bytes, RECORD.proof, watts]))
    assert PeerRecord.unpack(sign([*PAYLOAD, RECORD.state_bytes, RECORD.proof])).watts == 0.0  # an earlier version


def test_a_record_of_another_key_is_refused() -> None:
    with pytest.raises(NotAuthorized):
        RECORD.pack(STRANGER)
    with pytest.raises(NotAuthorized):
        PeerRecord.unpack(sign(PAYLOAD, STRANGER))


def test_a_signature_without_the_prefix_is_refused() -> None:
    assert PeerRecord.unpack(sign(PAYLOAD)) == RECORD
    with pytest.raises(NotAuthorized):
        PeerRecord.unpack(sign(PAYLOAD, prefix=b""))


def test_a_key_that_is_no_point_of_the_curve_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="key"):
        PeerRecord.unpack(sign([RECORD_LAYOUT, bytes(32), *PAYLOAD[2:]]))


def test_fields_of_later_versions_are_ignored_and_other_layouts_refused() -> None:
    assert PeerRecord.unpack(sign([*PAYLOAD, *(field.default for field in APPENDED), "later", 7])) == RECORD
    with pytest.raises(ProtocolVersionError):
        PeerRecord.unpack(sign([RECORD_LAYOUT + 1, *PAYLOAD[1:]]))


def test_an_oversized_record_is_refused() -> None:
    with pytest.raises(ProtocolError, match=str(MAX_RECORD_BYTES)):
        PeerRecord.unpack(sign([*PAYLOAD, "x" * MAX_RECORD_BYTES]))


@pytest.mark.parametrize("now", [RECORD.issued_at - 500, RECORD.issued_at, RECORD.issued_at + 10])
@pytest.mark.parametrize("ttl_s", [1.0, 60.0, MAX_TTL_S])
def test_a_farewell_outlives_the_record_it_ends(now: float, ttl_s: float) -> None:
    record = dataclasses.replace(RECORD, ttl_s=ttl_s)
    farewell = record.farewell(now)
    assert farewell.has_left and not record.has_left
    assert farewell.expires_at > record.expires_at
    assert PeerRecord.unpack(farewell.pack(IDENTITY)) == farewell


def test_a_record_is_valid_until_it_expires_and_not_from_the_future() -> None:
    issued_at, expires_at = RECORD.issued_at, RECORD.issued_at + RECORD.ttl_s
    assert all(map(RECORD.is_valid_at, (issued_at - MAX_CLOCK_SKEW_S, issued_at, expires_at - 0.25)))
    assert not any(map(RECORD.is_valid_at, (issued_at - MAX_CLOCK_SKEW_S - 0.25, expires_at, expires_at + 1)))
