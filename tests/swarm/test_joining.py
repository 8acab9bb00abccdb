"""A starting peer waits for other peers, and can be stopped while it waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from peers import joined_swarm
from peers.peer_options import PeerOptions, SpanWish
from peers.running_peer import RunningPeer
from splitnet.blocks.span import Span
from splitnet.directory import dht_directory
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import DirectoryError, SplitnetError
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm


class Stopped(BaseException):
    """Replaces SystemExit, which would end the tests."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[bool]]:
    """For each node of the DHT that was started, whether it is closed."""
    made: list[DhtDirectory] = []
    make = DhtDirectory.__init__

    def make_and_keep(self: DhtDirectory) -> None:
        make(self)
        made.append(self)

    monkeypatch.setattr(DhtDirectory, "__init__", make_and_keep)
    return lambda: [one._closed for one in made]


def options(start: int, end: int, **others: Any) -> PeerOptions:
    return PeerOptions(wish=SpanWish((start, end)), listen="tcp://127.0.0.1:0", device="cpu", **others)


def stop_at(stage: str, after: int) -> Callable[[str, int, int], None]:
    """A progress callback that raises after `after` reports of a stage."""
    told: list[str] = []

    def progress(now: str, done: int, total: int) -> None:
        told.append(now)
        if sum(one.startswith(stage) for one in told) > after:
            raise Stopped

    return progress


def test_a_peer_waits_for_the_file_of_the_first(model: Path, tmp_path: Path) -> None:
    file, waits = tmp_path / "address", threading.Event()

    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("join"):
            waits.set()

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(RunningPeer.start, model, options(3, 6, join_file=file), progress=progress)
        assert waits.wait(60)
        first = RunningPeer.start(model, options(0, 3))
        (tmp_path / "partial").write_text(first.directory.addresses[0] + "\n")
        (tmp_path / "partial").replace(file)
        peer = second.result(60)
        found = {(record.start, record.end) for record in peer.directory.peers(peer.checkpoint.fingerprint)}
        peer.close()
        first.close()
    assert (0, 3) in found


def test_a_file_that_never_comes_is_an_error(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_swarm, "FILE_TIMEOUT_S", 0.1)
    with pytest.raises(DirectoryError, match="no peer has written its address to"):
        RunningPeer.start(model, options(0, 3, join_file=tmp_path / "address"))


def test_a_peer_that_waits_for_a_file_can_be_stopped(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        RunningPeer.start(model, options(0, 3, join_file=tmp_path / "address"), progress=stop_at("join", after=3))


@pytest.mark.parametrize(("stage", "after"), [("start a swarm", 3), ("load", 0), ("load", 2), ("measure", 0)])
def test_a_peer_that_is_stopped_leaves(
    model: Path, monkeypatch: pytest.MonkeyPatch, closed: Callable[[], list[bool]], stage: str, after: int
) -> None:
    monkeypatch.setattr(dht_directory, "WAITING_S", 0.001)
    with pytest.raises(Stopped):
        RunningPeer.start(model, options(0, 3), progress=stop_at(stage, after))
    assert closed() == [True]


def test_a_peer_that_cannot_load_leaves(
    model: Path, monkeypatch: pytest.MonkeyPatch, closed: Callable[[], list[bool]]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Span:
        raise SplitnetError("no blocks")

    monkeypatch.setattr(Span, "load", fail)
    with pytest.raises(SplitnetError, match="no blocks"):
        RunningPeer.start(model, options(0, 3))
    assert closed() == [True]
