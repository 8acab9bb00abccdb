"""Device time is shared by weight, waits are bounded, and the device is not left idle without need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.fairness import BULK_COST, CREDIT_S, LATELY_S, FairShares

pieces = st.floats(0.001, 0.2)
weights = st.sampled_from([0.5, 1.0, 2.0, 4.0])


class Device:
    """Keys with endless work, run piece by piece in the order of their shares."""

    def __init__(self, weight: dict[str, float], piece_s: dict[str, float]) -> None:
        self.piece_s = piece_s
        self.shares = FairShares[str](weight.__getitem__)
        self.now = 0.0
        self.used = dict.fromkeys(weight, 0.0)
        for key in weight:
            self.shares.work_arrived(key, 0.0)

    def run(self, seconds: float) -> list[str]:
        order: list[str] = []
        until = self.now + seconds
        while self.now < until:
            first = self.shares.ranked(self.piece_s)[0]
            assert self.shares.awaited(first, self.piece_s[first], self.now) is None, "all are here"
            self.shares.begin_rounds(first)
            assert self.shares.may_join(first), "the device is never idle while somebody has work"
            self.now += self.piece_s[first]
            self.used[first] += self.piece_s[first]
            self.shares.charge(first, self.piece_s[first], self.now)
            order.append(first)
        return order


keys = st.dictionaries(st.sampled_from("abcdef"), st.tuples(weights, pieces), min_size=1)


@given(keys)
def test_device_time_is_shared_by_weight(given_keys: dict[str, tuple[float, float]]) -> None:
    weight = {key: each for key, (each, _) in given_keys.items()}
    device = Device(weight, {key: piece for key, (_, piece) in given_keys.items()})
    device.run(30.0)
    in_shares = [device.used[key] / weight[key] for key in weight]
    longest = max(piece / each for each, piece in given_keys.values())
    assert max(in_shares) - min(in_shares) <= CREDIT_S + 2 * longest


@given(keys, pieces)
def test_a_new_key_waits_for_one_piece_and_then_gets_its_share(
    given_keys: dict[str, tuple[float, float]], piece_s: float
) -> None:
    device = Device(
        {"z": 1.0} | {key: w for key, (w, _) in given_keys.items()}, {k: p for k, (_, p) in given_keys.items()}
    )
    device.shares.work_done("z", 0.0)
    device.run(10.0)
    device.piece_s["z"] = piece_s
    device.shares.work_arrived("z", device.now)
    assert device.run(piece_s / 2) == ["z"], "what others had before is not forgotten in its favour, nor its absence"
    # Between two pieces of key z, each other key gets at most the time of its weight and one piece more.
    others_s = sum(w * (piece_s + CREDIT_S) + p for w, p in given_keys.values())
    order = device.run(3 * (others_s + piece_s))
    assert "z" in order


def test_decode_gets_four_fifths_beside_prefill_and_training() -> None:
    shares = FairShares[str]()
    shares.work_arrived("decodes", 0.0)
    shares.work_arrived("trains", 0.0)
    used = {"decodes": 0.0, "trains": 0.0}
    for _ in range(1000):
        first = shares.ranked(used)[0]
        shares.begin_rounds(first)
        piece_s = 0.02 if first == "decodes" else 0.05
        shares.charge(first, piece_s, 0.0, bulk=first == "trains")
        used[first] += piece_s
    assert used["decodes"] / sum(used.values()) == pytest.approx(BULK_COST / (BULK_COST + 1), abs=0.02)


def test_a_device_is_contended_for_a_while_after_a_second_key() -> None:
    shares = FairShares[str]()
    assert not shares.contended(0.0)
    shares.work_arrived("a", 0.0)
    assert not shares.contended(0.0)
    shares.work_arrived("b", 0.0)
    shares.work_done("b", 0.1)
    assert shares.contended(0.1 + LATELY_S[0])
    assert not shares.contended(0.2 + LATELY_S[0])
    shares.work_arrived("b", 9.0)
    assert shares.contended(99.0), "it has work"


def returning(away_s: float) -> FairShares[str]:
    """`b` has used less time than `a`, and returns `away_s` seconds after each departure. It has just left, at 10 s."""
    shares = FairShares[str]()
    shares.work_arrived("a", 0.0)
    for turn in range(5):
        shares.work_arrived("b", 10 - (4 - turn) * away_s)
        shares.work_done("b", 10 - (4 - turn) * away_s)
    shares.charge("a", 1.0, 10.0)
    return shares


def test_a_key_ahead_of_its_share_waits_for_an_expected_key_behind_its_share() -> None:
    shares = returning(0.01)
    waits = shares.awaited("a", 0.05, 10.0)
    assert waits is not None and waits[0] == "b"
    assert waits[1] == pytest.approx(0.025)
    assert shares.awaited("a", 0.05, 10.03) is None, "it is late"
    assert returning(0.1).awaited("a", 0.05, 10.0) is None, "the piece ends before it comes"
    assert returning(0.1).quiet_s(10.0) == pytest.approx(0.08)
    even = returning(0.01)
    even.charge("b", 1.0, 10.0)
    assert even.awaited("a", 0.05, 10.0) is None, "it has had as much"


@given(st.lists(st.tuples(st.integers(0, 200), st.floats(0, 40))))
def test_absent_keys_are_forgotten(visits: list[tuple[int, float]]) -> None:
    shares = FairShares[int]()
    now = 0.0
    for key, after_s in visits:
        now += after_s
        shares.work_arrived(key, now)
        shares.work_done(key, now)
    for key in range(1000, 1000 + 2 * len(visits) + 2):
        shares.work_arrived(key, now + 1000)
        shares.work_done(key, now + 1000)
    assert len(shares) == 2 * len(visits) + 2
