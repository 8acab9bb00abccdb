"""Which model answers a request, and when models are loaded and closed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.responses import StreamingResponse

from splitnet.cli import serve as command
from splitnet.errors import DirectoryError, PeerLost, SplitnetError
from splitnet.serve import gateway as module
from splitnet.serve.apis.openai import API
from splitnet.serve.failures import ApiError
from splitnet.serve.gateway import Gateway, LoadableModel
from splitnet.serve.request_gate import REQUEST_CALLBACKS, ApiKeys, Gate


class World:
    """Models that are loaded and closed."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.open: list[str] = []

    def model(self, name: str) -> Any:
        served = SimpleNamespace(model_names=[name])
        self.open.append(name)
        served.close = lambda: self.open.remove(name)
        return served

    def offer(self, name: str) -> LoadableModel:
        def load() -> Any:
            self.loads.append(name)
            return self.model(name)

        return LoadableModel([name, f"{name}-too"], load)


@pytest.fixture
def world() -> World:
    return World()


async def find(gateway: Gateway, name: str) -> Any:
    """The model that a request finds; the request ends at once."""
    with request():
        return await gateway.find_model(name)


@contextmanager
def request() -> Iterator[None]:
    with ExitStack() as ends:
        ends.callback(REQUEST_CALLBACKS.reset, REQUEST_CALLBACKS.set(ends))
        yield


async def wait_until_open(world: World, *names: str) -> None:
    """Waits for models that are closed in other threads than the event loop's."""
    async with asyncio.timeout(10):
        while sorted(world.open) != sorted(names):
            await asyncio.sleep(0.001)


def test_models_are_loaded_on_demand_and_the_least_recently_used_is_closed(world: World) -> None:
    gateway = Gateway(world.model("first"), [world.offer(name) for name in "abc"], keep=2)
    assert gateway.model_names == ["first", "a", "a-too", "b", "b-too", "c", "c-too"]

    async def come() -> None:
        assert (await find(gateway, "first")).model_names == ["first"]
        assert not world.loads
        both = await asyncio.gather(find(gateway, "a"), find(gateway, "a-too"))
        assert both[0] is both[1] and world.loads == ["a"]
        await find(gateway, "b")
        await find(gateway, "a")
        await find(gateway, "c")
        await wait_until_open(world, "first", "a", "c")
        with request():
            await gateway.find_model("a")
            await find(gateway, "b")
            await wait_until_open(world, "first", "a", "b")

    asyncio.run(come())
    gateway.close()
    assert not world.open


def test_with_one_kept_model_alternating_requests_replace_it(world: World) -> None:
    gateway = Gateway(world.model("first"), [world.offer(name) for name in "ab"], keep=1)

    async def come() -> None:
        for name in "aabba":
            assert (await find(gateway, name)).model_names == [name]
            await wait_until_open(world, "first", name)

    asyncio.run(come())
    assert world.loads == ["a", "b", "a"]


def test_a_model_is_in_use_until_the_end_of_the_answer(world: World) -> None:
    gateway = Gateway(world.model("first"), [world.offer(name) for name in "ab"], keep=1)
    waiting: list[asyncio.Task[Any]] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        async def answer() -> AsyncIterator[bytes]:
            yield b"begun"
            waiting.append(asyncio.create_task(find(gateway, "b")))
            while gateway._freed.is_set():
                await asyncio.sleep(0)
            assert world.loads == ["a"]

        await gateway.find_model("a")
        await StreamingResponse(answer())(scope, receive, send)

    async def come() -> None:
        gateway._freed.set()
        transport = httpx.ASGITransport(Gate(inside, (API,), ApiKeys({})))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            assert (await client.get("/v1/a")).text == "begun"
        assert (await waiting[0]).model_names == ["b"]
        await wait_until_open(world, "first", "b")

    asyncio.run(come())


def test_a_request_is_refused_after_a_bounded_wait_for_models_in_use(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.0)
    gateway = Gateway(world.model("first"), [world.offer(name) for name in "ab"], keep=1)

    async def come() -> None:
        with request():
            await gateway.find_model("a")
            with pytest.raises(ApiError, match="1 other models are in use") as refused:
                await find(gateway, "b")
            assert refused.value.status == 429
            assert (await find(gateway, "a-too")).model_names == ["a"]
        await find(gateway, "b")

    asyncio.run(come())
    assert world.loads == ["a", "b"]


