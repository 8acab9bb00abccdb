"""Ollama's protocol: the chats that its requests become, and the form of its answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from pydantic import ValidationError

from splitnet.serve.answers.parser import ToolCall
from splitnet.serve.apis.ollama import GenerateRequest, OllamaChatRequest, OllamaWriter
from splitnet.serve.chat import Delta
from splitnet.serve.failures import ApiError
from splitnet.serve.generation import Ended
from splitnet.serve.request_gate import validated
from splitnet.serve.responses import stream_parts


def chat(*messages: dict[str, Any], **more: Any) -> OllamaChatRequest:
    return OllamaChatRequest.model_validate({"model": "m", "messages": messages} | more)


def call(name: str, **more: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": {"a": 1}}} | more


def called(name: str, id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": {"a": 1}}}


def test_messages_take_the_form_of_chat_templates() -> None:
    said = [
        {"role": "system", "content": "Be brief.", "images": []},
        {"role": "user"},
        {"role": "assistant", "thinking": "Hm.", "tool_calls": [call("f"), call("g", id="x"), call("f")]},
        {"role": "tool", "tool_name": "g", "content": "of g"},
        {"role": "tool", "content": "of the first f"},
        {"role": "tool", "tool_name": "f", "content": "of the second f"},
        {"role": "assistant", "content": "So?", "tool_calls": [call("g")]},
        {"role": "tool", "tool_call_id": "y", "content": "of y"},
        {"role": "tool", "tool_name": "h", "content": "of none"},
    ]
    first = [called("f", "call_2_0"), called("g", "x"), called("f", "call_2_2")]
    assert chat(*said).chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": first},
        {"role": "tool", "content": "of g", "tool_call_id": "x", "name": "g"},
        {"role": "tool", "content": "of the first f", "tool_call_id": "call_2_0"},
        {"role": "tool", "content": "of the second f", "tool_call_id": "call_2_2", "name": "f"},
        {"role": "assistant", "content": "So?", "tool_calls": [called("g", "call_6_0")]},
        {"role": "tool", "content": "of y", "tool_call_id": "y"},
        {"role": "tool", "content": "of none", "tool_call_id": "", "name": "h"},
    ]


def test_a_prompt_is_a_chat_or_a_bare_text() -> None:
    given = {"model": "m", "prompt": "hi", "suffix": "", "template": "", "context": []}
    asked = GenerateRequest.model_validate(given | {"system": "Be brief."}).chat
    assert asked.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    raw = GenerateRequest.model_validate(given | {"system": "", "raw": True}).chat
    assert raw.messages == [{"role": "user", "content": "hi"}] and raw.is_text and not asked.is_text
    assert not GenerateRequest.model_validate({"model": "m", "system": "Be brief."}).chat.messages


def test_options_become_sampling_and_limits() -> None:
    unused = {"num_keep": 4, "num_gpu": 1, "use_mmap": True, "penalize_newline": False, "numa": True}
    neutral = {"mirostat": 0, "tfs_z": 1.0, "typical_p": 1, "repeat_last_n": -1, "vocab_only": False}
    assert chat(options=dict.fromkeys(neutral)).chat == chat(options={}).chat
    options = {"seed": 5, "repeat_penalty": 1.1, "stop": "a", "num_predict": 7} | unused | neutral
    asked = chat(options=options, format="json").chat
    assert asked.sampling["seed"] == 5 and asked.sampling["repetition_penalty"] == 1.1
    assert (asked.stop_strings, asked.max_tokens, asked.fits) == (["a"], 7, False)
    assert (asked.answer_schema, asked.schema_param) == ({"type": "object"}, "format")
    assert chat(format={}).chat.answer_schema == {"type": "object"}
    free = chat(options={"seed": -1, "num_predict": -1, "stop": ["a", "b"]}, format="").chat
    assert free.sampling["seed"] is free.max_tokens is free.answer_schema is None and free.stop_strings == ["a", "b"]


def test_images_stand_before_the_text_of_their_message() -> None:
    said = [
        {"role": "user", "content": "a", "images": ["aaaa", "bbbb"]},
        {"role": "system", "content": "", "images": []},
    ]
    chat = validated(OllamaChatRequest, {"model": "m", "messages": said}).chat
    first, second = ({"type": "image", "data": data} for data in ("aaaa", "bbbb"))
    assert chat.messages[0]["content"] == [first, second, {"type": "text", "text": "a"}]
    assert chat.messages[1]["content"] == ""
    asked = validated(GenerateRequest, {"model": "m", "system": "S", "images": ["aaaa"]}).chat
    assert asked.messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [first, {"type": "text", "text": ""}]},
    ]
    with pytest.raises(ApiError, match=r"messages\.0\.images: Input should be a valid list"):
        validated(OllamaChatRequest, {"model": "m", "messages": [{"role": "user", "images": "aaaa"}]})


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"options": {"mirostat": 1}}, "mirostat"),
        ({"options": {"typical_p": 0.5}}, "typical_p"),
        ({"options": {"repeat_last_n": 64}}, "repeat_last_n"),
        ({"options": {"embedding_only": True}}, "embedding_only"),
        ({"options": {"unheard_of": 1}}, "unheard_of"),
        ({"options": {"num_predict": -3}}, "num_predict"),
        ({"options": 3}, "options"),
        ({"think": "a lot"}, "think"),
        ({"truncate": True}, "truncate"),
        ({"format": "yaml"}, "format"),
    ],
)
def test_unsupported_requests_are_refused(more: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValidationError, match=wrong):
        chat(**more)


async def happening(events: Sequence[Delta | Ended | Exception]) -> AsyncIterator[Delta | Ended]:
    for event in events:
        if isinstance(event, Exception):
            raise event
        yield event


def streamed(*events: Delta | Ended | Exception, is_chat: bool = True) -> list[Any]:
    async def write() -> list[Any]:
        answer = OllamaWriter("m", is_chat, [time.perf_counter_ns()] * 2)
        assert json.loads(answer.alive)["done"] is False, "clients read every line as a part of the answer"
        return [json.loads(chunk) async for chunk in stream_parts(answer, happening(events)) if chunk.endswith("}\n")]

    return asyncio.run(write())


def test_a_stream_adds_up_to_the_answer_in_one_piece() -> None:
    calls = [ToolCall("f", '{"a": 1}', "call_1"), ToolCall("g", "{}", "call_2")]
    events = (
        Delta(0, reasoning="I "),
        Delta(0, reasoning="see.", text="So"),
        Delta(0),
        Delta(0, text=": ", calls=calls[:1]),
        Delta(0, calls=calls[1:], finish="tool_calls"),
        Ended(7, 4, 9),
    )
    *parts, last = streamed(*events)
    assert [part["message"].get("thinking") for part in parts] == ["I ", "see.", None, None]
    assert "".join(part["message"]["content"] for part in parts) == "So: " and not last["message"]["content"]
    assert (last["done"], last["done_reason"], last["prompt_eval_count"], last["eval_count"]) == (True, "stop", 7, 9)
    whole = asyncio.run(OllamaWriter("m", True, [0, 0]).whole_body(happening(events)))
    functions = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    assert [call["function"] for call in whole["message"]["tool_calls"]] == functions
    assert (whole["message"]["content"], whole["message"]["thinking"]) == ("So: ", "I see.")
    assert [call for part in parts for call in part["message"].get("tool_calls", ())] == whole["message"]["tool_calls"]
    assert [part["response"] for part in streamed(*events, is_chat=False)] == ["", "So", ": ", "", ""]


def test_an_error_is_the_last_line() -> None:
    first, error = streamed(Delta(0, text="So"), ApiError(503, "no peers"))
    assert first["message"]["content"] == "So" and error == {"error": "no peers"}
