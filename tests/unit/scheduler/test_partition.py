from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import partition
from scheduler.cost import BlockWork, Encoding, hop_ms, occupied_ms, roofline, route_ms
from scheduler.facts import CLIENT, PASS_SIZES, Hop, Link, Network, Peer, Route, Speed
from scheduler.partition import (
    Device,
    DoesNotFit,
    fastest_partition,
    first_token_ms,
    tokens_per_s,
    widest_partition,
)
from tests.tiers import examples

ENCODINGS = (Encoding("none", 2304.0), Encoding("int8", 612.0, 0.2, 0.003))


@dataclass(frozen=True)
class Home:
    """Devices for a partition of a model with `num_blocks` blocks."""

    devices: list[Device]
    num_blocks: int
    network: Network

    @property
    def peers(self) -> dict[str, Peer]:
        return {device.id: device.peer(0, 1) for device in self.devices}

    def cost(self, hops: Sequence[Hop], positions: int = 1) -> float:
        return route_ms(hops, self.peers, self.network, positions=positions, encodings=ENCODINGS)

    def slowest(self, hops: Sequence[Hop], positions: int) -> float:
        names = [CLIENT, *(hop.peer for hop in hops), CLIENT]
        links = (occupied_ms(self.network.link(a, b), positions, ENCODINGS) for a, b in pairwise(names))
        return max(*(hop_ms(self.peers[hop.peer], hop.end - hop.start, positions) for hop in hops), *links)

    def all_chains(self) -> Iterator[list[Hop]]:
        """All partitions: each subset of devices in each order with each number of blocks."""
        for size in range(1, min(len(self.devices), self.num_blocks) + 1):
            for order in permutations(self.devices, size):
                for cuts in compositions(self.num_blocks, [device.max_blocks for device in order]):
                    ends = [sum(cuts[:place]) for place in range(size + 1)]
                    yield [Hop(d.id, a, b) for d, (a, b) in zip(order, pairwise(ends), strict=True)]


def compositions(total: int, most: list[int]) -> Iterator[list[int]]:
    if len(most) == 1:
        if 1 <= total <= most[0]:
            yield [total]
        return
    for first in range(1, min(total, most[0]) + 1):
        yield from ([first, *rest] for rest in compositions(total - first, most[1:]))


