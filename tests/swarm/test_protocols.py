"""Official clients of each protocol use the gateway over sockets, with a small random model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import pytest
import uvicorn
from anthropic import Anthropic
from anthropic.types import ErrorResponse, Message, MessageTokensCount, ModelInfo, RawMessageStreamEvent
from ollama import ChatResponse, Client, GenerateResponse
from pydantic import TypeAdapter
from transformers import AutoTokenizer

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht import Directory
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.security.identity import KeyOptions
from splitnet.serve import responses
from splitnet.serve.admission import Admission
from splitnet.serve.answers.grammars import Grammars
from splitnet.serve.gate import ApiKeys
from splitnet.serve.gateway import Gateway
from splitnet.serve.generation import Generations
from splitnet.serve.prompts import Prompts
from splitnet.serve.responses import ServedModel
from splitnet.serve.server import make_app
from splitnet.serve.session_cache import KeepLimits
from tests.swarm.harness import LocalSwarm, local_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

MODEL, ALIAS, KEY = "small", "claude-sonnet-5", "sk-protocols"
POSITIONS, VOCABULARY = 1024, 49152
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


@pytest.fixture(scope="module")
def small(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("protocols") / MODEL
    random_checkpoint("llama", folder, vocab=VOCABULARY, seed=3, max_position_embeddings=POSITIONS)
    Checkpoint.open(demo_checkpoint).tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def swarm(small: Path, node: Directory) -> Iterator[LocalSwarm]:
    with local_swarm(small, [(0, 2), (2, 6)], node=node) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(swarm: LocalSwarm) -> RemoteCausalLM:
    return swarm.model()


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The URL of an app."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def gateway(model: RemoteCausalLM, small: Path, keys: Sequence[str] = (), template: str = TEMPLATE) -> Iterator[str]:
    """The URL of a gateway."""
    tokenizer = AutoTokenizer.from_pretrained(small)
    tokenizer.chat_template = template
    prompts = Prompts(tokenizer, VOCABULARY, POSITIONS)
    generations = Generations(model, prompts.decode, 4, KeepLimits(4, 10_000, 300.0))
    grammars = Grammars(tokenizer, VOCABULARY, generations.end_tokens)
    served = ServedModel(MODEL, generations, prompts, grammars, Admission(4, 4), other_names=[ALIAS])
    try:
        with listening(make_app(Gateway(served), ApiKeys({key: KeyOptions() for key in keys}))) as url:
            yield url
    finally:
        generations.close()


@pytest.fixture
def url(model: RemoteCausalLM, small: Path) -> Iterator[str]:
    with gateway(model, small, [KEY]) as url:
        yield url


@pytest.fixture
def thinking(model: RemoteCausalLM, small: Path) -> Iterator[str]:
    """The URL of a gateway whose model never ends its reasoning."""
    with gateway(model, small, template=THINKING) as url:
        yield url


def of_openai(url: str, messages: list[Any] = SAID, **body: Any) -> Any:
    """The message of the gateway's answer in OpenAI's API."""
    given = {"model": MODEL, "temperature": 0, "max_tokens": 12, "messages": messages} | body
    reply = httpx.post(f"{url}/v1/chat/completions", json=given, headers={"Authorization": f"Bearer {KEY}"})
    return reply.json()["choices"][0]["message"]


def test_clients_accept_keep_alive_events(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "FIRST_S", 0.0)
    monkeypatch.setattr(responses, "ALIVE_S", 0.001)
    body: Any = {"model": MODEL, "messages": [{"role": "user", "content": "and " * 900}]}
    headers = {"Authorization": f"Bearer {KEY}"}
    reply = httpx.post(f"{url}/v1/messages", json=body | {"max_tokens": 8, "stream": True}, headers=headers)
    assert "event: ping\n" in reply.text.partition("content_block")[0]
    with Anthropic(base_url=url, api_key=KEY) as asking, asking.messages.stream(**body, max_tokens=8) as stream:
        assert stream.get_final_message().usage.output_tokens == 8
    reply = httpx.post(f"{url}/api/chat", json=body | {"options": {"num_predict": 8}}, headers=headers)
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert not lines[0]["message"]["content"] and not lines[0]["done"]
    with Client(url, headers=headers) as client:
        parts = list(client.chat(**body, stream=True, options={"num_predict": 8}))
        assert parts[-1].eval_count == 8


class TestAnthropic:
    @pytest.fixture
    def client(self, url: str) -> Iterator[Anthropic]:
        with Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
            yield client

    def ask(self, client: Anthropic, **body: Any) -> Message:
        """The message of an answer that is not streamed, checked against the client's types."""
        extra = COLD | {name: body.pop(name) for name in ("top_k", "container") if name in body}
        given = {"model": ALIAS, "max_tokens": 12, "messages": SAID} | body
        raw = client.messages.with_raw_response.create(**given, extra_body=extra)
        return Message.model_validate_json(raw.text(), strict=True)

    def test_a_chat_equals_that_of_openais_api(self, client: Anthropic, url: str) -> None:
        system: Any = [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.0; cch=12345;"},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        ]
        turns: list[Any] = [{"role": "assistant", "content": [{"type": "text", "text": "So?"}]}]
        texts: list[Any] = [{"type": "text", "text": "They"}, {"type": "text", "text": "sting"}]
        turns += [{"role": "user", "content": texts}, {"role": "user", "content": "often"}]
        answer = self.ask(client, system=system, messages=SAID + turns)
        said = [{"role": "system", "content": "Be brief."}, *SAID, {"role": "assistant", "content": "So?"}]
        said += [{"role": "user", "content": "They\nsting\noften"}]
        (block,) = answer.content
        assert block.type == "text" and block.text == of_openai(url, said)["content"]
        assert (answer.model, answer.stop_reason, answer.usage.output_tokens) == (MODEL, "max_tokens", 12)
        again = self.ask(client, system=system, messages=SAID + turns)
        assert again.content == answer.content and again.usage.cache_read_input_tokens
        assert again.usage.input_tokens + again.usage.cache_read_input_tokens == answer.usage.input_tokens
        counted = client.messages.count_tokens(model=ALIAS, system=system, messages=SAID + turns)
        assert MessageTokensCount.model_validate(counted.to_dict()).input_tokens == answer.usage.input_tokens

    def test_a_stream_equals_the_whole_answer(self, client: Anthropic, url: str) -> None:
        whole = self.ask(client)
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

    def test_a_client_with_stored_threads_sends_whole_conversations(self, client: Anthropic) -> None:
        @anthropic.beta_tool
        def weather(city: str) -> str:
            """Weather in a city."""
            return city

        runner = client.beta.messages.tool_runner(model=ALIAS, max_tokens=4, tools=[weather], messages=SAID)
        assert runner.until_done().stop_reason == "max_tokens"

    def test_required_calls_fit_their_tools(self, client: Anthropic, url: str) -> None:
        tools: list[Any] = [{"name": "weather", "description": "Tells it.", "input_schema": SCHEMA}]
        choice: Any = {"type": "any", "disable_parallel_tool_use": True}
        answer = self.ask(client, max_tokens=60, tools=tools, tool_choice=choice)
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
        follows = self.ask(client, messages=SAID + turns, tools=tools)
        function = {"name": "weather", "arguments": json.dumps(call.input)}
        said = [*SAID, {"role": "assistant", "tool_calls": [{"id": call.id, "function": function}]}]
        said += [{"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "Error: Hail"}]
        said += [{"role": "user", "content": "And now?"}]
        described = {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}
        other = of_openai(url, said, tools=[{"type": "function", "function": described}])
        assert follows.content[0].text == other["content"]  # pyright: ignore

    def test_answers_fit_a_schema(self, client: Anthropic) -> None:
        wanted: Any = {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"}
        answer = self.ask(client, max_tokens=60, output_config=wanted)
        assert json.loads(answer.content[0].text)["city"] in CITY["enum"]  # pyright: ignore
        assert answer.stop_reason == "end_turn"

    def test_stop_reasons(self, client: Anthropic) -> None:
        text: str = self.ask(client).content[0].text  # pyright: ignore
        stop = text[len(text) // 2 :][:4]
        stopped = self.ask(client, stop_sequences=["never", stop])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
        assert stopped.content[0].text == text[: text.index(stop)]  # pyright: ignore
        # Programs ask for as many tokens as Anthropic's models can give.
        full = self.ask(client, max_tokens=16000, messages=[{"role": "user", "content": "and " * (POSITIONS - 24)}])
        assert full.stop_reason == "model_context_window_exceeded"
        read = full.usage.cache_read_input_tokens or 0
        assert full.usage.input_tokens + read + full.usage.output_tokens == POSITIONS

    def test_thinking_sets_variables_of_the_chat_template(self, client: Anthropic, url: str) -> None:
        for thinking, on in (
            ({"type": "disabled"}, False),
            ({"type": "adaptive", "display": "summarized"}, True),
            ({"type": "enabled", "budget_tokens": 1024}, True),
        ):
            answer = self.ask(client, thinking=thinking)
            other = of_openai(url, chat_template_kwargs={"enable_thinking": on})
            assert answer.content[0].text == other["content"]  # pyright: ignore

    def test_thinking_is_a_separate_block(self, thinking: str) -> None:
        with Anthropic(base_url=thinking, api_key="none", max_retries=0) as client:
            (block,) = self.ask(client).content
            assert block.type == "thinking" and block.thinking and block.signature
            assert block.thinking.strip() == of_openai(thinking)["reasoning_content"].strip()
            with client.messages.stream(model=MODEL, max_tokens=12, messages=SAID, extra_body=COLD) as stream:
                kinds = [event.type for event in stream]
                assert stream.get_final_message().content == [block] and "signature" in kinds
            omitted: Any = {"type": "adaptive", "display": "omitted"}
            assert self.ask(client, thinking=omitted).content[0].type == "text"
            with pytest.raises(anthropic.BadRequestError, match="thinking: this model always thinks"):
                self.ask(client, thinking={"type": "disabled"})

    def test_requests_of_agents_are_accepted(self, client: Anthropic) -> None:
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

    def test_models_have_the_shape_of_this_api(self, client: Anthropic, url: str) -> None:
        assert [model.id for model in client.models.list()] == [MODEL, ALIAS]
        assert ModelInfo.model_validate(client.models.retrieve(ALIAS).to_dict()).id == ALIAS
        with pytest.raises(anthropic.NotFoundError, match="no model 'other'"):
            client.models.retrieve("other")
        listed = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()
        assert listed["object"] == "list"

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ({"top_k": -1}, "top_k: Input should be greater"),
            ({"max_tokens": 0}, "max_tokens: Input should be greater"),
            ({"container": "c"}, "container is not supported: leave it out"),
            ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "images are not supported"),
            (
                {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
                "'web_search_20250305' is not supported, only 'custom'",
            ),
            ({"tool_choice": {"type": "any"}}, "tool_choice asks for a tool that is not in tools"),
            ({"messages": [*SAID, {"role": "assistant", "content": "So"}]}, "end with a message of the user"),
            ({"messages": [{"role": "user", "content": "and " * 2000}]}, "model's context of 1024"),
        ],
    )
    def test_unsupported_parameters_are_refused_by_name(
        self, client: Anthropic, body: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(anthropic.BadRequestError) as refused:
            self.ask(client, **body)
        error = ErrorResponse.model_validate(refused.value.body).error
        assert error.type == refused.value.type == "invalid_request_error" and said in error.message

    def test_errors_have_the_types_of_this_api(self, client: Anthropic, url: str) -> None:
        with pytest.raises(anthropic.NotFoundError) as unknown:
            self.ask(client, model="claude-opus-9")
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
            assert self.ask(bearer, max_tokens=1).usage.output_tokens == 1


class TestOllama:
    @pytest.fixture
    def client(self, url: str) -> Iterator[Client]:
        with Client(url, headers={"Authorization": f"Bearer {KEY}"}) as client:
            yield client

    def ask(self, client: Client, **body: Any) -> ChatResponse:
        options = {"temperature": 0, "num_predict": 12} | body.pop("options", {})
        return client.chat(**{"model": MODEL, "messages": SAID, "options": options} | body)

    def test_a_chat_equals_that_of_openais_api(self, client: Client, url: str) -> None:
        for name in (MODEL, f"{MODEL}:latest", ALIAS):
            answer = self.ask(client, model=name)
            assert answer.message.content == of_openai(url)["content"]
            assert (answer.model, answer.done, answer.done_reason, answer.eval_count) == (name, True, "length", 12)
        assert answer.prompt_eval_count and answer.prompt_eval_count > 3
        durations = [answer.load_duration, answer.prompt_eval_duration, answer.eval_duration]
        assert all(duration is not None and duration >= 0 for duration in durations)
        assert sum(filter(None, durations)) == answer.total_duration

    def test_a_stream_equals_the_whole_answer(self, client: Client, url: str) -> None:
        whole = self.ask(client)
        parts: list[ChatResponse] = list(self.ask(client, stream=True))  # pyright: ignore
        assert "".join(part.message.content or "" for part in parts) == whole.message.content and len(parts) > 2
        assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
        assert (parts[-1].done_reason, parts[-1].eval_count) == ("length", 12)
        # Without `stream`, answers are streams of lines.
        headers, body = {"Authorization": f"Bearer {KEY}"}, {"model": MODEL, "messages": SAID}
        reply = httpx.post(f"{url}/api/chat", json=body | {"options": {"num_predict": 3}}, headers=headers)
        assert reply.headers["content-type"] == "application/x-ndjson"
        assert [ChatResponse(**json.loads(line)).done for line in reply.text.splitlines()][-1]

    def test_a_text_is_answered_or_continued(self, client: Client, url: str) -> None:
        options = {"temperature": 0, "num_predict": 12}
        answer = client.generate(MODEL, "Bees fly", system="Be brief.", options=options)
        said = [{"role": "system", "content": "Be brief."}, *SAID]
        assert answer.response == of_openai(url, said)["content"] and answer.context is None
        parts: list[GenerateResponse] = list(client.generate(MODEL, "Bees fly", raw=True, stream=True, options=options))
        given = {"model": MODEL, "prompt": "Bees fly", "temperature": 0, "max_tokens": 12}
        other = httpx.post(f"{url}/v1/completions", json=given, headers={"Authorization": f"Bearer {KEY}"}).json()
        assert "".join(part.response or "" for part in parts) == other["choices"][0]["text"]

    def test_tools_are_functions_and_results_find_their_calls(self, client: Client, url: str) -> None:
        def weather(city: str) -> str:
            """Tells it.

            Args:
                city: where
            """
            return city

        call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
        turns = [
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_name": "weather", "content": "Hail"},
        ]
        answer = self.ask(client, messages=SAID + turns, tools=[weather])
        function = {"name": "weather", "arguments": '{"city": "Rome"}'}
        said = [*SAID, {"role": "assistant", "tool_calls": [{"id": "call_1_0", "function": function}]}]
        said += [{"role": "tool", "tool_call_id": "call_1_0", "name": "weather", "content": "Hail"}]
        described = ollama._utils.convert_function_to_tool(weather).model_dump(exclude_none=True)  # pyright: ignore
        assert answer.message.content == of_openai(url, said, tools=[described])["content"]

    def test_answers_fit_a_format(self, client: Client) -> None:
        answer = self.ask(client, format=SCHEMA, options={"num_predict": 60})
        assert json.loads(answer.message.content or "")["city"] in CITY["enum"] and answer.done_reason == "stop"
        answer = client.generate(MODEL, "Bees", format="json", options={"num_predict": 8, "temperature": 0})
        assert (answer.response or "").startswith("{")

    def test_options_equal_those_of_openais_api(self, client: Client, url: str) -> None:
        drawn = {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 7, "presence_penalty": 0.5}
        more = {"repeat_penalty": 1.2, "frequency_penalty": 0.3}
        answer = self.ask(client, options=drawn | more | {"num_ctx": POSITIONS, "mirostat": 0, "num_gpu": 99})
        other = of_openai(url, **drawn, repetition_penalty=1.2, frequency_penalty=0.3)
        assert answer.message.content == other["content"] != of_openai(url)["content"]
        text: str = self.ask(client).message.content or ""
        stopped = self.ask(client, options={"stop": [text[4:8]]})
        assert stopped.message.content == text[: text.index(text[4:8])] and stopped.done_reason == "stop"
        full = self.ask(client, options={"num_predict": -1}, messages=[{"role": "user", "content": "a " * 990}])
        assert (full.prompt_eval_count or 0) + (full.eval_count or 0) == POSITIONS and full.done_reason == "length"

    def test_thinking_sets_variables_of_the_chat_template(self, client: Client, url: str) -> None:
        for think in (True, False, "low"):
            other = of_openai(url, chat_template_kwargs={"enable_thinking": bool(think)})
            assert self.ask(client, think=think).message.content == other["content"]

    def test_thinking_is_a_separate_field(self, client: Client, thinking: str, url: str) -> None:
        with Client(thinking) as thinks:
            for think in (None, True):
                message = self.ask(thinks, think=think).message
                assert message.thinking == of_openai(thinking)["reasoning_content"] and not message.content
            parts: list[ChatResponse] = list(self.ask(thinks, stream=True))  # pyright: ignore
            assert "".join(part.message.thinking or "" for part in parts) == message.thinking
            with pytest.raises(ollama.ResponseError, match="think: this model always thinks"):
                self.ask(thinks, think=False)
            assert thinks.show(MODEL).capabilities == ["completion", "tools", "thinking"]
            raw = thinks.generate(MODEL, "Bees<think>", raw=True, options={"num_predict": 4, "temperature": 0})
            assert raw.response and not raw.thinking
            assert thinks.generate(MODEL, "Bees", options={"num_predict": 4}).thinking

    def test_models_and_their_descriptions(self, client: Client, url: str) -> None:
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
            ({"options": {"repeat_last_n": 64}}, 400, "options.repeat_last_n is not supported"),
            ({"messages": [{"role": "user", "content": "a", "images": [b"a"]}]}, 400, "images"),
            ({"messages": [], "keep_alive": 0}, 400, "keep_alive: the server itself closes models"),
            ({"messages": [{"role": "user", "content": "and " * 2000}]}, 400, "model's context of 1024"),
        ],
    )
    def test_unsupported_parameters_are_refused_by_name(
        self, client: Client, body: dict[str, Any], status: int, said: str
    ) -> None:
        for stream in (False, True):
            with pytest.raises(ollama.ResponseError, match=said) as refused:
                list(self.ask(client, **body, stream=stream))
            assert refused.value.status_code == status

    def test_management_of_models_is_refused(self, client: Client, url: str) -> None:
        for change in (client.pull, client.push, client.delete):
            with pytest.raises(ollama.ResponseError, match="models are chosen where this server is started") as refused:
                change(MODEL)
            assert refused.value.status_code == 403
        for wrong in ({"suffix": "a"}, {"context": [1]}, {"template": "a"}, {"raw": True, "system": "a"}):
            with pytest.raises(ollama.ResponseError, match=next(iter(wrong))):
                client.generate(MODEL, "a", **wrong)  # pyright: ignore
        with Client(url) as stranger, pytest.raises(ollama.ResponseError, match="wrong API key") as refused:
            stranger.list()
        assert refused.value.status_code == 401
