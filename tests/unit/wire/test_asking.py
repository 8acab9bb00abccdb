"""Answers about weights to which there is no question are dropped."""

from __future__ import annotations

from typing import Any

import pytest

from splitnet.checkpoint.transfer.fetching import PeerQuestions
from splitnet.security.identity import Identity
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import AskWeights, Failure, FailureCode, WeightsKind, WeightsPart

PEER = Endpoint("tcp://127.0.0.1:1", Identity.generate().public)
OTHER = Endpoint("tcp://127.0.0.1:2", Identity.generate().public)


def test_one_answer_to_each_question_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A starting peer may read no answers for hours, for example while it downloads from the hub."""
    with PeerQuestions(Identity.generate()) as asking:
        sent: list[AskWeights] = []
        monkeypatch.setattr(asking._links, "send", lambda peer, message: sent.append(message))
        first, second = (asking.ask_peer(PEER, WeightsKind.MANIFEST, bytes(32)) for _ in range(2))
        assert [message.number for message in sent] == [first, second]
        hear: Any = asking._links.on_answer
        for number in (0, first, second + 1):
            hear(OTHER, WeightsPart(number, 1, b"x"))
        for _ in range(3):
            hear(PEER, WeightsPart(second + 1, 1, b"x"))
            hear(PEER, Failure(b"", 0, 99, FailureCode.WRONG_MODEL, "no"))
            hear(PEER, WeightsPart(first, 1, b"y"))
        asking.forget_question(second)
        hear(PEER, WeightsPart(second, 1, b"z"))
        assert asking.answers.get_nowait() == (PEER, WeightsPart(first, 1, b"y"))
        assert asking.answers.empty()
