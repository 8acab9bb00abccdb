"""Which model answers a request, when it is loaded, and which one gives way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from splitnet.errors import DirectoryError, PeerLost
from splitnet.serve import gateway as module
from splitnet.serve.failures import ApiError
from splitnet.serve.gateway import Gateway, Offer


class World:
    """Models that are loaded and closed; all of them are used long ago."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "PREPARING_S", -1.0)
        self.loads: list[str] = []
        self.open: list[str] = []

    def model(self, name: str) -> Any:
        served = SimpleNamespace(names=[name], admission=SimpleNamespace(running=0, waiting=0))
        self.open.append(name)
        served.close = lambda: self.open.remove(name)
        return served

    def offer(self, name: str) -> Offer:
        def load() -> Any:
            self.loads.append(name)
            return self.model(name)

        return Offer([name, f"{name}-too"], load)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_models_are_loaded_once_when_they_are_asked_for_and_the_least_used_gives_way(world: World) -> None:
    gateway = Gateway(world.model("first"), [world.offer(name) for name in "abc"], keep=3)
    assert gateway.names == ["first", "a", "a-too", "b", "b-too", "c", "c-too"]

    async def come() -> None:
        assert (await gateway.find("first")).names == ["first"]
        assert not world.loads
        both = await asyncio.gather(gateway.find("a"), gateway.find("a-too"))
        assert both[0] is both[1] and world.loads == ["a"]
        await gateway.find("b")
        await gateway.find("a")
        await gateway.find("c")
        assert world.open == ["first", "a", "c"]
        (a,) = [served for served in gateway.loaded if served.names == ["a"]]
        a.admission.running = 1
        await gateway.find("b")
        assert world.open == ["first", "a", "b"], "what is in use stays"
        (b,) = [served for served in gateway.loaded if served.names == ["b"]]
        b.admission.running = 1
        with pytest.raises(ApiError, match="3 models are in use") as refused:
            await gateway.find("c")
        assert refused.value.status == 429

    asyncio.run(come())
    gateway.close()
    assert not world.open


def test_what_a_request_has_just_found_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PREPARING_S", 60.0)
    gateway = Gateway(world.model("first"), [world.offer(name) for name in "ab"], keep=2)

    async def come() -> None:
        await gateway.find("a")
        with pytest.raises(ApiError, match="in use"):
            await gateway.find("b")

    asyncio.run(come())


def test_a_model_that_cannot_be_loaded_ends_no_other(world: World) -> None:
    def fails(error: Exception) -> Callable[[], Any]:
        def load() -> Any:
            raise error

        return load

    broken = [Offer(["far"], fails(PeerLost("the peer has gone"))), Offer(["bad"], fails(DirectoryError("no swarm")))]
    gateway = Gateway(world.model("first"), [*broken, world.offer("a")])

    async def come() -> None:
        for name, status in (("far", 502), ("bad", 503)):
            with pytest.raises(ApiError, match=f"'{name}' cannot be served: ") as refused:
                await gateway.find(name)
            assert refused.value.status == status
        assert (await gateway.find("a")).names == ["a"]

    asyncio.run(come())


def test_models_of_the_swarm_are_looked_for_where_a_name_is_not_known(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = 0

    def search() -> list[Offer]:
        nonlocal searches
        searches += 1
        if searches == 2:
            raise DirectoryError("nobody answers")
        return [world.offer("new")]

    gateway = Gateway(world.model("first"), search=search)

    async def come() -> None:
        assert (await gateway.find("new")).names == ["new"]
        with pytest.raises(ApiError, match="has no model 'other': use 'first' or 'new' or 'new-too'"):
            await gateway.find("other")
        assert searches == 1, "not again so soon"
        monkeypatch.setattr(module, "REFRESH_S", 0.0)
        await gateway.refresh()
        assert searches == 2 and "new" in gateway.names

    asyncio.run(come())
