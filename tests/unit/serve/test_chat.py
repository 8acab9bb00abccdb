"""Chats over HTTP in each protocol, with a stand-in that writes typical answers of models."""

from __future__ import annotations

import json
from typing import Any

import pytest

from splitnet.serve.answers.grammars import Grammars
from tests.unit.serve.stand_in import MODEL, client

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
SAID = [{"role": "user", "content": "How is the weather in Paris?"}]
ARGUMENTS = {"city": "Paris. Observation: sunny"}
WRITTEN = json.dumps({"name": "get_weather", "arguments": ARGUMENTS})
TAGGED = f"<tool_call>\n{WRITTEN}\n</tool_call>"
STOP = ["Observation:"]


def asked(api: str, *, required: bool = False, stop: bool = False, **more: Any) -> tuple[str, dict[str, Any]]:
    """The path and the body of a request in a protocol."""
    own: dict[str, Any]
    if api == "openai":
        own = {"tools": [TOOL]} | ({"tool_choice": "required"} if required else {}) | ({"stop": STOP} if stop else {})
        return "/v1/chat/completions", {"messages": SAID} | own | more
    if api == "responses":
        own = {"tools": [{"type": "function", **FUNCTION}]} | ({"tool_choice": "required"} if required else {})
        return "/v1/responses", {"input": SAID[0]["content"]} | own | more
    if api == "anthropic":
        own = {"tools": [{"name": "get_weather", "input_schema": PARAMETERS}], "max_tokens": 200, "model": MODEL}
        own |= {"tool_choice": {"type": "any"}} if required else {}
        return "/v1/messages", {"messages": SAID} | own | ({"stop_sequences": STOP} if stop else {}) | more
    own = {"tools": [TOOL], "model": MODEL, "stream": False} | ({"options": {"stop": STOP}} if stop else {})
    return "/api/chat", {"messages": SAID} | own | more


def answered(api: str, reply: dict[str, Any]) -> tuple[str, list[tuple[str, Any]], str]:
    """The text and calls of an answer of a protocol, and the reason of its end."""
    if api == "openai":
        (choice,) = reply["choices"]
        calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
        made = [(call["name"], json.loads(call["arguments"])) for call in calls]
        return choice["message"]["content"] or "", made, choice["finish_reason"]
    if api == "responses":
        made = [(item["name"], json.loads(item["arguments"])) for item in reply["output"] if "arguments" in item]
        texts = [part["text"] for item in reply["output"] for part in item.get("content", ())]
        return "".join(texts), made, reply["output"][-1]["type"]
    if api == "anthropic":
        made = [(block["name"], block["input"]) for block in reply["content"] if block["type"] == "tool_use"]
        texts = [block["text"] for block in reply["content"] if block["type"] == "text"]
        return "".join(texts), made, reply["stop_reason"]
    made = [
        (call["function"]["name"], call["function"]["arguments"]) for call in reply["message"].get("tool_calls", ())
    ]
    return reply["message"]["content"], made, reply["done_reason"]


def streamed(api: str, body: str) -> tuple[str, list[str]]:
    """The text of a stream, and the names of its calls."""
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith(("data: {", "{"))]
    text, names = "", list[str]()
    for event in map(json.loads, lines):
        if api == "openai":
            delta = event["choices"][0]["delta"]
            text += delta.get("content") or ""
            names += [call["function"]["name"] for call in delta.get("tool_calls", ())]
        elif api == "responses":
            text += event["delta"] if event["type"] == "response.output_text.delta" else ""
            names += [event["name"]] if event["type"] == "response.function_call_arguments.done" else []
        elif api == "anthropic":
            text += event.get("delta", {}).get("text", "")
            names += [event["content_block"]["name"]] if event.get("content_block", {}).get("name") else []
        else:
            text += event["message"]["content"]
            names += [call["function"]["name"] for call in event["message"].get("tool_calls", ())]
    return text, names


APIS = ["openai", "responses", "anthropic", "ollama"]
CALLED = {"openai": "tool_calls", "responses": "function_call", "anthropic": "tool_use", "ollama": "stop"}
CALL = [("get_weather", ARGUMENTS)]


@pytest.mark.parametrize("api", ["openai", "responses", "anthropic"])
def test_stop_strings_do_not_cut_a_required_call(api: str, tokenizer: Any, grammars: Grammars) -> None:
    http, writer = client(tokenizer, lambda prompt: ["Observation: none.", TAGGED], grammars)
    path, body = asked(api, required=True, stop=api != "responses")
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    assert answered(api, reply.json()) == ("", CALL, CALLED[api])
    assert writer.asked[0].grammar is not None


def test_stop_strings_end_text_but_not_strict_calls(tokenizer: Any, grammars: Grammars) -> None:
    strict = [{"type": "function", "function": FUNCTION | {"strict": True}}]
    http, _ = client(tokenizer, lambda prompt: [f"Let me look.\n{TAGGED}\nSo. Observation: more"], grammars)
    path, body = asked("openai", stop=True, tools=strict)
    text, calls, finish = answered("openai", http.post(path, json=body).json())
    assert (text, calls, finish) == ("Let me look.\nSo.", CALL, "tool_calls")
    free = answered("openai", http.post(path, json=asked("openai", stop=True)[1]).json())
    assert not free[1] and free[0].endswith('"Paris. ') and free[2] == "stop", "a call that nothing binds ends there"


BARE = [WRITTEN, f"```json\n{WRITTEN}\n```", WRITTEN.replace('"arguments"', '"parameters"')]


@pytest.mark.parametrize("text", BARE)
@pytest.mark.parametrize("api", APIS)
def test_a_call_without_marks_is_a_call_in_each_protocol(api: str, text: str, tokenizer: Any) -> None:
    http, _ = client(tokenizer, lambda prompt: [text])
    path, body = asked(api)
    assert answered(api, http.post(path, json=body).json()) == ("", CALL, CALLED[api])
    stream = http.post(path, json=body | {"stream": True}).text
    assert streamed(api, stream) == ("", ["get_weather"])


@pytest.mark.parametrize("api", APIS)
def test_text_with_json_stays_text_in_a_stream(api: str, tokenizer: Any) -> None:
    text = f"{WRITTEN} is what I would call."
    http, _ = client(tokenizer, lambda prompt: [text])
    path, body = asked(api)
    told, calls, _ = answered(api, http.post(path, json=body).json())
    assert (told, calls) == (text, [])
    stream = http.post(path, json=body | {"stream": True}).text
    assert streamed(api, stream) == (text, [])


def test_requested_json_is_not_a_call(tokenizer: Any, grammars: Grammars) -> None:
    http, _ = client(tokenizer, lambda prompt: [WRITTEN], grammars)
    path, body = asked("openai", response_format={"type": "json_object"})
    assert answered("openai", http.post(path, json=body).json()) == (WRITTEN, [], "stop")


def test_without_parallel_calls_only_one_unmarked_call_is_read(tokenizer: Any) -> None:
    http, _ = client(tokenizer, lambda prompt: [f"{WRITTEN}\n{WRITTEN}"])
    path, body = asked("openai")
    assert len(answered("openai", http.post(path, json=body).json())[1]) == 2
    assert len(answered("openai", http.post(path, json=body | {"parallel_tool_calls": False}).json())[1]) == 1
