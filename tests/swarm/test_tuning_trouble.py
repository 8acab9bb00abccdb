"""Training while peers fail, links are lossy, and other clients use the same peers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peers.running_peer import RunningPeer
from scheduler import liveness
from splitnet.blocks.adapters import read_tensors, write_tensors
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import NotFinite, SplitnetError
from splitnet.security.identity import Identity
from splitnet.tools.tune.folder import ADAPTER, CHECKPOINT, WORK, TuningFolder
from splitnet.tools.tune.job import TuningProgress, take_steps
from splitnet.tools.tune.owner import JointRun
from splitnet.tools.tune.rounds import RoundRules
from splitnet.tools.tune.run import TuningRun
from splitnet.tools.tune.side_tuner import SideTuner
from splitnet.tools.tune.states import States
from splitnet.wire.messages import AdapterGradient, Forward, Gradient, Message, Result, RoundWish, Step
from tests.swarm.adapters import CAUSAL, METHODS, batch, flat, gradients, lora, wrapped
from tests.swarm.harness import SPANS, LocalSwarm, dht_node, local_swarm, shared_swarm
from tests.swarm.test_joint_tuning import ROWS, SETTINGS, coordinated, linked, told
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with shared_swarm(folder, SPANS, node=node) as started:
        yield started


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Iterator[LocalSwarm]:
    """Two peers for every span. Failures of DHT nodes are tested without training."""
    with dht_node() as node, local_swarm(folder, SPANS * 2, node=node) as swarm:
        yield swarm


@pytest.fixture(autouse=True)
def several_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even small batches are split into micro-batches."""
    monkeypatch.setattr("splitnet.session.training.MIN_POSITIONS", 8)


