"""Joint tuning over real sockets: a coordinator, owners, and peers with a small model."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import DirectoryError, SplitnetError
from splitnet.hf.causal_lm import attach
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.security.swarm_key import SwarmKey
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.tools.tune import coordinator as coordinator_module
from splitnet.tools.tune import owner as owner_module
from splitnet.tools.tune import rounds as rounds_module
from splitnet.tools.tune.coordinator import Coordinator, round_place
from splitnet.tools.tune.folder import TuningFolder
from splitnet.tools.tune.methods import Schedule, TrainingSettings
from splitnet.tools.tune.owner import JointRun, RoundLink, Stopped
from splitnet.tools.tune.rounds import Numbers, RoundRules
from splitnet.tools.tune.run import Encoded, TuningRun
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import MAX_ROUNDS, RoundState, RoundWish
from tests.swarm.adapters import lora, wrapped
from tests.swarm.harness import LOOPBACK, SPANS, LocalSwarm, local_swarm, shared_swarm, wait_until

pytestmark = pytest.mark.swarm

NAME = "birds"
SIZE = 1000
ROUNDS = TrainingSettings(4, 0.01, schedule=Schedule.CONSTANT, clip=0.1, weight_decay=0.1)
"""Rules for owners without a model that give the same gradient in every round."""


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with shared_swarm(folder, SPANS, node=node) as started:
        yield started


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting owners ask often, and wait only briefly for a coordinator that a failed test has ended."""
    monkeypatch.setattr(owner_module, "ASK_AGAIN_S", 0.2)
    monkeypatch.setattr(owner_module, "SILENT_S", 30.0)


@dataclass
class Running:
    """A coordinator in a thread, and its key."""

    coordinator: Coordinator
    identity: Identity
    stopped: threading.Event
    thread: threading.Thread

    @property
    def rounds(self) -> rounds_module.Rounds:
        return self.coordinator._rounds

    def end(self) -> None:
        self.stopped.set()
        self.thread.join()


@contextmanager
def coordinated(swarm: Swarm, rules: RoundRules, folder: Path, **options: Any) -> Iterator[Running]:
    stopped = threading.Event()

    class Stop:
        def raise_if_stopped(self) -> None:
            if stopped.is_set():
                raise SystemExit

    given = {"resume": False, "listen": LOOPBACK, "public_host": None, "authorized": None} | options
    coordinator = Coordinator(swarm, NAME, rules, TuningFolder(folder), **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinator_module, "StopSignals", Stop)

        def run() -> None:
            with suppress(SystemExit):
                coordinator.run()

        running = Running(coordinator, swarm.identity, stopped, threading.Thread(target=run))
        running.thread.start()
        wait_until(lambda: coordinator._transport._thread.is_alive())
        try:
            yield running
        finally:
            running.end()


@pytest.fixture
def visitor(swarm: LocalSwarm) -> Iterator[LocalSwarm]:
    """The same peers; clients end with the test."""
    with swarm.newcomer() as made:
        yield made


@pytest.fixture
def owners(visitor: LocalSwarm) -> Iterator[Callable[..., RoundLink]]:
    """Makes links of owners to a coordinator by address; each has a new or a given key."""
    with ExitStack() as stack:

        def made(running: Running, examples: int = 1, identity: Identity | None = None) -> RoundLink:
            name = f"{NAME}@{owner_module.peer_address(running.coordinator._endpoint)}"
            client = visitor.connect(identity or Identity.generate())
            return stack.enter_context(RoundLink(client, name, examples))

        yield made


def linked(client: Swarm, examples: int) -> RoundLink:
    """A link by the name of the round, as soon as the coordinator is announced."""
    wait_until(lambda: client.directory.peers(round_place(client.facts.fingerprint, NAME)))
    return RoundLink(client, NAME, examples)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def values(seed: int, size: int = SIZE) -> Numbers:
    return np.random.default_rng(seed).normal(scale=0.01, size=size).astype(np.float32)


