from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet.directory import interface as dht_places
from splitnet.directory.interface import RecordTable
from splitnet.directory.record import PeerRecord
from splitnet.security import identity
from splitnet.security.identity import Identity, PublicKey
from tests.attacks.directory import fake_record

NOW = 1000.0
MODEL = "ab" * 16
SOMEBODY = Identity.generate()
KEYS = [Identity.generate().public for _ in range(40)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_places, "RECORDS_PER_KEY", 8)
    monkeypatch.setattr(dht_places, "RECORDS_PER_IDENTITY", 3)
    monkeypatch.setattr(dht_places, "MAX_RECORDS", 20)
    monkeypatch.setattr(PeerRecord, "is_proven", property(lambda record: record.proof == 1))


def record(key: PublicKey, *, proven: bool = False, issued_at: float = NOW, ttl_s: float = 60.0) -> PeerRecord:
    return fake_record(SOMEBODY, MODEL, key=key, issued_at=issued_at, ttl_s=ttl_s, proof=int(proven))


def test_a_flood_is_bounded_and_replaces_no_earlier_record() -> None:
    places = RecordTable()
    assert places.add_record((b"k", "honest"), record(KEYS[0]), NOW) == []
    taken = [places.add_record((b"k", str(n)), record(key), NOW) for n, key in enumerate(KEYS[1:])]
    assert taken.count([]) == 7 and places.places.taken == 8
    renewed = record(KEYS[0], issued_at=NOW + 15)
    assert places.add_record((b"k", "honest"), renewed, NOW + 15) == []


def test_a_proven_record_replaces_an_unproven_one() -> None:
    places = RecordTable()
    for n, key in enumerate(KEYS[:8]):
        places.add_record((b"k", str(n)), record(key, proven=n > 0), NOW)
    assert places.add_record((b"k", "late"), record(KEYS[8], proven=True), NOW) == [(b"k", "0")]
    assert places.add_record((b"k", "later"), record(KEYS[9], proven=True), NOW) is None
    assert places.places.taken == 8


def test_places_of_one_identity_are_bounded() -> None:
    places = RecordTable()
    taken = [places.add_record((b"models", str(n)), record(KEYS[0]), NOW) for n in range(8)]
    assert taken == [[]] * 3 + [None] * 5
    assert places.add_record((b"models", "other"), record(KEYS[1]), NOW) == []


def test_an_identity_gets_its_places_back_when_its_records_are_renewed_or_expire() -> None:
    places = RecordTable()
    for seconds, names in ((0, "abc"), (30, "abc"), (100, "def")):
        for name in names:
            renewed = record(KEYS[0], issued_at=NOW + seconds)
            assert places.add_record((b"models", name), renewed, NOW + seconds) == []
        assert places.add_record((b"models", "more"), record(KEYS[0], issued_at=NOW + seconds), NOW + seconds) is None


def test_an_unproven_key_does_not_replace_a_proven_record_of_a_model() -> None:
    places = RecordTable()
    assert places.add_record((b"models", "m"), record(KEYS[0], proven=True), NOW) == []
    assert places.add_record((b"models", "m"), record(KEYS[1], ttl_s=300), NOW) is None
    assert places.add_record((b"models", "m"), record(KEYS[2], proven=True, ttl_s=61), NOW) == []


def test_places_are_free_again_when_records_expire() -> None:
    places = RecordTable()
    for n, key in enumerate(KEYS[:8]):
        places.add_record((b"k", str(n)), record(key), NOW)
    assert places.add_record((b"k", "late"), record(KEYS[9], issued_at=NOW + 59), NOW + 59) is None
    assert places.add_record((b"k", "late"), record(KEYS[9], issued_at=NOW + 61), NOW + 61) == []
    assert places.places.taken == 1


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"a", b"b", b"c", b"d"]),
            st.integers(0, 20),
            st.integers(0, len(KEYS) - 1),
            st.booleans(),
            st.floats(0, 10),
            st.floats(1, 300),
        ),
        max_size=120,
    )
)
def test_bounds_hold_for_any_records(steps: list[tuple[bytes, int, int, bool, float, float]]) -> None:
    places, held, now = RecordTable(), {}, NOW
    for key, subkey, who, proven, later, ttl_s in steps:
        now += later
        place = (key, str(subkey))
        one = record(KEYS[who], proven=proven, issued_at=now, ttl_s=ttl_s)
        gone = places.add_record(place, one, now)
        held = {other: kept for other, kept in held.items() if kept.expires_at >= now}
        if gone is not None:
            for other in gone:
                assert proven and not held.pop(other).is_proven
            held[place] = one
        assert places.places.taken == len(held) <= 20
        for bounded in (b"a", b"b", b"c", b"d"):
            assert sum(other[0] == bounded for other in held) <= 8
        for owner in KEYS:
            assert sum(kept.key == owner for kept in held.values()) <= 3
        assert len(places._expiring) <= 2 * 20 + 8 + 1
        assert set(places._unproven) == {other for other, kept in held.items() if not kept.is_proven}


def test_a_proof_belongs_to_one_key_and_is_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WORK_BITS", 6)
    identity.has_worked.cache_clear()
    file, go_on, stop = tmp_path / "key.proof", threading.Event(), threading.Event()
    stop.set()
    key = KEYS[0]
    assert identity.kept_proof(key, file, stop) == 0 and not file.exists()
    proof = identity.kept_proof(key, file, go_on)
    assert proof and identity.has_worked(key, proof)
    assert identity.kept_proof(key, file, stop) == proof, "it is not made again"
    assert not all(identity.has_worked(other, proof) for other in KEYS[1:])
    assert not identity.has_worked(key, 0)
    for garbage in (b"", b"x", b"9" * 50, b"\xff" * 20, b"0"):
        file.write_bytes(garbage)
        assert identity.kept_proof(key, file, go_on) == proof
    identity.has_worked.cache_clear()
