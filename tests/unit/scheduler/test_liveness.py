"""Rounds of pings."""

from __future__ import annotations

import math
from collections.abc import Iterator

from scheduler.liveness import Liveness, PingAnswer


class Interrupted(dict[str, PingAnswer[str] | None]):
    """Answers of a round that another thread ends while this thread reads them."""

    def __init__(self, round_of: Liveness[str]) -> None:
        super().__init__(hop=None)
        self.round = round_of

    def items(self) -> Iterator[tuple[str, PingAnswer[str] | None]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.round.cancel_round()
        yield from super().items()


def test_a_round_may_end_while_another_thread_reads_its_deadline() -> None:
    liveness = Liveness[str]()
    liveness.begin_round(["hop"], 1.0)
    liveness._answers = Interrupted(liveness)
    assert liveness.wake_at(2.0) == math.inf
