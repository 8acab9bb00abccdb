"""Which peers a client names, and which it leaves for a while."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.liveness import BAN_S
from splitnet.audit.auditor import Auditor, named_peers
from splitnet.audit.comparison import Verdict
from splitnet.audit.piece import Piece
from splitnet.audit.program import AuditProgram
from splitnet.swarm.peer_cache import Bans
from splitnet.swarm.prefix_index import PrefixIndex
from tests.unit.audit.test_evidence import piece_of, signed
from tests.unit.swarm.test_measure import Clock

MODEL = "0" * 64
FALSE, HONEST = Verdict(9.0, 9.0, {}, "distance", 4.0), Verdict(0.0, 0.0, {}, "", 0.0)


class World:
    """An auditor whose examinations all have one verdict, and its client."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.bans, self.index, self.verdict = Bans(self.clock), PrefixIndex(), FALSE
        swarm: Any = SimpleNamespace(
            ban=self.bans.ban_peer,
            prefix_index=self.index,
            events=SimpleNamespace(note=lambda kind, text: None),
            facts=SimpleNamespace(source="model", fingerprint=MODEL),
        )
        program = AuditProgram("model")
        program.examine = self.examine  # type: ignore[method-assign]
        self.auditor = Auditor(swarm, 1.0, program)

    def examine(self, _: Piece) -> Verdict:
        return self.verdict

    def banned_after(self, seconds: float) -> set[str]:
        self.clock.now += seconds
        return self.bans.keys()


def hop(name: str) -> Any:
    endpoint = SimpleNamespace(address=f"tcp://{name}:1")
    return SimpleNamespace(name=name, endpoint=endpoint, blocks=(2, 4), weights="int8/float32")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    monkeypatch.setenv("SPLITNET_CACHE", str(tmp_path))
    return World()


def test_a_peer_with_false_outputs_is_named_for_good(world: World) -> None:
    lie = world.auditor.judge(hop("a"), False, piece_of(signed()))
    assert lie is not None and "tcp://a:1 has not computed" in str(lie)
    assert world.banned_after(1e9) == {"a"} and named_peers(MODEL).keys() == {"a"}


def test_a_peer_with_false_stored_pages_is_left_and_not_named(world: World) -> None:
    """An honest peer has such pages if a peer before it has lied."""
    generation = world.index.generation
    lie = world.auditor.judge(hop("a"), True, piece_of(signed(unknown=3)))
    assert lie is not None and "a peer before it has lied" in str(lie)
    assert world.index.generation != generation, "later sessions must not find these pages"
    assert world.bans.keys() == {"a"} and not world.auditor.counts["lies"] and not named_peers(MODEL)
    assert world.banned_after(2 * BAN_S) == set()
    world.verdict = HONEST
    assert world.auditor.judge(hop("a"), True, piece_of(signed(unknown=3))) is None


def test_liars_cannot_have_a_neighbour_named(world: World) -> None:
    generation = world.index.generation
    for number, liar in enumerate(("a", "b", "c"), 1):
        world.auditor.disagree(hop(liar), hop("honest"))
        assert world.bans.keys() == {liar, "honest"}
        assert world.banned_after(2 * BAN_S) == ({"honest"} if number > 1 else set())
        assert world.banned_after(math.ldexp(BAN_S, number)) == set()
    assert not world.auditor.counts["lies"] and world.index.generation != generation


def test_a_first_hop_that_denies_its_input_is_named(world: World) -> None:
    world.auditor.disagree(first := hop("a"), first)
    assert world.banned_after(1e9) == {"a"}
