from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import route as chain_search
from scheduler.batching import PASS_POSITIONS
from scheduler.cost import (
    PROMPT_SHARE,
    UNKNOWN_WATTS,
    Encoding,
    block_joules,
    block_ms,
    hop_joules,
    move_ms,
    occupied_ms,
    route_ms,
    transfer_ms,
)
from scheduler.facts import (
    CLIENT,
    UNMEASURED,
    Coordinate,
    Hop,
    Link,
    Network,
    NetworkPlace,
    Peer,
    Route,
    Speed,
    coverage,
    missing_blocks,
)
from scheduler.route import NEAR_EQUAL, NoRoute, best_route

FAST = Link(latency_ms=1.0, bytes_per_ms=100_000.0)
PLAIN = (Encoding("plain", 100),)
CODECS = (Encoding("plain", 100), Encoding("small", 20, step_ms=2.0, position_ms=0.01))


def peer(name: str, start: int, end: int, decode_ms: float = 1.0, queue_ms: float = 0.0, kv_free: int = 1000) -> Peer:
    return Peer(name, start, end, Speed.of(decode_ms, decode_ms / 10), queue_ms, kv_free=kv_free)


def plan(peers: Sequence[Peer], num_blocks: int, network: Network | None = None, **options: object) -> Route:
    settings: dict[str, object] = {"encodings": PLAIN, "kv_needed": 100, **options}
    return best_route(peers, (0, num_blocks), network or Network(unmeasured=FAST), **settings)  # pyright: ignore


def all_routes(
    peers: Sequence[Peer], num_blocks: int, start: int = 0, used: tuple[str, ...] = ()
) -> Iterator[list[Hop]]:
    """Every chain of peers over blocks [start, num_blocks) in which each peer occurs once."""
    if start == num_blocks:
        yield []
        return
    for candidate in peers:
        if candidate.id not in used and candidate.start <= start < candidate.end:
            for end in range(start + 1, min(candidate.end, num_blocks) + 1):
                for rest in all_routes(peers, num_blocks, end, (*used, candidate.id)):
                    yield [Hop(candidate.id, start, end), *rest]


@st.composite
def swarms(draw: st.DrawFn) -> tuple[list[Peer], int, Network]:
    num_blocks = draw(st.integers(1, 6))
    milliseconds = st.sampled_from([0.0, 0.5, 1.0, 3.0, 20.0, 100.0])
    peers: list[Peer] = []
    for name in "abcd"[: draw(st.integers(1, 4))]:
        start = draw(st.integers(0, num_blocks - 1))
        end = draw(st.integers(start + 1, num_blocks))
        speed = Speed.of(draw(milliseconds), draw(milliseconds))
        batch, kv_free = draw(st.sampled_from([0.0, 2.5])), draw(st.sampled_from([10, 100, 500]))
        watts = draw(st.sampled_from([0.0, 4.0, 15.0, 700.0]))
        peers.append(Peer(name, start, end, speed, draw(milliseconds), batch, kv_free, watts))
    names = [CLIENT, *(item.id for item in peers)]
    pairs = st.tuples(st.sampled_from(names), st.sampled_from(names))
    links = st.builds(Link, st.sampled_from([0.0, 1.0, 10.0, 50.0]), st.sampled_from([10.0, 1000.0]))
    vectors = st.tuples(*[st.sampled_from([0.0, 5.0, 40.0])] * 3)
    coordinates = st.builds(Coordinate, vectors, st.sampled_from([0.1, 8.0]), st.sampled_from([0.1, 1.0]))
    places = st.builds(NetworkPlace, coordinates, st.sampled_from([0.0, 50.0, 2000.0]))
    network = Network(
        draw(st.dictionaries(pairs, links, max_size=12)),
        Link(30.0, 100.0),
        draw(st.dictionaries(st.sampled_from(names), places)),
    )
    return peers, num_blocks, network