def test_concurrent_requests_share_one_load_which_delays_no_other_model(world: World) -> None:
    may_end = threading.Event()

    def load() -> Any:
        world.loads.append("slow")
        assert may_end.wait(10)
        return world.model("slow")

    gateway = Gateway(world.model("first"), [LoadableModel(["slow"], load), world.offer("a"), world.offer("b")])

    async def come() -> None:
        slow = [asyncio.create_task(find(gateway, "slow")) for _ in range(3)]
        while not world.loads:
            await asyncio.sleep(0.001)
        slow[0].cancel()
        for name in "ab":
            assert (await find(gateway, name)).model_names == [name]
        may_end.set()
        assert [served.model_names for served in await asyncio.gather(*slow[1:])] == [["slow"]] * 2

    asyncio.run(come())
    assert world.loads == ["slow", "a", "b"]


def test_a_failed_load_closes_no_other_model(world: World) -> None:
    def fails(error: Exception) -> Callable[[], Any]:
        def load() -> Any:
            raise error

        return load

    broken = [
        LoadableModel(["far"], fails(PeerLost("the peer has gone"))),
        LoadableModel(["bad"], fails(DirectoryError("no swarm"))),
    ]
    gateway = Gateway(world.model("first"), [*broken, world.offer("a")], keep=1)

    async def come() -> None:
        await find(gateway, "a")
        for name, status in (("far", 502), ("bad", 503)):
            with pytest.raises(ApiError, match=f"'{name}' cannot be served: ") as refused:
                await find(gateway, name)
            assert refused.value.status == status
        assert (await find(gateway, "a")).model_names == ["a"]
        assert world.loads == ["a"] and world.open == ["first", "a"]

    asyncio.run(come())


def test_an_unknown_name_starts_a_search_for_models(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = 0

    def search() -> list[LoadableModel]:
        nonlocal searches
        searches += 1
        if searches == 2:
            raise DirectoryError("nobody answers")
        return [world.offer("new")]

    gateway = Gateway(world.model("first"), search=search)

    async def come() -> None:
        assert (await find(gateway, "new")).model_names == ["new"]
        with pytest.raises(ApiError, match="has no model 'other': use 'first' or 'new' or 'new-too'"):
            await find(gateway, "other")
        assert searches == 1, "not again so soon"
        monkeypatch.setattr(module, "REFRESH_S", 0.0)
        await gateway.refresh()
        assert searches == 2 and "new" in gateway.model_names

    asyncio.run(come())


def test_requests_share_a_search_and_its_errors_are_not_theirs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH_S", 0.0)
    searches = 0

    def search() -> list[LoadableModel]:
        nonlocal searches
        searches += 1
        time.sleep(0.05)
        if searches == 2:
            raise ValueError("no SplitnetError")
        return [world.offer("new")]

    gateway = Gateway(world.model("first"), search=search)

    async def come() -> None:
        both = await asyncio.gather(find(gateway, "new"), find(gateway, "new"))
        assert both[0] is both[1] and searches == 1
        await gateway.refresh()
        assert searches == 2 and "new" in gateway.model_names
        await gateway.refresh()
        assert searches == 3

    asyncio.run(come())


def test_searches_for_models_are_repeated_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now, fails, tried = 0.0, True, list[str]()
    monkeypatch.setattr(
        "splitnet.swarm.swarm_models.models_of",
        lambda swarm: [SimpleNamespace(name=f"of/{id}", fingerprint=id, missing=()) for id in swarm],
    )

    def named(name: str, id: str) -> Any:
        tried.append(id)
        if fails:
            raise SplitnetError("the hub does not answer")
        return name

    found: Any = command.HubModelFinder(named, lambda: now)
    assert found(["a"]) == found(["a"]) == [] and tried == ["a"]
    now, fails = command.AGAIN_S + 1, False
    assert found(["a"]) == ["of/a"] and tried == ["a", "a"]
    assert len(found([str(number) for number in range(100)])) == command.MOST_FOUND
