"""Anthropic's protocol with Anthropic's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic
from anthropic.types import ErrorResponse, Message, MessageTokensCount, ModelInfo, RawMessageStreamEvent
from pydantic import TypeAdapter

from tests.unit.serve.clients import ALIAS, CITY, COLD, KEY, POSITIONS, SAID, SCHEMA, of_openai
from tests.unit.serve.serving import MODEL


@pytest.fixture
def client(url: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def ask(client: Anthropic, **body: Any) -> Message:
    """The message of an answer that is not streamed, checked against the client's types."""
    extra = COLD | {name: body.pop(name) for name in ("top_k", "container") if name in body}
    given = {"model": ALIAS, "max_tokens": 12, "messages": SAID} | body
    raw = client.messages.with_raw_response.create(**given, extra_body=extra)
    return Message.model_validate_json(raw.text(), strict=True)


def test_a_chat_equals_that_of_openais_api(client: Anthropic, url: str) -> None:
    system: Any = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.0; cch=12345;"},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
    ]
    turns: list[Any] = [{"role": "assistant", "content": [{"type": "text", "text": "So?"}]}]
    texts: list[Any] = [{"type": "text", "text": "They"}, {"type": "text", "text": "sting"}]
    turns += [{"role": "user", "content": texts}, {"role": "user", "content": "often"}]
    answer = ask(client, system=system, messages=SAID + turns)
    said = [{"role": "system", "content": "Be brief."}, *SAID, {"role": "assistant", "content": "So?"}]
    said += [{"role": "user", "content": "They\nsting\noften"}]
    (block,) = answer.content
    assert block.type == "text" and block.text == of_openai(url, said)["content"]
    assert (answer.model, answer.stop_reason, answer.usage.output_tokens) == (MODEL, "max_tokens", 12)
    again = ask(client, system=system, messages=SAID + turns)
    assert again.content == answer.content and again.usage.cache_read_input_tokens
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == answer.usage.input_tokens
    counted = client.messages.count_tokens(model=ALIAS, system=system, messages=SAID + turns)
    assert MessageTokensCount.model_validate(counted.to_dict()).input_tokens == answer.usage.input_tokens


