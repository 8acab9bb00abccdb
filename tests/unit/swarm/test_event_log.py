"""The log of events: bounded, in order, and nothing is told twice."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from splitnet.swarm.events import KEPT_EVENTS, EventLog


@given(st.lists(st.integers(0, 2 * KEPT_EVENTS), max_size=4))
def test_who_asks_again_and_again_gets_every_event_that_is_kept_once(bursts: list[int]) -> None:
    log = EventLog(clock=lambda: 7.0)
    last, told, noted = 0, 0, 0
    for burst in bursts:
        for _ in range(burst):
            noted += 1
            log.note("gone", f"event {noted}")
        new = log.since(last)
        assert [event.text for event in new] == [f"event {number + 1}" for number in range(noted)][-len(new) or noted :]
        assert len(new) == min(burst, KEPT_EVENTS) and all(event.at == 7.0 for event in new)
        told += len(new)
        last = new[-1].number if new else last
    assert log.since(last) == [] and len(log.since(0)) == min(noted, KEPT_EVENTS) and told <= noted


def test_threads_may_note_at_the_same_time() -> None:
    log = EventLog()

    def note() -> None:
        for _ in range(50):
            log.note("lost", "a hop")

    threads = [threading.Thread(target=note) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.number for event in log.since(0)] == list(range(1, 201))