@given(
    swarm=swarms(),
    positions=st.sampled_from([1, 7, 64]),
    in_flight=st.sampled_from([1, 2, 10]),
    encodings=st.sampled_from([PLAIN, CODECS]),
    prompt=st.sampled_from([0, 40, 700]),
)
def test_best_route_equals_brute_force(
    swarm: tuple[list[Peer], int, Network],
    positions: int,
    in_flight: int,
    encodings: tuple[Encoding, ...],
    prompt: int,
) -> None:
    peers, num_blocks, network = swarm
    usable = [item for item in peers if item.kv_free >= 100]
    by_id = {item.id: item for item in peers}

    options = {"positions": positions, "encodings": encodings, "in_flight": in_flight, "prompt": prompt}

    def cost(hops: Sequence[Hop]) -> float:
        return route_ms(hops, by_id, network, **options)  # pyright: ignore[reportArgumentType]

    lowest = min(map(cost, all_routes(usable, num_blocks)), default=None)
    if lowest is None:
        with pytest.raises(NoRoute) as caught:
            plan(peers, num_blocks, network, **options)
        assert bool(caught.value.missing) != bool(caught.value.full)
        return
    best = plan(peers, num_blocks, network, **options)
    assert best.cost_ms == pytest.approx(lowest)
    assert best.cost_ms == pytest.approx(cost(best.hops))
    check_route(best, usable, num_blocks)

    near = plan(peers, num_blocks, network, rng=random.Random(num_blocks), **options)
    assert near.cost_ms <= lowest * (1 + NEAR_EQUAL) + 1e-9
    check_route(near, usable, num_blocks)


def check_route(route: Route, usable: Sequence[Peer], num_blocks: int) -> None:
    by_id = {item.id: item for item in usable}
    boundary = 0
    for hop in route.hops:
        assert hop.start == boundary < hop.end
        assert by_id[hop.peer].start <= hop.start and hop.end <= by_id[hop.peer].end
        boundary = hop.end
    assert boundary == num_blocks
    assert len({hop.peer for hop in route.hops}) == len(route.hops)


@given(swarm=swarms())
def test_repaired_route_is_valid_when_the_search_is_cut_short(swarm: tuple[list[Peer], int, Network]) -> None:
    peers, num_blocks, network = swarm
    if missing_blocks(peers, num_blocks):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_search, "MAX_PROGRAMMES", 0)
        check_route(plan(peers, num_blocks, network, kv_needed=0), peers, num_blocks)


def test_a_hop_may_use_a_part_of_a_span() -> None:
    peers = [peer("slow", 0, 10, decode_ms=10.0), peer("fast", 4, 12, decode_ms=1.0)]
    assert plan(peers, 12).hops == (Hop("slow", 0, 4), Hop("fast", 4, 12))
    peers = [peer("fast", 0, 10, decode_ms=1.0), peer("slow", 4, 12, decode_ms=10.0)]
    assert plan(peers, 12).hops == (Hop("fast", 0, 10), Hop("slow", 10, 12))


@pytest.mark.parametrize("in_flight", [1, 10])
def test_a_queue_counts_at_each_place_of_the_route(in_flight: int) -> None:
    first, busy, slow = peer("a", 0, 1), peer("b", 1, 2, queue_ms=20.0), peer("c", 1, 2, decode_ms=10.0)
    for peers in ([first, busy, slow], [replace(busy, start=0, end=1), replace(slow, start=0, end=1), peer("a", 1, 2)]):
        assert "c" in [hop.peer for hop in plan(peers, 2, in_flight=in_flight).hops]


def test_no_peer_occurs_twice_even_if_that_were_faster() -> None:
    peers = [peer("wide", 0, 30, decode_ms=10.0), peer("fast", 10, 20, decode_ms=0.1)]
    assert plan(peers, 30).hops == (Hop("wide", 0, 30),)
    peers.append(peer("end", 20, 30, decode_ms=11.0))
    assert plan(peers, 30).hops == (Hop("wide", 0, 10), Hop("fast", 10, 20), Hop("end", 20, 30))