def test_a_stream_equals_the_whole_answer(client: Anthropic, url: str) -> None:
    whole = ask(client)
    with client.messages.stream(model=MODEL, max_tokens=12, messages=SAID, extra_body=COLD) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == whole.content[0].text == final.content[0].text and len(texts) > 1  # pyright: ignore
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 12
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) > 3

    body = {"model": MODEL, "max_tokens": 4, "messages": SAID, "stream": True}
    reply = httpx.post(f"{url}/v1/messages", json=body, headers={"x-api-key": KEY})
    assert reply.headers["content-type"].startswith("text/event-stream")
    kinds: list[str] = []
    for lines in reply.text.split("\n\n")[:-1]:
        event, data = lines.split("\n")
        TypeAdapter[Any](RawMessageStreamEvent).validate_json(data.removeprefix("data: "), strict=True)
        kinds.append(json.loads(data.removeprefix("data: "))["type"])
        assert event == f"event: {kinds[-1]}"
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_client_with_stored_threads_sends_whole_conversations(client: Anthropic) -> None:
    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Weather in a city."""
        return city

    runner = client.beta.messages.tool_runner(model=ALIAS, max_tokens=4, tools=[weather], messages=SAID)
    assert runner.until_done().stop_reason == "max_tokens"


def test_required_calls_fit_their_tools(client: Anthropic, url: str) -> None:
    tools: list[Any] = [{"name": "weather", "description": "Tells it.", "input_schema": SCHEMA}]
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    answer = ask(client, max_tokens=60, tools=tools, tool_choice=choice)
    (call,) = answer.content
    assert call.type == "tool_use" and call.name == "weather" and call.input["city"] in CITY["enum"]
    assert answer.stop_reason == "tool_use"
    named: Any = {"type": "tool", "name": "weather"}
    with client.messages.stream(
        model=MODEL, max_tokens=60, messages=SAID, extra_body=COLD, tools=tools, tool_choice=named
    ) as stream:
        streamed = stream.get_final_message()
    assert streamed.content[0].input == call.input and streamed.stop_reason == "tool_use"  # pyright: ignore

    # The model reads earlier calls and results as in the other protocol.
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Hail"}]}
    results: list[Any] = [result | {"is_error": True}, {"type": "text", "text": "And now?"}]
    turns: list[Any] = [{"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
    follows = ask(client, messages=SAID + turns, tools=tools)
    function = {"name": "weather", "arguments": json.dumps(call.input)}
    said = [*SAID, {"role": "assistant", "tool_calls": [{"id": call.id, "function": function}]}]
    said += [{"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "Error: Hail"}]
    said += [{"role": "user", "content": "And now?"}]
    described = {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}
    other = of_openai(url, said, tools=[{"type": "function", "function": described}])
    assert follows.content[0].text == other["content"]  # pyright: ignore


def test_answers_fit_a_schema(client: Anthropic) -> None:
    wanted: Any = {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"}
    answer = ask(client, max_tokens=60, output_config=wanted)
    assert json.loads(answer.content[0].text)["city"] in CITY["enum"]  # pyright: ignore
    assert answer.stop_reason == "end_turn"


def test_stop_reasons(client: Anthropic) -> None:
    text: str = ask(client).content[0].text  # pyright: ignore
    stop = text[len(text) // 2 :][:4]
    stopped = ask(client, stop_sequences=["never", stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].text == text[: text.index(stop)]  # pyright: ignore
    # Programs ask for as many tokens as Anthropic's models can give.
    full = ask(client, max_tokens=16000, messages=[{"role": "user", "content": "and " * (POSITIONS - 24)}])
    assert full.stop_reason == "model_context_window_exceeded"
    read = full.usage.cache_read_input_tokens or 0
    assert full.usage.input_tokens + read + full.usage.output_tokens == POSITIONS


def test_thinking_sets_variables_of_the_chat_template(client: Anthropic, url: str) -> None:
    for thinking, on in (
        ({"type": "disabled"}, False),
        ({"type": "adaptive", "display": "summarized"}, True),
        ({"type": "enabled", "budget_tokens": 1024}, True),
    ):
        answer = ask(client, thinking=thinking)
        other = of_openai(url, chat_template_kwargs={"enable_thinking": on})
        assert answer.content[0].text == other["content"]  # pyright: ignore


def test_thinking_is_a_separate_block(thinking: str) -> None:
    with Anthropic(base_url=thinking, api_key="none", max_retries=0) as client:
        (block,) = ask(client).content
        assert block.type == "thinking" and block.thinking and block.signature
        assert block.thinking.strip() == of_openai(thinking)["reasoning_content"].strip()
        with client.messages.stream(model=MODEL, max_tokens=12, messages=SAID, extra_body=COLD) as stream:
            kinds = [event.type for event in stream]
            assert stream.get_final_message().content == [block] and "signature" in kinds
        omitted: Any = {"type": "adaptive", "display": "omitted"}
        assert ask(client, thinking=omitted).content[0].type == "text"
        with pytest.raises(anthropic.BadRequestError, match="thinking: this model always thinks"):
            ask(client, thinking={"type": "disabled"})


def test_requests_of_agents_are_accepted(client: Anthropic) -> None:
    ephemeral = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    schema = SCHEMA | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    body: Any = {
        "model": ALIAS,
        "max_tokens": 32000,
        "system": [{"type": "text", "text": "You write programs.", **ephemeral}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi", **ephemeral}]},
            {"role": "system", "content": "<reminder>Now.</reminder>"},
        ],
        "tools": [{"name": "Bash", "description": "Runs it.", "input_schema": schema, **ephemeral}],
        "thinking": {"type": "adaptive", "display": "omitted"},
        "output_config": {"effort": "medium"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "user_1"},
    }
    betas = ["interleaved-thinking-2025-05-14", "context-management-2025-06-27"]
    with client.beta.messages.stream(**body | {"max_tokens": 8}, betas=betas) as stream:
        assert stream.get_final_message().usage.output_tokens <= 8


def test_models_have_the_shape_of_this_api(client: Anthropic, url: str) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, ALIAS]
    assert ModelInfo.model_validate(client.models.retrieve(ALIAS).to_dict()).id == ALIAS
    with pytest.raises(anthropic.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    listed = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert listed["object"] == "list"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"container": "c"}, "container is not supported: leave it out"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "'web_search_20250305' is not supported, only 'custom'",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice asks for a tool that is not in tools"),
        ({"messages": [*SAID, {"role": "assistant", "content": "So"}]}, "end with a user message"),
        ({"messages": [{"role": "user", "content": "and " * 2000}]}, "model's context of 1024"),
    ],
)
def test_unsupported_parameters_are_refused_by_name(client: Anthropic, body: dict[str, Any], said: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        ask(client, **body)
    error = ErrorResponse.model_validate(refused.value.body).error
    assert error.type == refused.value.type == "invalid_request_error" and said in error.message


def test_errors_have_the_types_of_this_api(client: Anthropic, url: str) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        ask(client, model="claude-opus-9")
    assert (unknown.value.request_id or "").startswith("req_")
    assert client.models.list()._request_id != unknown.value.request_id  # pyright: ignore
    assert unknown.value.type == "not_found_error" and "'small' or 'claude-sonnet-5'" in str(unknown.value)
    for path in (client.messages.create, client.messages.stream):
        with Anthropic(base_url=url, api_key="sk-wrong", max_retries=0) as stranger:
            path = getattr(stranger.messages, path.__name__)
            with pytest.raises(anthropic.AuthenticationError) as wrong:
                path(model=MODEL, max_tokens=1, messages=SAID).__enter__()
            assert wrong.value.type == "authentication_error"
    reply = httpx.post(f"{url}/v1/messages", json={"model": MODEL, "messages": SAID}, headers={"x-api-key": KEY})
    assert reply.status_code == 400 and "max_tokens is missing" in reply.json()["error"]["message"]
    with Anthropic(base_url=url, api_key=None, auth_token=KEY, max_retries=0) as bearer:
        assert ask(bearer, max_tokens=1).usage.output_tokens == 1
