"""Strangers send false weights: the memory and files of a starting peer are bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks import weights

pytestmark = pytest.mark.swarm

SECONDS = 1.0


def test_answers_without_a_question_are_not_kept() -> None:
    assert weights.unasked_answers(seconds=SECONDS) > 3


def test_one_piece_in_many_places_is_kept_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITNET_CACHE", str(tmp_path))
    assert weights.pieces_everywhere(seconds=0.0) >= 10, "parts of a manifest, what is held, and a piece"