def told(settings: TrainingSettings) -> bytes:
    return json.dumps(asdict(settings)).encode()


def take_part(
    link: RoundLink, gradient: Numbers, settings: TrainingSettings = ROUNDS, stopped: Sequence[int] = ()
) -> Numbers:
    """Joins and gives the same gradient in every round until the last; returns the final parameters of all owners."""
    state, parameters = link.ask_round(RoundWish.JOIN, payload=told(settings), stopped=stopped)
    link.send_parameters(np.ones(SIZE, np.float32))
    while state.number < state.rounds:
        state, new = link.ask_round(RoundWish.READY, state.number, gradient=gradient, stopped=stopped)
        parameters = parameters if new is None else new  # None: the rounds have ended with the current parameters.
    assert parameters is not None
    return parameters


def finished(futures: Sequence[Future[Numbers]]) -> list[Numbers]:
    return [future.result(60) for future in futures]


def stepped(gradients: Sequence[Numbers], settings: TrainingSettings = ROUNDS) -> Numbers:
    """The result of torch's AdamW, starting from ones."""
    parameter = torch.nn.Parameter(torch.ones(SIZE))
    optimizer = torch.optim.AdamW([parameter], settings.learning_rate, weight_decay=settings.weight_decay)
    for number, gradient in enumerate(gradients):
        parameter.grad = torch.from_numpy(gradient.astype(np.float32))
        descend([parameter], optimizer, settings, number)
    return parameter.detach().numpy()


def descend(
    parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, settings: TrainingSettings, number: int
) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf)
    optimizer.param_groups[0]["lr"] = settings.learning_rate_at(number)
    optimizer.step()


ROWS = [Encoded([3 + (7 * row + place) % 90 for place in range(6)], [*range(20, 26)]) for row in range(9)]
SETTINGS = TrainingSettings(
    steps=4, learning_rate=0.01, batch_size=2, warmup_steps=1, schedule=Schedule.COSINE, clip=0.1, weight_decay=0.1
)


class Gradients(TuningRun):
    """Computes gradients without taking steps."""

    def _descend(self) -> None:
        pass


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def trained_alone(models: Sequence[Any], rows: Sequence[list[Encoded]]) -> dict[str, torch.Tensor]:
    """The result of one optimizer with the weighted mean of gradients at the same parameters."""
    runs = [Gradients(model, own, SETTINGS, pad=0) for model, own in zip(models, rows, strict=True)]
    weights = [len(own) / sum(map(len, rows)) for own in rows]
    base = {name: torch.nn.Parameter(each) for name, each in tensors(models[0]).items()}
    optimizer = torch.optim.AdamW(base.values(), SETTINGS.learning_rate, weight_decay=SETTINGS.weight_decay)
    for number in range(SETTINGS.steps):
        for run in runs:
            set_all(run, base)
            run.done = number
            run.take_step()
        for name, parameter in base.items():
            parameter.grad = torch.zeros_like(parameter)
            for weight, run in zip(weights, runs, strict=True):
                found = run.trained[name].grad
                assert found is not None
                parameter.grad += weight * found
        descend(list(base.values()), optimizer, SETTINGS, number)
    return {name: each.detach() for name, each in base.items()}


@torch.no_grad()
def set_all(run: TuningRun, to: Mapping[str, torch.Tensor]) -> None:
    for name, value in to.items():
        run.trained[name].copy_(value)


def train(run: TuningRun) -> list[float]:
    """Trains to the end; returns the losses."""
    losses = list[float]()
    while run.done < run.settings.steps:
        losses.append(run.take_step().loss)
    return losses


@pytest.fixture
def adapted(visitor: LocalSwarm, folder: Path) -> Callable[..., Any]:
    """Makes models with an adapter whose initial values depend on the seed."""

    def made(identity: Identity | None = None, seed: int = 3) -> Any:
        client = visitor.client if identity is None else visitor.connect(identity)
        return wrapped(attach(Checkpoint.open(folder), client, codec="none"), lora(), seed)

    return made


