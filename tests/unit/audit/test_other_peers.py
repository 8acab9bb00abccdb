"""Whom a client without the weights believes, of a hop and two other peers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitnet.audit.other_peers import OtherPeers
from splitnet.audit.piece import Piece
from splitnet.errors import SplitnetError
from splitnet.session.options import ConnectionOptions
from tests.unit.audit.test_evidence import PIECE

HIDDEN = 16
GIVEN = torch.randn(PIECE.length, HIDDEN, generator=torch.Generator().manual_seed(1))
RIGHT = 2 * GIVEN


def off_by(part: float) -> torch.Tensor:
    """Outputs whose difference from the right ones is this part of the change that the blocks make."""
    noise = torch.randn(GIVEN.shape, generator=torch.Generator().manual_seed(int(1e6 * part)))
    change = (RIGHT - GIVEN).norm(dim=1, keepdim=True)
    return RIGHT + part * change * noise / noise.norm(dim=1, keepdim=True)


class World:
    """A client whose other peers give these outputs, in order."""

    def __init__(self, *others: torch.Tensor) -> None:
        self.banned: list[str] = []
        self.avoided: list[set[str]] = []
        self._others = list(enumerate(others))
        swarm: Any = SimpleNamespace(ban=self.banned.append, facts=SimpleNamespace(hidden_size=HIDDEN))
        self._peers: Any = OtherPeers(swarm, ConnectionOptions(), routed=False)
        self._peers._compute = self._compute

    def _compute(self, _: Piece, __: torch.Tensor, avoided: set[str]) -> tuple[torch.Tensor, set[str]]:
        self.avoided.append(avoided)
        number, outputs = self._others.pop(0)
        return outputs, {f"auditor {number}"}

    def is_honest(self, outputs: torch.Tensor, weights: str = "float32") -> bool:
        receipt = replace(PIECE.receipt, weights=weights)
        given, sent = (each.numpy().tobytes() for each in (GIVEN, outputs))
        return self._peers.examine(replace(PIECE, receipt=receipt, received=given, sent=sent)).honest


def test_a_peer_that_agrees_with_another_one_is_honest() -> None:
    for outputs in (RIGHT, off_by(2e-4)):
        assert (world := World(RIGHT)).is_honest(outputs)
        assert world.avoided == [{PIECE.key.text}] and not world.banned


def test_a_peer_that_two_others_contradict_has_lied() -> None:
    world = World(RIGHT, off_by(2e-4))
    assert not world.is_honest(off_by(0.05))
    assert world.avoided == [{PIECE.key.text}, {PIECE.key.text, "auditor 0"}] and not world.banned


def test_an_auditor_that_two_others_contradict_is_left() -> None:
    world = World(off_by(0.05), RIGHT)
    assert world.is_honest(off_by(2e-4)) and world.banned == ["auditor 0"]


def test_three_results_name_nobody() -> None:
    world = World(RIGHT, off_by(0.04))
    with pytest.raises(SplitnetError, match="none of them is named"):
        world.is_honest(off_by(0.05))
    assert not world.banned


def test_half_precision_may_differ_more() -> None:
    assert World(RIGHT).is_honest(off_by(0.01), "bfloat16")
    assert World(RIGHT).is_honest(off_by(0.01), "int8/float32")
    assert not World(RIGHT, RIGHT).is_honest(off_by(0.01), "int4/float32")
    assert not World(RIGHT, RIGHT).is_honest(off_by(0.1), "bfloat16")


def test_too_few_positions_tell_nothing() -> None:
    piece = replace(PIECE, positions=PIECE.positions[:7])
    with pytest.raises(SplitnetError, match="7 positions are too few"):
        World()._peers.examine(piece)
