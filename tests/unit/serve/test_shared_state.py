"""Gateways that share a server of Valkey: answers, quotas and stored responses of one are known to the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from splitnet.security.identity import KeyOptions
from splitnet.serve import server, shared_state
from splitnet.serve.shared_state import SharedState
from tests.unit.serve.fake_model import FakeModel
from tests.unit.serve.serving import MODEL, Server, Told, listening, until
from tests.unit.serve.test_answer_records import STREAMS, events_of, without_measures
from tests.valkey import NEEDS_VALKEY, Valkey

pytestmark = NEEDS_VALKEY
PATH = "/v1/chat/completions"
KEY = {"Idempotency-Key": "one"}


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    with closing(Valkey(tmp_path)) as state:
        yield state


@contextmanager
def gateways(
    url: str, tokenizer: Any, keys: Mapping[str, KeyOptions] | None = None
) -> Iterator[list[tuple[Server, str]]]:
    """Two gateways that listen, and their URLs."""
    with ExitStack() as ends:
        made: list[tuple[Server, str]] = []
        for _ in range(2):
            one = Server(FakeModel(), tokenizer, keys=keys or {}, state=SharedState(url))
            ends.enter_context(closing(one.generations))
            made.append((one, ends.enter_context(listening(one.app))))
        yield made


def run(gateways: list[tuple[Server, str]], does: Callable[..., Awaitable[None]], **headers: str) -> None:
    """Runs the coroutine of a test with a client for each of these gateways."""

    async def come() -> None:
        async with AsyncExitStack() as ends:
            clients = [httpx.AsyncClient(base_url=url, headers=headers, timeout=20) for _, url in gateways]
            await does(*[await ends.enter_async_context(client) for client in clients])

    asyncio.run(come())


@pytest.mark.parametrize("path", STREAMS)
def test_another_gateway_continues_an_answer(valkey: Valkey, tokenizer: Any, path: str) -> None:
    async def does(first: httpx.AsyncClient, second: httpx.AsyncClient) -> None:
        begun = await events_of(first, path, KEY, most=7)
        rest = await events_of(second, path, {"Last-Event-ID": begun[-1][0]})
        whole = await events_of(first, path, KEY)
        assert without_measures(begun + rest) == without_measures(whole) and len(whole) > 20
        assert Told((await second.get("/metrics")).text)("resumed_answers_total") == 1

    with gateways(valkey.url, tokenizer) as urls:
        run(urls, does)


def test_the_gateway_that_was_asked_last_has_the_answer(valkey: Valkey, tokenizer: Any) -> None:
    with gateways(valkey.url, tokenizer) as urls:
        model: Any = urls[0][0].generations.model

        async def does(first: httpx.AsyncClient, second: httpx.AsyncClient) -> None:
            model.may_step.clear()
            model.free_steps = 5
            old = asyncio.create_task(events_of(first, PATH, KEY))
            try:
                await until(lambda: model.free_steps == 0)
                whole = await events_of(second, PATH, KEY)
            finally:
                model.may_step.set()
            assert whole[-1][1] == "[DONE]"
            events = await old
            assert events[-1][1]["error"]["code"] == "answer_moved"
            assert without_measures(events[:-1]) == without_measures(whole)[: len(events) - 1]

        run(urls, does)


def test_a_quota_holds_for_all_gateways_together(
    valkey: Valkey, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SHARE_S", 0.01)
    asked = {"model": MODEL, "prompt": "Hello", "max_tokens": 60}

    async def does(first: httpx.AsyncClient, second: httpx.AsyncClient) -> None:
        assert (await first.post("/v1/completions", json=asked)).status_code == 200

        async def refused() -> httpx.Response:
            while (reply := await second.post("/v1/completions", json=asked | {"max_tokens": 1})).status_code == 200:
                await asyncio.sleep(0.01)
            return reply

        reply = await asyncio.wait_for(refused(), 10)
        assert reply.status_code == 429 and int(reply.headers["Retry-After"]) > 0
        assert (await first.post("/v1/completions", json=asked)).status_code == 429

    with gateways(valkey.url, tokenizer, {"secret": KeyOptions(tokens_per_minute=40)}) as urls:
        run(urls, does, Authorization="Bearer secret")


def test_responses_are_found_by_all_gateways(valkey: Valkey, tokenizer: Any) -> None:
    async def does(first: httpx.AsyncClient, second: httpx.AsyncClient) -> None:
        asked = {"model": MODEL, "input": "Hello", "max_output_tokens": 5}
        made = (await first.post("/v1/responses", json=asked)).json()
        assert (await second.get(f"/v1/responses/{made['id']}")).json() == made
        follows = asked | {"previous_response_id": made["id"]}
        assert (await second.post("/v1/responses", json=follows)).status_code == 200
        assert (await second.delete(f"/v1/responses/{made['id']}")).status_code == 200
        for gone in (first, second):
            assert (await gone.get(f"/v1/responses/{made['id']}")).status_code == 404

    with gateways(valkey.url, tokenizer) as urls:
        run(urls, does)


def test_answers_go_on_without_the_state(valkey: Valkey, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_state, "AGAIN_S", 0.05)
    monkeypatch.setattr(server, "SHARE_S", 0.01)

    async def does(first: httpx.AsyncClient, second: httpx.AsyncClient) -> None:
        async def state_of(gateway: httpx.AsyncClient) -> str:
            return (await gateway.get("/health")).json()["state"]

        async def becomes(state: str) -> None:
            async with asyncio.timeout(10):
                for each in (first, second):
                    while await state_of(each) != state:
                        await asyncio.sleep(0.01)

        begun = await events_of(first, PATH, KEY, most=7)
        valkey.close()
        await becomes("unreachable")
        assert Told((await first.get("/metrics")).text)("state_up") == 0
        rest = await events_of(first, PATH, {"Last-Event-ID": begun[-1][0]})
        assert rest[-1][1] == "[DONE]"
        reply = await second.post(PATH, json=STREAMS[PATH] | {"stream": True}, headers={"Last-Event-ID": begun[-1][0]})
        assert reply.status_code == 409 and "begins anew" in reply.text
        valkey.start()
        await becomes("ok")
        whole = await events_of(first, PATH, KEY)
        assert without_measures(begun + rest) == without_measures(whole)

    with gateways(valkey.url, tokenizer) as urls:
        run(urls, does)


def test_a_lost_record_is_written_again(valkey: Valkey, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_state, "AGAIN_S", 0.0)
    with gateways(valkey.url, tokenizer) as urls:
        model: Any = urls[0][0].generations.model

        async def does(first: httpx.AsyncClient, second: httpx.AsyncClient) -> None:
            model.may_step.clear()
            model.free_steps = 5
            old = asyncio.create_task(events_of(first, PATH, KEY))
            try:
                await until(lambda: model.free_steps == 0)
                valkey.close()
                valkey.start()
            finally:
                model.may_step.set()
            events = await old
            assert events[-1][1] == "[DONE]"
            assert without_measures(await events_of(second, PATH, KEY)) == without_measures(events)

        run(urls, does)
