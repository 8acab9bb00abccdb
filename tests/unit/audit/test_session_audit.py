"""How much of the work of a session is examined."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from splitnet.audit import session_audit
from splitnet.audit.session_audit import COMPUTED, SessionAudit, _Disagreement, _Fetched
from splitnet.errors import PeerLied
from splitnet.wire.messages import Chunk, Receipt
from splitnet.wire.receipts import DIGEST, UNKNOWN

PROMPT, HOPS, RATE = 100, 3, 0.25


class Judge:
    """A client that knows all peers."""

    rate, most_positions = RATE, 4096

    def audits(self, hop: object) -> bool:
        return True

    def is_new(self, hop: object, stored: bool) -> bool:
        return False


class Hop:
    def __init__(self, name: str) -> None:
        self.name, self.endpoint = name, SimpleNamespace(address=f"{name}:1")


def done(start: int, length: int) -> Any:
    """A step whose last output the session keeps."""
    parts = (Chunk(1, start, length, 1),)
    return SimpleNamespace(result=SimpleNamespace(payload=bytes(4)), kept=1, message=SimpleNamespace(parts=parts))


@pytest.mark.parametrize(("lot", "drawn"), [(0.99, 2), (1.01, 0)])
def test_the_examined_part_of_the_work_includes_the_prompt(
    lot: float, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = SimpleNamespace(hops=[Hop(str(number)) for number in range(HOPS)])
    judge: Any = Judge()
    audit = SessionAudit(session, judge, "", HOPS, 1)
    begun: list[int] = []
    chances = [RATE * HOPS * (PROMPT + 1) / (COMPUTED * PROMPT), RATE * HOPS / (COMPUTED * (PROMPT + 1))]
    lots = iter([lot * chance for chance in chances])
    monkeypatch.setattr(session_audit.random, "random", lambda: next(lots))
    monkeypatch.setattr(audit, "_begin", lambda row, length, hops, chosen: begun.append(length))
    for start, length in ((0, PROMPT), (PROMPT, 1), (PROMPT + 1, 1)):
        audit.step_begins([Chunk(1, start, length, 1)])  # before the first output nothing can be examined
        audit.step_done(done(start, length))
    assert len(begun) == drawn and next(lots, None) is None


class Strangers(Judge):
    """A client that knows nobody, and examines short pieces."""

    most_positions = 16

    def is_new(self, hop: object, stored: bool) -> bool:
        return True


@pytest.mark.parametrize("rows", [1, 40])
def test_long_rows_are_examined_at_their_beginning(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    session: Any = SimpleNamespace(hops=["first", "second"], prefix_hit=0)
    judge: Any = Strangers()
    audit = SessionAudit(session, judge, "", HOPS, 1)
    begun: list[int] = []
    monkeypatch.setattr(audit, "_begin", lambda row, length, hops, chosen: begun.append(length))
    monkeypatch.setattr(audit, "_bucket", SimpleNamespace(wait_s=lambda *_: 0.0))
    for row in range(rows):
        audit.step_begins([Chunk(row, 0, PROMPT, 1)])
    for row in range(rows):
        step = done(0, PROMPT)
        step.message.parts = (Chunk(row, 0, PROMPT, 1),)
        audit.step_done(step)
    audit.step_begins([Chunk(rows - 1, PROMPT, 1, 1)])
    assert begun == [16]


@pytest.mark.parametrize(
    ("length", "repaired", "raised"), [(PROMPT, True, True), (PROMPT, False, False), (4, True, False)]
)
def test_an_answer_of_a_lost_hop_that_was_not_examined_is_not_trusted(
    length: int, repaired: bool, raised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, other = map(Hop, "abc")
    session: Any = SimpleNamespace(hops=[first, second], prefix_hit=0)
    judge: Any = Strangers()
    monkeypatch.setattr(judge, "is_new", lambda hop, stored: hop is second)
    audit = SessionAudit(session, judge, "", HOPS, 1)
    monkeypatch.setattr(audit, "_begin", lambda *_: None)
    audit.step_begins([Chunk(1, 0, length, 1)])
    audit.step_done(done(0, length))
    session.hops = [first, other] if repaired else session.hops
    if not raised:
        audit.finish()
        return
    with pytest.raises(PeerLied, match=r"b:1 was not examined before the route was repaired: ask again"):
        audit.finish()


def receipt(received: list[bytes], sent: list[bytes]) -> Receipt:
    return Receipt(bytes(16), 0, 0, 1, len(sent), 0, "float32", False, bytes(64), b"".join((*received, *sent)))


A, B, C, D = (bytes([number]) * DIGEST for number in range(1, 5))


@pytest.mark.parametrize(
    ("received", "repairs", "found"),
    [([A, B], 0, False), ([A, C], 0, True), ([UNKNOWN, B], 0, False), ([A, C], 1, False)],
)
def test_each_examination_compares_all_links(received: list[bytes], repairs: int, found: bool) -> None:
    sent: Any = SimpleNamespace(hops=("first", "second", "third"), repairs=repairs)
    session: Any = SimpleNamespace()
    receipts = [receipt([D, D], [A, B]), receipt([A, B], [A, B]), receipt(received, [D, D])]
    fetched = _Fetched(session, sent, {}, dict, receipts)
    if not found:
        fetched.check_links()
        return
    with pytest.raises(_Disagreement) as error:
        fetched.check_links()
    assert (error.value.before, error.value.hop) == ("second", "third")