def random_home(rng: random.Random, count: int, num_blocks: int, *, scarce: bool = False) -> Home:
    """Devices of different speed and memory; each direction of a link has its own latency and bandwidth."""
    most = max(1, 3 * num_blocks // count) if scarce else num_blocks
    devices = [
        Device(
            f"device-{index}",
            rng.randint(0, most),
            Speed.of(rng.choice([0.3, 1.0, 1.1, 4.0, 12.0]), rng.choice([0.05, 0.4])),
            rng.choice([0.0, 0.9, 15.0]),
        )
        for index in range(count)
    ]
    names = [CLIENT, *(device.id for device in devices)]
    links = {
        (a, b): Link(rng.choice([0.1, 1.0, 8.0, 40.0]), rng.choice([500.0, 20_000.0])) for a in names for b in names
    }
    return Home(devices, num_blocks, Network(links))


@st.composite
def homes(draw: st.DrawFn, most_devices: int = 4) -> Home:
    rng = draw(st.randoms(use_true_random=False))
    return random_home(rng, draw(st.integers(1, most_devices)), draw(st.integers(1, 6)))


def check_feasible(home: Home, route: Route) -> None:
    """The hops are consecutive and fit into memory, and no device occurs twice."""
    assert [hop.start for hop in route.hops] == [0, *(hop.end for hop in route.hops[:-1])]
    assert route.hops[-1].end == home.num_blocks
    assert len({hop.peer for hop in route.hops}) == len(route.hops)
    room = {device.id: device.max_blocks for device in home.devices}
    assert all(1 <= hop.end - hop.start <= room[hop.peer] for hop in route.hops)


@settings(max_examples=examples(60))
@given(homes())
def test_the_fastest_partition_is_the_best_of_all(home: Home) -> None:
    chains = list(home.all_chains())
    if not chains:
        with pytest.raises(DoesNotFit):
            fastest_partition(home.devices, home.num_blocks, home.network, encodings=ENCODINGS)
        return
    route = fastest_partition(home.devices, home.num_blocks, home.network, encodings=ENCODINGS)
    check_feasible(home, route)
    assert route.cost_ms == pytest.approx(home.cost(route.hops))
    assert route.cost_ms == pytest.approx(min(home.cost(hops) for hops in chains))


@settings(max_examples=examples(60))
@given(homes(), st.sampled_from([1, 8]))
def test_the_widest_partition_has_the_fastest_bottleneck_and_then_the_lowest_cost(home: Home, positions: int) -> None:
    chains = list(home.all_chains())
    if not chains:
        return
    route = widest_partition(home.devices, home.num_blocks, home.network, encodings=ENCODINGS, positions=positions)
    check_feasible(home, route)
    pace = min(home.slowest(hops, positions) for hops in chains)
    assert home.slowest(route.hops, positions) == pytest.approx(pace)
    equals = [hops for hops in chains if home.slowest(hops, positions) <= pace + 1e-6]
    assert route.cost_ms == pytest.approx(min(home.cost(hops, positions) for hops in equals))


@settings(max_examples=examples(40))
@given(homes())
def test_all_devices_take_part_on_request(home: Home) -> None:
    usable = [device for device in home.devices if device.max_blocks]
    chains = [hops for hops in home.all_chains() if len(hops) == len(usable)]
    if not chains:
        with pytest.raises((DoesNotFit, ValueError)):
            fastest_partition(home.devices, home.num_blocks, home.network, encodings=ENCODINGS, everyone=True)
        return
    route = fastest_partition(home.devices, home.num_blocks, home.network, encodings=ENCODINGS, everyone=True)
    check_feasible(home, route)
    assert route.cost_ms == pytest.approx(min(home.cost(hops) for hops in chains))


@pytest.mark.parametrize("seed", range(12))
def test_the_local_search_comes_near_the_optimum(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    home = random_home(rng, rng.choice([9, 10]), 32, scarce=bool(seed % 2))
    best = fastest_partition(home.devices, 32, home.network, encodings=ENCODINGS)
    monkeypatch.setattr(partition, "EXACT_DEVICES", 0)
    found = fastest_partition(home.devices, 32, home.network, encodings=ENCODINGS)
    check_feasible(home, found)
    assert best.cost_ms <= found.cost_ms + 1e-6 <= 1.03 * best.cost_ms


def test_the_local_search_comes_near_the_fastest_bottleneck(monkeypatch: pytest.MonkeyPatch) -> None:
    home = random_home(random.Random(4), 9, 16)
    best = widest_partition(home.devices, 16, home.network, encodings=ENCODINGS)
    monkeypatch.setattr(partition, "EXACT_DEVICES", 0)
    found = widest_partition(home.devices, 16, home.network, encodings=ENCODINGS)
    check_feasible(home, found)
    assert home.slowest(found.hops, 1) <= 1.03 * home.slowest(best.hops, 1)


def test_partitions_over_more_devices_than_the_exact_search_takes() -> None:
    home = random_home(random.Random(7), 24, 80, scarce=True)
    route = fastest_partition(home.devices, 80, home.network, encodings=ENCODINGS)
    check_feasible(home, route)
    everyone = fastest_partition(home.devices, 80, home.network, encodings=ENCODINGS, everyone=True)
    assert route.cost_ms <= everyone.cost_ms
    assert len(everyone.hops) == sum(device.max_blocks > 0 for device in home.devices)


def one_network(link: Link) -> Network:
    return Network(unmeasured=link)


def test_a_device_that_would_only_add_a_link_gets_no_blocks() -> None:
    devices = [Device("strong", 8, Speed.of(1.0, 0.1)), Device("weak", 8, Speed.of(2.0, 0.1))]
    network = one_network(Link(1.0, 1e5))
    assert fastest_partition(devices, 8, network, encodings=ENCODINGS).hops == (Hop("strong", 0, 8),)
    widest = widest_partition(devices, 8, network, encodings=ENCODINGS)
    assert {hop.peer: hop.end - hop.start for hop in widest.hops} == {"strong": 6, "weak": 2}


def test_the_fast_device_gets_as_many_blocks_as_fit() -> None:
    devices = [Device("slow", 8, Speed.of(5.0, 0.1)), Device("fast", 5, Speed.of(1.0, 0.1))]
    route = fastest_partition(devices, 8, one_network(Link(1.0, 1e5)), encodings=ENCODINGS)
    assert {hop.peer: hop.end - hop.start for hop in route.hops} == {"fast": 5, "slow": 3}


def test_the_order_of_devices_follows_the_direction_of_links() -> None:
    devices = [Device(name, 2, Speed.of(1.0, 0.1)) for name in "abc"]
    near = {(CLIENT, "b"), ("b", "c"), ("c", "a"), ("a", CLIENT)}
    network = Network(dict.fromkeys(near, Link(1.0, 1e5)), unmeasured=Link(2.0, 1e5))
    route = fastest_partition(devices, 6, network, encodings=ENCODINGS)
    assert [hop.peer for hop in route.hops] == ["b", "c", "a"]


def test_the_error_has_the_number_of_blocks_that_do_not_fit() -> None:
    devices = [Device("a", 3, Speed.of(1.0, 0.1)), Device("b", 0, Speed.of(1.0, 0.1))]
    for plan in (fastest_partition, widest_partition):
        with pytest.raises(DoesNotFit) as error:
            plan(devices, 10, one_network(Link(1.0, 1.0)), encodings=ENCODINGS)
        assert error.value.missing == 7
        with pytest.raises(ValueError, match="same id"):
            plan([devices[0]] * 4, 10, one_network(Link(1.0, 1.0)), encodings=ENCODINGS)


HOPS = (Hop("a", 0, 4), Hop("b", 4, 8))
PEERS = {
    "a": Device("a", 4, Speed.of(10.0, 0.01), hop_ms=0.0).peer(0, 4),
    "b": Device("b", 4, Speed.of(5.0, 0.01), hop_ms=0.0).peer(4, 8),
}
FREE = (Encoding("free", 0.0),)


def test_more_sessions_add_throughput_until_the_slowest_hop_is_busy() -> None:
    network = one_network(Link(10.0, 1.0))

    def rate(sessions: int, client_ms: float = 0.0) -> float:
        return tokens_per_s(HOPS, PEERS, network, encodings=FREE, sessions=sessions, client_ms=client_ms)

    trip_ms = 40 + 20 + 3 * 10
    assert rate(1) == pytest.approx(1000 / trip_ms)
    assert rate(1, client_ms=10.0) == pytest.approx(1000 / (trip_ms + 10))
    # Passes of up to 256 positions take at most 10 ms here, so that all sessions can share one pass.
    assert rate(8) == pytest.approx(8000 / trip_ms)
    slow_in_batches = {name: Device(name, 4, Speed.of(10.0, 10.0), hop_ms=0.0).peer(0, 1) for name in "ab"}
    full = tokens_per_s(HOPS, slow_in_batches, network, encodings=FREE, sessions=8)
    assert full == pytest.approx(1000 / 40)


def test_the_steps_of_a_prompt_are_pipelined() -> None:
    network = one_network(Link(10.0, 1.0))
    peers = {name: Device(name, 4, Speed.of(1.0, 1.0), hop_ms=0.0).peer(0, 1) for name in "ab"}

    def first(prompt: int) -> float:
        return first_token_ms(HOPS, peers, network, encodings=FREE, prompt=prompt, client_ms=5.0)

    assert first(1) == pytest.approx(5 + 30 + 2 * 4)
    assert first(64) == pytest.approx(5 + 30 + 2 * 256)
    assert first(128) == pytest.approx(5 + 30 + 3 * 256)


def test_a_device_is_bound_by_its_memory_or_by_its_arithmetic() -> None:
    work = BlockWork(dense_bytes=1000.0, flops=100.0, expert_bytes=8000.0, expert_share=0.25, cache_bytes=10.0)
    assert work.bytes_read(1) == 3010.0
    assert work.bytes_read(100) == 9010.0
    assert replace(work, sessions=4).bytes_read(2) == 5020.0
    assert replace(work, sessions=4).bytes_read(100) == 9040.0
    speed = roofline(work, bytes_per_ms=100.0, flops_per_ms=50.0)
    assert speed.block_ms_at(1) == pytest.approx(30.1)
    assert speed.block_ms_at(PASS_SIZES[-1]) == pytest.approx(512.0)
    with pytest.raises(ValueError, match="must be greater than 0"):
        roofline(work, bytes_per_ms=0.0, flops_per_ms=1.0)
