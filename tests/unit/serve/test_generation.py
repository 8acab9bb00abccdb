"""Requests run in threads, in kept or new sessions, and end with an answer or an error."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from splitnet.serve import generation
from tests.unit.serve.fake_model import FakeModel, FakeSession
from tests.unit.serve.serving import GREEDY, Serve, Server, until


def test_a_request_leaves_no_compute_threads(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(generation, "end_threads", lambda: ended.append(threading.current_thread().name))

    async def does(server: Server) -> None:
        await server.complete(prompt="Bees fly", max_tokens=2)
        await until(lambda: len(ended) == 1)

    serve(does)
    assert ended[0].startswith("splitnet-serve")


def test_two_requests_never_share_a_kept_session(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async def does(server: Server) -> None:
        first = await server.chat("Who are you?", max_tokens=8)
        kept, all_here = server.generations.kept, threading.Barrier(3)
        take = kept.take_session

        def take_together(*given: Any) -> Any:
            taken = take(*given)
            all_here.wait(30)
            return taken

        monkeypatch.setattr(kept, "take_session", take_together)
        twins = await asyncio.gather(*(server.chat("Who are you?", max_tokens=8) for _ in range(3)))
        assert all(twin["choices"] == first["choices"] for twin in twins)
        cached = sorted(twin["usage"]["prompt_tokens_details"]["cached_tokens"] for twin in twins)
        assert cached[0] == 0 and cached[-1] > 0

    serve(does)


def test_an_error_during_a_stream_is_sent_in_it(serve: Serve, model: FakeModel) -> None:
    async def does(server: Server) -> None:
        running = asyncio.create_task(
            server.http.post("/v1/completions", json=GREEDY | {"prompt": "Bees", "max_tokens": 250, "stream": True})
        )
        await until(lambda: len(model.sessions) == 1)
        server.generations.end_requests()
        ended = await running
        if ended.status_code == 200:  # the first token had been sent
            assert '"code":"server_ending"' in ended.text and "[DONE]" not in ended.text
        else:
            assert ended.status_code == 503 and ended.json()["error"]["code"] == "server_ending"
        later = await server.http.post("/v1/completions", json=GREEDY | {"prompt": "Bees"})
        assert later.status_code == 503 and "Retry-After" in later.headers
        await until(lambda: not model.sessions)
        server.generations.close()
        closed = await server.http.post("/v1/completions", json=GREEDY | {"prompt": "Bees"})
        assert closed.status_code == 503 and closed.json()["error"]["code"] == "server_ending"
        assert not server.generations.progress.working_peers()
        assert all(answer.ended for answer in server.generations.progress.answers()), "nothing stays counted"

    serve(does)


def test_too_many_waiting_requests_are_refused(serve: Serve) -> None:
    async def does(server: Server) -> None:
        body = GREEDY | {"prompt": "Bees", "max_tokens": 30}
        replies = await asyncio.gather(*(server.http.post("/v1/completions", json=body) for _ in range(4)))
        assert sorted(reply.status_code for reply in replies) == [200, 200, 429, 429]
        for reply in replies:
            if reply.status_code == 429:
                assert int(reply.headers["Retry-After"]) >= 1
                assert reply.json()["error"]["type"] == "rate_limit_error"

    serve(does, at_a_time=1, waiting=1)


def test_a_prefix_that_the_peers_stored_counts_as_cached(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeSession, "reused", 2)

    async def does(server: Server) -> Any:
        return (await server.chat("Who are you?", max_tokens=2))["usage"]

    assert serve(does)["prompt_tokens_details"]["cached_tokens"] == 2
