"""Progress of answers: no token is lost or counted twice, and routes are kept after the answer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from splitnet.serve.progress import HISTORY_S, KEPT_ANSWERS, HopView, ProgressLog, RouteView

ROUTE = RouteView((HopView("a", 0, 6),), ())


@given(st.lists(st.tuples(st.floats(0, HISTORY_S * 1.5), st.integers(0, 5)), max_size=20))
def test_every_token_is_counted_in_its_second(steps: list[tuple[float, int]]) -> None:
    now = 50.0
    log = ProgressLog(clock=lambda: now)
    answer = log.begin_answer("answer")
    seconds: list[int] = []
    for pause, tokens in steps:
        now += pause
        seconds += [int(now)] * tokens
        for _ in range(tokens):
            log.token(answer)
    counted = log.tokens_per_second()
    assert counted == [seconds.count(int(now) - back) for back in range(HISTORY_S - 1, 0, -1)]
    assert answer.tokens == len(seconds)


def test_an_ended_answer_keeps_its_last_route() -> None:
    now = 1.0
    log = ProgressLog(clock=lambda: now)
    answer = log.begin_answer("answer")
    assert log.answers() == [answer] and answer.routes() == () and answer.first_token is None
    routes = (ROUTE,)
    answer.follow(lambda: routes)
    now = 3.0
    log.token(answer)
    assert (answer.first_token, answer.routes()) == (3.0, (ROUTE,))
    answer.follow(None)
    routes = ()
    log.end_answer(answer)
    assert answer.routes() == (ROUTE,) and answer.ended == 3.0 and log.answers() == [answer]


def test_read_positions_of_the_prompt_are_counted() -> None:
    log = ProgressLog()
    answer = log.begin_answer("answer", 100)
    assert answer.prompt_done() == 0
    answer.cached = 40
    passed = iter([0, 32, 60, 70])  # several choices pass more positions than the prompt has
    answer.follow(lambda: (), lambda: next(passed))
    assert [answer.prompt_done() for _ in range(4)] == [40, 72, 100, 100]
    answer.follow(None)
    assert answer.prompt_done() == 0
    log.token(answer)
    assert answer.prompt_done() == 100


def test_the_last_answers_are_kept() -> None:
    log = ProgressLog()
    running = log.begin_answer("running")
    for number in range(KEPT_ANSWERS + 5):
        log.end_answer(log.begin_answer(str(number)))
    told = log.answers()
    assert len(told) == KEPT_ANSWERS + 1 and told[-1] is running and told[0].answer == "5"