def test_rounds_are_steps_with_the_mean_gradient_of_all_owners(
    visitor: LocalSwarm, adapted: Callable[..., Any], tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    """The adapters of the owners start with different values, but all owners end with the same."""
    rows = [ROWS[:3], ROWS[3:]]
    keys = [Identity.generate(), Identity.generate()]
    models = [adapted(key, seed) for key, seed in zip(keys, (3, 4), strict=True)]
    first = tensors(models[0])
    with coordinated(visitor.connect(keys[0]), RoundRules(), tmp_path / "kept") as running, ExitStack() as stack:
        runs = list[JointRun]()
        for key, own, model in zip(keys, rows, models, strict=True):
            link = stack.enter_context(linked(visitor.connect(key), len(own)))
            joined = link.ask_round(RoundWish.JOIN, payload=told(SETTINGS))
            runs.append(JointRun(model, own, SETTINGS, pad=0, link=link, say=lambda _: None, joined=joined))
        for future in [threads.submit(train, run) for run in runs]:
            assert len(future.result(120)) == SETTINGS.steps
        running.thread.join(30)
        assert not running.thread.is_alive(), "it ends by itself when all have the last parameters"
    found = [tensors(model) for model in models]
    expected = trained_alone([adapted(), adapted()], rows)
    for name, value in expected.items():
        assert torch.equal(found[0][name], found[1][name])
        moved = float((value - first[name]).norm())
        assert moved > 0 and float((found[0][name] - value).norm()) < 0.01 * moved, name


@pytest.mark.default_cases(clip=(0.0,))
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_rounds_of_a_single_owner_equal_its_own_steps(
    clip: float, visitor: LocalSwarm, adapted: Callable[..., Any], tmp_path: Path
) -> None:
    """This also holds when the owner continues from a checkpoint of rounds that have not begun."""
    settings, key = replace(SETTINGS, steps=6, clip=clip), Identity.generate()
    alone = TuningRun(adapted(), ROWS, settings, pad=0)
    first = tensors(alone.model)
    losses = [alone.take_step().loss]
    elsewhere = alone.saved_state()
    losses += train(alone)
    with (
        coordinated(visitor.connect(key), RoundRules(owners=1), tmp_path / "kept") as running,
        linked(visitor.connect(key), len(ROWS)) as link,
    ):
        joined = link.ask_round(RoundWish.JOIN, payload=told(settings))
        run = JointRun(adapted(key), ROWS, settings, pad=0, link=link, say=lambda _: None, joined=joined)
        run.restore(*elsewhere)
        assert run.done == 0 and all(torch.equal(each, first[name]) for name, each in tensors(run.model).items())
        assert train(run) == pytest.approx(losses, rel=1e-4)
        running.thread.join(30)
    for name, value in tensors(alone.model).items():
        moved = float((value - first[name]).norm())
        assert moved > 0 and float((tensors(run.model)[name] - value).norm()) < 1e-3 * moved, name


def test_masked_sums_equal_plain_sums_except_for_rounding(
    visitor: LocalSwarm, owners: Callable[..., RoundLink], tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    results = list[Numbers]()
    for masked in (False, True):
        rules = RoundRules(owners=4, norm=1.0, masked=masked)
        with coordinated(visitor.connect(Identity.generate()), rules, tmp_path / str(masked)) as running:
            links = [owners(running, 1 + number, None if number else running.identity) for number in range(4)]
            found = finished([threads.submit(take_part, link, values(seed)) for seed, link in enumerate(links)])
            assert all(np.array_equal(found[0], each) for each in found)
            results.append(found[0])
    expected = stepped([np.sum([(1 + seed) / 10 * values(seed) for seed in range(4)], axis=0)] * ROUNDS.steps)
    assert np.allclose(results[0], expected, atol=1e-5)
    assert np.allclose(results[1], results[0], atol=1e-4)
    assert abs(results[0] - 1).mean() > ROUNDS.learning_rate


def test_an_owner_with_far_too_large_gradients_has_no_effect(
    visitor: LocalSwarm, owners: Callable[..., RoundLink], tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with coordinated(visitor.connect(Identity.generate()), RoundRules(owners=4), tmp_path / "kept") as running:
        links = [owners(running, 1, None if number else running.identity) for number in range(4)]
        gradients = [*map(values, range(3)), -20 * values(0)]
        found = finished([threads.submit(take_part, *each) for each in zip(links, gradients, strict=True)])
    assert all(np.array_equal(found[0], each) for each in found)
    assert np.allclose(found[0], stepped([np.mean(gradients[:3], axis=0)] * ROUNDS.steps), atol=1e-5)


def test_owners_wait_for_the_first_parameters_which_then_stay(
    visitor: LocalSwarm, owners: Callable[..., RoundLink], tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with coordinated(visitor.connect(Identity.generate()), RoundRules(), tmp_path / "kept") as running:
        own, other = owners(running, 1, running.identity), owners(running)
        with pytest.raises(SplitnetError, match="have not begun: stop the coordinator"):
            own.ask_round(RoundWish.END)
        with pytest.raises(SplitnetError, match="steps: lower --steps"):
            own.ask_round(RoundWish.JOIN, payload=told(replace(ROUNDS, steps=MAX_ROUNDS + 1)))
        for nonsense in (b"", b"[]", b"{}", b"\xff"):
            with pytest.raises(SplitnetError, match="not the settings of a round"):
                own.ask_round(RoundWish.JOIN, payload=nonsense)
        says = list[str]()
        waiting = threads.submit(other.ask_round, RoundWish.JOIN, say=says.append)
        wait_until(lambda: bool(says))
        assert "waiting for the owner who starts" in says[0]
        state, parameters = own.ask_round(RoundWish.JOIN, payload=told(ROUNDS))
        assert parameters is None and (state.number, state.rounds) == (0, ROUNDS.steps)
        wait_until(lambda: len(says) > 1)
        assert not waiting.done()
        for value in (1, 2):
            own.send_parameters(np.full(SIZE, value, np.float32))
            state, parameters = waiting.result(60) if value == 1 else own.ask_round(RoundWish.JOIN)
            assert state.payload == told(ROUNDS) and parameters is not None
            assert np.array_equal(parameters, np.ones(SIZE))
        own.ask_round(RoundWish.END)


def test_rounds_continue_without_a_lost_owner_and_with_a_late_one(
    visitor: LocalSwarm,
    owners: Callable[..., RoundLink],
    tmp_path: Path,
    threads: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In masked rounds, leftover masks of the lost owner must not be part of the average."""
    rules, clock, settings = RoundRules(owners=4, norm=1.0, masked=True), _Clock(), replace(ROUNDS, steps=MAX_ROUNDS)
    monkeypatch.setattr(coordinator_module, "time", clock)
    with coordinated(visitor.connect(Identity.generate()), rules, tmp_path / "kept") as running:
        links = [owners(running, 1, None if number else running.identity) for number in range(3)]
        futures = [threads.submit(take_part, link, values(seed), settings) for seed, link in enumerate(links)]
        gone, stop = owners(running), list[int]()
        monkeypatch.setattr(gone, "_transport", _Deaf(gone._transport))
        lost = threads.submit(take_part, gone, values(9), settings, stop)
        wait_until(lambda: sum(owner.gradient is not None for owner in running.rounds.owners.values()) == 3)
        assert running.rounds.number == 0, "it is waited for"
        stop.append(1)
        with pytest.raises(Stopped):
            lost.result(60)
        clock.ahead = 2 * rounds_module.LOST_S
        wait_until(lambda: running.rounds.number > 0)
        late = owners(running)
        joined, parameters = late.ask_round(RoundWish.JOIN)
        owners(running, 1, running.identity).ask_round(RoundWish.END)
        found = finished(futures)
        assert all(np.array_equal(found[0], each) for each in found)
        average = np.mean([values(seed) for seed in range(3)], axis=0)
        assert parameters is not None
        for each, number in ((parameters, joined.number), (found[0], running.rounds.number)):
            assert number > 0 and np.allclose(each, stepped([average] * number, settings), atol=number * 1e-4)


class _Clock:
    ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


class _Deaf:
    """The transport of an owner that vanishes before it sends its gradient."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def send(self, destination: Any, frames: Any) -> None:
        if len(frames[-1]) < 4 * SIZE:
            self._transport.send(destination, frames)

    def close(self) -> None:
        self._transport.close()


def test_a_restarted_coordinator_continues_its_rounds(
    visitor: LocalSwarm, owners: Callable[..., RoundLink], tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    """The optimizer's moments continue, too, as if the coordinator had never stopped."""
    rules, client = RoundRules(owners=2, norm=1.0, noise=1e-7), visitor.connect(Identity.generate())
    both = (values(0) + values(1)) / 2

    def ready(number: int, link: RoundLink, seed: int) -> Future[tuple[RoundState, Numbers | None]]:
        return threads.submit(link.ask_round, RoundWish.READY, number, gradient=values(seed))

    with coordinated(client, rules, tmp_path / "kept") as running:
        links = [owners(running, 1, None if number else running.identity) for number in range(2)]
        links[0].ask_round(RoundWish.JOIN, payload=told(ROUNDS))
        links[0].send_parameters(np.ones(SIZE, np.float32))
        links[1].ask_round(RoundWish.JOIN)
        first = [ready(0, link, seed) for seed, link in enumerate(links)]
        (state, parameters), (_, others) = (future.result(60) for future in first)
        assert state.number == 1 and parameters is not None and others is not None
        assert np.array_equal(parameters, others)
        assert np.allclose(parameters, stepped([both]), atol=1e-4)
        wait_until(lambda: running.coordinator._saved.get("number") == 1)
        port, releases = running.coordinator._transport.port, running.rounds.releases
        waiting = ready(1, links[0], 0)
    with pytest.raises(SplitnetError, match="has owners 2, not 3"):
        Coordinator(
            client, NAME, RoundRules(owners=3, liars=1), TuningFolder(tmp_path / "kept"),
            resume=True, listen=LOOPBACK, public_host=None, authorized=None,
        )  # fmt: skip
    listen = f"tcp://127.0.0.1:{port}"
    with coordinated(client, rules, tmp_path / "kept", resume=True, listen=listen) as running:
        assert (running.rounds.number, running.rounds.releases) == (1, releases)
        state, parameters = waiting.result(60)
        assert state.number == 2 and state.payload == told(ROUNDS) and parameters is not None
        expected = stepped([both, values(0)])
        assert np.allclose(parameters, expected, atol=1e-4), "the owner that was back first"
        state, known = links[1].ask_round(RoundWish.READY, 1, gradient=values(1))
        assert known is not None and np.array_equal(known, parameters), "that one was late, and is told"
        ends = [ready(2, link, seed) for seed, link in enumerate(links)]
        for state, parameters in (future.result(60) for future in ends):
            assert state.number == 3 and parameters is not None
            assert np.allclose(parameters, stepped([both, values(0), both]), atol=1e-4)


def test_only_the_key_of_the_coordinator_may_end_the_rounds(
    visitor: LocalSwarm, owners: Callable[..., RoundLink], tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with coordinated(visitor.connect(Identity.generate()), RoundRules(), tmp_path / "kept") as running:
        links = [owners(running, 1, None if number else running.identity) for number in range(2)]
        stranger, own = owners(running), owners(running, 1, running.identity)
        assert stranger.ask_round(RoundWish.LOOK)[0].payload == b""
        settings = replace(ROUNDS, steps=50)
        futures = [threads.submit(take_part, link, values(seed), settings) for seed, link in enumerate(links)]
        wait_until(lambda: running.rounds.number > 0)
        with pytest.raises(SplitnetError, match="only the coordinator's key can end a round"):
            stranger.ask_round(RoundWish.END)
        state, _ = own.ask_round(RoundWish.END)
        assert 0 < state.number == state.rounds < 50
        found = finished(futures)
        assert np.array_equal(found[0], found[1])
        assert np.allclose(found[0], stepped([(values(0) + values(1)) / 2] * state.number, settings), atol=1e-4)


def test_two_owners_with_the_same_key_get_an_error(
    visitor: LocalSwarm, owners: Callable[..., RoundLink], tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with coordinated(visitor.connect(Identity.generate()), RoundRules(), tmp_path / "kept") as running:
        key = Identity.generate()
        links = [owners(running, 1, key) for _ in range(2)]
        own = owners(running, 1, running.identity)
        own.ask_round(RoundWish.JOIN, payload=told(ROUNDS))
        own.send_parameters(np.ones(SIZE, np.float32))
        links[0].ask_round(RoundWish.JOIN)
        first = threads.submit(links[0].ask_round, RoundWish.READY, 0, gradient=values(0))
        links[1].ask_round(RoundWish.JOIN)
        with pytest.raises(SplitnetError, match="give each its --key-file"):
            first.result(60)


def test_a_trusted_key_chooses_among_coordinators_of_the_same_name(
    visitor: LocalSwarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, stranger = Identity.generate(), Identity.generate()
    client = visitor.connect(Identity.generate())
    records = [
        SimpleNamespace(endpoint=Endpoint("tcp://127.0.0.1:9", each.public), has_left=False)
        for each in (stranger, right)
    ]
    monkeypatch.setattr(client.directory, "peers", lambda place: records)
    with pytest.raises(DirectoryError, match="2 coordinators call their round birds") as refused:
        RoundLink(client, NAME)
    assert all(f"'{NAME}@tcp://127.0.0.1:9?key={each.public.text}'" in str(refused.value) for each in (right, stranger))
    (tmp_path / "trusted").write_text(right.public.text)
    monkeypatch.setattr(client, "trusted", AuthorizedKeys(tmp_path / "trusted"))
    with RoundLink(client, NAME) as link:
        assert link._endpoint.key == right.public
    records.pop()
    with pytest.raises(DirectoryError, match=f"{stranger.public.text} coordinates birds: list it"):
        RoundLink(client, NAME)
    monkeypatch.setattr(client, "identity", stranger)
    with RoundLink(client, NAME) as link:
        assert link._endpoint.key == stranger.public


@pytest.mark.default_cases(key=(None,))
@pytest.mark.parametrize("key", [None, SwarmKey.generate()], ids=["open", "closed"])
def test_a_round_is_found_without_a_dht(
    key: SwarmKey | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round is found through a peer that the coordinator did not join through, and does not count as a model."""
    monkeypatch.setattr("splitnet.directory.joining.have_hivemind", lambda: False)
    with local_swarm(folder, [(0, 6)], swarm_key=key, join=()) as swarm, ExitStack() as stack:
        first = swarm.peers[0]
        second = swarm.add(0, 6, swarm_key=key, join=[first.join_address])
        facts = ModelFacts.of(first.checkpoint)

        def connect(address: str) -> Swarm:
            made = Swarm(facts, [address], swarm_key=key, identity=Identity.generate())
            return stack.enter_context(made)

        host, guest = connect(second.join_address), connect(first.join_address)
        with pytest.raises(DirectoryError, match="nobody coordinates a round birds"):
            RoundLink(guest, NAME)
        with coordinated(host, RoundRules(), tmp_path / "kept") as running:
            place = round_place(facts.fingerprint, NAME)
            wait_until(lambda: guest.directory.peers(place))
            with RoundLink(guest, NAME) as link:
                assert link._endpoint == running.coordinator._endpoint
                assert link.ask_round(RoundWish.LOOK)[0] == RoundState(0, 0, 0, 0, False, "")
            assert guest.directory.models() == {facts.fingerprint: facts.name}
            assert {record.key for record in guest.peers(fresh=True)} == {each.identity.public for each in swarm.peers}
        wait_until(lambda: not guest.directory.peers(place))
