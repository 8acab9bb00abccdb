"""The times and the route of a request, in the headers of its answer."""

from __future__ import annotations

import asyncio
import re
import threading
from typing import Any

import pytest

from splitnet.errors import CoverageError
from splitnet.serve import generation, responses
from splitnet.serve.progress import HopView, RouteView
from splitnet.serve.responses import ServedModel
from splitnet.serve.trace import Trace
from tests.unit.serve.fake_model import FakeModel
from tests.unit.serve.serving import GREEDY, MODEL, Serve, Server, until

ROUTES = (
    RouteView((HopView("sn1aaaaaaaaaaaa", 0, 2), HopView("sn1bbbbbbbbbbbb", 2, 4)), ()),
    RouteView((HopView("sn1cccccccccccc", 5, 6),), ()),
)
ROUTE = "0:2 sn1aaaaaa, 2:4 sn1bbbbbb, 5:6 sn1cccccc"
WHOLE = ["prepare", "queue", "prefill", "decode", "total"]
MESSAGES = [{"role": "user", "content": "Hi"}]
ANSWERED = [
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3}),
    ("/v1/completions", {"prompt": ["Bees", "Ants"], "max_tokens": 3}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 3}),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 3}),
    ("/api/chat", {"messages": MESSAGES, "options": {"num_predict": 3}}),
]


@pytest.fixture(autouse=True)
def routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake model has no peers, so its sessions get a route here."""
    monkeypatch.setattr(generation, "routes_of", lambda swarm, session: ROUTES if session is not None else ())


def times(reply: Any) -> dict[str, float]:
    parts = [re.fullmatch(r"([a-z]+);dur=([\d.]+)", part) for part in reply.headers["server-timing"].split(", ")]
    return {part[1]: float(part[2]) for part in parts if part is not None}


def test_the_time_of_a_request_is_divided_into_its_parts() -> None:
    now = 1.0
    trace = Trace(lambda: now)
    for seconds, part in ((2, "prepare"), (3, "queue"), (5, None), (7, None), (11, None)):
        now += seconds
        if part is None:
            trace.note_event()
        else:
            trace.end_part(part)
    now += 13
    told = "prepare;dur=2000.0, queue;dur=3000.0, prefill;dur=5000.0, decode;dur=18000.0, total;dur=41000.0"
    assert trace.timing() == told and trace.route() == ""


@pytest.mark.parametrize(("path", "body"), ANSWERED)
def test_answers_of_every_api_have_times_and_a_route(serve: Serve, path: str, body: dict[str, Any]) -> None:
    async def does(server: Server) -> None:
        whole = await server.http.post(path, json={"model": MODEL, "stream": False} | body)
        assert whole.status_code == 200 and whole.headers["x-splitnet-route"] == ROUTE
        told = times(whole)
        assert list(told) == WHOLE and sum(told.values()) <= 2 * told["total"] + 0.3  # of rounding
        # The headers of a stream leave with its first token.
        stream = await server.http.post(path, json={"model": MODEL, "stream": True} | body)
        assert stream.status_code == 200 and stream.headers["x-splitnet-route"] == ROUTE
        assert list(times(stream)) == [*WHOLE[:3], "total"]

    serve(does)


def test_texts_that_are_only_read_have_times_and_a_route(serve: Serve) -> None:
    async def does(server: Server) -> None:
        reply = await server.http.post("/v1/embeddings", json={"model": MODEL, "input": "Bees"})
        assert list(times(reply)) == [*WHOLE[:3], "total"] and reply.headers["x-splitnet-route"] == ROUTE

    serve(does)


def test_an_answer_without_the_model_has_its_total_time_alone(serve: Serve) -> None:
    async def does(server: Server) -> None:
        for path in ("/v1/models", "/absent"):
            reply = await server.http.get(path)
            assert list(times(reply)) == ["total"] and "x-splitnet-route" not in reply.headers
        refused = await server.http.post("/v1/completions", json=GREEDY | {"prompt": [], "max_tokens": 1})
        assert refused.status_code == 400 and list(times(refused)) == ["total"]

    serve(does)


def test_the_route_can_be_left_out(serve: Serve) -> None:
    async def does(server: Server) -> None:
        body = GREEDY | {"prompt": "Bees", "max_tokens": 3}
        for stream in (False, True):
            reply = await server.http.post("/v1/completions", json=body | {"stream": stream})
            assert reply.status_code == 200 and "total" in times(reply) and "x-splitnet-route" not in reply.headers

    serve(does, names_route=False)


def test_waiting_for_a_place_counts_as_queue(serve: Serve, model: FakeModel) -> None:
    async def does(server: Server) -> None:
        body = GREEDY | {"max_tokens": 1}
        model.may_step.clear()
        first = asyncio.ensure_future(server.http.post("/v1/completions", json=body | {"prompt": "Bees"}))
        await until(lambda: server.admission.running == 1)
        second = asyncio.ensure_future(server.http.post("/v1/completions", json=body | {"prompt": "Ants"}))
        await until(lambda: server.admission.waiting == 1)
        model.may_step.set()
        began, waited = times(await first), times(await second)
        # The second request waits while the first request, which has its place, gets its token.
        assert waited["queue"] > began["queue"] and waited["queue"] + waited["prefill"] <= waited["total"] + 0.2

    serve(does, at_a_time=1)


def test_pages_of_allowed_sites_may_read_times_and_route(serve: Serve) -> None:
    async def does(server: Server) -> None:
        for origin, may_read in (("https://chat.example", True), ("http://localhost:1", True), ("https://a.b", False)):
            reply = await server.http.get("/v1/models", headers={"Origin": origin, "Authorization": "Bearer sk"})
            assert reply.status_code == 200
            assert (reply.headers.get("access-control-allow-origin") == origin) == may_read
            assert (reply.headers.get("timing-allow-origin") == origin) == may_read
            assert "Server-Timing, X-Splitnet-Route" in reply.headers["access-control-expose-headers"]

    serve(does, keys=["sk"], origins=["https://chat.example"])


def test_a_stream_without_some_blocks_ends_with_its_own_status(
    serve: Serve, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session waits longer for the blocks than streams wait for their first event."""
    looked = threading.Event()

    def missing(served: ServedModel) -> str:
        looked.set()
        return "2..3"

    def fails(**given: Any) -> Any:
        assert looked.wait(20)
        raise CoverageError("blocks 2..3 of small are served by nobody: start a peer")

    monkeypatch.setattr(responses, "FIRST_EVENT_S", 0.0)
    monkeypatch.setattr(ServedModel, "missing_blocks", missing)
    monkeypatch.setattr(model, "generate", fails)

    async def does(server: Server) -> None:
        reply = await server.http.post("/v1/completions", json=GREEDY | {"prompt": "Bees", "stream": True})
        assert reply.status_code == 503 and int(reply.headers["retry-after"]) > 0
        assert "blocks 2..3" in reply.text

    serve(does)
