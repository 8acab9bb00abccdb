"""The metrics of the gateway for Prometheus."""

from __future__ import annotations

import asyncio

from tests.unit.serve.fake_model import FakeModel
from tests.unit.serve.serving import GREEDY, Serve, Server, Told, until


def test_metrics_count_requests_and_tokens(serve: Serve) -> None:
    async def does(server: Server) -> None:
        first = await server.chat("Who are you?", max_tokens=8)
        said = first["choices"][0]["message"]["content"]
        second = await server.chat("Who are you?", said, "And I?", max_tokens=8)
        several = await server.complete(prompt=["Bees", "Ants"], max_tokens=4, n=2)
        scored = await server.complete(prompt="Bees", max_tokens=0)
        replies = (first, second, several, scored)
        assert (await server.http.post("/v1/completions", json={"model": "other", "prompt": "a"})).status_code == 404
        told = await Told.by(server)
        for kind in ("prompt", "completion"):
            assert told(f"{kind}_tokens_total") == sum(reply["usage"][f"{kind}_tokens"] for reply in replies)
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert told("cached_tokens_total") == cached > 0
        assert told("requests_total", path="/v1/chat/completions", status="200") == 2
        assert told("requests_total", path="/v1/completions", status="404") == 1
        assert told("request_seconds_count", path="/v1/completions") == 3
        assert told("time_to_first_token_seconds_count") == 3  # the scored prompt without an answer has none
        assert told("time_per_output_token_seconds_count") == 4  # one for each prompt that was answered
        assert told("sent_bytes_total") > told("received_bytes_total") > 0
        assert (told("kept_sessions"), told("requests_running"), told("cancelled_total")) == (1, 0, 0)
        assert told("kept_tokens") >= cached
        assert told("failover_seconds_count", cause="lost") == told("failures_total", cause="overloaded") == 0

    serve(does)


def test_metrics_count_waiting_and_disconnected_requests(serve: Serve, model: FakeModel) -> None:
    model.may_step.clear()

    async def does(server: Server) -> None:
        begun = asyncio.create_task(server.complete(prompt="Bees", max_tokens=2))
        await until(lambda: server.admission.running == 1)
        waits = asyncio.create_task(server.complete(prompt="Ants", max_tokens=2))
        await until(lambda: server.admission.waiting == 1)
        refused = await server.http.post("/v1/completions", json=GREEDY | {"prompt": "Flies"})
        assert refused.status_code == 429
        told = await Told.by(server)
        assert (told("requests_running"), told("requests_waiting")) == (1, 1)
        assert told("failures_total", cause="overloaded") == 1
        for task in (waits, begun):
            task.cancel()
        await asyncio.gather(begun, waits, return_exceptions=True)
        await until(lambda: server.admission.running == server.admission.waiting == 0)
        assert (await Told.by(server))("cancelled_total") == 2

    serve(does, at_a_time=1, waiting=1)


def test_metrics_need_a_key_if_there_are_keys(serve: Serve) -> None:
    async def does(server: Server) -> None:
        assert (await server.http.get("/metrics")).status_code == 401
        told = await Told.by(server, headers={"authorization": "Bearer sk-metrics"})
        assert told("requests_total", path="/metrics", status="401") == 1

    serve(does, keys=["sk-metrics"])
