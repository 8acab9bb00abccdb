"""Ollama's protocol with Ollama's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest
from ollama import ChatResponse, Client, GenerateResponse

from tests.unit.serve.clients import ALIAS, CITY, KEY, POSITIONS, SAID, SCHEMA, of_openai
from tests.unit.serve.serving import MODEL


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


def ask(client: Client, **body: Any) -> ChatResponse:
    options = {"temperature": 0, "num_predict": 12} | body.pop("options", {})
    return client.chat(**{"model": MODEL, "messages": SAID, "options": options} | body)


def test_a_chat_equals_that_of_openais_api(client: Client, url: str) -> None:
    for name in (MODEL, f"{MODEL}:latest", ALIAS):
        answer = ask(client, model=name)
        assert answer.message.content == of_openai(url)["content"]
        assert (answer.model, answer.done, answer.done_reason, answer.eval_count) == (name, True, "length", 12)
    assert answer.prompt_eval_count and answer.prompt_eval_count > 3
    durations = [answer.load_duration, answer.prompt_eval_duration, answer.eval_duration]
    assert all(duration is not None and duration >= 0 for duration in durations)
    assert sum(filter(None, durations)) == answer.total_duration


def test_a_stream_equals_the_whole_answer(client: Client, url: str) -> None:
    whole = ask(client)
    parts: list[ChatResponse] = list(ask(client, stream=True))  # pyright: ignore
    assert "".join(part.message.content or "" for part in parts) == whole.message.content and len(parts) > 2
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (parts[-1].done_reason, parts[-1].eval_count) == ("length", 12)
    # If a request does not set `stream`, the answer is streamed as JSON lines.
    headers, body = {"Authorization": f"Bearer {KEY}"}, {"model": MODEL, "messages": SAID}
    reply = httpx.post(f"{url}/api/chat", json=body | {"options": {"num_predict": 3}}, headers=headers)
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert [ChatResponse(**json.loads(line)).done for line in reply.text.splitlines()][-1]


def test_a_text_is_answered_or_continued(client: Client, url: str) -> None:
    options = {"temperature": 0, "num_predict": 12}
    answer = client.generate(MODEL, "Bees fly", system="Be brief.", options=options)
    said = [{"role": "system", "content": "Be brief."}, *SAID]
    assert answer.response == of_openai(url, said)["content"] and answer.context is None
    parts: list[GenerateResponse] = list(client.generate(MODEL, "Bees fly", raw=True, stream=True, options=options))
    given = {"model": MODEL, "prompt": "Bees fly", "temperature": 0, "max_tokens": 12}
    other = httpx.post(f"{url}/v1/completions", json=given, headers={"Authorization": f"Bearer {KEY}"}).json()
    assert "".join(part.response or "" for part in parts) == other["choices"][0]["text"]


def test_tools_are_functions_and_results_find_their_calls(client: Client, url: str) -> None:
    def weather(city: str) -> str:
        """Tells the weather in a city.

        Args:
            city: the name of the city
        """
        return city

    call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    turns = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_name": "weather", "content": "Hail"},
    ]
    answer = ask(client, messages=SAID + turns, tools=[weather])
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    said = [*SAID, {"role": "assistant", "tool_calls": [{"id": "call_1_0", "function": function}]}]
    said += [{"role": "tool", "tool_call_id": "call_1_0", "name": "weather", "content": "Hail"}]
    described = ollama._utils.convert_function_to_tool(weather).model_dump(exclude_none=True)  # pyright: ignore
    assert answer.message.content == of_openai(url, said, tools=[described])["content"]


def test_answers_fit_a_format(client: Client) -> None:
    answer = ask(client, format=SCHEMA, options={"num_predict": 60})
    assert json.loads(answer.message.content or "")["city"] in CITY["enum"] and answer.done_reason == "stop"
    answer = client.generate(MODEL, "Bees", format="json", options={"num_predict": 8, "temperature": 0})
    assert (answer.response or "").startswith("{")


def test_options_equal_those_of_openais_api(client: Client, url: str) -> None:
    drawn = {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 7, "presence_penalty": 0.5}
    more = {"repeat_penalty": 1.2, "frequency_penalty": 0.3}
    answer = ask(client, options=drawn | more | {"num_ctx": POSITIONS, "mirostat": 0, "num_gpu": 99})
    other = of_openai(url, **drawn, repetition_penalty=1.2, frequency_penalty=0.3)
    assert answer.message.content == other["content"] != of_openai(url)["content"]
    text: str = ask(client).message.content or ""
    stopped = ask(client, options={"stop": [text[4:8]]})
    assert stopped.message.content == text[: text.index(text[4:8])] and stopped.done_reason == "stop"
    full = ask(client, options={"num_predict": -1}, messages=[{"role": "user", "content": "a " * 990}])
    assert (full.prompt_eval_count or 0) + (full.eval_count or 0) == POSITIONS and full.done_reason == "length"


def test_thinking_sets_variables_of_the_chat_template(client: Client, url: str) -> None:
    for think in (True, False, "low"):
        other = of_openai(url, chat_template_kwargs={"enable_thinking": bool(think)})
        assert ask(client, think=think).message.content == other["content"]


def test_thinking_is_a_separate_field(client: Client, thinking: str, url: str) -> None:
    with Client(thinking) as thinks:
        for think in (None, True):
            message = ask(thinks, think=think).message
            assert message.thinking == of_openai(thinking)["reasoning_content"] and not message.content
        parts: list[ChatResponse] = list(ask(thinks, stream=True))  # pyright: ignore
        assert "".join(part.message.thinking or "" for part in parts) == message.thinking
        with pytest.raises(ollama.ResponseError, match="think: this model always thinks"):
            ask(thinks, think=False)
        assert thinks.show(MODEL).capabilities == ["completion", "tools", "thinking"]
        raw = thinks.generate(MODEL, "Bees<think>", raw=True, options={"num_predict": 4, "temperature": 0})
        assert raw.response and not raw.thinking
        assert thinks.generate(MODEL, "Bees", options={"num_predict": 4}).thinking


def test_models_and_their_descriptions(client: Client, url: str) -> None:
    assert [model.model for model in client.list().models] == [f"{MODEL}:latest", f"{ALIAS}:latest"]
    (loaded,) = client.ps().models
    assert loaded.name == f"{MODEL}:latest" and loaded.details and loaded.details.family == "llama"
    shown = client.show(f"{ALIAS}:latest")
    assert shown.capabilities == ["completion", "tools"] and shown.details
    assert (shown.details.family, (shown.modelinfo or {})["llama.context_length"]) == ("llama", POSITIONS)
    assert client.chat(MODEL, []).done_reason == "load" == client.generate(MODEL).done_reason
    with pytest.raises(ollama.ResponseError, match="logprobs is not supported"):
        client.chat(MODEL, SAID, logprobs=True)
    assert "version" in httpx.get(f"{url}/api/version", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert httpx.head(url).status_code == 200 and "<html" in httpx.get(url).text


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "other"}, 404, "no model 'other': use 'small' or"),
        ({"options": {"mirostat": 2}}, 400, "options.mirostat is not supported: leave it out"),
        ({"options": {"num_ctx": 4096}}, 400, "options.num_ctx: the model's context is 1024"),
        ({"messages": [], "keep_alive": 0}, 400, "only the server closes models: leave out keep_alive"),
        ({"messages": [{"role": "user", "content": "and " * 2000}]}, 400, "model's context of 1024"),
    ],
)
def test_unsupported_parameters_are_refused_by_name(
    client: Client, body: dict[str, Any], status: int, said: str
) -> None:
    for stream in (False, True):
        with pytest.raises(ollama.ResponseError, match=said) as refused:
            list(ask(client, **body, stream=stream))
        assert refused.value.status_code == status


def test_management_of_models_is_refused(client: Client, url: str) -> None:
    for change in (client.pull, client.push, client.delete):
        with pytest.raises(ollama.ResponseError, match="clients cannot change the models") as refused:
            change(MODEL)
        assert refused.value.status_code == 403
    for wrong in ({"suffix": "a"}, {"context": [1]}, {"template": "a"}, {"raw": True, "system": "a"}):
        with pytest.raises(ollama.ResponseError, match=next(iter(wrong))):
            client.generate(MODEL, "a", **wrong)  # pyright: ignore
    with Client(url) as stranger, pytest.raises(ollama.ResponseError, match="wrong API key") as refused:
        stranger.list()
    assert refused.value.status_code == 401
