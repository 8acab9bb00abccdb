"""When a session leaves its route, and the prediction error that a client learns from slow routes."""

import pytest

from scheduler.replan import (
    DISAPPOINTING,
    MAX_ERROR,
    MOVE_COUNTS,
    PREDICTIONS,
    RECENT_S,
    RECENT_STEPS,
    TRIAL_STEPS,
    WORTHWHILE,
    PredictionErrors,
    RouteWatch,
    changed_hops,
    move_pays,
)


class TestMovePays:
    def test_a_move_pays_only_if_the_remaining_steps_save_more_than_it_costs(self) -> None:
        assert move_pays(100.0, 50.0, move_ms=400.0 / MOVE_COUNTS, steps_left=9, expected_ms=50.0)
        assert not move_pays(100.0, 50.0, move_ms=400.0 / MOVE_COUNTS, steps_left=8, expected_ms=50.0)

    def test_small_gains_cause_no_move(self) -> None:
        assert not move_pays(100.0, 100.0 * WORTHWHILE + 0.1, move_ms=0.0, steps_left=10**6, expected_ms=50.0)

    def test_a_route_that_is_as_fast_as_predicted_is_not_left(self) -> None:
        assert not move_pays(100.0, 1.0, move_ms=0.0, steps_left=10**6, expected_ms=101.0 / DISAPPOINTING)
        assert move_pays(100.0, 1.0, move_ms=0.0, steps_left=10**6, expected_ms=99.0 / DISAPPOINTING)
        assert move_pays(100.0, 1.0, move_ms=0.0, steps_left=10**6, expected_ms=0.0)


class TestPresentMs:
    def test_present_ms_is_the_median_of_the_last_steps(self) -> None:
        watch = RouteWatch()
        watch.begin_route(10.0)
        for elapsed_ms in [11.0, *[80.0] * (RECENT_STEPS // 2 - 1), *[90.0] * 2, *[500.0] * (RECENT_STEPS // 2 - 1)]:
            watch.observe_step(elapsed_ms)
        assert watch.present_ms(10.0) == 90.0
        assert watch.present_ms(95.0) == 90.0
        watch.advise(RECENT_S + 1, 95.0, news=True, ends_silent=False)
        assert watch.present_ms(95.0) == 95.0

    def test_steps_of_several_positions_do_not_count(self) -> None:
        watch = RouteWatch()
        watch.begin_route(10.0)
        for _ in range(RECENT_STEPS):
            watch.observe_step(90.0, positions=8)
        assert watch.present_ms(10.0) == 10.0

    def test_present_ms_is_unknown_for_a_new_route(self) -> None:
        watch = RouteWatch()
        for _ in range(RECENT_STEPS):
            watch.observe_step(500.0)
        watch.begin_route(10.0)
        for _ in range(RECENT_STEPS - 1):
            watch.observe_step(90.0)
        assert watch.present_ms(90.0) == 0.0


class TestExpectedMs:
    @pytest.mark.parametrize(("step_ms", "expected_ms"), [(6.0, 6.0), (14.0, 10.0)])
    def test_expected_ms_is_the_smaller_of_prediction_and_first_steps(self, step_ms: float, expected_ms: float) -> None:
        watch = RouteWatch()
        watch.begin_route(10.0)
        assert watch.expected_ms == 10.0
        for _ in range(TRIAL_STEPS):
            watch.observe_step(step_ms)
        assert watch.expected_ms == expected_ms
        for _ in range(2 * TRIAL_STEPS):
            watch.observe_step(1.0)
        assert watch.expected_ms == expected_ms


class TestPredictionErrors:
    def test_the_best_ratio_of_a_route_counts(self) -> None:
        watch = RouteWatch()
        watch.begin_route(10.0)
        steps = [elapsed_ms for elapsed_ms in (30.0, 40.0, 12.0, 20.0) for _ in range(TRIAL_STEPS)]
        ratios = [watch.observe_step(elapsed_ms) for elapsed_ms in steps]
        assert [ratio for ratio in ratios if ratio is not None] == [3.0, 1.2]

    def test_a_single_slow_route_changes_no_error(self) -> None:
        predictions = PredictionErrors()
        assert predictions.error == 1.0
        for ratio in (1.6, 3.0, 3.0):
            predictions.add_ratio("a", ratio)
        assert predictions.error == 1.0

    def test_two_routes_slower_than_predicted_raise_the_error(self) -> None:
        predictions = PredictionErrors()
        predictions.add_ratio("a", 3.0)
        predictions.add_ratio("b", 2.0)
        assert predictions.error == 2.0
        predictions.add_ratio("a", 1e6)
        predictions.add_ratio("b", 1e6)
        assert predictions.error == MAX_ERROR

    def test_only_the_latest_routes_count(self) -> None:
        predictions = PredictionErrors()
        for route in range(PREDICTIONS):
            predictions.add_ratio(route, 3.0)
        assert predictions.error == 3.0
        for route in "abc":
            predictions.add_ratio(route, 0.5)
        assert predictions.error == 1.0, "routes that are faster than predicted make up for none"

    @pytest.mark.parametrize("factor", [2.0, 4.0])
    def test_a_session_stops_moving_when_all_routes_are_slower_than_predicted(self, factor: float) -> None:
        """This happens when all devices are on one machine. Until then, the session recomputes its context on only few
        routes."""
        predictions, watch, moves = PredictionErrors(), RouteWatch(), 0
        watch.begin_route(10.0)
        for _ in range(100):
            for _ in range(TRIAL_STEPS):
                ratio = watch.observe_step(10.0 * factor)
                if ratio is not None:
                    predictions.add_ratio(moves, ratio)
            if move_pays(watch.present_ms(10.0), 10.0 * predictions.error, 0.0, 1000, watch.expected_ms):
                moves += 1
                watch.begin_route(10.0)
        assert moves == 1

    def test_a_session_leaves_a_slow_first_route(self) -> None:
        predictions, watch = PredictionErrors(), RouteWatch()
        watch.begin_route(10.0)
        *_, ratio = [watch.observe_step(10.0 * DISAPPOINTING) for _ in range(TRIAL_STEPS)]
        assert ratio is not None
        predictions.add_ratio("slow", ratio)
        assert move_pays(watch.present_ms(10.0), 10.0 * predictions.error, 0.0, 1000, watch.expected_ms)


@pytest.mark.parametrize(
    ("present", "route", "before", "changed"),
    [
        ("abc", "abc", "c", ""),
        ("abc", "axc", "a", "x"),
        ("abc", "xbc", None, "x"),
        ("abc", "abx", "b", "x"),
        ("abc", "axyc", "a", "xy"),
        ("abcd", "axcy", "a", "xcy"),
        ("", "ab", None, "ab"),
    ],
)
def test_a_move_fills_only_changed_hops(present: str, route: str, before: str | None, changed: str) -> None:
    assert changed_hops(present, route) == (before, list(changed))
