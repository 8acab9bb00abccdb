"""The changes of a directory for a process that knows some of its records."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import pytest

from splitnet.directory.ask import OUTDATED_S, RECORD_OVERHEAD, DirectoryDelta, entry_of, still_there
from splitnet.directory.record import PeerRecord
from splitnet.security.identity import Identity, PublicKey
from splitnet.wire.endpoints import Relay
from splitnet.wire.messages import ENTRY_BYTES
from tests.unit.directory.test_ask import signed

MUCH = 60_000
OWNER = Identity.generate()
HELD = signed(OWNER, issued_at=time.time() - 20, queue_ms=50.0, kv_free_positions=10_000, batch=4.0)


def told(
    now: Sequence[PeerRecord], held: Sequence[PeerRecord], since: float = 0.0, most: int = MUCH
) -> tuple[list[bool], list[PeerRecord]]:
    present, records = DirectoryDelta(now).changes(list(map(entry_of, held)), since, most)
    return still_there(present, len(held)), records


def later(**changes: Any) -> PeerRecord:
    return PeerRecord.unpack(dataclasses.replace(HELD, issued_at=HELD.issued_at + 15, **changes).pack(OWNER))


def test_an_entry_has_few_bytes() -> None:
    assert len(entry_of(HELD)) == ENTRY_BYTES


def test_an_unchanged_record_is_present_and_not_sent() -> None:
    assert told([later()], [HELD]) == ([True], [])
    assert told([], [HELD]) == ([False], [])


@pytest.mark.parametrize(
    "changes",
    [
        {"end": 3},
        {"address": "tcp://192.0.2.7:5"},
        {"relays": (Relay("tcp://192.0.2.8:1", OWNER.public.raw),)},
        {"serves": False},
        {"moving_to": (1, 3)},
        {"codecs": ("none", "int8")},
        {"version": "9.9"},
        {"queue_ms": 90.0},
        {"queue_ms": 0.0},
        {"kv_free_positions": 5000},
        {"kv_free_positions": 6900},  # two steps, the smallest change that counts
        {"batch": 9.0},
        {"block_ms": (9.0,) * 5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_changed_record_is_sent(changes: dict[str, Any]) -> None:
    new = later(**changes)
    assert told([new], [HELD]) == ([True], [new])
    assert told([HELD], [new]) == ([True], []), "what is older is not told"


@pytest.mark.parametrize("changes", [{"queue_ms": 55.0}, {"kv_free_positions": 9000}, {"batch": 4.4}])
def test_a_slightly_changed_record_is_not_sent(changes: dict[str, Any]) -> None:
    assert told([later(**changes)], [HELD]) == ([True], [])


def test_an_outdated_record_is_sent_after_all_changed_ones() -> None:
    old, moved = Identity.generate(), Identity.generate()
    held = [signed(each, issued_at=time.time() - OUTDATED_S - 20) for each in (old, moved)]
    now = [signed(old), signed(moved, end=1)]
    assert told(now, held) == ([True, True], [now[1], now[0]])
    assert told(now, held, most=len(now[1].signed) + RECORD_OVERHEAD) == ([True, True], [now[1]])


def test_the_record_of_a_peer_that_has_left_is_sent() -> None:
    gone = PeerRecord.unpack(HELD.farewell().pack(OWNER))
    assert told([gone], [HELD]) == ([False], [gone])
    assert told([gone], [signed()])[1] == [], "who did not know it need not know that"


def test_new_records_are_sent_proven_keys_first_then_the_latest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.time()
    worked, *others = (signed(placed_at=now - age) for age in (900, 300, 20, 600))
    monkeypatch.setattr(PeerRecord, "is_proven", property(lambda record: record.key == worked.key))
    assert told([worked, *others], [HELD])[1] == [worked, others[1], others[0], others[2]]
    assert told([worked, *others], [HELD], since=now - 400)[1] == [others[1], others[0]]
    assert told([worked, *others], [worked, others[0]])[1] == [others[1], others[2]]


def test_changed_and_new_records_alternate_within_the_bound() -> None:
    owners = [Identity.generate() for _ in range(20)]
    held = [signed(owner, issued_at=time.time() - 20) for owner in owners]
    changed, others = [signed(owner, end=1) for owner in owners], [signed() for _ in range(20)]
    size = len(changed[0].signed) + RECORD_OVERHEAD
    present, records = told([*changed, *others], held, most=10 * size + 20)
    assert all(present) and len(records) == 10
    assert [record in changed for record in records] == [True, False] * 5


def test_keys_with_the_same_prefix_are_not_confused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitnet.directory.ask.KEY_PREFIX_BYTES", 0)  # so that all keys have the same prefix
    other = signed()
    assert told([later(), other], [HELD]) == ([True], [other])


def test_versions_agree_on_the_digest_of_a_record() -> None:
    """The expected digest was written by version 0.2, whose code listed the fields of the digest."""
    key = PublicKey(bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"))
    facts: dict[str, Any] = {"key": key, "model": "0123456789abcdef", "model_name": "model", "num_blocks": 4}
    facts["address"] = "tcp://192.0.2.7:5"
    assert entry_of(PeerRecord.idle(**facts)).hex() == "d75a980182b10ab70cd4ee0000000000000000"
    facts |= {"start": 1, "end": 3, "codecs": ("none", "int8"), "device": "cpu", "dtype": "int8", "max_blocks": 2}
    facts |= {"moving_to": (2, 4), "serves": True, "version": "0.2", "state_bytes": 5, "relay_port": 9}
    facts |= {"relays": (Relay("tcp://192.0.2.8:1", key.raw),), "issued_at": 1000.0, "queue_ms": 50.0}
    assert entry_of(PeerRecord.idle(**facts)).hex() == "d75a980182b10ab756826600003e80000e0000"
