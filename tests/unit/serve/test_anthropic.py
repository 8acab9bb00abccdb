"""Anthropic's protocol: the chats that its requests become, and the form of its answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from pydantic import ValidationError

from splitnet.serve.answers.parser import ToolCall
from splitnet.serve.apis.anthropic import AnthropicWriter, MessagesRequest, error_body
from splitnet.serve.chat import Delta
from splitnet.serve.failures import ApiError
from splitnet.serve.generation import Ended
from splitnet.serve.request_gate import validated
from splitnet.serve.responses import stream_parts

USER = {"role": "user", "content": "hi"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}


def request(*messages: dict[str, Any], **more: Any) -> MessagesRequest:
    return MessagesRequest.model_validate({"model": "m", "max_tokens": 9, "messages": messages or [USER]} | more)


def test_messages_take_the_form_of_chat_templates() -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "x"},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "a", "name": "f", "input": {"b": [1]}, "caller": {"type": "direct"}},
        {"type": "tool_use", "id": "c", "name": "g", "input": {}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "c", "content": "no", "is_error": True},
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": t} for t in ("x", "y")]},
        {"type": "tool_result", "tool_use_id": "z"},
        {"type": "text", "text": "Go on"},
    ]
    chat = request(
        {"role": "system", "content": "Now."},
        USER,
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": results},
        {"role": "system", "content": "<note/>"},
        {"role": "user", "content": "please"},
        system="Be brief.",
    ).chat
    calls = [("a", "f", {"b": [1]}), ("c", "g", {})]
    assert chat.messages == [
        {"role": "system", "content": "Be brief.\nNow."},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
                for id, name, arguments in calls
            ],
        },
        {"role": "tool", "content": "Error: no", "tool_call_id": "c"},
        {"role": "tool", "content": "x\ny", "tool_call_id": "a"},
        {"role": "tool", "content": "", "tool_call_id": "z"},
        {"role": "user", "content": "Go on\n<note/>\nplease"},
    ]


@pytest.mark.parametrize(
    ("choice", "offered", "to_call", "several"),
    [
        (None, 2, [], True),
        ({"type": "auto", "disable_parallel_tool_use": True}, 2, [], False),
        ({"type": "any"}, 2, ["f", "g"], True),
        ({"type": "tool", "name": "g"}, 2, ["g"], True),
        ({"type": "none"}, 0, [], True),
    ],
)
def test_which_tools_may_and_must_be_called(choice: Any, offered: int, to_call: list[str], several: bool) -> None:
    chat = request(tools=[TOOL, TOOL | {"name": "g", "strict": True}], tool_choice=choice).chat
    assert len(chat.functions) == offered and chat.several_calls == several
    assert [function.name for function in chat.to_call] == to_call
    assert all(function.parameters == {"type": "object"} for function in chat.functions)


def test_schema_may_be_in_output_config_or_output_format() -> None:
    given = {"type": "json_schema", "schema": {"type": "integer"}}
    for more in ({"output_format": given}, {"output_config": {"format": given, "effort": "max"}}):
        chat = request(tools=[TOOL], **more).chat
        assert chat.answer_schema == {"type": "integer"} and len(chat.functions) == 1


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "h"}}, "not in tools: add it"),
        ({"tools": [TOOL], "tool_choice": {"type": "auto", "name": TOOL["name"]}}, "tool_choice.name"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "defer_loading"),
        ({"thinking": {"type": "between_tools"}}, "thinking"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"inference_geo": "eu"}, "inference_geo"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "'document'"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
    ],
)
def test_unsupported_requests_are_refused(more: dict[str, Any], wrong: str) -> None:
    with pytest.raises((ValidationError, ApiError), match=wrong):
        _ = request(**more).chat


def test_refusals_name_the_parameter() -> None:
    hosted = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/tiff", "data": "AA=="}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [image]}
    given = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}
    for more, says in (
        ({"tools": [hosted]}, "'web_search_20250305' is not supported, only 'custom'"),
        ({"messages": [{"role": "user", "content": [image]}]}, "'image/tiff' is not supported, only 'image/jpeg'"),
        ({"messages": [{"role": "user", "content": [result]}]}, "'image/tiff' is not supported, only 'image/jpeg'"),
        ({"messages": [{"role": "assistant", "content": [image]}]}, "send them in messages of the user"),
    ):
        with pytest.raises(ApiError, match=says):
            validated(MessagesRequest, given | more)


async def happening(events: Sequence[Delta | Ended | Exception]) -> AsyncIterator[Delta | Ended]:
    for event in events:
        if isinstance(event, Exception):
            raise event
        yield event


def written(*events: Delta | Ended | Exception, shows_thinking: bool = True) -> tuple[list[Any], Any]:
    """The events of a stream, and the answer in one piece (None if it fails)."""

    async def write() -> tuple[list[Any], Any]:
        answers = [AnthropicWriter("m", 7, 9, shows_thinking) for _ in range(2)]
        chunks = [chunk async for chunk in stream_parts(answers[0], happening(events))]
        streamed = [json.loads(chunk.split("data: ")[1]) for chunk in chunks]
        assert all(chunk.startswith(f"event: {each['type']}\n") for chunk, each in zip(chunks, streamed, strict=True))
        fails = any(isinstance(event, Exception) for event in events)
        return streamed, None if fails else await answers[1].whole_body(happening(events))

    return asyncio.run(write())


CALL = ToolCall("f", '{"a": 1}', "call_1")
ALL = (
    Delta(0, reasoning="I "),
    Delta(0, reasoning="see.", text="So"),
    Delta(0, text=": "),
    Delta(0, calls=[CALL, ToolCall("g", "{}", "call_2")]),
    Delta(0, finish="tool_calls"),
    Ended(7, 4, 9),
)


def test_a_stream_adds_up_to_the_answer_in_one_piece() -> None:
    streamed, whole = written(*ALL)
    assert [each["type"] for each in whole["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert whole["content"][0]["thinking"] == "I see." and whole["content"][1]["text"] == "So: "
    assert whole["content"][2] == {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": 1}}
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("tool_use", None)
    used = {"input_tokens": 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4, "output_tokens": 9}
    assert whole["usage"] == used

    begins, *inside, ends, last = streamed
    assert begins["message"]["content"] == [] and begins["message"]["usage"]["input_tokens"] == 7
    assert ends["delta"] == {"stop_reason": "tool_use", "stop_sequence": None} and ends["usage"] == used
    assert last == {"type": "message_stop"}
    blocks: list[dict[str, Any]] = []
    stopped = 0
    for each in inside:
        if each["type"] == "content_block_start":
            assert stopped == len(blocks), "one block after the other"
            blocks.append(each["content_block"])
        elif each["type"] == "content_block_stop":
            stopped += 1
        else:
            for name, new in each["delta"].items():
                if name == "partial_json":
                    blocks[each["index"]]["input"] = json.loads(new)
                elif name != "type":
                    blocks[each["index"]][name] += new
        assert each["index"] == len(blocks) - 1
    assert blocks == whole["content"] and stopped == len(blocks)


def test_omitted_thinking_is_not_sent() -> None:
    streamed, whole = written(*ALL, shows_thinking=False)
    assert [each["type"] for each in whole["content"]] == ["text", "tool_use", "tool_use"]
    assert "see." not in json.dumps(streamed)


@pytest.mark.parametrize(
    ("last", "reason", "stopped"),
    [
        ((Delta(0, finish="stop"), Ended(7, 0, 5)), "end_turn", None),
        ((Delta(0, finish="stop", stopped="!"), Ended(7, 0, 5)), "stop_sequence", "!"),
        ((Delta(0, finish="length"), Ended(7, 0, 9)), "max_tokens", None),
        ((Delta(0, finish="length"), Ended(7, 0, 8)), "model_context_window_exceeded", None),
    ],
)
def test_stop_reasons(last: Sequence[Delta | Ended], reason: str, stopped: str | None) -> None:
    streamed, whole = written(*last)
    assert whole["content"] == [{"type": "text", "text": ""}], "clients take the first block"
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, stopped)
    assert streamed[-2]["delta"] == {"stop_reason": reason, "stop_sequence": stopped}


def test_an_error_is_the_last_event() -> None:
    streamed, _ = written(Delta(0, text="So"), ApiError(503, "no peers"))
    error = {"type": "overloaded_error", "message": "no peers"}
    assert streamed[-1] == {"type": "error", "error": error} == error_body(ApiError(503, "no peers"))
    assert [each["type"] for each in streamed[:-1]] == ["message_start", "content_block_start", "content_block_delta"]