def test_a_hop_must_save_more_than_its_link_costs() -> None:
    peers = [peer("whole", 0, 10, decode_ms=1.0), peer("half", 0, 5, decode_ms=0.5)]
    assert plan(peers, 10).hops == (Hop("half", 0, 5), Hop("whole", 5, 10))
    slow_links = Network(unmeasured=Link(latency_ms=5.0, bytes_per_ms=1e6))
    assert plan(peers, 10, slow_links).hops == (Hop("whole", 0, 10),)


def test_measured_links_are_preferred_to_unmeasured_ones() -> None:
    peers = [peer("known", 0, 4, decode_ms=2.0), peer("unknown", 0, 4, decode_ms=1.0)]
    network = Network().with_links({(CLIENT, "known"): FAST, ("known", CLIENT): FAST})
    assert plan(peers, 4, network).hops == (Hop("known", 0, 4),)
    assert plan(peers, 4, Network()).hops == (Hop("unknown", 0, 4),)


def test_long_steps_prefer_fast_arithmetic_and_short_steps_fast_memory() -> None:
    peers = [
        Peer("decoder", 0, 4, Speed.of(1.0, 1.0), kv_free=1000),
        Peer("prefiller", 0, 4, Speed.of(5.0, 0.1), kv_free=1000),
    ]
    assert plan(peers, 4).hops[0].peer == "decoder"
    assert plan(peers, 4, positions=100).hops[0].peer == "prefiller"


def test_full_peers_are_left_out() -> None:
    peers = [peer("full", 0, 4, 0.1, kv_free=99), peer("busy", 0, 4, queue_ms=50.0), peer("free", 0, 4)]
    assert plan(peers, 4).hops[0].peer == "free"
    assert plan(peers[:2], 4).hops[0].peer == "busy"
    with pytest.raises(NoRoute) as caught:
        plan(peers[:1], 4)
    assert (caught.value.missing, caught.value.full) == ([], [(0, 4)])


def test_missing_blocks_are_named() -> None:
    peers = [peer("a", 0, 12), peer("b", 18, 24), peer("c", 26, 30, kv_free=0)]
    with pytest.raises(NoRoute) as caught:
        plan(peers, 30)
    assert (caught.value.missing, caught.value.full) == ([(12, 18), (24, 26)], [])
    with pytest.raises(NoRoute) as caught:
        plan([], 3)
    assert caught.value.missing == [(0, 3)]


def test_clients_spread_over_nearly_equal_peers_only() -> None:
    peers = [peer("a", 0, 8), peer("b", 0, 8), peer("c", 0, 8, decode_ms=1.01), peer("slow", 0, 8, decode_ms=1.5)]
    network = Network(unmeasured=Link(latency_ms=0.0, bytes_per_ms=1e9))
    rng = random.Random(7)
    chosen = Counter(plan(peers, 8, network, rng=rng).hops[0].peer for _ in range(300))
    assert set(chosen) == {"a", "b", "c"}
    assert min(chosen.values()) > 30
    assert {plan(peers, 8, network).hops[0].peer for _ in range(5)} == {"a"}


def test_two_peers_of_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="same id"):
        plan([peer("a", 0, 4), peer("a", 0, 4)], 4)


