"""Measured speeds are found again for the same blocks on the same device, and for nothing else."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from peers import speed
from peers.power import EnergyMeter
from peers.speed import KnownSpeeds, ObservedSpeed, speed_of
from scheduler.facts import ContextCost
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.paths import MAX_KNOWN, KnownFigures
from tests.unit.random_models import random_checkpoint

PAST = ContextCost(((0.1, 10.0), (0.8, 80.0)))
SPEED = ObservedSpeed((1.0, 2.0, 3.0, 4.0, 5.0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(random_checkpoint("llama", tmp_path_factory.mktemp("models") / "llama"))


def test_a_speed_is_found_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "speeds.json"
    KnownSpeeds(file).keep_speed(Span.load(checkpoint, 0, 2), "model", SPEED)
    found = KnownSpeeds(file).find_speed(Span.load(checkpoint, 0, 2), "model")
    assert found is not None and found.block_ms == SPEED.block_ms


def test_what_reading_takes_is_kept_with_it_as_far_as_rows_may_be_long(checkpoint: Checkpoint, tmp_path: Path) -> None:
    known, span = KnownSpeeds(tmp_path / "speeds.json"), Span.load(checkpoint, 0, 2)
    known.keep_speed(span, "model", ObservedSpeed(SPEED.block_ms, PAST))
    for most, kept in ((0, ContextCost()), (1024, ContextCost(PAST.ms[:1])), (8192, PAST)):
        found = known.find_speed(span, "model", most)
        assert found is not None and found.past == kept and found.block_ms == SPEED.block_ms
    assert known.find_speed(span, "model", 32768) is None, "a longer one is to be measured"


def test_another_device_model_or_way_to_compute_has_its_own(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = KnownSpeeds(tmp_path / "speeds.json")
    span = Span.load(checkpoint, 0, 2)
    known.keep_speed(span, "model", SPEED)
    assert known.find_speed(span, "other") is None
    assert known.find_speed(Span.load(checkpoint, 1, 3), "model") is None
    assert known.find_speed(Span.load(checkpoint, 0, 3), "model") is None
    assert known.find_speed(Span.load(checkpoint, 0, 2, dtype="bfloat16"), "model") is None
    for owner, name, value in (
        (speed.native, "path_in_use", lambda: "other"),
        (speed, "__version__", "other"),
        (speed.native, "processor", lambda: "other"),
        (torch, "get_num_threads", lambda: 99),
        (torch, "__version__", "other"),
        (speed.platform, "node", lambda: "other"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert known.find_speed(span, "model") is None, name
    assert known.find_speed(span, "model") is not None


@pytest.mark.parametrize("odd", [[1.0], [1.0, 2.0, 3.0, 4.0, -5.0], [1.0] * 4 + [float("inf")], ["1.0"] * 5, None, {}])
def test_what_is_odd_is_measured_again(checkpoint: Checkpoint, tmp_path: Path, odd: object) -> None:
    file = tmp_path / "speeds.json"
    known, span = KnownSpeeds(file), Span.load(checkpoint, 0, 2)
    known.keep_speed(span, "model", SPEED)
    (key,) = json.loads(file.read_text())
    file.write_text(json.dumps({key: odd}))
    assert known.find_speed(span, "model") is None
    for text in ("", "{", "[]", "\x00"):
        file.write_text(text)
        assert known.find_speed(span, "model") is None
    known.keep_speed(span, "model", SPEED)
    assert known.find_speed(span, "model") is not None


def test_only_the_latest_are_kept(checkpoint: Checkpoint, tmp_path: Path) -> None:
    known, span = KnownSpeeds(tmp_path / "speeds.json"), Span.load(checkpoint, 0, 2)
    for index in range(MAX_KNOWN + 1):
        known.keep_speed(span, f"model-{index}", SPEED)
    assert known.find_speed(span, "model-0") is None
    assert known.find_speed(span, "model-1") is not None and known.find_speed(span, f"model-{MAX_KNOWN}") is not None


def test_a_folder_that_cannot_be_written_does_no_harm(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    known, span = KnownSpeeds(tmp_path / "file" / "speeds.json"), Span.load(checkpoint, 0, 2)
    known.keep_speed(span, "model", SPEED)
    assert known.find_speed(span, "model") is None


def test_what_cannot_be_put_in_its_place_is_not_left_beside_it(tmp_path: Path) -> None:
    taken = tmp_path / "speeds.json"
    taken.mkdir()
    KnownFigures(taken).keep_figure("a speed", 1.0)
    assert list(tmp_path.iterdir()) == [taken]


def test_a_peer_measures_at_its_first_start_and_keeps_what_it_measures_later(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Mock(side_effect=lambda *_: ObservedSpeed((9.0, 9.0, 9.0, 9.0, 9.0)))
    monkeypatch.setattr(speed, "measure_speed", measured)

    def start() -> ObservedSpeed:
        return speed_of(Span.load(checkpoint, 0, 2), "model", tmp_path / "speeds.json", EnergyMeter())

    assert start().block_ms[0] == 9.0
    second = start()
    assert second.block_ms[0] == 9.0 and measured.call_count == 1
    second.replace(SPEED)
    assert start().block_ms == SPEED.block_ms and measured.call_count == 1


def test_what_is_measured_of_a_span_that_is_left_is_kept_without_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    known, first = KnownSpeeds(tmp_path / "speeds.json"), Span.load(checkpoint, 0, 2)
    observed = ObservedSpeed(SPEED.block_ms)
    known.follow(first, "model", observed)
    left = weakref.ref(first)
    del first
    gc.collect()
    assert left() is None, "a peer that moves needs its memory"
    observed.replace(ObservedSpeed((9.0,) * 5))
    found = known.find_speed(Span.load(checkpoint, 0, 2), "model")
    assert found is not None and found.block_ms == (9.0,) * 5
