"""Wrong requests are refused with a status and a sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.serve.serving import GREEDY, Serve, Server

HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
CALLS = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "has no model 'other': use 'small'"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 300}, 400, "more than the model's context of 256"),
        ("/v1/completions", {"prompt": [49152]}, 400, "0 to 49151"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"49152": 1}}, 400, "0 to 49151"),
        ("/v1/completions", {"prompt": "a", "best_of": 2}, 400, "best_of: only 1"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [49152], "min_tokens": 1}, 400, "0 to 49151"),
        ("/v1/chat/completions", HELLO | {"stop_token_ids": [49152]}, 400, "0 to 49151"),
        ("/v1/chat/completions", HELLO | CALLS | {"min_tokens": 9}, 400, "calls set where an answer ends"),
        ("/v1/chat/completions", HELLO | CALLS | {"ignore_eos": True}, 400, "calls set where an answer ends"),
        ("/v1/completions", b'{"model": "small", "prompt": "\\ud800"}', 400, "not valid JSON"),
        (
            "/api/embed",
            b'{"model": "small", "input": "a", "options": {"num_ctx": 4096}}',
            400,
            "options.num_ctx: the model's context",
        ),
        ("/v1/completions", b"{", 400, "not valid JSON"),
        (
            "/v1/completions",
            {"prompt": ["a " * 120] * 256, "echo": True, "logprobs": 20},
            400,
            "ask for fewer logprobs",
        ),
        ("/v1/completions", b'{"a":' * 500 + b"1" + b"}" * 500, 400, "nested too deep"),
        ("/v1/completions", b'{"model": "small", "prompt": [' + b"1," * 800_000 + b"1]}", 413, "too many values"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}] * 100_000}, 413, "too many values"),
        (
            "/detokenize",
            json.dumps({"tokens": [5] * 257}).encode(),
            400,
            "257 tokens are more than the model's context of 256",
        ),
        ("/v1/completions", b" " * (16 * 2**20 + 1), 413, "longer than"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a " * 300}]}, 400, "shorten the prompt"),
        ("/v1/completions", b'"prompt"', 400, "a JSON object"),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "a"}],
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "rope"}}},
            },
            400,
            "cannot be kept to: Invalid type: rope",
        ),
        ("/v1/images", {}, 404, "POST /v1/completions, for the models 'small'"),
        ("/v1/models", {}, 405, "GET /v1/models, GET /v1/models/{name}, POST /v1/chat/completions"),
    ],
)
def test_errors(serve: Serve, path: str, body: Any, status: int, message: str) -> None:
    async def does(server: Server) -> None:
        content = body if isinstance(body, bytes) else json.dumps(GREEDY | body)
        reply = await server.http.post(path, content=content, headers={"content-type": "application/json"})
        assert reply.status_code == status, reply.text
        told = reply.json()["error"]
        assert message in (told["message"] if isinstance(told, dict) else told)

    serve(does)