def test_the_cost_of_a_route_is_the_sum_of_its_hops_and_links() -> None:
    peers = {"a": Peer("a", 0, 4, Speed.of(2.0, 0.5), 3.0), "b": Peer("b", 4, 6, Speed.of(4.0, 0.25), 1.0)}
    links = {(CLIENT, "a"): Link(10, 100), ("a", "b"): Link(1, 1000), ("b", CLIENT): Link(20, 50)}
    hops = [Hop("a", 0, 4), Hop("b", 4, 6)]
    decode = route_ms(hops, peers, Network(links), positions=1, encodings=PLAIN)
    assert decode == pytest.approx((10 + 1) + (3 + 4 * 2) + (1 + 0.1) + (1 + 2 * 4) + (20 + 2))
    prefill = route_ms(hops, peers, Network(links), positions=16, encodings=PLAIN)
    assert prefill == pytest.approx((10 + 16) + (3 + 4 * 8) + (1 + 1.6) + (1 + 2 * 4) + (20 + 32))
    assert block_ms(peers["b"], 512) == 128.0
    assert transfer_ms(UNMEASURED, 0, PLAIN) == UNMEASURED.latency_ms
    steps = route_ms(hops, peers, Network(links), positions=1, encodings=PLAIN, in_flight=5)
    assert steps == pytest.approx(decode + 4 * (3 + 4 * 2))


def test_an_unknown_link_is_slow_and_a_network_is_immutable() -> None:
    empty = Network()
    assert empty.link("a", "b") == UNMEASURED
    assert empty.with_links({("a", "b"): FAST}).link("a", "b") == FAST
    assert empty.link("a", "b") == UNMEASURED
    assert Network({("a", "b"): FAST}).link("b", "a") == UNMEASURED


def test_a_partial_route_includes_the_links_to_its_neighbours() -> None:
    peers = [peer("near", 2, 6, decode_ms=2.0), peer("far", 2, 6)]
    network = Network({("before", "near"): FAST, ("near", "after"): FAST})
    part = best_route(peers, (3, 6), network, encodings=PLAIN, kv_needed=1, source="before", target="after")
    assert part.hops == (Hop("near", 3, 6),)
    assert part.cost_ms == pytest.approx(2 * (1 + 0.001) + 3 * 2)
    with pytest.raises(NoRoute) as caught:
        best_route(peers, (1, 7), network, encodings=PLAIN, kv_needed=1)
    assert caught.value.missing == [(1, 2), (6, 7)]


def test_the_cost_of_a_move_is_that_of_a_pipelined_replay() -> None:
    peers = {name: peer(name, 0, 8) for name in ("left", "right")}
    hops = [Hop("left", 2, 4), Hop("right", 4, 8)]
    network = Network({("before", "left"): Link(1.0, 1e6), ("left", "right"): Link(2.0, 1e6)}, Link(4.0, 1e6))

    def ms(cached: int) -> float:
        return move_ms(hops, peers, network, cached=cached, encodings=PLAIN, source="before")

    chunk_ms = (2 + 4) * PASS_POSITIONS / 10
    assert ms(PASS_POSITIONS) == pytest.approx(1 + 2 + 4 + chunk_ms, rel=1e-3)
    # Each further chunk occupies the slower of the two hops only, not both hops in sequence.
    assert ms(3 * PASS_POSITIONS) == pytest.approx(1 + 2 + 4 + chunk_ms + 2 * 4 * PASS_POSITIONS / 10, rel=1e-3)
    assert ms(1) == pytest.approx(1 + 2 + 4 + 6, rel=1e-3)


def test_the_faster_codec_of_a_link_counts() -> None:
    assert transfer_ms(Link(0, 1), 10, CODECS) == pytest.approx(2.1 + 200)
    assert occupied_ms(Link(5, 1e6), 10, CODECS) == pytest.approx(0.001)


def test_one_hop_has_the_lowest_latency_and_many_the_highest_throughput() -> None:
    peers = [peer("whole", 0, 8), peer("left", 0, 4), peer("right", 4, 8)]
    network = Network(unmeasured=Link(1.0, 1e6))
    assert plan(peers, 8, network).hops == (Hop("whole", 0, 8),)
    busy = plan(peers, 8, network, in_flight=100)
    assert max(hop.end - hop.start for hop in busy.hops) == 3
    assert busy.cost_ms == pytest.approx(4 * 1 + 8 + 99 * 3, rel=1e-3)


