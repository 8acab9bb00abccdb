"""Streams of answers in each protocol."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from ollama import Client

from splitnet.serve import responses
from splitnet.serve.answers.grammars import Grammars
from tests.unit.serve.fake_model import FakeModel
from tests.unit.serve.serving import MODEL, Server, listening


def test_clients_accept_keep_alive_events(
    model: FakeModel, tokenizer: Any, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "FIRST_EVENT_S", 0.0)
    monkeypatch.setattr(responses, "KEEP_ALIVE_S", 0.001)
    server = Server(model, tokenizer, grammars=grammars)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        """The model computes nothing before a part of the answer is sent."""
        model.may_step.clear()

        async def noting(message: Any) -> None:
            await send(message)
            if message.get("body"):
                model.may_step.set()

        await server.app(scope, receive, noting)

    body: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    with listening(app) as url:
        reply = httpx.post(f"{url}/v1/messages", json=body | {"max_tokens": 8, "stream": True})
        assert "event: ping\n" in reply.text.partition("content_block")[0]
        with Anthropic(base_url=url, api_key="a") as asking, asking.messages.stream(**body, max_tokens=8) as stream:
            assert stream.get_final_message().usage.output_tokens == 8
        reply = httpx.post(f"{url}/api/chat", json=body | {"options": {"num_predict": 8}})
        lines = [json.loads(line) for line in reply.text.splitlines()]
        assert not lines[0]["message"]["content"] and not lines[0]["done"]
        with Client(url) as client:
            parts = list(client.chat(**body, stream=True, options={"num_predict": 8}))
            assert parts[-1].eval_count == 8
    server.generations.close()
