"""Clients that want more memory, traffic or log than a peer's budget, beside an honest client."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from peers.running_peer import RunningPeer
from peers.sessions import MESSAGE_BYTES
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.swarm.swarm import ModelFacts
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Failure, Forward, Gradient, Result
from tests.attacks import fairness
from tests.attacks import memory as attacks
from tests.attacks.memory import PLAIN
from tests.swarm.harness import LocalSwarm, local_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

KV_MEMORY, TRAINING_MEMORY = 16 * 2**20, 32 * 2**20
STEP_MEMORY = 128 * 2**20
SLACK = 96 * 2**20
"""Further memory of the process, in bytes: activations, messages in transit, and memory that is freed late."""

BUDGET = 6000
"""Positions of a hostile session: more than half of the KV memory, so that an honest session has room."""

SECONDS = 0.6
HEADS, HEAD_SIZE = 2, 16
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@dataclass
class Watched:
    """The highest figures of the peers during an attack."""

    peers: list[RunningPeer]
    rss: int = 0
    rows: int = 0
    """Bytes of keys and values, and of logs."""
    accounted: int = 0
    kept: int = 0
    """Passes that wait for a gradient."""
    training: int = 0
    """Bytes of passes, including waiting ones."""
    honest: int = 0
    """Number of correct answers to the honest client."""
    _ended: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        process = psutil.Process()
        before = process.memory_info().rss
        while not self._ended.wait(0.005):
            self.rss = max(self.rss, process.memory_info().rss - before)
            self.look()

    def look(self) -> None:
        for peer in self.peers:
            sessions = list(peer.service.sessions)
            self.kept = max(self.kept, *(len(each.training_state.kept) for each in sessions), 0)
            try:
                held = sum(row.nbytes for each in sessions for row in list(each.row_state.caches.values()))
                held += sum(each.log.nbytes for each in sessions)
            except RuntimeError:  # The rows and logs change at the same time.
                continue
            self.rows = max(self.rows, held)
            self.accounted = max(self.accounted, peer.service.sessions.memory.used)
            self.training = max(self.training, peer.service.training_memory.used)


Attack = Callable[[Callable[[], None]], Any]


@dataclass
class Victims:
    """A swarm of two peers, and a client of these."""

    swarm: LocalSwarm
    facts: ModelFacts
    local: Any

    @property
    def endpoint(self) -> Endpoint:
        return self.swarm.peers[0].endpoint

    @contextmanager
    def attacked(self, attack: Attack) -> Iterator[Watched]:
        """Runs `attack`, which calls its argument when it has begun; the client generates at the same time."""
        watched, began = Watched(self.swarm.peers), threading.Event()

        def begin() -> None:
            watched.look()  # On a slow machine, the watching thread may miss the attack.
            began.set()

        prompt = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(1))
        inputs: dict[str, Any] = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **GREEDY}
        expected = self.local.generate(**inputs)
        with self.swarm.visit(), ThreadPoolExecutor(2) as threads:
            model = self.swarm.model()
            assert torch.equal(model.generate(**inputs), expected)
            watching, running = threads.submit(watched.watch), threads.submit(attack, begin)
            try:
                began.wait(20)
                while not watched.honest or not running.done():
                    assert torch.equal(model.generate(**inputs), expected)
                    watched.honest += 1
                running.result()
            finally:
                watched._ended.set()
            watching.result()
        yield watched
        self.wait_until_forgotten()

    def wait_until_forgotten(self) -> None:
        """Waits until the memory of the attack is freed."""
        deadline = time.monotonic() + 10
        for peer in self.swarm.peers:
            accounts = (peer.service.queue.memory, peer.service.training_memory)
            while any(account.used for account in accounts):
                assert time.monotonic() < deadline, "something is still accounted for"
                time.sleep(0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=8192)


@pytest.fixture(scope="module")
def victims(folder: Path, node: DhtDirectory) -> Iterator[Victims]:
    with serving(folder, [(0, 3), (3, 6)], node=node) as found:
        yield found


@contextmanager
def serving(
    folder: Path,
    spans: list[tuple[int, int]],
    training_memory: int = TRAINING_MEMORY,
    node: DhtDirectory | None = None,
) -> Iterator[Victims]:
    options = {"kv_memory": KV_MEMORY, "training_memory": training_memory}
    with local_swarm(folder, spans, node=node, **options) as swarm:
        swarm.join()
        local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        yield Victims(swarm, ModelFacts.of(Checkpoint.open(folder)), local)


def test_rows_take_no_more_than_was_reserved(victims: Victims) -> None:
    options: dict[str, Any] = {"seconds": SECONDS, "reservation": BUDGET, "blocks": (0, 3)}

    def attack(began: Callable[[], None]) -> None:
        attacks.prefix_rows(victims.endpoint, victims.facts, heads=HEADS, head_size=HEAD_SIZE, began=began, **options)
        attacks.tiny_rows(victims.endpoint, victims.facts, **options)
        attacks.lost_logs(victims.endpoint, victims.facts, **options)

    with victims.attacked(attack) as seen:
        assert 0 < seen.rows <= seen.accounted <= KV_MEMORY
        assert seen.rss < KV_MEMORY + STEP_MEMORY + SLACK


def test_small_messages_are_counted_with_their_objects(folder: Path) -> None:
    little = 2**18
    with serving(folder, [(0, 6)], training_memory=little) as victims:

        def attack(began: Callable[[], None]) -> None:
            attacks.tiny_passes(victims.endpoint, victims.facts, seconds=SECONDS, began=began)
            attacks.waiting_steps(victims.endpoint, victims.facts, seconds=SECONDS, reservation=BUDGET)

        with victims.attacked(attack) as seen:
            assert 0 < seen.kept <= little // MESSAGE_BYTES
            assert little // 3 < seen.training <= little
            assert seen.rss < KV_MEMORY + STEP_MEMORY + SLACK


def test_one_key_does_not_keep_another_from_training(folder: Path) -> None:
    with (
        serving(folder, [(0, 6)], training_memory=2**20) as victims,
        attacks.Stranger(victims.endpoint, victims.facts, None) as stranger,
        fairness.Client(victims.endpoint, victims.facts) as client,
    ):
        session = stranger.open(64)
        number = 0
        while number < 1 << 20:
            number += 1
            stranger.say(Forward(session, 1, number, 0, (8,), True, 0, PLAIN, PLAIN, stranger.positions(8)))
            if isinstance(stranger.wait_for(session, Result), Failure):
                break
        assert number > 50
        own, _ = client.open(64)
        for number in range(1, 9):
            client.forward(own, number, (64,), kept=True)
            assert isinstance(client.hear(), Result)
        for number in range(1, 9):
            client.gradient(own, number, 64)
            assert isinstance(client.hear(), Gradient)


def test_small_requests_have_little_sent(victims: Victims) -> None:
    figures: list[tuple[int, int, int]] = []
    options: dict[str, Any] = {"seconds": SECONDS, "reservation": BUDGET, "blocks": (0, 3)}
    most = 14  # Number of logs.

    def attack(began: Callable[[], None]) -> None:
        figures.append(attacks.replays(victims.endpoint, victims.facts, **options, least=10 * most + 1, began=began))

    with victims.attacked(attack):
        [(asked, uploaded, came)] = figures
        assert asked > 10 * most
        assert 0 < came < most * uploaded


def test_adapters_that_do_not_fit_fill_no_log(victims: Victims, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING),
        victims.attacked(
            lambda began: attacks.adapters(
                victims.endpoint,
                victims.facts,
                seconds=SECONDS,
                layer="self_attn.q_proj",
                width=(64, 64),
                blocks=(0, 3),
                began=began,
            )
        ) as seen,
    ):
        assert seen.rss < KV_MEMORY + TRAINING_MEMORY + SLACK
    assert not [record for record in caplog.records if record.exc_info], "a peer was surprised"


@pytest.mark.full
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_attention_takes_no_more_than_its_chunks(backward: bool, node: DhtDirectory, tmp_path: Path) -> None:
    folder = random_checkpoint("gemma2", tmp_path, blocks=2, max_position_embeddings=8192)
    with serving(folder, [(0, 2)], node=node) as victims:
        options: dict[str, Any] = {"seconds": 0.1, "length": 2048 if backward else 4096, "backward": backward}
        target = victims.endpoint, victims.facts
        with victims.attacked(lambda began: attacks.long_passes(*target, began=began, **options)) as seen:
            assert seen.rss < 320 * 2**20
