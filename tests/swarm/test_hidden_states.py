"""Hidden states within the model arrive with the outputs and equal those of transformers, wherever the blocks run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peers.service import SessionService
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.hf.cache import RemoteCache
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.session.driver import LinkCodecs
from splitnet.session.inference import Session
from splitnet.wire.codecs import codec_by_name
from splitnet.wire.messages import Open, Tapped
from tests.swarm.harness import SPANS, LocalSwarm, repairs, shared_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

BLOCKS = 6
TAPS = [(1, 3, 5), (2, 6), (6,), (0, 4, 1, 6)]
CLOSE: Any = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def chain(
    request: pytest.FixtureRequest, node: DhtDirectory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalSwarm]:
    folder = random_checkpoint(request.param, tmp_path_factory.mktemp(request.param), seed=1)
    with shared_swarm(folder, SPANS, node=node) as swarm:
        yield swarm


of_llama = pytest.mark.parametrize("chain", ["llama"], indirect=True)


def tokens(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def states_of(folder: Path, ids: torch.Tensor, **given: Any) -> list[torch.Tensor]:
    """The states at each boundary, `[batch, seq, hidden]`; the last one is before the final norm, unlike in
    transformers."""
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    last: list[torch.Tensor] = []
    norm = whole.base_model.norm if hasattr(whole.base_model, "norm") else whole.base_model.ln_f
    norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    return [*whole(ids, output_hidden_states=True, **given).hidden_states[:BLOCKS], last[0]]


@torch.no_grad()
def step(model: RemoteCausalLM, cache: RemoteCache, ids: torch.Tensor) -> torch.Tensor:
    """The hidden states of new tokens."""
    exchange = model.send_tokens(ids, cache)
    exchange.finish()
    assert exchange.tapped is not None
    return exchange.tapped


def joined(states: Sequence[torch.Tensor], taps: Sequence[int]) -> torch.Tensor:
    return torch.cat([states[tap] for tap in taps], dim=-1)


@pytest.mark.parametrize("taps", TAPS, ids=str)
@pytest.mark.parametrize("local_blocks", [None, "0:1", "3:4", "1:3,5:6", "0:6"])
@pytest.mark.default_cases(local_blocks=(None, "1:3,5:6"), chain=("llama",))
def test_hidden_states_equal_those_of_transformers(
    chain: LocalSwarm, taps: tuple[int, ...], local_blocks: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a prompt in chunks, a token, a window of drafts, and positions after a rewind."""
    monkeypatch.setattr(Session, "step_positions", lambda *_: 16)
    ids = tokens(40)
    expected = joined(states_of(chain.folder, ids), taps)
    with chain.visit() as visit:
        model = visit.model(local_blocks=local_blocks)
        with model.session() as cache:
            cache.remote.use_taps(taps)
            for start, end in ((0, 33), (33, 34), (34, 38), (36, 40)):
                cache.remote.rewind(start, [0])
                torch.testing.assert_close(step(model, cache, ids[:, start:end]), expected[:, start:end], **CLOSE)


@of_llama
@pytest.mark.parametrize("local_blocks", [None, "0:1,3:4", "4:6"])
def test_a_padded_batch_gets_the_hidden_states_of_its_wanted_positions(
    chain: LocalSwarm, local_blocks: str | None
) -> None:
    ids, taps, padding = tokens(9, batch=3), (0, 2, 3, 6), torch.tensor([4, 0, 7])
    mask = torch.arange(9)[None] >= padding[:, None]
    given = {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}
    states = joined(states_of(chain.folder, ids, **given), taps)
    with chain.visit() as visit:
        model = visit.model(local_blocks=local_blocks)
        for keep in (0, 3):
            with model.session() as cache, torch.no_grad():
                cache.remote.use_taps(taps)
                exchange = model._blocks.begin_step(cache, model.get_input_embeddings()(ids), mask, keep)
                output = exchange.finish()
            wanted = mask if not keep else mask & (torch.arange(9) >= 9 - keep)
            assert exchange.tapped is not None
            torch.testing.assert_close(exchange.tapped[wanted], states[wanted], **CLOSE)
            torch.testing.assert_close(exchange.tapped[wanted][:, -64:], output[wanted])
            assert not exchange.tapped[~wanted].any() and not output[~wanted].any()


