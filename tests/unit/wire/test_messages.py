"""Messages and frames: a message is decoded as it was encoded, and invalid frames raise `ProtocolError`."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitnet.errors import ProtocolError, ProtocolVersionError
from splitnet.logs import printable
from splitnet.wire.messages import (
    ENTRY_BYTES,
    EVERY_BLOCK,
    KEY_BYTES,
    LABEL_BYTES,
    MAGIC,
    MAX_ATTEMPT,
    MAX_BLOCKS,
    MAX_CHANGES_BYTES,
    MAX_DEPTH,
    MAX_FOUND,
    MAX_HEADER_BYTES,
    MAX_IMAGES,
    MAX_INPUT_BYTES,
    MAX_INPUTS,
    MAX_KNOWN,
    MAX_LABELS,
    MAX_LEVELS,
    MAX_OWNERS,
    MAX_PART_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_POSITIONS,
    MAX_RECEIPT,
    MAX_ROUNDS,
    MAX_ROW_ID,
    MAX_ROWS,
    MAX_TAPS,
    MAX_TEXT,
    MAX_TEXT_BYTES,
    MAX_WEIGHTS_BYTES,
    MESSAGES,
    PROTOCOL_VERSION,
    SESSION_BYTES,
    SIGNATURE_BYTES,
    Adapter,
    AdapterGradient,
    AdapterLoaded,
    Announce,
    Announced,
    AskCompression,
    AskReceipt,
    AskRound,
    AskWeights,
    Chunk,
    Close,
    CompressionState,
    CopiedPages,
    CopyPages,
    Failure,
    FetchedKV,
    FetchedSent,
    FetchKV,
    FetchSent,
    Fork,
    Forward,
    Found,
    Gradient,
    ImageFeatures,
    ImageTensor,
    LookUp,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    ReadImages,
    Receipt,
    Replay,
    Result,
    RoundNumbers,
    RoundState,
    RoundWish,
    Step,
    Tapped,
    Timing,
    WantGradient,
    WeightsKind,
    WeightsPart,
    decode,
    encode,
)
from tests.tiers import examples

SESSION = bytes(range(SESSION_BYTES))
LARGEST_NUMBER = (1 << 48) - 1
LARGEST_EPOCH = (1 << 31) - 1

sessions = st.binary(min_size=SESSION_BYTES, max_size=SESSION_BYTES)
keys = st.one_of(st.just(b""), st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES))
numbers = st.integers(0, LARGEST_NUMBER)
epochs = st.integers(0, LARGEST_EPOCH)
blocks = st.integers(0, MAX_BLOCKS)
positions = st.integers(0, MAX_POSITIONS)
codes = st.integers(0, 255)
depths = st.integers(0, MAX_DEPTH)
milliseconds = st.floats(0, 1e300)
payloads = st.binary(max_size=64)
rounds = st.integers(0, MAX_ROUNDS)
owners = st.integers(0, MAX_OWNERS)
attempts = st.integers(0, MAX_ATTEMPT)


def texts(limit: int) -> st.SearchStrategy[str]:
    # Control characters are escaped when decoded, see tests/unit/test_logs_printable.py.
    return st.text(st.characters(codec="utf-8"), max_size=min(limit, 80)).map(lambda text: printable(text)[:limit])


parts = st.lists(st.builds(Chunk, numbers, positions, positions, positions), max_size=5).map(tuple)
timings = st.lists(st.builds(Timing, numbers, numbers, numbers), max_size=4).map(tuple)
labels = st.binary(min_size=LABEL_BYTES, max_size=LABEL_BYTES)
forks = st.none() | st.lists(st.builds(Fork, numbers, numbers), max_size=5).map(tuple)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Ping, numbers, payloads, st.just(b"") | sessions),
    st.builds(
        Pong,
        numbers,
        milliseconds,
        numbers,
        numbers,
        numbers,
        st.booleans(),
        numbers,
        timings.map(lambda several: several[:1]),
    ),
    st.builds(
        Open,
        sessions,
        epochs,
        texts(64),
        blocks,
        blocks,
        positions,
        codes,
        keys,
        keys,
        texts(256),
        asks_weights=st.booleans(),
        taps=st.lists(blocks, max_size=MAX_TAPS).map(tuple),
        tap_codec=codes,
        context=st.just(b"") | labels,
        row=numbers,
        labels=st.lists(labels, max_size=3).map(tuple),
        shared=st.booleans(),
    ),
    st.builds(Opened, sessions, epochs, st.booleans(), numbers, texts(64), st.booleans(), st.booleans(), st.booleans()),
    st.builds(Close, sessions),
    st.builds(
        Step,
        sessions,
        epochs,
        numbers,
        parts,
        forks,
        blocks,
        codes,
        payloads,
        blocks,
        timings,
        positions,
        st.lists(labels).map(tuple),
    ),
    st.builds(Result, sessions, epochs, numbers, blocks, codes, timings, payloads),
    st.builds(Failure, st.just(b"") | sessions, epochs, numbers, codes, texts(MAX_TEXT)),
    st.builds(Replay, sessions, epochs, numbers, blocks, positions),
    st.builds(
        Forward,
        sessions,
        epochs,
        numbers,
        numbers,
        st.lists(positions, max_size=5).map(tuple),
        st.booleans(),
        numbers,
        codes,
        codes,
        payloads,
        blocks,
        timings,
    ),
    st.builds(Gradient, sessions, epochs, numbers, blocks, numbers, st.booleans(), codes, payloads),
    st.builds(Adapter, sessions, epochs, numbers, numbers, payloads),
    st.builds(AdapterLoaded, sessions, epochs, numbers),
    st.builds(AdapterGradient, sessions, epochs, numbers, numbers, payloads),
    st.builds(FetchKV, sessions, epochs, numbers, st.integers(0, 9), st.integers(0, 9)),
    st.builds(FetchedKV, sessions, epochs, numbers, numbers, payloads),
    st.builds(
        LookUp,
        numbers,
        st.just("") | st.text("0123456789abcdef", min_size=8, max_size=128),
        depths,
        st.lists(st.binary(min_size=ENTRY_BYTES, max_size=ENTRY_BYTES), max_size=3).map(tuple),
        st.floats(0, 1e11),
        st.integers(0, MAX_CHANGES_BYTES),
    ),
    st.builds(Found, numbers, st.integers(0, MAX_FOUND - 1), payloads, st.binary(max_size=MAX_KNOWN // 8)),
    st.builds(Announce, numbers, depths, payloads),
    st.builds(Announced, numbers, st.booleans()),
    st.builds(
        AskWeights,
        numbers,
        codes,
        st.binary(min_size=32, max_size=32),
        st.integers(0, MAX_WEIGHTS_BYTES),
        st.integers(0, MAX_PART_BYTES),
    ),
    st.builds(WeightsPart, numbers, st.integers(0, MAX_WEIGHTS_BYTES), payloads),
    st.builds(Tapped, sessions, epochs, numbers, blocks, codes, payloads),
    st.builds(
        AskRound,
        texts(64),
        st.text("0123456789abcdef", min_size=8, max_size=128),
        codes,
        rounds,
        st.integers(0, 1 << 31),
        st.integers(0, MAX_PAYLOAD_BYTES // 4),
        payloads,
    ),
    st.builds(RoundState, rounds, rounds, owners, owners, st.booleans(), texts(MAX_TEXT), payloads),
    st.builds(
        WantGradient,
        rounds,
        attempts,
        st.floats(0, 1),
        milliseconds,
        milliseconds,
        st.lists(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), max_size=3).map(tuple),
    ),
    st.builds(RoundNumbers, rounds, attempts, payloads),
)

OPEN = Open(SESSION, 1, "model", 0, 2, 128, 0, b"", bytes(KEY_BYTES), "tcp://127.0.0.1:1")
STEP = Step(SESSION, 1, 7, (Chunk(1, 0, 3, 1),), (Fork(2, 1),), 0, 0, b"payload")
RESULT = Result(SESSION, 1, 7, 2, 0, (Timing(0, 1500, 250),), b"payload")
FAILURE = Failure(SESSION, 1, 7, 3, "busy")
FORWARD = Forward(SESSION, 1, 7, 5, (3, 1), True, 2, 0, 0, b"payload")
LABEL = bytes(LABEL_BYTES)
READ_IMAGES = ReadImages(SESSION, 1, 7, "ab" * 32, 0, 2, (ImageTensor("pixel_values", (24, 48)),), b"pixels")
IMAGE_FEATURES = ImageFeatures(SESSION, 1, 7, 2, (6, 4), 3, False, b"features")
COMPRESS = AskCompression(7, 0, "ab" * 32, 0, 4, 4, 32, 4096, 512, bytes(32), 2, 1024, b"states")
COPY = CopyPages(SESSION, 1e6, False, 7, 0, 2, 0, LABEL, (LABEL,), bytes(KEY_BYTES), "tcp://127.0.0.1:1", ())
RECEIPT = Receipt(SESSION, 1, 7, 1, 16, 0, "int8/float32", False, bytes(SIGNATURE_BYTES), b"digests")
EXAMPLES: list[Message] = [
    Ping(1, b"padding"),
    Pong(1, 2.5, 100),
    OPEN,
    Opened(SESSION, 1, True, 0),
    Close(SESSION),
    STEP,
    RESULT,
    FAILURE,
    Replay(SESSION, 1, 7, 2),
    FORWARD,
    Gradient(SESSION, 1, 7, 2, 5, True, 0, b"payload"),
    Adapter(SESSION, 1, 2, 0, b"tensors"),
    AdapterLoaded(SESSION, 1, 2),
    AdapterGradient(SESSION, 1, 7, 0, b"tensors"),
    FetchKV(SESSION, 1, 7, 1, 16),
    FetchedKV(SESSION, 1, 7, 0, b"tensors"),
    LookUp(7, "ab" * 32, 2, (bytes(ENTRY_BYTES), b"k" * ENTRY_BYTES), 1e9, 9000),
    Found(7, 1, b"records", b"\x03"),
    Announce(7, 2, b"record"),
    Announced(7, True),
    AskWeights(7, WeightsKind.PIECE, bytes(32), 0, 1024),
    WeightsPart(7, 1024, b"weights"),
    Tapped(SESSION, 1, 7, 2, 0, b"states"),
    AskRound("birds", "ab" * 32, RoundWish.JOIN, 3, 100, 4096, b"settings"),
    RoundState(3, 20, 5, 2, True, "", b"settings"),
    WantGradient(3, 7, 0.25, 1.0, 0.5, (bytes(KEY_BYTES), b"k" * KEY_BYTES)),
    RoundNumbers(3, 7, b"numbers"),
    COPY,
    CopiedPages(SESSION, 7, 1, 4096),
    COMPRESS,
    CompressionState(7, 1024, 3, 4096, "", b"file"),
    READ_IMAGES,
    IMAGE_FEATURES,
    AskReceipt(SESSION, 1, 7, 1, 16),
    RECEIPT,
    FetchSent(SESSION, 1, 7, 1, 16),
    FetchedSent(SESSION, 1, 7, 0, b"payload"),
]


def frames_of(tag: int, fields: Any, *payload: bytes) -> list[bytes]:
    return [b"".join((MAGIC, bytes((PROTOCOL_VERSION, tag)), msgpack.packb(fields) or b"")), *payload]


def fields_of(message: Message) -> list[Any]:
    fields = {item.name: getattr(message, item.name) for item in dataclasses.fields(message) if item.name != "payload"}
    if "labels" in fields:
        fields["labels"] = b"".join(fields["labels"])
    return msgpack.unpackb(msgpack.packb([*fields.values()]))


def decode_or_refuse(frames: list[Any]) -> Message | None:
    """The message; None: the frames were refused with a `ProtocolError`."""
    try:
        return decode(frames)
    except ProtocolError:
        return None


def test_there_is_an_example_of_every_message() -> None:
    assert [type(message) for message in EXAMPLES] == list(MESSAGES)


@given(messages)
def test_a_message_is_decoded_from_its_frames(message: Message) -> None:
    frames = encode(message)
    assert decode(frames) == message
    assert decode([memoryview(frame) for frame in frames]) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
@settings(max_examples=examples(50))
@given(data=st.data())
def test_changed_frames_raise_only_protocol_errors(message: Message, data: st.DataObject) -> None:
    header, *payload = encode(message)
    changed = bytearray(header)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(changed) - 1))
        changed[where : where + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        if not changed:
            break
    decode_or_refuse([bytes(changed), *payload])


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_truncated_header_is_refused(message: Message) -> None:
    header, *payload = encode(message)
    for length in range(len(header)):
        with pytest.raises(ProtocolError):
            decode([header[:length], *payload])
    with pytest.raises(ProtocolError):
        decode([bytes(header) + b"\0", *payload])


@given(st.lists(st.binary(max_size=80), max_size=4))
def test_random_frames_are_refused(frames: list[bytes]) -> None:
    decode_or_refuse(frames)


@given(st.integers(0, 255), st.binary(max_size=200))
def test_random_bodies_are_refused_or_valid(tag: int, body: bytes) -> None:
    message = decode_or_refuse([MAGIC + bytes((PROTOCOL_VERSION, tag)) + body])
    if message is not None:
        assert decode(encode(message)) == message


@given(st.integers(0, 255).filter(lambda version: version != PROTOCOL_VERSION), st.binary(max_size=40))
def test_another_version_is_named_for_any_later_bytes(version: int, rest: bytes) -> None:
    with pytest.raises(ProtocolVersionError, match=rf"protocol {version}, this side speaks {PROTOCOL_VERSION}"):
        decode([MAGIC + bytes((version,)) + b"\1" + rest])


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(), st.binary(max_size=40), st.text()
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=12)


@given(st.sampled_from(EXAMPLES), st.data())
def test_any_value_of_a_field_is_refused_or_valid(message: Message, data: st.DataObject) -> None:
    fields = fields_of(message)
    fields[data.draw(st.integers(0, len(fields) - 1))] = data.draw(values)
    decoded = decode_or_refuse(frames_of(message.TAG, fields))
    if decoded is not None:
        assert decode(encode(decoded)) == decoded


ASK_ROUND = AskRound("birds", "ab" * 32, RoundWish.JOIN, 3, 100, 4096)
ROUND_STATE = RoundState(3, 20, 5, 2, True, "")
WANT = WantGradient(3, 7, 0.25, 1.0, 0.5, ())
BOUNDS: list[tuple[Message, str, Any, Any]] = [
    *((kind(SESSION, 1, 7, 1, 16), "row", MAX_ROW_ID, MAX_ROW_ID + 1) for kind in (AskReceipt, FetchSent)),
    *((kind(SESSION, 1, 7, 1, 16), "length", MAX_RECEIPT, MAX_RECEIPT + 1) for kind in (AskReceipt, FetchSent)),
    (RECEIPT, "row", MAX_ROW_ID, MAX_ROW_ID + 1),
    (RECEIPT, "length", MAX_RECEIPT, MAX_RECEIPT + 1),
    (RECEIPT, "codec", 255, 256),
    (RECEIPT, "weights", "w" * 64, "w" * 65),
    (RECEIPT, "adapted", True, 1),
    (RECEIPT, "signature", bytes(SIGNATURE_BYTES), bytes(SIGNATURE_BYTES - 1)),
    (FetchedSent(SESSION, 1, 7, 0), "codec", 255, 256),
    (ASK_ROUND, "name", "n" * 64, "n" * 65),
    (ASK_ROUND, "model", "ab" * 64, "ab" * 65),
    (ASK_ROUND, "wish", 255, 256),
    (ASK_ROUND, "number", MAX_ROUNDS, MAX_ROUNDS + 1),
    (ASK_ROUND, "examples", 1 << 31, (1 << 31) + 1),
    (ASK_ROUND, "size", MAX_PAYLOAD_BYTES // 4, MAX_PAYLOAD_BYTES // 4 + 1),
    (ROUND_STATE, "number", MAX_ROUNDS, MAX_ROUNDS + 1),
    (ROUND_STATE, "rounds", MAX_ROUNDS, MAX_ROUNDS + 1),
    (ROUND_STATE, "owners", MAX_OWNERS, MAX_OWNERS + 1),
    (ROUND_STATE, "ready", MAX_OWNERS, -1),
    (ROUND_STATE, "following", False, 1),
    (ROUND_STATE, "refused", "t" * MAX_TEXT, "t" * (MAX_TEXT + 1)),
    (WANT, "number", MAX_ROUNDS, MAX_ROUNDS + 1),
    (WANT, "attempt", MAX_ATTEMPT, MAX_ATTEMPT + 1),
    (WANT, "share", 1.0, 1.5),
    (WANT, "share", 0, float("nan")),
    (WANT, "norm", 0.0, float("inf")),
    (WANT, "noise", 1e9, -0.5),
    (WANT, "members", [bytes(KEY_BYTES)] * MAX_OWNERS, [bytes(KEY_BYTES)] * (MAX_OWNERS + 1)),
    (WANT, "members", [], [bytes(KEY_BYTES - 1)]),
    (RoundNumbers(3, 7), "number", MAX_ROUNDS, MAX_ROUNDS + 1),
    (RoundNumbers(3, 7), "attempt", MAX_ATTEMPT, MAX_ATTEMPT + 1),
    (AskWeights(7, 2, bytes(32), 0, 1), "kind", 255, 256),
    (AskWeights(7, 2, bytes(32), 0, 1), "number", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (AskWeights(7, 2, bytes(32), 0, 1), "name", bytes(32), bytes(33)),
    (AskWeights(7, 2, bytes(32), 0, 1), "offset", MAX_WEIGHTS_BYTES, MAX_WEIGHTS_BYTES + 1),
    (AskWeights(7, 2, bytes(32), 0, 1), "length", MAX_PART_BYTES, MAX_PART_BYTES + 1),
    (WeightsPart(7, 1), "number", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (WeightsPart(7, 1), "total", MAX_WEIGHTS_BYTES, MAX_WEIGHTS_BYTES + 1),
    (Ping(1), "nonce", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (Pong(1, 0, 0), "queue_ms", 1e9, float("inf")),
    (Pong(1, 0, 0), "queue_ms", 0.0, -0.5),
    (Pong(1, 0, 0), "queue_ms", 3, float("nan")),
    (Pong(1, 0, 0), "kv_free_positions", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (Ping(1), "session", SESSION, SESSION + b"x"),
    (Ping(1), "session", b"", SESSION[1:]),
    (Pong(1, 0, 0), "waiting", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (Pong(1, 0, 0), "last", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (Pong(1, 0, 0), "done", LARGEST_NUMBER, -1),
    (Pong(1, 0, 0), "holds", True, 1),
    (Pong(1, 0, 0), "last", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (Pong(1, 0, 0), "timing", [[1, 2, 3]], [[1, 2, 3], [1, 2, 3]]),
    (Ping(1), "load", True, 1),
    (Pong(1, 0, 0), "load", [[1e9, 0.0, 5.0]], [[1e9, 0.0, 5.0], [1e9, 0.0, 5.0]]),
    (Pong(1, 0, 0), "load", [[0.5, 1e9, 5.0]], [[0.5, float("inf"), 5.0]]),
    (Pong(1, 0, 0), "load", [], [[-0.5, 0.0, 5.0]]),
    (Pong(1, 0, 0), "load", [[0.5, 0.0, 1e11]], [[0.5, 0.0, 1e12]]),
    (OPEN, "session", SESSION, SESSION + b"x"),
    (OPEN, "session", SESSION, b""),
    (OPEN, "session", SESSION, "0123456789abcdef"),
    (OPEN, "epoch", LARGEST_EPOCH, LARGEST_EPOCH + 1),
    (OPEN, "epoch", 0, -1),
    (OPEN, "epoch", 1, True),
    (OPEN, "epoch", 1, 1.0),
    (OPEN, "model", "m" * 64, "m" * 65),
    (OPEN, "start", MAX_BLOCKS, MAX_BLOCKS + 1),
    (OPEN, "end", MAX_BLOCKS, MAX_BLOCKS + 1),
    (OPEN, "reservation", MAX_POSITIONS, MAX_POSITIONS + 1),
    (OPEN, "codec", 255, 256),
    (OPEN, "previous", bytes(KEY_BYTES), bytes(KEY_BYTES - 1)),
    (OPEN, "next_key", b"", bytes(KEY_BYTES + 1)),
    (Opened(SESSION, 1, True, 0), "cached_positions", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (OPEN, "next_address", "a" * 256, "a" * 257),
    (OPEN, "next_relays", [["a" * 64, bytes(KEY_BYTES)]] * 3, [["a" * 64, bytes(KEY_BYTES)]] * 4),
    (OPEN, "next_relays", [], [["a" * 65, bytes(KEY_BYTES)]]),
    (OPEN, "next_relays", [], [["a", bytes(KEY_BYTES - 1)]]),
    (OPEN, "asks_weights", True, 1),
    (OPEN, "taps", [MAX_BLOCKS] * MAX_TAPS, [1] * (MAX_TAPS + 1)),
    (OPEN, "taps", [], [MAX_BLOCKS + 1]),
    (OPEN, "taps", [1], [True]),
    (OPEN, "tap_codec", 255, 256),
    (COPY, "start", MAX_BLOCKS, MAX_BLOCKS + 1),
    (COPY, "end", MAX_BLOCKS, MAX_BLOCKS + 1),
    (COPY, "rate", 1e12, 1e13),
    (COPY, "if_faster", True, 1),
    (COPY, "rate", 1.0, 0.5),
    (COPY, "context", LABEL, b""),
    (COPY, "labels", LABEL * MAX_LABELS, LABEL * (MAX_LABELS + 1)),
    (COPY, "labels", LABEL, b""),
    (COPY, "source_key", bytes(KEY_BYTES), b""),
    (COPY, "source_address", "a" * 256, "a" * 257),
    (COPY, "source_relays", [["a" * 64, bytes(KEY_BYTES)]] * 3, [["a" * 64, bytes(KEY_BYTES)]] * 4),
    (CopiedPages(SESSION, 7, 1, 2), "pages", MAX_LABELS, MAX_LABELS + 1),
    (READ_IMAGES, "model", "ab" * 32, "xy" * 32),
    (READ_IMAGES, "codec", 255, 256),
    (READ_IMAGES, "features_codec", 255, 256),
    (READ_IMAGES, "tensors", [["n" * 32, [1] * 5]] * 3, [["n" * 32, [1] * 5]] * 4),
    (READ_IMAGES, "tensors", [["n", [0]]], []),
    (READ_IMAGES, "tensors", [["n", [MAX_PAYLOAD_BYTES]]], [["n", [MAX_PAYLOAD_BYTES + 1]]]),
    (READ_IMAGES, "tensors", [["n", [1]]], [["n", [1] * 6]]),
    (READ_IMAGES, "tensors", [["n", [1]]], [["n", []]]),
    (IMAGE_FEATURES, "codec", 255, 256),
    (IMAGE_FEATURES, "lengths", [MAX_POSITIONS] * MAX_IMAGES, [1] * (MAX_IMAGES + 1)),
    (IMAGE_FEATURES, "lengths", [0], []),
    (IMAGE_FEATURES, "levels", MAX_LEVELS, MAX_LEVELS + 1),
    (IMAGE_FEATURES, "stacked", True, 1),
    (CopiedPages(SESSION, 7, 1, 2), "nbytes", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (COMPRESS, "wish", 255, 256),
    (COMPRESS, "model", "ab" * 32, "AB" * 32),
    (COMPRESS, "start", MAX_BLOCKS, MAX_BLOCKS + 1),
    (COMPRESS, "end", MAX_BLOCKS, MAX_BLOCKS + 1),
    (COMPRESS, "block", MAX_BLOCKS, MAX_BLOCKS + 1),
    (COMPRESS, "bits", 8, 9),
    (COMPRESS, "group", 128, 129),
    (COMPRESS, "positions", MAX_POSITIONS, MAX_POSITIONS + 1),
    (COMPRESS, "length", MAX_POSITIONS, MAX_POSITIONS + 1),
    (COMPRESS, "states", bytes(32), bytes(31)),
    (COMPRESS, "offset", MAX_TEXT_BYTES, MAX_TEXT_BYTES + 1),
    (CompressionState(7, 0, 0, 0, ""), "received", MAX_TEXT_BYTES, MAX_TEXT_BYTES + 1),
    (CompressionState(7, 0, 0, 0, ""), "done", MAX_BLOCKS, MAX_BLOCKS + 1),
    (CompressionState(7, 0, 0, 0, ""), "total", MAX_TEXT_BYTES, MAX_TEXT_BYTES + 1),
    (CompressionState(7, 0, 0, 0, ""), "error", "a" * 2048, "a" * 2049),
    (OPEN, "context", bytes(LABEL_BYTES), bytes(LABEL_BYTES + 1)),
    (OPEN, "row", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (OPEN, "labels", LABEL * MAX_LABELS, LABEL * (MAX_LABELS + 1)),
    (OPEN, "labels", b"", [LABEL]),
    (OPEN, "shared", True, 1),
    (Opened(SESSION, 1, True, 0), "taps", True, 1),
    (Tapped(SESSION, 1, 7, 2, 0), "boundary", MAX_BLOCKS, MAX_BLOCKS + 1),
    (Opened(SESSION, 1, True, 0), "next_reachable", False, 0),
    (Opened(SESSION, 1, True, 0), "weights", "w" * 64, "w" * 65),
    (STEP, "number", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (STEP, "rope_length", MAX_POSITIONS, MAX_POSITIONS + 1),
    (STEP, "labels", LABEL * MAX_LABELS, LABEL * (MAX_LABELS + 1)),
    (STEP, "labels", b"", bytes(LABEL_BYTES - 1)),
    (STEP, "inputs", [["a" * 32, EVERY_BLOCK, 1, 0, 1, 8, 0]], [["a" * 33, EVERY_BLOCK, 1, 0, 1, 8, 0]]),
    (STEP, "inputs", [["a", 0, 1, 0, 1, 8, 0]] * MAX_INPUTS, [["a", 0, 1, 0, 1, 8, 0]] * (MAX_INPUTS + 1)),
    (STEP, "inputs", [["a", 0, 1, 0, 1, MAX_INPUT_BYTES, 0]], [["a", 0, 1, 0, 1, MAX_INPUT_BYTES + 1, 0]]),
    (FORWARD, "inputs", [["a", 0, 1, 0, 1, 8, 0]] * MAX_INPUTS, [["a", 0, 1, 0, 1, 8, 0]] * (MAX_INPUTS + 1)),
    (Replay(SESSION, 1, 7, 2), "since", MAX_POSITIONS, MAX_POSITIONS + 1),
    (Opened(SESSION, 1, True, 0), "looked_up", True, 1),
    (Opened(SESSION, 1, True, 0), "stores", True, 1),
    (STEP, "parts", [[1, 0, 1, 0]] * MAX_ROWS, [[1, 0, 1, 0]] * (MAX_ROWS + 1)),
    (STEP, "parts", [], None),
    (STEP, "parts", [[LARGEST_NUMBER, MAX_POSITIONS, MAX_POSITIONS, MAX_POSITIONS]], [[LARGEST_NUMBER + 1, 0, 1, 0]]),
    (STEP, "parts", [[1, 0, 1, 0]], [[1, 0, 1]]),
    (STEP, "parts", [[1, 0, 1, 0]], [[1, 0, 1, 0, 0]]),
    (STEP, "parts", [[1, 0, 1, 0]], [[1, MAX_POSITIONS + 1, 1, 0]]),
    (STEP, "parts", [[1, 0, 1, 0]], [[1, 0, -1, 0]]),
    (STEP, "parts", [[1, 0, 1, 0]], [[1, 0, True, 0]]),
    (STEP, "forks", None, False),
    (STEP, "forks", [[1, 1]] * MAX_ROWS, [[1, 1]] * (MAX_ROWS + 1)),
    (STEP, "forks", [], [[1]]),
    (STEP, "replay_until", MAX_BLOCKS, MAX_BLOCKS + 1),
    (STEP, "boundary", MAX_BLOCKS, MAX_BLOCKS + 1),
    (STEP, "timings", [[0, 1 << 40, 3]] * 256, [[0, 1, 3]] * 257),
    (STEP, "timings", [], [[0, 1]]),
    (RESULT, "end", MAX_BLOCKS, MAX_BLOCKS + 1),
    (RESULT, "timings", [[0, 0, 0]], [[0, -1, 0]]),
    (FORWARD, "lengths", [MAX_POSITIONS] * MAX_ROWS, [1] * (MAX_ROWS + 1)),
    (FORWARD, "lengths", [], [MAX_POSITIONS + 1]),
    (FORWARD, "lengths", [0], [True]),
    (FORWARD, "oldest", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (FORWARD, "rope_length", MAX_POSITIONS, MAX_POSITIONS + 1),
    (FORWARD, "kept", False, 1),
    (FORWARD, "adapter", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (FORWARD, "gradient_codec", 255, 256),
    (FORWARD, "boundary", MAX_BLOCKS, MAX_BLOCKS + 1),
    (FORWARD, "timings", [], [[0, 1]]),
    (Gradient(SESSION, 1, 7, 2, 5, True, 0), "boundary", MAX_BLOCKS, MAX_BLOCKS + 1),
    (Gradient(SESSION, 1, 7, 2, 5, True, 0), "since", 0, -1),
    (Gradient(SESSION, 1, 7, 2, 5, True, 0), "held", False, 0),
    (Gradient(SESSION, 1, 7, 2, 5, True, 0), "timings", [[0, 0, 0]], [[0, 1]]),
    (Adapter(SESSION, 1, 2, 0), "version", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (Adapter(SESSION, 1, 2, 0), "remaining", LARGEST_NUMBER, LARGEST_NUMBER + 1),
    (AdapterLoaded(SESSION, 1, 2), "version", 0, -1),
    (AdapterGradient(SESSION, 1, 7, 0), "remaining", 0, -1),
    (FetchKV(SESSION, 1, 7, 1, 16), "row", (1 << 48) - 1, 1 << 48),
    (FetchedKV(SESSION, 1, 7, 0), "remaining", 0, -1),
    (FetchKV(SESSION, 1, 7, 1, 16), "length", 16, 1 << 40),
    (LookUp(7, "", 0), "model", "ab" * 64, "ab" * 64 + "a"),
    (LookUp(7, "", 0), "model", "", "ab"),
    (LookUp(7, "", 0), "model", "abcdef01", "abcdefgh"),
    (LookUp(7, "", 0), "depth", MAX_DEPTH, MAX_DEPTH + 1),
    (LookUp(7, "", 0), "known", [bytes(ENTRY_BYTES)] * MAX_KNOWN, [bytes(ENTRY_BYTES)] * (MAX_KNOWN + 1)),
    (LookUp(7, "", 0), "known", [], [bytes(ENTRY_BYTES - 1)]),
    (LookUp(7, "", 0), "since", 1e11, -1.0),
    (LookUp(7, "", 0), "most", MAX_CHANGES_BYTES, MAX_CHANGES_BYTES + 1),
    (Found(7, 0), "remaining", MAX_FOUND - 1, MAX_FOUND),
    (Found(7, 0), "present", bytes(MAX_KNOWN // 8), bytes(MAX_KNOWN // 8 + 1)),
    (Announce(7, 0), "depth", MAX_DEPTH, MAX_DEPTH + 1),
    (Announced(7, True), "taken", False, 0),
    (FAILURE, "session", b"", b"x"),
    (FAILURE, "text", "t" * MAX_TEXT, "t" * (MAX_TEXT + 1)),
    (FAILURE, "code", 255, 256),
]


@pytest.mark.parametrize(("message", "name", "allowed", "refused"), BOUNDS)
def test_bounds_of_fields_are_checked(message: Message, name: str, allowed: Any, refused: Any) -> None:
    names = [item.name for item in dataclasses.fields(message) if item.name != "payload"]
    fields = fields_of(message)
    fields[names.index(name)] = allowed
    decode(frames_of(message.TAG, fields))
    fields[names.index(name)] = refused
    with pytest.raises(ProtocolError):
        decode(frames_of(message.TAG, fields))


def test_every_bounded_field_is_tested() -> None:
    bounded = {(type(message), name) for message, name, _, _ in BOUNDS}
    # These fields share their check with a listed field.
    same = {"session", "epoch", "nonce", "number", "codec", "until"}
    for message in EXAMPLES:
        for item in dataclasses.fields(message):
            if item.name not in same | {"payload"}:
                assert (type(message), item.name) in bounded, f"{type(message).__name__}.{item.name}"


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_bodies_that_are_no_arrays_and_surplus_frames_are_refused(message: Message) -> None:
    fields = fields_of(message)
    for wrong in (None, 7, b"bytes", "text"):
        with pytest.raises(ProtocolError):
            decode(frames_of(message.TAG, wrong))
    with pytest.raises(ProtocolError):
        decode(frames_of(message.TAG, fields, b"payload", b"a third frame"))
    if not hasattr(message, "payload"):
        with pytest.raises(ProtocolError, match="payload"):
            decode(frames_of(message.TAG, fields, b"payload"))


def test_unknown_tags_are_refused() -> None:
    for tag in set(range(256)) - {kind.TAG for kind in MESSAGES}:
        with pytest.raises(ProtocolError, match=f"tag {tag}"):
            decode(frames_of(tag, []))


def test_no_frames_are_refused() -> None:
    with pytest.raises(ProtocolError):
        decode([])


def test_frames_that_are_too_large_are_refused() -> None:
    with pytest.raises(ProtocolError, match="header"):
        decode([bytes(encode(Close(SESSION))[0]) + bytes(MAX_HEADER_BYTES)])
    zeros = bytearray(MAX_PAYLOAD_BYTES + 1)  # memory pages that are never written are not allocated
    with pytest.raises(ProtocolError, match="payload"):
        decode([*encode(Ping(1)), memoryview(zeros)])
    assert isinstance(decode([*encode(Ping(1)), memoryview(zeros)[:-1]]), Ping)


HUGE_CLAIMS = {
    "array": b"\xdd\xff\xff\xff\xff",
    "array of arrays": b"\x99" + b"\xdd\xff\xff\xff\xff" * 9,
    "deep arrays": b"\xdc\x04\x00" * 20_000,
    "deep small arrays": b"\x91" * 60_000,
    "map": b"\xdf\xff\xff\xff\xff",
    "bytes": b"\x91\xc6\xff\xff\xff\xff",
    "text": b"\x91\xdb\xff\xff\xff\xff",
    "extension": b"\x91\xc9\xff\xff\xff\xff\x01",
    "timestamp": b"\x91\xd6\xff\x00\x00\x00\x01",
}


@pytest.mark.parametrize("body", HUGE_CLAIMS.values(), ids=HUGE_CLAIMS.keys())
def test_a_header_with_large_lengths_allocates_little(body: bytes) -> None:
    header = MAGIC + bytes((PROTOCOL_VERSION, Step.TAG)) + body
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode([header])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * 2**20


def test_a_step_at_all_bounds_fits_in_a_header() -> None:
    most = (Chunk(LARGEST_NUMBER, MAX_POSITIONS, MAX_POSITIONS, MAX_POSITIONS),) * MAX_ROWS
    step = Step(
        SESSION, LARGEST_EPOCH, LARGEST_NUMBER, most, (Fork(LARGEST_NUMBER, LARGEST_NUMBER),) * MAX_ROWS, 0, 255
    )
    assert len(encode(step)[0]) <= MAX_HEADER_BYTES
    assert decode(encode(step)) == step
