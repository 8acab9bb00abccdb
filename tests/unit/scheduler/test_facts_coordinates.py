"""Network coordinates found from round trips predict round trips that were never measured."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

from hypothesis import example, given
from hypothesis import strategies as st

from scheduler.facts import DIMENSIONS, MAX_ERROR, MIN_HEIGHT_MS, MOST_OFF_MS, TUNING, Coordinate, place_among

numbers = st.floats(-1e4, 1e4)
coordinates = st.builds(
    Coordinate, st.tuples(*[numbers] * DIMENSIONS), st.floats(MIN_HEIGHT_MS, 1e3), st.floats(0.0, MAX_ERROR)
)
directions = st.tuples(*[numbers] * DIMENSIONS)


@given(coordinates, coordinates, st.floats(0.0, 1e5), directions)
@example(Coordinate(height_ms=0.125, error=0.0), Coordinate(height_ms=1.0, error=0.0), 0.0, (0.0, 0.0, 1.0))
@example(Coordinate(height_ms=1.0), Coordinate((0.0, 0.0, 1.0), 11.0, error=0.0), 0.0, (0.0, 0.0, 0.0))
def test_a_measurement_moves_the_predicted_round_trip_towards_it(
    here: Coordinate, there: Coordinate, rtt_ms: float, direction: tuple[float, ...]
) -> None:
    moved = here.moved_by(there, rtt_ms, direction)
    assert moved.height_ms >= MIN_HEIGHT_MS
    assert 0.0 <= moved.error <= MAX_ERROR
    before, after = abs(here.rtt_ms(there) - rtt_ms), abs(moved.rtt_ms(there) - rtt_ms)
    assert after <= before + 2 * MIN_HEIGHT_MS + 1e-6 * (rtt_ms + here.rtt_ms(there))


def test_forty_devices_in_a_plane_find_their_coordinates() -> None:
    rng = random.Random(1)
    true = [Coordinate((rng.uniform(0, 100), rng.uniform(0, 100), 0.0), rng.uniform(1, 10)) for _ in range(40)]
    found = [Coordinate() for _ in true]
    for _ in range(80):
        for index in range(len(true)):
            other = rng.choice([number for number in range(len(true)) if number != index])
            direction = tuple(rng.gauss(0, 1) for _ in range(DIMENSIONS))
            found[index] = found[index].moved_by(found[other], true[index].rtt_ms(true[other]), direction)
    errors = [
        abs(found[a].rtt_ms(found[b]) - true[a].rtt_ms(true[b])) / true[a].rtt_ms(true[b])
        for a in range(40)
        for b in range(a)
    ]
    assert statistics.median(errors) < 0.1
    assert statistics.mean(place.error for place in found) < 0.25


@given(st.lists(st.tuples(coordinates, st.floats(0.0, 1e5)), max_size=8), directions)
def test_the_error_of_a_coordinate_shrinks_with_the_number_of_measurements(
    measured: list[tuple[Coordinate, float]], direction: tuple[float, ...]
) -> None:
    place = place_among(measured, direction)
    assert place.height_ms >= MIN_HEIGHT_MS
    assert min(MAX_ERROR, 1 / max(1, len(measured))) <= place.error <= MAX_ERROR


def test_peers_without_a_coordinate_do_not_affect_other_coordinates() -> None:
    rng = random.Random(3)
    true = Coordinate((80.0, 40.0, 0.0), 2.0)
    placed = [Coordinate(tuple(rng.uniform(0, 100) for _ in range(DIMENSIONS)), 1.0, 0.2) for _ in range(32)]
    measured = [(other, true.rtt_ms(other)) for other in placed]
    unplaced = [(Coordinate(), rng.uniform(1.0, 100.0)) for _ in range(32)]
    direction = (1.0, 0.0, 0.0)
    assert place_among([*measured, *unplaced], direction) == place_among(measured, direction)
    assert place_among(unplaced, direction).error > 0.0


def test_a_newcomer_in_a_distant_region_finds_its_near_peers() -> None:
    """Most peers are in one region and a few in a distant one. The newcomer is in the distant region."""
    rng = random.Random(2)

    def around(x: float, count: int) -> list[Coordinate]:
        return [Coordinate((x + rng.gauss(0, 10), rng.gauss(0, 10), rng.gauss(0, 10)), 1.0, 0.2) for _ in range(count)]

    crowd, far = around(0.0, 31), around(250.0, 12)
    true = Coordinate((250.0, 0.0, 0.0), 2.0)
    # Real routes are no straight lines: distances are up to a fifth longer or shorter than coordinates can express.
    measured = [(other, true.rtt_ms(other) * rng.uniform(0.8, 1.2)) for other in [*crowd, far[0]]]
    place = place_among(measured, tuple(rng.gauss(0, 1) for _ in range(DIMENSIONS)))
    assert place.error < 0.3
    assert max(place.rtt_ms(other) for other in far[1:]) < min(place.rtt_ms(other) for other in crowd) / 2


liars = st.builds(
    Coordinate, st.tuples(*[st.sampled_from([-1e9, -1e3, 0.0, 400.0, 1e9])] * DIMENSIONS), st.sampled_from([0.01, 1e9])
)


@given(st.lists(st.tuples(liars, st.floats(0.5, 5.0)), max_size=15), st.integers(0, 100))
def test_false_coordinates_of_a_minority_do_little_harm(lies: list[tuple[Coordinate, float]], seed: int) -> None:
    """Liars are fewer than a third of the near peers, and publish an error of 0."""
    rng = random.Random(seed)
    true = Coordinate((80.0, 40.0, 0.0), 2.0)
    others = [Coordinate(tuple(rng.uniform(0, 100) for _ in range(DIMENSIONS)), 1.0, 0.2) for _ in range(32)]
    measured = [(other, true.rtt_ms(other) * rng.uniform(0.9, 1.1)) for other in others]
    place = place_among([*measured, *((replace(lie, error=0.0), rtt_ms) for lie, rtt_ms in lies)], (1.0, 0.0, 0.0))
    assert statistics.median(abs(place.rtt_ms(other) - rtt_ms) / rtt_ms for other, rtt_ms in measured) < 0.5


def test_one_false_coordinate_moves_another_only_a_bounded_distance() -> None:
    here = Coordinate((10.0, 20.0, 0.0), 1.0, 0.2)
    moved = here.moved_by(Coordinate((1e9, 0.0, 0.0), 1.0, 0.0), 5.0, (1.0, 0.0, 0.0))
    assert math.dist(moved.vector, here.vector) <= TUNING * MOST_OFF_MS
