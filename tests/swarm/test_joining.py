"""A peer joins while it loads: what goes wrong with either ends both."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from peers import joining
from peers.daemon import Peer
from peers.options import PeerOptions
from peers.placing import SpanWish
from splitnet.errors import DirectoryError, SplitnetError
from splitnet.model.span import Span
from splitnet.net.directory import Directory
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWBm1hNQ8YZeo4EkJrZcEH2ruMBTQNwKfLh2jnqd76F53Z"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("models") / "llama")


def options(start: int, end: int, **others: Any) -> PeerOptions:
    return PeerOptions(wish=SpanWish((start, end)), listen="tcp://127.0.0.1:0", device="cpu", **others)


def test_a_peer_waits_for_the_file_of_the_first(model: Path, tmp_path: Path) -> None:
    file, loading = tmp_path / "address", threading.Event()

    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("load"):
            loading.set()

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(Peer.start, model, options(3, 6, join_file=file), progress=progress)
        assert loading.wait(60), "it loads before there is a swarm"
        first = Peer.start(model, options(0, 3))
        (tmp_path / "partial").write_text(first.addresses[0] + "\n")
        (tmp_path / "partial").replace(file)
        peer = second.result(60)
        fingerprint = peer.checkpoint.fingerprint
        found = {(record.start, record.end) for record in peer._directory.peers(fingerprint)}
        peer.close()
        first.close()
    assert (0, 3) in found


def test_a_file_that_never_comes_is_an_error(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "FILE_TIMEOUT_S", 0.1)
    with pytest.raises(DirectoryError, match="no peer has written its address to"):
        Peer.start(model, options(0, 3, join_file=tmp_path / "address"))


def test_a_peer_that_cannot_join_does_not_load_to_the_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()
    run, load = joining.Joining._run, Span.load

    def run_and_tell(self: joining.Joining) -> None:
        run(self)
        failed.set()

    def load_late(*args: Any, **kwargs: Any) -> Span:
        assert failed.wait(60)
        load(*args, **kwargs)
        raise AssertionError("it has loaded all")

    monkeypatch.setattr(joining.Joining, "_run", run_and_tell)
    monkeypatch.setattr(Span, "load", load_late)
    with pytest.raises(DirectoryError):
        Peer.start(model, options(0, 3, initial_peers=[NOBODY]))


def test_a_peer_that_cannot_load_leaves(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Directory] = []
    start = Directory.start

    def start_and_keep(**kwargs: Any) -> Directory:
        started.append(start(**kwargs))
        return started[-1]

    def fail(*args: Any, **kwargs: Any) -> Span:
        raise SplitnetError("no blocks")

    monkeypatch.setattr(Directory, "start", start_and_keep)
    monkeypatch.setattr(Span, "load", fail)
    with pytest.raises(SplitnetError, match="no blocks"):
        Peer.start(model, options(0, 3))
    assert [directory._closed for directory in started] == [True]
