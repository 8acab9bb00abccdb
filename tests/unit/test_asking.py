"""What peers answer about weights is taken only if it can be, and in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from splitnet.errors import ModelNotFound
from splitnet.net.endpoints import Endpoint
from splitnet.net.identity import Identity
from splitnet.net.messages import MAX_PART_BYTES, Announced, AskWeights, WeightsKind, WeightsPart
from splitnet.weights import fetching
from splitnet.weights.fetching import Asking

PEER = Endpoint("tcp://127.0.0.1:1", Identity.generate().public)
Answer = Callable[[AskWeights], tuple[int, bytes]]


@pytest.fixture
def asking() -> Iterator[Asking]:
    with Asking(Identity.generate()) as asking:
        yield asking


def ask(asking: Asking, monkeypatch: pytest.MonkeyPatch, answer: Answer) -> tuple[bytes, int]:
    """What comes of a question, and the number of parts that were asked for."""
    asked: list[AskWeights] = []

    def send(peer: Endpoint, message: AskWeights) -> None:
        asked.append(message)
        if len(asked) > 99:
            pytest.fail("it is asked again and again")
        asking.answers.put((peer, WeightsPart(message.number, *answer(message))))

    monkeypatch.setattr(asking._links, "send", send)
    return asking.all_of(PEER, WeightsKind.MANIFEST, bytes(32), lambda *_: None), len(asked)


@pytest.mark.parametrize("size", [0, 1, MAX_PART_BYTES, MAX_PART_BYTES + 1, 3 * MAX_PART_BYTES])
def test_parts_are_joined(size: int, asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(size)
    got, parts = ask(asking, monkeypatch, lambda one: (size, data[one.offset : one.offset + one.length]))
    assert got == data and parts == max(1, -(-size // MAX_PART_BYTES))


@pytest.mark.parametrize(
    "answer",
    [
        lambda one: (1 << 20, b"x"),  # one byte after the other
        lambda one: (1 << 20, b""),
        lambda one: (1, b"xx"),
        lambda one: ((3 << 20) - 3 * one.offset, bytes(MAX_PART_BYTES)),
    ],
)
def test_who_answers_less_or_more_than_it_says_is_not_asked_on(
    answer: Answer, asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelNotFound, match="what cannot be"):
        ask(asking, monkeypatch, answer)


def test_who_answers_another_question_is_not_asked_on(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        asking._links, "send", lambda peer, message: asking.answers.put((peer, Announced(message.number, False)))
    )
    with pytest.raises(ModelNotFound, match="what cannot be"):
        asking.all_of(PEER, WeightsKind.MANIFEST, bytes(32), lambda *_: None)


def test_who_takes_too_long_is_not_asked_on(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "WHOLE_S", -1.0)
    with pytest.raises(ModelNotFound, match="too long"):
        ask(asking, monkeypatch, lambda one: (256 << 20, bytes(MAX_PART_BYTES)))