@of_llama
def test_taps_at_the_embeddings_and_the_output_cost_no_message(
    chain: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only states at inner boundaries count as received."""
    opened: list[Open] = []
    receive = SessionService.receive_message

    def noted(service: Any, source: Any, message: Any, now: float) -> None:
        opened.extend([message] if isinstance(message, Open) else [])
        receive(service, source, message, now)

    monkeypatch.setattr(SessionService, "receive_message", noted)
    received: list[int] = []
    with chain.visit() as visit:
        for taps in ((), (6,), (0, 6), (1, 2, 5)):
            model = visit.model()
            with model.session() as cache, torch.no_grad():
                cache.remote.use_taps(taps)
                model.send_tokens(tokens(8), cache).finish()
                assert cache.session is not None
                received.append(cache.session.traffic.bytes_received)
    assert received[0] == received[1] == received[2] == 8 * 64 * 4
    assert received[3] == 4 * received[0]
    assert {each.taps for each in opened} == {(), (1, 2), (5,)}


@of_llama
def test_hidden_states_use_the_codec_of_the_link(chain: LocalSwarm) -> None:
    ids, taps = tokens(12), (1, 4)
    states = joined(states_of(chain.folder, ids), taps)
    with chain.visit() as visit:
        model = visit.model("auto")
        with model.session() as cache:
            cache.remote.use_taps(taps)
            found = step(model, cache, ids)
            assert isinstance(cache.session, Session)
            size = codec_by_name("int8").bytes_per_position(64)
            assert LinkCodecs(model.swarm, "auto").of_taps.name == "int8"
            assert cache.session.traffic.bytes_received <= 12 * (2 * size + 64 * 4)
    assert ((found - states).norm() / states.norm()) < 0.1


@of_llama
def test_sessions_with_and_without_taps_share_passes(chain: LocalSwarm) -> None:
    ids = tokens(20)
    states = states_of(chain.folder, ids)
    with chain.visit() as visit:
        model = visit.model()
        wishes = [(), (1, 3), (2, 5), (3, 4)]
        caches = [model.new_cache() for _ in wishes]
        for cache, taps in zip(caches, wishes, strict=True):
            cache.remote.use_taps(taps)
        for start, end in ((0, 8), *((at, at + 1) for at in range(8, 20))):
            with torch.no_grad():
                exchanges = [model.send_tokens(ids[:, start:end], cache) for cache in caches]
            for exchange, taps in zip(exchanges, wishes, strict=True):
                torch.testing.assert_close(exchange.finish(), states[BLOCKS][:, start:end], **CLOSE)
                if taps:
                    torch.testing.assert_close(exchange.tapped, joined(states, taps)[:, start:end], **CLOSE)
                else:
                    assert exchange.tapped is None
        for cache in caches:
            cache.close()


@pytest.mark.default_cases(at=(1,))
@pytest.mark.parametrize("at", [0, 1, 2])
def test_hidden_states_continue_after_a_lost_hop(folder: Path, twins: LocalSwarm, at: int) -> None:
    """A replay brings no hidden states; a repeated step brings only its own."""
    ids, taps = tokens(24), (1, 3, 4)
    expected = joined(states_of(folder, ids), taps)
    model = twins.model()
    with model.session() as cache:
        cache.remote.use_taps(taps)
        for start, end in ((0, 12), (12, 13), (13, 14), (14, 17), (17, 18), (18, 24)):
            if start == 14:
                assert isinstance(cache.session, Session)
                lost = cache.session.hops[at].endpoint
                next(peer for peer in twins.peers if peer.endpoint == lost).close()
            before = cache.session.traffic.bytes_received if cache.session is not None else 0
            torch.testing.assert_close(step(model, cache, ids[:, start:end]), expected[:, start:end], **CLOSE)
        assert isinstance(cache.session, Session)
        assert len(repairs(cache.session)) == 1
        assert cache.session.traffic.bytes_received - before == 6 * 64 * 4 * (len(taps) + 1)


@contextmanager
def after_a_prompt(folder: Path, twins: LocalSwarm) -> Iterator[tuple[RemoteCache, Callable[[], None]]]:
    """A cache that holds 12 tokens, and a check of the hidden states of the next four tokens, one at a time."""
    ids, taps = tokens(16), (1, 3)
    expected = joined(states_of(folder, ids), taps)
    model = twins.model()

    def check() -> None:
        for start in range(12, 16):
            torch.testing.assert_close(step(model, cache, ids[:, start : start + 1]), expected[:, start : start + 1])

    with model.session() as cache:
        cache.remote.use_taps(taps)
        step(model, cache, ids[:, :12])
        yield cache, check


def test_lost_hidden_states_arrive_with_the_repeated_step(
    folder: Path, twins: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    with after_a_prompt(folder, twins) as (cache, check):
        deliver, lost = Session.deliver, list[Any]()

        def lose_one(session: Session, source: Any, message: Any) -> None:
            if isinstance(message, Tapped) and not lost:
                lost.append(message)
            else:
                deliver(session, source, message)

        monkeypatch.setattr(Session, "deliver", lose_one)
        check()
        assert lost and isinstance(cache.session, Session) and len(repairs(cache.session)) == 1


@pytest.mark.parametrize("unit", [b"\x00\x00\xc0\x7f", b"x"], ids=["not finite", "short"])
def test_a_hop_that_sends_malformed_hidden_states_is_replaced(
    folder: Path, twins: LocalSwarm, monkeypatch: pytest.MonkeyPatch, unit: bytes
) -> None:
    with after_a_prompt(folder, twins) as (cache, check):
        assert isinstance(cache.session, Session)
        liar = cache.session.hops[1].endpoint
        service: Any = next(peer for peer in twins.peers if peer.endpoint == liar).service
        add_taps = service.outputs.add_taps

        def lie(work: Any, taps: Any, states: Any) -> None:
            codec: Any = SimpleNamespace(code=taps.codec.code, encode=lambda _: unit * 64)
            add_taps(work, taps._replace(codec=codec), states)

        monkeypatch.setattr(service.outputs, "add_taps", lie)
        check()
        assert len(repairs(cache.session)) == 1
        assert liar not in [hop.endpoint for hop in cache.session.hops]


@of_llama
def test_a_cache_drops_positions_of_other_taps(chain: LocalSwarm) -> None:
    ids = tokens(8)
    states = states_of(chain.folder, ids)
    with chain.visit() as visit:
        model = visit.model()
        with model.session() as cache:
            with torch.no_grad():
                assert model.send_tokens(ids, cache).finish().shape == (1, 8, 64)
            for taps in ((2, 3), (2, 3), (3, 2, 2)):
                cache.remote.use_taps(taps)
                cache.remote.reset()
                torch.testing.assert_close(step(model, cache, ids), joined(states, taps), **CLOSE)
            for wrong in ((7,), (-1, 2)):
                cache.remote.use_taps(wrong)
                with pytest.raises(ValueError, match="blocks of 6"):
                    step(model, cache, ids)
