"""Rounds of pings."""

from __future__ import annotations

import math
from collections.abc import Iterator

from scheduler.liveness import Alive, Liveness


class Interrupted(dict[str, Alive[str] | None]):
    """Answers of a round that another thread ends while this thread reads them."""

    def __init__(self, round_of: Liveness[str]) -> None:
        super().__init__(hop=None)
        self.round = round_of

    def items(self) -> Iterator[tuple[str, Alive[str] | None]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.round.stop()
        yield from super().items()


def test_a_round_may_end_while_another_thread_reads_its_deadline() -> None:
    liveness = Liveness[str]()
    liveness.ask(["hop"], 1.0)
    liveness._answers = Interrupted(liveness)
    assert liveness.wake_at(2.0) == math.inf