def train(model: PeftModel, steps: int, between: Callable[[int], None] = lambda step: None) -> torch.Tensor:
    """Some steps of SGD; `between` runs after each forward pass. Returns the adapter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**batch(step)).loss
        between(step)
        loss.backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in trained])


def session_of(model: Any) -> Any:
    (passes,) = model.get_base_model()._blocks.passes.values()
    return passes


def used(swarm: LocalSwarm, model: Any, index: int) -> RunningPeer:
    endpoint = session_of(model).hops[index].endpoint
    return next(peer for peer in swarm.peers if peer.endpoint == endpoint)


@pytest.mark.default_cases(indexes=((1,),), method=("lora",))
@pytest.mark.parametrize("indexes", [(0,), (1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_peers_lost_between_forward_and_backward_pass_change_nothing(
    method: str, indexes: tuple[int, ...], twins: LocalSwarm
) -> None:
    config = METHODS[method]("llama", CAUSAL)
    undisturbed = train(wrapped(twins.model(), config), 3)
    model = wrapped(twins.model(), config)

    def kill(step: int) -> None:
        if step == 1:
            for index in indexes:
                used(twins, model, index).close()

    assert torch.equal(train(model, 3, kill), undisturbed)
    assert session_of(model).recoveries


@pytest.mark.default_cases(victim=(1,), ways=(("backward", "backward_saved"),))
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize(
    "ways", [("forward", "forward_saving"), ("backward", "backward_saved")], ids=["forward", "backward"]
)
def test_a_peer_lost_during_a_pass_changes_nothing(ways: tuple[str, ...], victim: int, twins: LocalSwarm) -> None:
    undisturbed = train(wrapped(twins.model(), lora()), 3)
    model = wrapped(twins.model(), lora())
    killed = threading.Event()

    def arm(step: int) -> None:
        if step == 0:
            peer = used(twins, model, victim)
            passes: Any = peer.server.engine._passes

            def dies(original: Any, *args: Any, **others: Any) -> Any:
                if not killed.is_set():
                    killed.set()
                    peer.transport.close()
                return original(*args, **others)

            for way in ways:
                setattr(passes, way, partial(dies, getattr(passes, way)))

    assert torch.equal(train(model, 3, arm), undisturbed)
    assert killed.is_set()


def test_a_forward_pass_that_peers_have_dropped_is_repeated(swarm: LocalSwarm) -> None:
    with swarm.visit() as visit:
        undisturbed = train(wrapped(visit.model(), lora()), 2)
        model = wrapped(visit.model(), lora())

        def forget(step: int) -> None:
            if step == 1:
                service = used(swarm, model, 1).service
                session = service.sessions.get(session_of(model).id)
                assert session is not None and session.training_state.kept
                with service._lock:
                    service.training.forget_passes(session)

        assert torch.equal(train(model, 2, forget), undisturbed)


def test_training_can_continue_after_the_error_of_a_lost_peer(node: DhtDirectory, own_folder: Path) -> None:
    with local_swarm(own_folder, SPANS, node=node) as swarm:
        model = wrapped(swarm.model(recovery_timeout_s=1.0), lora())
        undisturbed = train(wrapped(swarm.model(), lora()), 2)
        swarm.peers[1].close()
        with pytest.raises(SplitnetError, match=r"blocks 2\.\.3|does not answer|is gone"):
            model(**batch())
        swarm.add(2, 4)
        assert torch.equal(train(model, 2), undisturbed)


@pytest.mark.default_cases(gradient_codec=("auto",))
@pytest.mark.parametrize("gradient_codec", ["auto", "fp16", "none"])
def test_gradients_over_lossy_links_point_the_same_way(gradient_codec: str, swarm: LocalSwarm) -> None:
    with swarm.visit() as visit:
        _, exact = gradients(wrapped(visit.model(), lora()), batch())
        lossy = wrapped(visit.model(codec="int8", gradient_codec=gradient_codec), lora())
        _, found = gradients(lossy, batch())
        assert not torch.equal(flat(found), flat(exact))
        assert float(torch.cosine_similarity(flat(found), flat(exact), dim=0)) > 0.999


def test_clients_with_different_adapters_do_not_see_each_other(swarm: LocalSwarm) -> None:
    prompt = {"input_ids": batch()["input_ids"][:1], "attention_mask": torch.ones(1, 14, dtype=torch.long)}
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def models(clients: list[LocalSwarm]) -> list[Any]:
        plain, *others = (client.model() for client in clients)
        return [plain, *(wrapped(model, lora(), seed=seed) for seed, model in enumerate(others, 1))]

    with ExitStack() as stack:
        clients = [stack.enter_context(swarm.newcomer()) for _ in range(4)]
        alone = [model.generate(**prompt, **options) for model in models(clients)]
        together: dict[int, torch.Tensor] = {}

        def ask(index: int, model: Any) -> None:
            together[index] = model.generate(**prompt, **options)

        threads = [threading.Thread(target=ask, args=item) for item in enumerate(models(clients))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({tuple(tokens[0].tolist()) for tokens in alone}) == 4
    for index, tokens in enumerate(alone):
        assert torch.equal(together[index], tokens)


def test_kept_passes_of_a_client_are_dropped_with_its_next_batch_or_session(swarm: LocalSwarm) -> None:
    with swarm.visit() as visit:
        model = wrapped(visit.model(), lora())
        kept: list[int] = []
        for seed in range(5):
            model(**batch(seed))  # No backward pass follows.
            session = used(swarm, model, 0).service.sessions.get(session_of(model).id)
            assert session is not None
            kept.append(len(session.training_state.kept))
        assert kept[0] > 1
        # Peers keep only the passes of the last batch, because the next batch releases the earlier ones.
        assert len(set(kept)) == 1
    memories = [peer.service.training.memory for peer in swarm.peers]
    for peer in swarm.peers:
        peer.service.forget_all()
    assert all(memory.used == 0 for memory in memories)


def test_a_second_backward_pass_is_refused(swarm: LocalSwarm) -> None:
    with swarm.visit() as visit:
        loss = wrapped(visit.model(), lora())(**batch()).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="once"):
            loss.backward()


def test_a_backward_pass_through_a_cache_is_refused(swarm: LocalSwarm) -> None:
    with swarm.visit() as visit:
        ids = batch()["input_ids"]
        loss = wrapped(visit.model(), lora())(input_ids=ids, labels=ids, use_cache=True).loss
        with pytest.raises(NotImplementedError, match="use_cache=False"):
            loss.backward()


def test_an_unsupported_adapter_is_refused_by_the_client(swarm: LocalSwarm) -> None:
    config = LoraConfig(task_type=CAUSAL, target_modules=["q_proj"], lora_dropout=0.1)
    with swarm.visit() as visit:
        model = get_peft_model(visit.model(), config).train()
        with pytest.raises(SplitnetError, match=r"lora_dropout=0\.0"):
            model(**batch())


@pytest.mark.default_cases(use_cache=(False,))
@pytest.mark.parametrize("use_cache", [True, False])
def test_an_adapted_layer_that_skips_positions_is_refused_by_name(
    use_cache: bool, node: DhtDirectory, tmp_path: Path
) -> None:
    folder = random_checkpoint("qwen2_moe", tmp_path, blocks=1)
    with local_swarm(folder, [(0, 1)], node=node) as swarm:
        config = LoraConfig(task_type=CAUSAL, target_modules=["shared_expert.up_proj"])
        model: Any = get_peft_model(swarm.model(), config)
        with pytest.raises(SplitnetError, match=r"shared_expert\.up_proj does not run on every position"):
            model(torch.tensor([[5, 6, 7]]), use_cache=use_cache)


@pytest.mark.full
def test_a_peer_without_memory_for_training_is_an_error(node: DhtDirectory, own_folder: Path) -> None:
    with local_swarm(own_folder, SPANS, training_memory=1000, node=node) as swarm:
        model = wrapped(swarm.model(recovery_timeout_s=1.0), lora())
        with pytest.raises(SplitnetError, match="train with fewer positions"):
            model(**batch())


def all_of(value: float) -> Callable[[Any], Any]:
    def made(message: Any) -> Any:
        if isinstance(message, AdapterGradient):
            tensors = {name: torch.full_like(each, value) for name, each in read_tensors(message.payload).items()}
            return replace(message, payload=write_tensors(tensors))
        return replace(message, payload=np.full(len(message.payload) // 4, value, "<f4").tobytes())

    return made


def misshapen(message: Any) -> Any:
    if isinstance(message, AdapterGradient):
        tensors = {name: each.flatten() for name, each in read_tensors(message.payload).items()}
        return replace(message, payload=write_tensors(tensors))
    return replace(message, payload=bytes(message.payload[:-4]))


def silence(message: Any) -> None:
    pass


def death(message: Any) -> None:
    pass


FAULTS: dict[str, Callable[[Any], Any]] = {
    "nan": all_of(float("nan")),
    "inf": all_of(float("inf")),
    "shape": misshapen,
    "silence": silence,
    "death": death,
}
WAYS: dict[str, tuple[type[Message], ...]] = {
    "forward": (Forward, Step, Result),
    "backward": (Gradient,),
    "by the adapter": (AdapterGradient,),
}


@dataclass
class Fault:
    """A fault of the first peer of a span that sends something once the fault is armed.

    hits: the number of messages that it has changed.
    """

    start: int
    kinds: tuple[type[Message], ...]
    change: Callable[[Any], Any]
    armed: bool = False
    victim: RunningPeer | None = None
    hits: int = 0
    closing: threading.Thread | None = None

    def sent(self, peer: RunningPeer, message: Any) -> Any:
        """Returns the message that the peer sends instead; None: no message."""
        if self.change in (silence, death) and self.victim is peer:
            return None  # This includes answers to pings.
        concerned = self.armed and peer.span.start == self.start and self.victim in (None, peer)
        if not concerned or not isinstance(message, self.kinds) or not len(getattr(message, "payload", b"")):
            return message
        self.victim, self.hits = peer, self.hits + 1
        # Closed in another thread, because the transport waits for a lock of the thread that sends.
        if self.change is death:
            self.closing = threading.Thread(target=peer.transport.close)
            self.closing.start()
        return self.change(message)


class Faulty:
    """The outbox of a peer that may have a fault."""

    def __init__(self, outbox: Any, peer: RunningPeer, fault: Fault) -> None:
        self._outbox, self._peer, self._fault = outbox, peer, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outbox, name)

    def send(self, destination: Any, message: Any) -> None:
        sent = self._fault.sent(self._peer, message)
        if sent is not None:
            self._outbox.send(destination, sent)


@contextmanager
def failing(swarm: LocalSwarm, index: int, way: str, name: str) -> Iterator[Fault]:
    """A fault of one of the peers that serve the hop at `index`."""
    fault = Fault(SPANS[index][0], WAYS[way], FAULTS[name])
    with pytest.MonkeyPatch.context() as patch:
        for peer in swarm.peers:
            outbox = Faulty(peer.service.outbox, peer, fault)
            patch.setattr(peer.service, "outbox", outbox)
            patch.setattr(peer.service.training, "outbox", outbox)
            patch.setattr(peer.service.outputs, "outbox", outbox)
        try:
            yield fault
        finally:
            if fault.closing is not None:
                fault.closing.join()


def tuned(
    method: str,
    swarm: LocalSwarm,
    path: Path,
    look: Callable[[int], None] = lambda done: None,
    *,
    resume: bool = False,
    **options: Any,
) -> torch.Tensor:
    """The adapter that `splitnet tune` trains in a folder, with `SETTINGS`.

    method: prompt, lora, side, or joint: a round with a single owner. look: called before the first step and after
    each, with the number of steps.
    """
    folder, model = TuningFolder(path), swarm.model(**options)
    saved = folder.load_checkpoint() if resume else None
    folder.claim({})
    with ExitStack() as stack:
        if method == "side":
            torch.manual_seed(0)
            adapted: Any = SideTuner(model, 32, States(TuningFolder(path / WORK)), ROWS, 1 << 20)
            look(0)
            adapted.compute_states(0, lambda _: None, [])
        else:
            adapted = wrapped(model, METHODS["lora" if method == "joint" else method]("llama", CAUSAL))
        joint: dict[str, Any] = {}
        if method == "joint":
            key = Identity.generate()
            stack.enter_context(coordinated(swarm.connect(key), RoundRules(owners=1), path / "round", resume=resume))
            link = stack.enter_context(linked(swarm.connect(key), len(ROWS)))
            joint = {
                "link": link,
                "say": lambda _: None,
                "joined": link.ask_round(RoundWish.JOIN, payload=told(SETTINGS)),
            }
        run = (JointRun if joint else TuningRun)(adapted, ROWS, SETTINGS, pad=0, **joint)

        def keep() -> None:
            folder.save_checkpoint(*run.saved_state())
            folder.save_adapter(adapted)

        progress = TuningProgress(SETTINGS.steps)
        take_steps(run, folder, progress, saved, "training", look=lambda: look(run.done), keep=keep)
        return torch.cat([each.detach().flatten() for each in run.trained.values()])


@pytest.fixture(scope="module")
def undisturbed(swarm: LocalSwarm, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], torch.Tensor]:
    """The result of a run without a fault, by method; computed once."""

    @cache
    def of(method: str) -> torch.Tensor:
        with swarm.newcomer() as visit:
            return tuned(method, visit, tmp_path_factory.mktemp(method))

    return of


TROUBLES = [
    *((method, way, 1) for method in ("prompt", "joint") for way in ("forward", "backward")),
    *(("lora", way, index) for way in WAYS for index in range(3)),
    *(("side", "forward", index) for index in range(3)),
]
OFTEN = [("lora", "backward", 1)]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "MAX_SILENCE_S", 0.5)


@pytest.mark.default_cases(fault=("nan",), trouble=OFTEN)
@pytest.mark.default_cases(fault=("shape",), trouble=[("lora", "by the adapter", 0)])
@pytest.mark.parametrize("trouble", TROUBLES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_peer_with_a_fault_is_replaced_and_the_adapter_is_the_same(
    fault: str,
    trouble: tuple[str, str, int],
    twins: LocalSwarm,
    undisturbed: Callable[[str], torch.Tensor],
    soon: None,
    tmp_path: Path,
) -> None:
    method, way, index = trouble

    def arm(done: int) -> None:
        failure.armed = done == 1 or method == "side"

    expected = undisturbed(method)
    with failing(twins, index, way, fault) as failure:
        found = tuned(method, twins, tmp_path / "run", arm)
    assert failure.hits
    assert torch.equal(found, expected)


@pytest.mark.default_cases(fault=("nan",), trouble=OFTEN)
@pytest.mark.parametrize("trouble", TROUBLES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_ended_by_a_faulty_peer_resumes_from_its_checkpoint(
    fault: str,
    trouble: tuple[str, str, int],
    swarm: LocalSwarm,
    undisturbed: Callable[[str], torch.Tensor],
    soon: None,
    tmp_path: Path,
) -> None:
    method, way, index = trouble

    def arm(done: int) -> None:
        failure.armed = done >= 1 or method == "side"

    expected, path = undisturbed(method), tmp_path / "run"
    with swarm.mended() as visit:
        with failing(visit, index, way, fault) as failure, pytest.raises(SplitnetError) as raised:
            tuned(method, visit, path, arm, recovery_timeout_s=1.0)
        assert failure.hits
        assert not isinstance(raised.value, NotFinite) and "--lr" not in str(raised.value)
        if method != "side":
            for name in (CHECKPOINT, ADAPTER[1]):
                assert all(bool(each.isfinite().all()) for each in load_file(path / name).values())
            saved = TuningFolder(path).load_checkpoint()
            assert saved is not None and saved[1]["step"] == 1
    with swarm.newcomer() as visit:
        assert torch.equal(tuned(method, visit, path, resume=True), expected)


@pytest.mark.default_cases(codec=("none",))
@pytest.mark.parametrize("codec", ["none", "bf16"])
def test_values_of_the_client_that_are_not_finite_are_an_error_of_the_client(codec: str, swarm: LocalSwarm) -> None:
    with swarm.newcomer() as visit:
        model = wrapped(visit.model(codec=codec), lora())
        loss = model(**batch()).loss
        with pytest.raises(NotFinite, match="inf, NaN or values too large"):
            (loss * float("inf")).backward()
        weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        before = weight.detach().clone()
        weight.data.fill_(float("nan"))
        with pytest.raises(NotFinite, match="the adapter holds inf or NaN"):
            model(**batch())
        weight.data.copy_(before)
        assert torch.isfinite(model(**batch()).loss)
        assert not visit.client.bans.keys()


def test_an_overflow_at_every_peer_is_blamed_on_the_adapter(twins: LocalSwarm) -> None:
    """The values of the adapter are finite, but far too large."""
    model = wrapped(twins.model(), lora())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(1e30)
    with pytest.raises(NotFinite, match="another peer reports the same"):
        model(**batch())


@pytest.mark.default_cases(way=("backward",))
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_peer_that_computes_values_that_are_not_finite_is_replaced(
    way: str, twins: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer with defective memory detects this itself."""
    undisturbed = train(wrapped(twins.model(), lora()), 3)
    model = wrapped(twins.model(), lora())
    victims: list[RunningPeer] = []

    def damaged(original: Any, *given: Any, **named: Any) -> Any:
        found = original(*given, **named)
        return found * torch.nan if isinstance(found, torch.Tensor) else (found[0] * torch.nan, *found[1:])

    def damage(step: int) -> None:
        if not step:
            victims.append(used(twins, model, 1))
            passes: Any = victims[0].server.engine._passes
            for name in ("forward", "forward_saving") if way == "forward" else ("backward_saved",):
                monkeypatch.setattr(passes, name, partial(damaged, getattr(passes, name)))

    assert torch.equal(train(model, 3, damage), undisturbed)
    assert twins.client.bans.keys() == {victims[0].identity.public.text}
