"""The paths of the app, and its models."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS

from splitnet.serve.answers.grammars import Grammars
from splitnet.serve.pooling import Pooling
from tests.unit.serve.fake_model import FakeModel
from tests.unit.serve.serving import MODEL, Serve, Server


def test_models_and_health(serve: Serve) -> None:
    async def does(server: Server) -> None:
        assert (await server.http.get("/health")).json() == {"status": "ok"}
        (entry,) = (await server.http.get("/v1/models")).json()["data"]
        assert entry["id"] == MODEL
        assert (await server.http.get(f"/v1/models/{MODEL}")).json() == entry
        assert (await server.http.get("/v1/models/other")).status_code == 404

    serve(does)


def test_health_names_the_missing_blocks(serve: Serve, model: FakeModel) -> None:
    model.local_spans = ((0, 2), (3, 4))  # pyright: ignore[reportAttributeAccessIssue]

    async def does(server: Server) -> None:
        reply = await server.http.get("/health")
        assert reply.status_code == 503 and int(reply.headers["retry-after"]) > 0
        error = reply.json()["error"]
        assert error["code"] == "blocks_not_served" and "blocks 2, 4..5 of 6 are served by nobody" in error["message"]

    serve(does)


def test_a_model_has_several_names(serve: Serve) -> None:
    async def does(server: Server) -> None:
        entries = (await server.http.get("/v1/models")).json()["data"]
        assert [entry["id"] for entry in entries] == [MODEL, "gpt-4o"]
        assert (await server.http.get("/v1/models/gpt-4o")).json() == entries[1]
        reply = await server.complete(model="gpt-4o", prompt="Bees", max_tokens=1)
        assert reply["model"] == MODEL
        refused = await server.http.post("/v1/completions", json={"model": "gpt", "prompt": "a"})
        assert refused.status_code == 404 and "use 'small' or 'gpt-4o'" in refused.json()["error"]["message"]

    serve(does, names=["gpt-4o"])


GENERATING = ["POST /v1/chat/completions", "POST /v1/completions", "POST /v1/messages", "POST /v1/responses"]
GENERATING += ["POST /api/chat", "POST /api/generate", "POST /infill"]
READING = ["POST /v1/embeddings", "POST /v1/rerank", "POST /v2/rerank"]
READING += ["POST /v1/messages/count_tokens", "POST /api/embed", "POST /api/embeddings"]
READING += ["GET /api/ps", "GET /api/tags", "GET /api/version", "POST /api/show"]
READING += ["POST /tokenize", "POST /detokenize", "GET /props", "GET /version", "POST /apply-template"]
READING += ["POST /v1/chat/completions/input_tokens", "POST /v1/responses/input_tokens"]
NAMED = ["GET /v1/models/{name}", "GET /v1/responses/{id}", "DELETE /v1/responses/{id}"]
PATHS = sorted(["GET /health", "GET /v1/models", *NAMED, *GENERATING, *READING])
MOST = {"POST /api/chat": "options", "POST /api/generate": "options", "POST /v1/responses": "max_output_tokens"}
MOST |= {"POST /infill": "n_predict"}
OFTEN = ("POST /v1/chat/completions", "POST /v1/embeddings")


@pytest.mark.default_cases(path=OFTEN)
@pytest.mark.parametrize("path", PATHS)
def test_generated_requests_are_answered_by_the_openapi_schema(
    path: str, model: FakeModel, tokenizer: Any, grammars: Grammars
) -> None:
    tokenizer.infill_marks = ["<issue_start>", "<issue_comment>", "<issue_closed>"]
    server = Server(model, tokenizer, grammars=grammars, pooling=Pooling(reranks=True, most=256))
    described = schemathesis.openapi.from_dict(server.app.openapi())
    every: list[Any] = [result.ok() for result in described.get_all_operations()]  # pyright: ignore
    operations = {operation.label: operation for operation in every}
    assert sorted(operations) == PATHS
    # Requests that fit the schema may be refused: the context is too short, or an option needs another one.
    left_out = [CHECKS.get_one("positive_data_acceptance")]
    statuses: list[int] = []

    with asyncio.Runner() as runner:

        @settings(max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
        @given(case=operations[path].as_strategy())
        def answers(case: Any) -> None:
            if isinstance(case.body, dict):
                bound = MOST.get(path, "max_tokens")
                short = {bound: {"num_predict": 2} if bound == "options" else 2}
                case.body = case.body | {"model": MODEL} | (short if path in GENERATING else {})
            request = case.as_transport_kwargs(base_url="http://127.0.0.1")
            chosen = {name: request[name] for name in ("method", "url", "headers", "params", "json") if name in request}

            async def send() -> httpx.Response:
                async with server.running():
                    return await server.http.request(**chosen)

            response = runner.run(send())
            statuses.append(response.status_code)
            case.validate_response(response, excluded_checks=left_out)

        try:
            answers()
        finally:
            server.generations.close()
    assert path in NAMED or 200 in statuses