def test_a_table_holds_the_same_links_as_the_network() -> None:
    near, far = Coordinate((0.0, 0.0, 0.0), 2.0, 0.0), Coordinate((30.0, 40.0, 0.0), 4.0, 0.5)
    places = {"a": NetworkPlace(near, 500.0), "b": NetworkPlace(far, 2000.0), "c": NetworkPlace(far, 0.0)}
    network = Network({("a", "c"): FAST}, places=places)
    assert network.link("a", "b").latency_ms == pytest.approx(28 * 1.25)
    assert network.link("a", "b").bytes_per_ms == 500.0
    assert network.link("c", "a").bytes_per_ms == UNMEASURED.bytes_per_ms
    names = ["a", "b", "c", "unknown"]
    table = network.table(names)
    for row, sender in enumerate(names):
        for column, receiver in enumerate(names):
            if sender != receiver:
                link = network.link(sender, receiver)
                assert table.latency_ms[row, column] == pytest.approx(link.latency_ms)
                assert 1 / table.ms_per_byte[row, column] == pytest.approx(link.bytes_per_ms)


def test_the_cost_of_a_prompt_includes_its_passes_and_bytes() -> None:
    hops, fast = [Hop("a", 0, 2)], {"a": peer("a", 0, 2)}
    network = Network({(CLIENT, "a"): Link(5.0, 10.0), ("a", CLIENT): Link(5.0, 10.0)})

    def cost(prompt: int) -> float:
        return route_ms(hops, fast, network, positions=1, encodings=PLAIN, prompt=prompt)

    # Two passes of 300 positions at 30 ms a block, and 60,000 bytes on both links at 10 bytes per ms.
    assert cost(600) - cost(0) == pytest.approx(PROMPT_SHARE * (2 * 2 * 30.0 + 2 * 6000.0))


@given(st.lists(st.tuples(st.integers(-2, 12), st.integers(-2, 12)), max_size=8), st.integers(1, 10))
def test_coverage_counts_and_gaps_agree(spans: list[tuple[int, int]], num_blocks: int) -> None:
    peers = [peer(str(index), start, end) for index, (start, end) in enumerate(spans)]
    counts = coverage(peers, num_blocks)
    assert counts == [sum(start <= block < end for start, end in spans) for block in range(num_blocks)]
    gaps = missing_blocks(peers, num_blocks)
    assert [block for start, end in gaps for block in range(start, end)] == [
        block for block, replicas in enumerate(counts) if not replicas
    ]
    later = missing_blocks(peers, num_blocks, first=3)
    assert later == [(max(start, 3), end) for start, end in gaps if end > 3]
    assert all(first[1] < second[0] for first, second in pairwise(gaps))


def joules_of(hops: Sequence[Hop], peers: Sequence[Peer], positions: int = 1) -> float:
    by_id = {item.id: item for item in peers}
    return sum((hop.end - hop.start) * block_joules(by_id[hop.peer], positions) for hop in hops)


