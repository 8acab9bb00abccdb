"""A gateway that listens at a port, for the official clients of other protocols."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from splitnet.serve.answers.grammars import Grammars
from tests.unit.serve.fake_model import FakeModel
from tests.unit.serve.serving import MODEL, Server, listening

ALIAS, KEY, POSITIONS = "claude-sonnet-5", "sk-protocols", 1024
TEMPLATE = (
    "{{ tools or '' }}{% for m in messages %}{{ m.role }}: {{ m.reasoning_content or '' }}{{ m.content }}"
    '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}"
    "{{ m.tool_call_id }}\n{% endfor %}"
    "assistant:{{ '' if enable_thinking else ' -' }}"
)
THINKING = TEMPLATE.replace("{{ '' if enable_thinking else ' -' }}", "<think>")  # the model always thinks
CITY = {"enum": ["Paris", "Rome"]}
SCHEMA = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}
COLD = {"temperature": 0}
SAID: list[Any] = [{"role": "user", "content": "Bees fly"}]


@contextmanager
def gateway(tokenizer: Any, grammars: Grammars, keys: Sequence[str] = (), template: str = TEMPLATE) -> Iterator[str]:
    """Runs a gateway; yields its URL."""
    tokenizer.chat_template = template
    model = FakeModel(POSITIONS)
    server = Server(model, tokenizer, grammars=grammars, positions=POSITIONS, names=[ALIAS], keys=keys)
    try:
        with listening(server.app) as url:
            yield url
    finally:
        server.generations.close()


def of_openai(url: str, messages: list[Any] = SAID, **body: Any) -> Any:
    """The message of the gateway's answer in OpenAI's API."""
    given = {"model": MODEL, "temperature": 0, "max_tokens": 12, "messages": messages} | body
    reply = httpx.post(f"{url}/v1/chat/completions", json=given, headers={"Authorization": f"Bearer {KEY}"})
    return reply.json()["choices"][0]["message"]
