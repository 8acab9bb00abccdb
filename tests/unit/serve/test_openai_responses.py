"""OpenAI's Responses API: messages from its items, its events, and stored responses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter, ValidationError

from splitnet.errors import PeerLost
from splitnet.serve.answers.parser import ToolCall
from splitnet.serve.apis import openai_responses
from splitnet.serve.apis.openai_responses import KeptResponses, ResponseRequest, ResponsesWriter, for_template
from splitnet.serve.chat import Delta
from splitnet.serve.failures import ApiError
from splitnet.serve.generation import Ended
from splitnet.serve.request_gate import validated
from splitnet.serve.responses import stream_parts as streamed_by

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
PARIS = ToolCall("weather", '{"city": "Paris"}', "call_1")
ROME = ToolCall("weather", '{"city": "Rome"}', "call_2")
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
TURN = [
    Delta(0, reasoning="Hm"),
    Delta(0, reasoning=", France."),
    Delta(0, "It is "),
    Delta(0, "Paris."),
    Delta(0, calls=[PARIS, ROME], finish="tool_calls"),
    Ended(7, 3, 5),
]


def body(**given: Any) -> ResponseRequest:
    return ResponseRequest.model_validate({"model": "m", "input": "Hi"} | given)


async def told(events: Sequence[Any]) -> AsyncIterator[Any]:
    for event in events:
        if isinstance(event, Exception):
            raise event
        yield event


def keeping(kept: list[dict[str, Any]]) -> Callable[[dict[str, Any]], Awaitable[None]]:
    async def keep(response: dict[str, Any]) -> None:
        kept.append(response)

    return keep


def streamed(events: Sequence[Any], **given: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """The events of a stream in OpenAI's types, and the stored responses."""
    kept: list[dict[str, Any]] = []
    answer = ResponsesWriter("m", body(**given), keeping(kept))

    async def read() -> list[str]:
        return [chunk async for chunk in streamed_by(answer, told(events))]

    found: list[Any] = []
    for number, chunk in enumerate(asyncio.run(read())):
        kind, data = chunk.removesuffix("\n\n").split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {document['type']}" and document["sequence_number"] == number
        found.append(EVENT.validate_python(document))
        assert type(found[-1]).__name__ != "dict"
    return found, kept


def test_events_in_their_order() -> None:
    events, kept = streamed(TURN, tools=[TOOL], metadata={"a": "b"}, instructions="Be kind.")
    of_text = ["output_item.added", "content_part.added", "{}.delta", "{}.delta", "{}.done", "content_part.done"]
    of_text.append("output_item.done")
    of_call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    kinds = ["created", "in_progress"]
    kinds += [kind.format("reasoning_text") for kind in of_text] + [kind.format("output_text") for kind in of_text]
    assert [event.type.removeprefix("response.") for event in events] == [*kinds, *of_call, *of_call, "completed"]
    last: Response = events[-1].response
    assert last.output_text == "It is Paris." and last.status == "completed" and last.metadata == {"a": "b"}
    assert last.instructions == "Be kind." and last.parallel_tool_calls and last.tools[0].type == "function"
    thought, message, *calls = last.output
    assert thought.type == "reasoning" and thought.content and thought.content[0].text == "Hm, France."
    assert message.type == "message" and message.status == "completed"
    assert [(call.call_id, call.name, call.arguments) for call in calls if call.type == "function_call"] == [
        ("call_1", "weather", PARIS.arguments),
        ("call_2", "weather", ROME.arguments),
    ]
    assert last.usage and (last.usage.input_tokens, last.usage.output_tokens, last.usage.total_tokens) == (7, 5, 12)
    assert last.usage.input_tokens_details.cached_tokens == 3
    assert [each["id"] for each in kept] == [last.id] == [events[0].response.id]
    added = [event for event in events if event.type == "response.output_item.added"]
    assert [event.output_index for event in added] == [0, 1, 2, 3]
    assert [event.item.id for event in added] == [item.id for item in last.output]


def test_a_whole_response_says_the_same() -> None:
    kept: list[dict[str, Any]] = []
    whole = asyncio.run(ResponsesWriter("m", body(), keeping(kept)).whole_body(told(TURN)))
    response = Response.model_validate(whole)
    assert kept == [whole] and response.output_text == "It is Paris." and len(response.output) == 4


@pytest.mark.parametrize("text", ["", "It is"])
def test_an_answer_that_is_cut(text: str) -> None:
    events, kept = streamed([Delta(0, text, finish="length"), Ended(1, 0, 2)])
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.output[0].status == "incomplete" and last.response.output_text == text and kept


def test_an_answer_that_is_cut_after_a_call() -> None:
    events, _ = streamed([Delta(0, calls=[PARIS], finish="length"), Ended(1, 0, 2)])
    assert events[-1].type == "response.incomplete" and events[-1].response.output[0].status == "completed"


