"""Texts with a common beginning: peers continue from the keys and values of earlier sessions."""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from transformers import AutoModelForCausalLM

from peers import page_copies
from peers.counters import WorkKind
from peers.running_peer import RunningPeer
from peers.service import SessionService
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import SplitnetError
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.security.identity import Identity
from splitnet.session.inference import Session
from splitnet.session.options import ConnectionOptions
from splitnet.wire.messages import AskWeights, CopiedPages, CopyPages, WeightsPart, decode, encode
from splitnet.wire.sent_log import PAGE
from tests.attacks.transport import Client
from tests.swarm.harness import SPANS, LocalSwarm, local_swarm, wait_until
from tests.swarm.test_lying_hops import LIES, lying
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=2048)


@pytest.fixture
def own_long(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    seed = zlib.crc32(request.node.nodeid.encode())
    return random_checkpoint("llama", tmp_path / "own", seed=seed, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def running(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with local_swarm(folder, SPANS, node=node) as swarm:
        yield swarm


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (1, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    own = {"speculate": None} if isinstance(model, RemoteCausalLM) else {}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**own, **GREEDY, **options})


def computed(peer: RunningPeer) -> int:
    """The number of positions that a peer has computed in steps so far."""
    kinds = WorkKind.DECODE, WorkKind.PREFILL, WorkKind.REPLAY
    return sum(peer.counters.work[kind].positions for kind in kinds)


@pytest.fixture
def swarm(running: LocalSwarm) -> Iterator[LocalSwarm]:
    with running.newcomer() as visitor:
        yield visitor


def test_a_second_text_computes_only_new_positions(swarm: LocalSwarm, local: Any) -> None:
    model = swarm.model()
    tools = text(3 * PAGE + 5, seed=1)
    for question, known in ((2, 0), (3, 3 * PAGE)):
        ids = torch.cat((tools, text(20, seed=question)), dim=1)
        before = [computed(peer) for peer in swarm.peers]
        with model.session() as cache:
            assert torch.equal(generate(model, ids), generate(local, ids))
            assert cache.session is not None and cache.session.prefix_hit == known
        new = [computed(peer) - each for peer, each in zip(swarm.peers, before, strict=True)]
        assert new == [ids.shape[1] - known + GREEDY["max_new_tokens"] - 1] * len(new)


def test_rows_are_filled_before_the_first_step_arrives(
    swarm: LocalSwarm, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = swarm.model(), text(3 * PAGE + 9, seed=10)
    generate(model, ids)
    look_up, waited = Session._look_up_prefix, list[int]()

    def is_filled(peer: RunningPeer, session: Session) -> bool:
        held = peer.service.sessions.get(session.id)
        return held is not None and held.row_state.load is not None and held.row_state.load.done == 3

    def look_up_and_wait(session: Session, *given: Any) -> int:
        waited.append(look_up(session, *given))
        for peer in swarm.peers:
            wait_until(lambda peer=peer: is_filled(peer, session))
        return waited[-1]

    monkeypatch.setattr(Session, "_look_up_prefix", look_up_and_wait)
    assert torch.equal(
        model.generate(ids, speculate=None, **{**GREEDY, "max_new_tokens": 1}), generate(local, ids, max_new_tokens=1)
    )
    assert waited == [3 * PAGE]


def test_missing_pages_of_a_hop_are_replayed_by_the_previous_hop(swarm: LocalSwarm, local: Any) -> None:
    model, ids = swarm.model(), text(4 * PAGE + 9, seed=4)
    generate(model, ids)
    store = swarm.peers[1].service.sessions.prefixes
    assert store is not None
    store.forget_pages([held.page for held in list(store._held.values())])
    before = [computed(peer) for peer in swarm.peers]
    with model.session() as cache:
        assert torch.equal(generate(model, ids), generate(local, ids))
        assert cache.session is not None and cache.session.prefix_hit == 4 * PAGE
    first, second, third = (computed(peer) - each for peer, each in zip(swarm.peers, before, strict=True))
    assert first == third == 9 + GREEDY["max_new_tokens"] - 1
    assert second == first + 4 * PAGE


def test_keys_do_not_find_pages_of_other_keys(swarm: LocalSwarm) -> None:
    ids = text(2 * PAGE + 9, seed=5)
    for _ in range(2):
        model = swarm.model(identity=Identity.generate())
        with model.session() as cache:
            generate(model, ids)
            assert cache.session is not None and cache.session.prefix_hit == 0


def test_a_text_without_permission_to_store_is_not_stored(swarm: LocalSwarm) -> None:
    ids, model = text(2 * PAGE + 9, seed=6), swarm.model(prefixes="off")
    for _ in range(2):
        with model.session() as cache:
            generate(model, ids)
            assert cache.session is not None and cache.session.prefix_hit == 0


def test_a_replacement_uses_its_standby_copies_of_pages(node: DhtDirectory, own_long: Path) -> None:
    local: Any = AutoModelForCausalLM.from_pretrained(own_long, dtype=torch.float32).eval()
    with local_swarm(own_long, [*SPANS, SPANS[1]], node=node) as swarm:
        model, ids = swarm.model(standby=1e9), text(3 * PAGE + 9, seed=7)
        expected = local.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, "max_new_tokens": 24})
        with model.session() as cache:
            first = generate(model, ids)
            assert torch.equal(first, expected[:, : first.shape[1]])
            session = cache.session
            assert isinstance(session, Session) and session.standby is not None
            middle = session.hops[1].endpoint
            lost = next(peer for peer in swarm.peers if peer.transport.port == int(middle.address.rpartition(":")[2]))
            replica = next(peer for peer in swarm.peers if peer.span.start == 2 and peer is not lost)
            store = replica.service.sessions.prefixes
            assert store is not None
            wait_until(lambda: len(store) == 3)
            lost.close()
            assert torch.equal(generate(model, first, max_new_tokens=16), expected)
            assert session.recoveries
        assert replica.counters.work[WorkKind.REPLAY].positions < PAGE


def test_pages_are_copied_from_a_replica_if_that_is_faster(
    node: DhtDirectory, own_long: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local: Any = AutoModelForCausalLM.from_pretrained(own_long, dtype=torch.float32).eval()
    monkeypatch.setattr(SessionService, "page_ms", lambda *_: math.inf)
    with local_swarm(own_long, [*SPANS, SPANS[1]], node=node) as swarm:
        model, ids = swarm.model(), text(20 * PAGE + 9, seed=8)
        with model.session() as cache:
            first = generate(model, ids)
            assert isinstance(cache.session, Session)
            middle = cache.session.hops[1]
        # The peer is alive, but excluded from planning.
        monkeypatch.setattr(swarm.client, "_peers_to_plan_with", lambda *_, **__: (swarm.client.peers(), {middle.name}))
        replica = next(each for each in swarm.peers if each.span.start == 2 and _name(each) != middle.name)
        with model.session() as cache:
            again = generate(model, ids)
            assert isinstance(cache.session, Session) and cache.session.hops[1].name == _name(replica)
            assert cache.session.prefix_hit == 20 * PAGE
        assert torch.equal(first, again) and torch.equal(first, generate(local, ids))
        assert computed(replica) == 9 + GREEDY["max_new_tokens"] - 1


class Source:
    """A socket that a client names as the source of pages. It answers each question with `part` bytes of a page, or
    does not answer. asked: the received questions."""

    def __init__(self, part: int | None) -> None:
        self.identity, self.asked, self._part = Identity.generate(), list[AskWeights](), part
        self._ended = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server, self._socket.linger = 1, 0
        self._socket.curve_publickey = self.identity.curve_public
        self._socket.curve_secretkey = self.identity.curve_secret
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        while not self._ended.is_set():
            if self._socket.poll(20):
                who, *frames = self._socket.recv_multipart()
                message = decode(frames)
                if isinstance(message, AskWeights):
                    self.asked.append(message)
                    if self._part is not None:
                        part = encode(WeightsPart(message.number, 1 << 20, bytes(self._part)))
                        self._socket.send_multipart([who, *map(bytes, part)])

    def __enter__(self) -> Source:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def request(self, number: int, *, if_faster: bool) -> CopyPages:
        """Asks a peer of the second span to copy a page from this source."""
        place = self.identity.public.raw, self.address, ()
        ids = os.urandom(16), 1e9, if_faster, number
        return CopyPages(*ids, *SPANS[1], 0, bytes(16), (os.urandom(16),), *place)


def test_a_source_that_sends_single_bytes_is_asked_once(node: DhtDirectory, folder: Path) -> None:
    with (
        local_swarm(folder, [SPANS[1]], node=node) as swarm,
        Source(part=1) as source,
        Client(swarm.peers[0].record().endpoint) as client,
    ):
        for if_faster in (False, True):
            client.say(source.request(7, if_faster=if_faster))
            answer = client.hear(CopiedPages)
            assert (answer.number, answer.pages) == (7, 0)
        assert len(source.asked) == 2


def test_pages_are_copied_while_the_source_of_another_client_is_silent(
    node: DhtDirectory, own_long: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_copies, "ANSWER_S", math.inf)
    with local_swarm(own_long, [*SPANS, SPANS[1]], node=node) as swarm, ExitStack() as stack:
        source = stack.enter_context(Source(part=None))
        replicas = [peer for peer in swarm.peers if (peer.span.start, peer.span.end) == SPANS[1]]
        for peer in replicas:
            liar = stack.enter_context(Client(peer.record().endpoint))
            for number in range(page_copies.PER_KEY):
                liar.say(source.request(number, if_faster=bool(number % 2)))
        wait_until(lambda: len(source.asked) == page_copies.AT_ONCE_OF_KEY * len(replicas))
        model, ids = swarm.model(standby=1e9), text(3 * PAGE + 9, seed=12)
        with model.session():
            generate(model, ids)
            wait_until(lambda: all(len(peer.service.sessions.prefixes or ()) == 3 for peer in replicas))
        assert len(source.asked) == page_copies.AT_ONCE_OF_KEY * len(replicas)


def test_the_key_with_most_requests_makes_room_for_another_key(
    node: DhtDirectory, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_copies, "ANSWER_S", math.inf)
    with local_swarm(folder, [SPANS[1]], node=node) as swarm, ExitStack() as stack:
        source, last = stack.enter_context(Source(part=None)), stack.enter_context(Source(part=1))
        victim = swarm.peers[0].record().endpoint
        clients = [stack.enter_context(Client(victim)) for _ in range(page_copies.WAITING // page_copies.PER_KEY)]
        for client in clients:
            for number in range(page_copies.PER_KEY):
                client.say(source.request(number, if_faster=False))
            client.ping()  # The peer has received the requests.
        newcomer = stack.enter_context(Client(victim))
        newcomer.say(last.request(9, if_faster=True))
        assert newcomer.hear(CopiedPages).number == 9 and len(last.asked) == 1


def _name(peer: RunningPeer) -> str:
    return peer.identity.public.text


def test_pages_from_a_session_with_a_lying_hop_are_not_used(node: DhtDirectory, own_long: Path) -> None:
    with local_swarm(own_long, [*SPANS, SPANS[2]], node=node) as swarm:
        model, ids = swarm.model(), text(2 * PAGE + 9, seed=9)
        with model.session() as cache:
            expected = generate(model, ids)
            assert isinstance(cache.session, Session)
            tail = cache.session.hops[2].name
            cache.reset()  # The session keeps its route.
            with lying(next(each for each in swarm.peers if _name(each) == tail), LIES["nan"]):
                assert torch.equal(generate(model, ids), expected)
            assert cache.session.recoveries
        with model.session() as cache:
            assert torch.equal(generate(model, ids), expected)
            assert isinstance(cache.session, Session) and cache.session.prefix_hit == 0


@pytest.mark.parametrize("options", [{"prefixes": "off"}, {"prefixes": "shared"}, {"standby": 0}, {"standby": "much"}])
def test_a_standby_without_pages_to_copy_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SplitnetError, match=r"standby copies|amount of memory"):
        ConnectionOptions(**{"standby": "8MiB", **options})