def corners(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (ms, J) that have the lowest cost for some weight of joules."""
    slopes = {(b[0] - a[0]) / (a[1] - b[1]) for a in points for b in points if a[1] > b[1] and b[0] > a[0]}
    ordered = [0.0, *sorted(slopes)]
    weights = [(a + b) / 2 for a, b in pairwise(ordered)] + [ordered[-1] * 2 + 1]
    return [min(points, key=lambda point: (point[0] + weight * point[1], point)) for weight in weights]


@given(swarm=swarms(), positions=st.sampled_from([1, 7]), slowdown=st.sampled_from([1.0, 1.2, 1.5, 4.0, 1000.0]))
def test_the_route_has_the_least_energy_within_the_slowdown(
    swarm: tuple[list[Peer], int, Network], positions: int, slowdown: float
) -> None:
    peers, num_blocks, network = swarm
    usable = [item for item in peers if item.kv_free >= 100]
    by_id = {item.id: item for item in peers}
    points = [
        (
            route_ms(hops, by_id, network, positions=positions, encodings=PLAIN),
            joules_of(hops, peers, positions),
        )
        for hops in all_routes(usable, num_blocks)
    ]
    if not points:
        return
    fastest = plan(peers, num_blocks, network, positions=positions)
    most_ms = fastest.cost_ms * slowdown * (1 + 1e-6) + 1e-9
    thrifty = plan(peers, num_blocks, network, positions=positions, energy_slowdown=slowdown)
    check_route(thrifty, usable, num_blocks)
    found = joules_of(thrifty.hops, peers, positions)
    assert thrifty.cost_ms <= most_ms
    assert found <= joules_of(fastest.hops, peers, positions) * (1 + 1e-6)
    least = min(joules for ms, joules in corners(points) if ms <= most_ms)
    assert found <= least * (1 + 1e-5) + 1e-9
    assert found >= min(joules for ms, joules in points if ms <= most_ms) * (1 - 1e-9)

    spread = plan(peers, num_blocks, network, positions=positions, energy_slowdown=slowdown, rng=random.Random(1))
    assert spread.cost_ms <= most_ms


def test_energy_decides_only_within_the_slowdown() -> None:
    hungry = replace(peer("hungry", 0, 10), watts=100.0)
    thrifty = replace(peer("thrifty", 0, 10, decode_ms=1.4), watts=10.0)
    lazy = replace(peer("lazy", 0, 10, decode_ms=5.0), watts=0.1)
    peers = [hungry, thrifty, lazy]

    def names(slowdown: float | None = None) -> set[str]:
        return {hop.peer for hop in plan(peers, 10, energy_slowdown=slowdown).hops}

    assert names() == {"hungry"}
    assert names(1.5) == {"thrifty"}
    assert names(1.1) == {"hungry"}
    assert names(10.0) == {"lazy"}
    with pytest.raises(ValueError, match="one step in flight"):
        plan(peers, 10, energy_slowdown=1.5, in_flight=2)


def test_only_some_hops_save_energy_if_all_would_be_too_slow() -> None:
    hungry = replace(peer("hungry", 0, 10), watts=100.0)
    thrifty = replace(peer("thrifty", 0, 5, decode_ms=1.6), watts=10.0)
    also = replace(peer("also", 5, 10, decode_ms=1.6), watts=50.0)
    route = plan([hungry, thrifty, also], 10, energy_slowdown=1.5)
    assert {hop.peer for hop in route.hops} == {"hungry", "thrifty"}


def test_a_peer_without_published_watts_counts_with_a_default() -> None:
    unknown, known = peer("unknown", 0, 10), replace(peer("known", 0, 10, decode_ms=1.2), watts=UNKNOWN_WATTS / 2)
    assert {hop.peer for hop in plan([unknown, known], 10, energy_slowdown=1.5).hops} == {"known"}
    hungrier = replace(known, watts=UNKNOWN_WATTS * 2)
    assert {hop.peer for hop in plan([unknown, hungrier], 10, energy_slowdown=1.5).hops} == {"unknown"}
    # If no peer publishes watts, the least device time counts as the least energy.
    assert {hop.peer for hop in plan([unknown, peer("slow", 0, 10, decode_ms=1.2)], 10, energy_slowdown=1.5).hops} == {
        "unknown"
    }
    assert hop_joules(unknown, 10) is None


def test_joules_are_watts_times_the_share_of_a_pass_of_the_session() -> None:
    alone = replace(peer("alone", 0, 10, decode_ms=4.0), watts=15.0)
    assert block_joules(alone, 1) == pytest.approx(15.0 * 0.004)
    assert hop_joules(alone, 6) == pytest.approx(6 * 15.0 * 0.004)
    # Reading the weights takes as long for four positions as for one, so three other sessions bear three quarters of
    # the energy.
    assert hop_joules(replace(alone, batch=3.0), 6) == pytest.approx(6 * 15.0 * 0.004 / 4)
    assert block_joules(alone, 100) == pytest.approx(15.0 * alone.speed.block_ms_at(100) / 1000)