def test_a_stream_that_fails() -> None:
    events, kept = streamed([Delta(0, "It"), PeerLost("a peer was lost")])
    assert events[-1].type == "response.failed" and not kept
    assert events[-1].response.error.message == "a peer was lost"
    answer = ResponsesWriter("m", body(), keeping(kept))
    limited = json.loads(answer.error_event(ApiError(429, "busy")).partition("data: ")[2])
    assert limited["response"]["error"] == {"code": "rate_limit_exceeded", "message": "busy"}


def test_items_as_templates_expect_them() -> None:
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Paris"}]},
        {"id": "r", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {
            "id": "m",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "phase": None,
            "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": None}],
        },
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Paris"}', "async": None},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "wet"}], "encrypted_content": None},
        {"role": "assistant", "content": "It rains."},
    ]
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    assert for_template(body(input=items).input) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Paris"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "c"},
        {"role": "assistant", "content": "It rains.", "reasoning_content": "wet"},
    ]
    for wrong in ("{", '{"a": "\\ud800"}'):
        with pytest.raises(ApiError, match="not valid JSON"):
            for_template(body(input=[items[4] | {"arguments": wrong}]).input)


@pytest.mark.parametrize(
    "wrong",
    [
        {"input": []},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": 1}]}]},
        {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
        {"tools": [{"type": "web_search"}]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "name": "other"}, "tools": [TOOL]},
        {"truncation": "auto"},
        {"background": True},
        {"include": ["message.output_text.logprobs"]},
        {"conversation": "x"},
        {"metadata": dict.fromkeys(map(str, range(17)), "")},
        {"metadata": {"a": "x" * 513}},
    ],
)
def test_unsupported_requests_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        body(**wrong)


def test_refusals_name_the_parameter() -> None:
    image = {"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}
    for more, says in (
        ({"tools": [{"type": "web_search"}]}, "'web_search' is not supported, only 'function'"),
        ({"tools": [TOOL, {"type": "image_generation"}]}, "'image_generation' is not supported"),
        ({"input": [image]}, "input_image.image_url: Field required"),
    ):
        with pytest.raises(ApiError, match=says):
            validated(ResponseRequest, {"model": "m", "input": "Hi"} | more)


def test_requests_of_official_clients_are_accepted() -> None:
    always = {"store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "user": None}
    always |= {"stream_options": {"include_obfuscation": False}, "truncation": "disabled", "background": False}
    asked = body(**always, reasoning={"effort": "low", "summary": "auto"}, text={"format": {"type": "text"}})
    chat = asked.chat([])
    assert not asked.store and chat.answer_schema is None and not chat.fits and chat.several_calls


def test_formats_and_choices() -> None:
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "array"}, "strict": True}
    assert body(text={"format": schema}).chat([]).answer_schema == {"type": "array"}
    assert body(text={"format": {"type": "json_object"}}).chat([]).answer_schema == {"type": "object"}
    chosen = body(tools=[TOOL, TOOL | {"name": "other"}], tool_choice={"type": "function", "name": "other"}).chat([])
    assert [tool.name for tool in chosen.to_call] == ["other"] and len(chosen.functions) == 2
    assert not body(tools=[TOOL], tool_choice="none").chat([]).functions
    assert len(body(tools=[TOOL], tool_choice="required", parallel_tool_calls=False).chat([]).to_call) == 1


def test_stored_responses_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_responses, "KEPT_BYTES", 390)
    kept = KeptResponses()
    text = "x" * 50

    async def holds(owner: str, *ids: str) -> list[bool]:
        async def there(id: str) -> bool:
            try:
                return await kept.find_response(owner, id) == ({"id": id}, [{"content": text}])
            except ApiError as error:
                assert (error.status, error.code) == (404, "response_not_found")
                return False

        return [await there(id) for id in ids]

    async def come() -> None:
        for number in range(3):
            await kept.keep_response("a", {"id": f"a{number}"}, [{"content": text}])
        assert await holds("a", "a0", "a1", "a2") == [False, True, True]  # half of the bytes is for one client
        await kept.keep_response("b", {"id": "b0"}, [{"content": text}])
        await kept.keep_response("b", {"id": "b1"}, [{"content": text}])
        await kept.keep_response("c", {"id": "c0"}, [{"content": text}])
        assert await holds("a", "a1", "a2") == [False, True] and await holds("b", "b0", "b1") == [True, True]
        assert await holds("c", "c0", "b0") == [True, False]  # b0 belongs to another client
        with pytest.raises(ApiError):
            await kept.drop("c", "b0")
        await kept.drop("b", "b0")
        assert await holds("b", "b0", "b1") == [False, True]
        await kept.keep_response("b", {"id": "large"}, [{"content": text * 9}])
        assert await holds("b", "b1", "large") == [False, False]

    asyncio.run(come())
