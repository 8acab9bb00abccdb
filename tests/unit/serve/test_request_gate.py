"""Requests are prepared in other threads than the event loop's, and clients take turns."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from splitnet.serve.admission import ApiClient
from splitnet.serve.failures import ApiError
from splitnet.serve.request_gate import LARGE_BYTES, PreparationQueue

SMALL, LARGE = 10, LARGE_BYTES + 1


class Caller:
    """A request of a client, which may disconnect."""

    def __init__(self, client: str) -> None:
        self.state = SimpleNamespace(client=ApiClient(client, tokens_per_minute=1))
        self.state.client.spend_tokens(100)
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


class Work:
    """Work that records its beginnings and ends once `may_end` is set."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.may_end = threading.Event()

    def __call__(self, name: str) -> str:
        self.begun.append(name)
        assert self.may_end.wait(10)
        return name

    async def has_begun(self, *names: str) -> None:
        async with asyncio.timeout(10):
            while self.begun != [*names]:
                await asyncio.sleep(0.001)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_client_with_many_requests_does_not_delay_others(size: int) -> None:
    async def does() -> None:
        preparing, work = PreparationQueue(), Work()
        async with asyncio.TaskGroup() as tasks:
            for number in range(16):
                tasks.create_task(preparing.run_in_turn(Caller("many"), size, work, f"many {number}"))  # pyright: ignore[reportArgumentType]
            await work.has_begun("many 0")
            one = tasks.create_task(preparing.run_in_turn(Caller("one"), size, work, "one"))  # pyright: ignore[reportArgumentType]
            if size == SMALL:
                await work.has_begun("many 0", "one")
            work.may_end.set()
            assert await one == "one"
        assert work.begun.index("one") == 1 and len(work.begun) == 17

    asyncio.run(does())


def test_the_request_of_a_disconnected_client_is_not_prepared() -> None:
    async def does() -> None:
        preparing, work = PreparationQueue(), Work()
        callers = [Caller("a") for _ in range(3)]
        tasks = [
            asyncio.create_task(preparing.run_in_turn(caller, SMALL, work, f"{number}"))  # pyright: ignore[reportArgumentType]
            for number, caller in enumerate(callers)
        ]
        await work.has_begun("0")
        callers[1].gone.set()
        with pytest.raises(ApiError, match="has disconnected"):
            await tasks[1]
        work.may_end.set()
        assert (await tasks[0], await tasks[2]) == ("0", "2")
        assert work.begun == ["0", "2"]

    asyncio.run(does())


def test_a_thread_keeps_its_place_after_its_client_disconnects() -> None:
    async def does() -> None:
        preparing, work = PreparationQueue(), Work()
        callers = [Caller("a") for _ in range(3)]
        tasks = [
            asyncio.create_task(preparing.run_in_turn(caller, SMALL, work, f"{number}"))  # pyright: ignore[reportArgumentType]
            for number, caller in enumerate(callers)
        ]
        await work.has_begun("0")
        callers[0].gone.set()
        for _ in range(20):  # iterations of the loop, in which a free place would be taken
            await asyncio.sleep(0.001)
        assert work.begun == ["0"], "one thread for each client"
        work.may_end.set()
        with pytest.raises(ApiError, match="has disconnected"):
            await tasks[0]
        assert [await task for task in tasks[1:]] == ["1", "2"]

    asyncio.run(does())
