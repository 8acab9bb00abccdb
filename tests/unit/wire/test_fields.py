"""Compatibility of versions of splitnet: bytes written by an earlier version, and appended fields.

`data/wire_0968ef07.json` was written by the code of that commit (version 0.2.0.dev0), with a value in every field of
every message and of a record; it never changes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest
from nacl.signing import SigningKey

from splitnet.directory.record import RECORD_LAYOUT, PeerRecord
from splitnet.errors import ProtocolError
from splitnet.security.identity import Identity
from splitnet.wire.fields import MessageLayout, appended_field, flag, uint, wire_field
from splitnet.wire.messages import (
    MAGIC,
    MESSAGES,
    PROTOCOL_VERSION,
    LoadReport,
    Open,
    Opened,
    Ping,
    Pong,
    Timing,
    decode,
    encode,
)

OLD = json.loads((Path(__file__).parents[1] / "data" / "wire_0968ef07.json").read_text())
IDENTITY = Identity(SigningKey(bytes.fromhex(OLD["record"]["seed"])))
OLD_RECORD = bytes.fromhex(OLD["record"]["bytes"])

old_messages = pytest.mark.parametrize("old", OLD["messages"], ids=lambda old: old["kind"])


def frames_of(old: dict[str, Any]) -> list[bytes]:
    return [bytes.fromhex(frame) for frame in old["frames"]]


def plain(value: Any) -> Any:
    """A value in the form of the recording."""
    if isinstance(value, bytes | memoryview):
        return bytes(value).hex()
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def changed_frames(message: Any, change: Callable[[list[Any]], list[Any]]) -> list[Any]:
    header, *payload = encode(message)
    values = change(msgpack.unpackb(bytes(header)[4:]))
    return [MAGIC + bytes((PROTOCOL_VERSION, message.TAG)) + (msgpack.packb(values) or b""), *payload]


def test_every_message_of_the_earlier_version_is_recorded_and_known() -> None:
    tags = [frames_of(old)[0][3] for old in OLD["messages"]]
    assert tags == list(range(1, 30))
    assert set(tags) <= {kind.TAG for kind in MESSAGES}


@old_messages
def test_messages_of_the_earlier_version_are_read(old: dict[str, Any]) -> None:
    message = decode(frames_of(old))
    assert {name: plain(getattr(message, name)) for name in old["fields"]} == old["fields"]
    for field in dataclasses.fields(message):
        if field.name not in old["fields"]:
            assert getattr(message, field.name) == field.default


@old_messages
def test_messages_without_new_fields_are_written_as_by_the_earlier_version(old: dict[str, Any]) -> None:
    assert [bytes(frame) for frame in encode(decode(frames_of(old)))] == frames_of(old)


def test_a_record_of_the_earlier_version_is_read_and_written_again() -> None:
    record = PeerRecord.unpack(OLD_RECORD)
    assert {name: plain(getattr(record, name)) for name in OLD["record"]["fields"]} == OLD["record"]["fields"]
    assert record.key == IDENTITY.public
    assert record.pack(IDENTITY) == OLD_RECORD


def test_a_record_may_lack_fields_that_have_defaults_and_no_others() -> None:
    values = msgpack.unpackb(msgpack.unpackb(OLD_RECORD)[0])

    def signed(values: list[Any]) -> bytes:
        payload = msgpack.packb(values) or b""
        return msgpack.packb([payload, IDENTITY.sign(b"splitnet peer record\0" + payload)]) or b""

    optional = [field for field in dataclasses.fields(PeerRecord) if field.default is not dataclasses.MISSING]
    appended = len(dataclasses.fields(PeerRecord)) + 1 - len(values)  # fields that the old record lacks
    defaults = {field.name: field.default for field in optional}
    assert values[0] == RECORD_LAYOUT
    later = [*list(defaults.values())[-appended:], "a later field", 7]
    assert PeerRecord.unpack(signed([*values, *later])) == PeerRecord.unpack(OLD_RECORD)
    assert PeerRecord.unpack(signed(values[:-1])).kv == "auto"
    without = dataclasses.replace(PeerRecord.unpack(OLD_RECORD), **defaults)
    needed = len(values) - (len(defaults) - appended)
    assert PeerRecord.unpack(signed(values[:needed])) == without
    with pytest.raises(ProtocolError, match="lacks the field issued_at"):
        PeerRecord.unpack(signed(values[: needed - 1]))


@old_messages
def test_fields_of_later_versions_are_ignored(old: dict[str, Any]) -> None:
    message = decode(frames_of(old))
    later = changed_frames(message, lambda _: [*_all_values(message), 7, "text", [1, [2]], None])
    assert decode(later) == message


def _all_values(message: Any) -> list[Any]:
    """All fields on the wire, defaults included."""
    fields = [field for field in dataclasses.fields(message) if "check" in field.metadata]
    return [(field.metadata["write"] or (lambda value: value))(getattr(message, field.name)) for field in fields]


@old_messages
def test_a_message_without_a_required_field_names_it(old: dict[str, Any]) -> None:
    message = decode(frames_of(old))
    fields = [field for field in dataclasses.fields(message) if "check" in field.metadata]
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    assert required == [field.name for field in fields[: len(required)]]
    for count, name in enumerate(required):
        with pytest.raises(ProtocolError, match=f"{type(message).__name__} lacks the field {name}"):
            decode(changed_frames(message, lambda values, count=count: values[:count]))
    decode(changed_frames(message, lambda values: values[: len(required)]))


def test_questions_of_a_ping_and_their_answers_are_on_the_wire() -> None:
    ping = Ping(1, b"padding", bytes(range(16)), load=True)
    pong = Pong(1, 2.5, 100, 3, 4, True, 5, (Timing(6, 7, 8),), (LoadReport(9.5, 0.25, 1.5e9),))
    assert (decode(encode(ping)), decode(encode(pong))) == (ping, pong)


def test_fields_of_hidden_states_are_omitted_where_none_are_wanted() -> None:
    opening = Open(bytes(16), 1, "model", 0, 2, 128, 0, b"", b"", "")
    opened = Opened(bytes(16), 1, True, 0)
    for message, fields in ((opening, {"taps": (1, 2), "tap_codec": 3}), (opened, {"taps": True})):
        asking = dataclasses.replace(message, **fields)
        assert decode(encode(asking)) == asking
        assert len(encode(asking)[0]) > len(encode(message)[0])
        assert decode(changed_frames(asking, lambda values, message=message: values[: _written(message)])) == message


def _written(message: Any) -> int:
    return len(msgpack.unpackb(bytes(encode(message)[0])[4:]))


def test_appended_fields_come_last() -> None:
    for kind in (*MESSAGES, PeerRecord):
        later = ["appended" in field.metadata for field in dataclasses.fields(kind) if "check" in field.metadata]
        assert later == sorted(later), f"{kind.__name__} has a field that is always written behind an appended one"


@dataclass(frozen=True)
class Early:
    first: int = wire_field(uint(9))
    known: int = wire_field(uint(9), default=1)


@dataclass(frozen=True)
class Late(Early):
    second: int = appended_field(uint(9), 5)
    third: bool = appended_field(flag, False)


@pytest.mark.parametrize(
    ("late", "written"),
    [
        (Late(3), [3, 1]),
        (Late(3, 1, 5, False), [3, 1]),
        (Late(3, 2, 4), [3, 2, 4]),
        (Late(3, 2, 5, True), [3, 2, 5, True]),
    ],
)
def test_a_writer_omits_only_trailing_appended_defaults(late: Late, written: list[Any]) -> None:
    assert MessageLayout(Late).write_fields(late) == written
    assert Late(**MessageLayout(Late).read_fields(written)) == late
    assert Early(**MessageLayout(Early).read_fields(written)) == Early(late.first, late.known)
