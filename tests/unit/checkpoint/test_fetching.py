"""Tests from which source each piece is fetched, for all ways in which sources can behave."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.liveness import SOURCE_SILENT_S
from splitnet.checkpoint.transfer.fetching import BUSY_S, MAX_BYTES, MAX_PIECES, MAX_STRIKES, REST_S, FetchPlan

NAMES = [bytes([index]) * 32 for index in range(24)]
SIZES = {name: 1 + 40_000 * index for index, name in enumerate(NAMES)}
SOURCES = ["a", "b", "c"]


class Fetching(RuleBasedStateMachine):
    """Sources deliver, refuse, are busy, silent, lost or corrupt, and return; the fetch is interrupted and resumed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.written: set[bytes] = set()
        self.under_way: dict[str, dict[bytes, float]] = {source: {} for source in SOURCES}
        self.held: dict[str, set[bytes]] = {}
        self.liars: set[str] = set()
        self.plan: FetchPlan[str] = FetchPlan(SIZES)

    @initialize()
    def begin(self) -> None:
        self.plan = FetchPlan(SIZES)

    @rule(source=st.sampled_from(SOURCES), held=st.sets(st.sampled_from(NAMES)))
    def comes(self, source: str, held: set[bytes]) -> None:
        self.plan.add_source(source, held)
        if source not in self.liars:
            self.held[source] = held

    @rule(seconds=st.sampled_from([0.0, 0.05, 1.0, REST_S + 1, SOURCE_SILENT_S + 1]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def ask(self) -> None:
        for source, name in self.plan.asks(self.now):
            assert source in self.held and source not in self.liars
            assert name in self.held[source] and name not in self.written
            self.under_way[source][name] = self.now

    def _one(self, data: st.DataObject) -> tuple[str, bytes] | None:
        all_asked = [(source, name) for source, asked in self.under_way.items() for name in asked]
        return data.draw(st.sampled_from(all_asked)) if all_asked else None

    @rule(data=st.data())
    def brings(self, data: st.DataObject) -> None:
        if one := self._one(data):
            source, name = one
            del self.under_way[source][name]
            assert self.plan.arrived(source, name, self.now) == (name not in self.written)
            self.written.add(name)

    @rule(data=st.data(), busy=st.booleans())
    def refuses(self, data: st.DataObject, busy: bool) -> None:
        if one := self._one(data):
            source, name = one
            del self.under_way[source][name]
            if busy:
                self.plan.busy(source, name, self.now)
            else:
                self.plan.refused(source, name, self.now)

    @rule(source=st.sampled_from(SOURCES))
    def is_lost(self, source: str) -> None:
        self.plan.lost(source)
        self.held.pop(source, None)
        self.under_way[source] = {}

    @precondition(lambda self: len(self.liars) < 1)
    @rule(data=st.data())
    def lies(self, data: st.DataObject) -> None:
        if one := self._one(data):
            self.plan.exclude(one[0])
            self.liars.add(one[0])
            self.held.pop(one[0], None)
            self.under_way[one[0]] = {}

    @rule()
    def is_killed_and_resumed(self) -> None:
        self.plan = FetchPlan({name: size for name, size in SIZES.items() if name not in self.written})
        self.liars.clear()
        self.held.clear()
        self.under_way = {source: {} for source in SOURCES}

    @invariant()
    def counts(self) -> None:
        assert set(self.plan.left) == set(NAMES) - self.written
        assert self.plan.is_done == (len(self.written) == len(NAMES))
        for source, state in self.plan.sources.items():
            assert source not in self.liars
            assert state.asked_bytes == sum(SIZES[name] for name in state.asked)
            assert len(state.asked) <= MAX_PIECES and state.asked_bytes <= MAX_BYTES + max(SIZES.values())
            assert all(source in self.plan._askers[name] for name in state.asked)
        for name, askers in self.plan._askers.items():
            assert 0 < len(askers) <= 2 and name in self.plan.left

    def teardown(self) -> None:
        """In each state, one good source delivers all missing pieces."""
        self.plan.add_source("good", NAMES)
        for _ in range(200):
            if self.plan.is_done:
                break
            self.now += SOURCE_SILENT_S + REST_S
            for source, name in self.plan.asks(self.now):
                if source == "good":
                    self.plan.arrived(source, name, self.now + 0.01)
        assert self.plan.is_done and not self.plan.is_stuck(self.now)


TestFetching = Fetching.TestCase


def drive(
    rates: dict[str, float], pieces: int = 200, size: int = 1 << 20, rtt_s: float = 0.1
) -> tuple[float, dict[str, int]]:
    """Seconds of a fetch from sources with these rates in bytes/s, and the bytes that each source has sent."""
    names = [index.to_bytes(32, "big") for index in range(pieces)]
    plan: FetchPlan[str] = FetchPlan(dict.fromkeys(names, size))
    for source in rates:
        plan.add_source(source, names)
    now = 0.0
    free_at = dict.fromkeys(rates, 0.0)
    sent = dict.fromkeys(rates, 0)
    coming: list[tuple[float, str, bytes]] = []
    while not plan.is_done:
        for source, name in plan.asks(now):
            free_at[source] = max(now + rtt_s / 2, free_at[source]) + size / rates[source]
            coming.append((free_at[source] + rtt_s / 2, source, name))
            sent[source] += size
        coming.sort()
        now, source, name = coming.pop(0)
        plan.arrived(source, name, now)
    return now, sent


def test_sources_send_at_full_rate_and_almost_nothing_twice() -> None:
    for rates in ({"a": 10e6, "b": 10e6, "c": 10e6}, {"a": 30e6, "b": 5e6, "c": 1e6}, {"a": 100e6}):
        seconds, sent = drive(rates)
        least = (200 << 20) / sum(rates.values())
        assert seconds < 1.1 * least + 2 * (1 << 20) / min(rates.values())  # plus the last pieces of the slowest source
        assert sum(sent.values()) <= 1.01 * (200 << 20)


def test_rare_pieces_come_first() -> None:
    plan: FetchPlan[str] = FetchPlan(SIZES)
    plan.add_source("all", NAMES)
    plan.add_source("some", NAMES[:12])
    asked = [name for source, name in plan.asks(0.0) if source == "all"]
    assert asked and set(asked) <= set(NAMES[12:])


def test_a_silent_source_is_left_out_in_the_end() -> None:
    plan: FetchPlan[str] = FetchPlan({NAMES[0]: 10})
    plan.add_source("silent", NAMES)
    now = 0.0
    for _ in range(MAX_STRIKES):
        assert plan.asks(now) == [("silent", NAMES[0])]
        now += SOURCE_SILENT_S + 1
        assert plan.asks(now) == []
        now += REST_S + 1
    assert plan.is_stuck(now)


def test_a_piece_resets_the_strikes_of_its_source() -> None:
    plan: FetchPlan[str] = FetchPlan({NAMES[0]: 10, NAMES[1]: 10})
    plan.add_source("slow", NAMES)
    now = 0.0
    for silence in range(MAX_STRIKES):
        asked = plan.asks(now)
        assert asked
        if silence == MAX_STRIKES - 1:
            plan.arrived(*asked[0], now)
        now += SOURCE_SILENT_S + 1
        assert plan.asks(now) == []
        now += REST_S + 1
    assert plan.asks(now)


def test_a_busy_source_is_asked_again_after_a_while() -> None:
    plan: FetchPlan[str] = FetchPlan({NAMES[0]: 10})
    plan.add_source("busy", NAMES)
    assert plan.asks(0.0) == [("busy", NAMES[0])]
    plan.busy("busy", NAMES[0], 0.0)
    assert plan.asks(BUSY_S / 2) == []
    assert plan.asks(BUSY_S) == [("busy", NAMES[0])]
