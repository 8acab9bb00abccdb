"""Places found from round trips predict those that were never measured."""

from __future__ import annotations

import random
import statistics

from hypothesis import example, given
from hypothesis import strategies as st

from scheduler.coordinates import DIMENSIONS, MAX_ERROR, MIN_HEIGHT_MS, Coordinate

numbers = st.floats(-1e4, 1e4)
coordinates = st.builds(
    Coordinate, st.tuples(*[numbers] * DIMENSIONS), st.floats(MIN_HEIGHT_MS, 1e3), st.floats(0.0, MAX_ERROR)
)
directions = st.tuples(*[numbers] * DIMENSIONS)


@given(coordinates, coordinates, st.floats(0.0, 1e5), directions)
@example(Coordinate(height_ms=0.125, error=0.0), Coordinate(height_ms=1.0, error=0.0), 0.0, (0.0, 0.0, 1.0))
@example(Coordinate(height_ms=1.0), Coordinate((0.0, 0.0, 1.0), 11.0, error=0.0), 0.0, (0.0, 0.0, 0.0))
def test_a_measurement_moves_the_foretold_round_trip_towards_it(
    here: Coordinate, there: Coordinate, rtt_ms: float, direction: tuple[float, ...]
) -> None:
    moved = here.moved(there, rtt_ms, direction)
    assert moved.height_ms >= MIN_HEIGHT_MS
    assert 0.0 <= moved.error <= MAX_ERROR
    before, after = abs(here.rtt_ms(there) - rtt_ms), abs(moved.rtt_ms(there) - rtt_ms)
    assert after <= before + 2 * MIN_HEIGHT_MS + 1e-6 * (rtt_ms + here.rtt_ms(there))


def test_forty_devices_in_a_plane_find_their_places() -> None:
    rng = random.Random(1)
    true = [Coordinate((rng.uniform(0, 100), rng.uniform(0, 100), 0.0), rng.uniform(1, 10)) for _ in range(40)]
    found = [Coordinate() for _ in true]
    for _ in range(80):
        for index in range(len(true)):
            other = rng.choice([number for number in range(len(true)) if number != index])
            direction = tuple(rng.gauss(0, 1) for _ in range(DIMENSIONS))
            found[index] = found[index].moved(found[other], true[index].rtt_ms(true[other]), direction)
    errors = [
        abs(found[a].rtt_ms(found[b]) - true[a].rtt_ms(true[b])) / true[a].rtt_ms(true[b])
        for a in range(40)
        for b in range(a)
    ]
    assert statistics.median(errors) < 0.1
    assert statistics.mean(place.error for place in found) < 0.25
