"""The data of the dashboard, and who gets it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from splitnet.serve.admission import ANYONE
from splitnet.serve.dashboard import Dashboard
from splitnet.serve.gateway import LoadableModel
from tests.unit.serve.fake_model import FakeModel
from tests.unit.serve.serving import GREEDY, Server, until

KEY = "sk-dashboard"


@pytest.fixture
def server(model: FakeModel, tokenizer: Any) -> Iterator[Server]:
    server = Server(model, tokenizer, keys=[KEY])
    yield server
    server.generations.close()


async def shown(server: Server, **headers: str) -> list[Any]:
    """What somebody sees who looks at a server that is about to end, which therefore ends the stream."""
    server.generations.draining = True
    reply = await server.http.get("/dashboard/events", headers={"Authorization": f"Bearer {KEY}"} | headers)
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
    return [json.loads(event.removeprefix("data: ")) for event in reply.text.split("\n\n")[:-1]]


def test_the_answers_of_all_models_are_told(server: Server, model: FakeModel, tokenizer: Any) -> None:
    other = Server(model, tokenizer)
    loaded = dataclasses.replace(other.app.state.gateway.served, name="other")
    server.app.state.gateway.offers = [LoadableModel(["other"], lambda: loaded)]

    async def does() -> None:
        async with server.running():
            server.http.headers["Authorization"] = f"Bearer {KEY}"
            ids = [(await server.complete(prompt="Bees", max_tokens=3))["id"]]
            ids.append((await server.complete(model="other", prompt="Bees", max_tokens=5))["id"])
            await until(lambda: all(log.answers()[0].ended is not None for log in logs))
            model.may_step.clear()
            body = GREEDY | {"model": "other", "prompt": "Bees", "max_tokens": 2}
            asked = [asyncio.create_task(server.http.post("/v1/completions", json=body)) for _ in range(5)]
            await until(lambda: len(logs[1].answers()) == 5 and other.admission.waiting == 1)
            snapshot, _ = await shown(server)
            other.generations.end_requests()
            await asyncio.gather(*asked)
        assert [(answer["id"], answer["tokens"]) for answer in snapshot["answers"] if answer["ended"]] == [
            (ids[0], 3),
            (ids[1], 5),
        ]
        assert snapshot["requests"] == {"running": 4, "waiting": 1}

    logs = [each.generations.progress for each in (server, other)]
    asyncio.run(does())
    other.generations.close()


def test_requests_that_run_and_wait_are_counted(server: Server, model: FakeModel) -> None:
    model.may_step.clear()

    async def does() -> None:
        async with server.running():
            server.http.headers["Authorization"] = f"Bearer {KEY}"
            body = GREEDY | {"prompt": "Bees", "max_tokens": 2}
            asked = [asyncio.create_task(server.http.post("/v1/completions", json=body)) for _ in range(5)]
            await until(lambda: len(model.sessions) == 4 and server.admission.waiting == 1)
            snapshot, _ = await shown(server)
            server.generations.end_requests()
            await asyncio.gather(*asked)
            assert snapshot["requests"] == {"running": 4, "waiting": 1}
            assert [answer["ended"] for answer in snapshot["answers"]] == [False] * 4
            await until(lambda: all(each.ended is not None for each in server.generations.progress.answers()))

    asyncio.run(does())


def test_the_page_is_free_and_its_data_needs_a_key(server: Server) -> None:
    async def does() -> None:
        async with server.running():
            page = await server.http.get("/")
            assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
            assert "script-src 'self'" in page.headers["content-security-policy"]
            script = await server.http.get("/page/dashboard.js")
            assert script.status_code == 200 and script.headers["content-type"].startswith("text/javascript")
            for path in ("/page/none.js", "/page/..%2fgate.py", "/page/%2e%2e/gate.py"):
                assert (await server.http.get(path)).status_code == 404
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                refused = await server.http.get("/dashboard/events", headers=headers)
                assert refused.status_code == 401 and refused.json()["error"]["code"] == "wrong_key"
            assert await shown(server)

    asyncio.run(does())


def test_a_stream_that_is_open_ends_with_the_server(server: Server) -> None:
    async def does() -> None:
        stream = Dashboard(server.app.state.gateway).stream(ANYONE)
        assert json.loads((await anext(stream)).removeprefix("data: "))["type"] == "snapshot"
        server.generations.draining = True
        async with asyncio.timeout(10):
            assert [json.loads(event.removeprefix("data: "))["type"] async for event in stream] == ["events"]

    asyncio.run(does())
