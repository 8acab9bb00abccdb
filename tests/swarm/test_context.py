"""An admitted request has memory until its end; a request without memory is refused before a position is computed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from peers.counters import WorkKind
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import ContextTooLong, PeerBusy, TooLongForPeers
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.serve import generation
from splitnet.wire.receipts import RECORD
from tests.e2e.small_model import small_model
from tests.swarm.harness import LocalSwarm, local_swarm, wait_until
from tests.unit.serve.serving import GREEDY, TEMPLATE, Server

pytestmark = pytest.mark.swarm

POSITIONS = 240  # Positions that the peer has memory for.
MORE = GREEDY | {"ignore_eos": True}
PROMPT = torch.arange(20)[None]


@pytest.fixture(scope="module")
def swarm(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, node: DhtDirectory) -> Iterator[LocalSwarm]:
    folder = small_model(tmp_path_factory.mktemp("context") / "small", demo_checkpoint, seed=0)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with local_swarm(folder, [(0, 6)], node=node) as swarm:
        span = swarm.peers[0].span
        memory = int(POSITIONS * 9 / 8 * (span.kv_bytes_per_position + RECORD)) + 20_000
        swarm.peers.pop().close()
        swarm.add(0, 6, kv_memory=memory, prefixes=False)
        assert POSITIONS <= swarm.peers[0].service.sessions.capacity < POSITIONS + 60
        yield swarm


@pytest.fixture
def model(swarm: LocalSwarm) -> Iterator[RemoteCausalLM]:
    wait_until(lambda: not len(swarm.peers[0].service.sessions))
    # Without this, the record would show the memory use of the previous test for seconds.
    swarm.peers[0]._announcer.publish()
    with swarm.newcomer() as visitor:
        yield visitor.model()


@pytest.fixture
def server(swarm: LocalSwarm, model: RemoteCausalLM) -> Iterator[Server]:
    server = Server(model, AutoTokenizer.from_pretrained(swarm.folder), keep=0)
    yield server
    server.generations.close()


def computed(swarm: LocalSwarm) -> int:
    """Positions computed so far."""
    return sum(work.positions for peer in swarm.peers for work in peer.counters.work.values())


async def begun(swarm: LocalSwarm, request: Coroutine[Any, Any, httpx.Response]) -> asyncio.Task[httpx.Response]:
    """A request for which the peer has begun to compute."""
    before = computed(swarm)
    running = asyncio.create_task(request)
    while computed(swarm) == before:
        await asyncio.sleep(0)
    return running


def test_an_admitted_request_gets_all_its_tokens_and_the_next_is_refused(
    swarm: LocalSwarm, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "RESERVED_ANSWER", 20)  # This applies only to answers of unknown length.

    async def does() -> None:
        async with server.running():
            body = MORE | {"prompt": "Bees", "max_tokens": 150}
            first = await begun(swarm, server.http.post("/v1/completions", json=body))
            # The record shows the reservation only after seconds, so the peer itself refuses this request.
            late = await server.http.post("/v1/completions", json=MORE | {"prompt": "Ants", "max_tokens": 150})
            assert not first.done()
            assert late.status_code == 429 and late.json()["error"]["code"] == "peers_busy", late.text
            assert (await first).json()["usage"]["completion_tokens"] == 150

    asyncio.run(does())


def test_a_request_that_fits_no_peer_is_refused_before_computation(swarm: LocalSwarm, server: Server) -> None:
    before = computed(swarm)

    async def does() -> None:
        async with server.running():
            wide = {"prompt": "Bees", "max_tokens": 200, "n": 2, "temperature": 1}
            for body in (wide, wide | {"stream": True}):
                refused = await server.http.post("/v1/completions", json=MORE | body)
                assert refused.status_code == 400, refused.text
                error = refused.json()["error"]
                assert error["code"] == "context_length_exceeded"
                assert "fits into no peer of blocks 0..5" in error["message"] and "--kv-memory" in error["message"]

    asyncio.run(does())
    assert computed(swarm) == before


@pytest.mark.full
def test_parallel_answers_have_memory_from_the_start(swarm: LocalSwarm, server: Server) -> None:
    async def does() -> None:
        async with server.running():
            two = MORE | {"prompt": "Bees", "max_tokens": 100, "n": 2, "temperature": 1}
            both = await begun(swarm, server.http.post("/v1/completions", json=two))
            busy = await server.http.post("/v1/completions", json=MORE | {"prompt": "Ants", "max_tokens": 60})
            assert busy.status_code == 429, busy.text
            assert (await both).json()["usage"]["completion_tokens"] == 200

    asyncio.run(does())


@pytest.mark.default_cases(alone=(False,))
@pytest.mark.parametrize("alone", [True, False])
def test_an_answer_of_unknown_length_ends_when_memory_runs_out(
    swarm: LocalSwarm, server: Server, model: RemoteCausalLM, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    monkeypatch.setattr(generation, "RESERVED_ANSWER", 40)
    monkeypatch.setattr(generation, "LEAST_ANSWER", 16)
    chat = MORE | {"messages": [{"role": "user", "content": "Tell me of bees"}]}

    async def does() -> dict[str, Any]:
        async with server.running():
            reply = await server.http.post("/v1/chat/completions", json=chat)
            assert reply.status_code == 200, reply.text
            return reply.json()

    with model.session(0 if alone else 120):
        if not alone:
            model.generate(PROMPT[:, :2], max_new_tokens=1)
        answer = asyncio.run(does())
    usage, (choice,) = answer["usage"], answer["choices"]
    assert choice["finish_reason"] == "length"
    tokens = usage["prompt_tokens"] + usage["completion_tokens"]
    free = swarm.peers[0].service.sessions.capacity
    if alone:
        assert free - 40 - 1 <= tokens <= free
    else:
        assert usage["completion_tokens"] >= 40 and tokens <= free - 120


def test_generate_reserves_memory_for_all_its_tokens_or_fails(swarm: LocalSwarm, model: RemoteCausalLM) -> None:
    before = computed(swarm)
    with pytest.raises(TooLongForPeers, match="300 positions"):
        model.generate(PROMPT.expand(2, -1), max_new_tokens=130)
    assert computed(swarm) == before
    with model.session():
        assert model.generate(PROMPT, max_new_tokens=130, eos_token_id=None).shape == (1, 150)
        prompts = swarm.peers[0].counters.work[WorkKind.PREFILL]
        between = prompts.positions  # The last tokens are counted a moment after their results are sent.
        with pytest.raises(PeerBusy) as busy:
            model.generate(PROMPT, max_new_tokens=130, cache=model.new_cache())
        assert not isinstance(busy.value, ContextTooLong)
        assert prompts.positions == between


def test_a_refused_session_may_be_used_for_a_shorter_text(model: RemoteCausalLM) -> None:
    with model.session():
        with pytest.raises(TooLongForPeers):
            model.generate(PROMPT.expand(2, -1), max_new_tokens=130)
        assert model.generate(PROMPT, max_new_tokens=5, eos_token_id=None).shape == (1, 25)


def test_a_text_longer_than_the_context_is_refused_before_computation(swarm: LocalSwarm, model: RemoteCausalLM) -> None:
    before, most = computed(swarm), model.swarm.facts.max_positions
    assert most is not None
    with pytest.raises(ContextTooLong, match=f"context of {most}"):
        model.generate(PROMPT, max_new_tokens=most - 18)
    assert computed(swarm) == before
