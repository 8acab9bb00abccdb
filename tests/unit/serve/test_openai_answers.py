"""Completions and chats of OpenAI's API, with the parameters of vLLM and llama.cpp."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import pytest
from llguidance.gbnf_to_lark import any_to_lark

from splitnet.serve import chat
from splitnet.serve.apis import openai_requests
from tests.unit.serve.fake_model import FakeModel
from tests.unit.serve.serving import GREEDY, MODEL, Serve, Server, until


def test_several_prompts_and_choices(serve: Serve, model: FakeModel) -> None:
    async def does(server: Server) -> None:
        prompts = ["Bees", "A longer prompt about bees"]
        alone = [(await server.complete(prompt=prompt, max_tokens=6))["choices"][0]["text"] for prompt in prompts]
        reply = await server.complete(prompt=prompts, max_tokens=6, n=2)
        assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
        assert [choice["text"] for choice in reply["choices"]] == [alone[0], alone[0], alone[1], alone[1]]
        assert reply["usage"]["completion_tokens"] == 24
        sampled = await server.complete(prompt="Bees", max_tokens=6, n=3, temperature=1, seed=1)
        assert len({choice["text"] for choice in sampled["choices"]}) == 3
        again = await server.complete(prompt="Bees", max_tokens=6, n=3, temperature=1, seed=1)
        assert again["choices"] == sampled["choices"]
        one = await server.complete(prompt="Bees", max_tokens=6, temperature=1, seed=1)
        assert one["choices"][0] == sampled["choices"][0]
        same = [await server.complete(prompt=["Bees"] * 3, max_tokens=6, temperature=1, seed=1) for _ in range(2)]
        assert same[0]["choices"] == same[1]["choices"] and same[0]["choices"][0] == one["choices"][0]
        assert len({choice["text"] for choice in same[0]["choices"]}) == 3

        await until(lambda: not model.sessions)

    serve(does, keep=0)


FIRST_DELTA = {"role": "assistant", "content": ""}


def test_a_stream_equals_the_whole_answer(serve: Serve) -> None:
    async def does(server: Server) -> None:
        body = {"max_tokens": 10, "logprobs": True, "top_logprobs": 1, "n": 2}
        whole = await server.chat("Hello", **body)
        streamed = await server.http.post(
            "/v1/chat/completions",
            json=GREEDY
            | body
            | {
                "stream": True,
                "stream_options": {"include_usage": True},
                "messages": [{"role": "user", "content": "Hello"}],
            },
        )
        assert streamed.headers["content-type"].startswith("text/event-stream")
        *events, done, rest = streamed.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        *chunks, last = [json.loads(event.removeprefix("data: ")) for event in events]
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 20
        assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
        for choice in whole["choices"]:
            parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
            assert parts[0] == {"index": choice["index"], "delta": FIRST_DELTA, "logprobs": None, "finish_reason": None}
            del parts[0]
            assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
            tokens = [token for part in parts for token in part["logprobs"]["content"]]
            assert tokens == choice["logprobs"]["content"] and len(tokens) == 10
            assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]

    serve(does)


def test_parameters_of_other_servers(serve: Serve, tokenizer: Any) -> None:
    async def does(server: Server) -> None:
        plain = await server.complete(prompt="Bees fly", max_tokens=6, return_token_ids=True)
        (choice,) = plain["choices"]
        assert choice["prompt_token_ids"] == tokenizer("Bees fly").input_ids and len(choice["token_ids"]) == 6
        third = choice["token_ids"][2]
        stopped = await server.complete(prompt="Bees fly", max_tokens=6, stop_token_ids=[third], return_token_ids=True)
        assert stopped["choices"][0]["finish_reason"] == "stop"
        assert stopped["choices"][0]["token_ids"] == choice["token_ids"][:3]
        longer = await server.complete(
            prompt="Bees fly", max_tokens=6, stop_token_ids=[third], min_tokens=4, return_token_ids=True
        )
        assert len(longer["choices"][0]["token_ids"]) >= 4
        assert third not in longer["choices"][0]["token_ids"][:4]
        cut = await server.complete(
            prompt="One two three Bees fly", truncate_prompt_tokens=len(tokenizer("Bees fly").input_ids)
        )
        assert cut["usage"]["prompt_tokens"] == len(tokenizer("Bees fly").input_ids)
        echoed = await server.complete(
            prompt="One two three Bees fly", truncate_prompt_tokens=2, echo=True, logprobs=0, max_tokens=1
        )
        (choice,) = echoed["choices"]
        assert choice["logprobs"]["tokens"][:2] == [" Bees", " fly"] and choice["text"].startswith(" Bees fly")
        assert choice["logprobs"]["text_offset"] == [0, 5, 9]
        fitted = await server.complete(prompt="Bees fly " * 200, truncate_prompt_tokens=-1, max_tokens=5)
        assert fitted["usage"]["prompt_tokens"] == 251
        timed = await server.complete(prompt="Bees fly", max_tokens=2, timings_per_token=True)
        assert timed["timings"]["predicted_n"] == 2 and timed["timings"]["prompt_ms"] > 0

    serve(does)


@pytest.mark.parametrize(
    ("constraint", "fits"),
    [
        ({"structured_outputs": {"choice": ["red", "blue"]}}, "red|blue"),
        ({"guided_choice": ["red"]}, "red"),
        ({"structured_outputs": {"regex": "[ab]{3}/x"}}, "[ab]{3}/x"),
        ({"guided_regex": "\\d\\d"}, r"\d\d"),
        ({"guided_regex": "a\\/b"}, "a/b"),
        ({"grammar": 'root ::= "y" ("es" | "ep")'}, "yes|yep"),
        ({"structured_outputs": {"grammar": 'start: "no" DIGIT\nDIGIT: /[0-9]/'}}, r"no\d"),
        ({"guided_json": '{"enum": ["a"]}'}, '"a"'),
        ({"json_schema": {"const": 7}}, "7"),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, "true|false"),
    ],
)
def test_answers_fit_constraints_of_vllm_and_llama_cpp(serve: Serve, constraint: dict[str, Any], fits: str) -> None:
    async def does(server: Server) -> None:
        text = (await server.complete(prompt="Well", max_tokens=20, **constraint))["choices"][0]["text"]
        assert re.fullmatch(fits, text)
        told = (await server.chat("Well", max_tokens=20, **constraint))["choices"][0]["message"]["content"]
        assert re.fullmatch(fits, told)

    serve(does)


def test_a_message_of_the_assistant_is_continued(serve: Serve, tokenizer: Any) -> None:
    async def does(server: Server) -> None:
        said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bees fly"}]
        body = GREEDY | {"messages": said, "continue_final_message": True, "max_tokens": 3}
        told = (await server.http.post("/v1/chat/completions", json=body)).json()
        bare = await server.complete(prompt="user: Hi\nassistant: Bees fly", max_tokens=3)
        assert told["choices"][0]["message"]["content"] == bare["choices"][0]["text"]
        echoed = (await server.http.post("/v1/chat/completions", json=body | {"echo": True})).json()
        assert echoed["choices"][0]["message"]["content"] == "Bees fly" + bare["choices"][0]["text"]

    serve(does)


def test_scores_of_prompts_in_the_form_of_vllm(serve: Serve, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def does(server: Server) -> None:
        text = await server.complete(prompt="Bees fly", max_tokens=1, prompt_logprobs=1)
        scores = text["choices"][0]["prompt_logprobs"]
        ids = tokenizer("Bees fly").input_ids
        assert scores[0] is None and [str(token) in score for token, score in zip(ids[1:], scores[1:], strict=True)]
        assert text["choices"][0]["logprobs"] is None
        told = await server.chat("Hi", max_tokens=1, prompt_logprobs=0)
        assert len(told["prompt_logprobs"]) == told["usage"]["prompt_tokens"]
        named = await server.complete(prompt="Bees fly", max_tokens=1, logprobs=0, return_tokens_as_token_ids=True)
        [token] = named["choices"][0]["logprobs"]["tokens"]
        assert text["choices"][0]["text"] == tokenizer.decode(int(token.removeprefix("token_id:")))
        both = await server.chat("Hi", max_tokens=1, prompt_logprobs=4, logprobs=True, top_logprobs=1)
        assert all(len(scores) >= 4 for scores in both["prompt_logprobs"][1:])
        assert len(both["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 1
        text = await server.complete(prompt="Bees fly", max_tokens=1, prompt_logprobs=1, logprobs=3, echo=True)
        assert {len(scores) for scores in text["choices"][0]["prompt_logprobs"][1:]} <= {1, 2}
        assert all(len(top) >= 3 for top in text["choices"][0]["logprobs"]["top_logprobs"][1:])
        monkeypatch.setattr(chat, "MAX_SCORES", 2)
        body = {"messages": [{"role": "user", "content": "Hi"}], "prompt_logprobs": 0}
        refused = await server.http.post("/v1/chat/completions", json=GREEDY | body)
        assert refused.status_code == 400 and "more than 2: ask for fewer" in refused.json()["error"]["message"]

    serve(does)


def test_requests_are_prepared_beside_the_event_loop(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def noting(grammar: str) -> str:
        threads.append(threading.current_thread())
        return any_to_lark(grammar)

    monkeypatch.setattr(openai_requests, "any_to_lark", noting)

    async def does(server: Server) -> None:
        grammar = {"grammar": 'root ::= "yes"'}
        await server.complete(prompt="Well", max_tokens=2, **grammar)
        await server.chat("Well", max_tokens=2, **grammar)
        await server.http.post("/apply-template", json={"messages": [{"role": "user", "content": "Hi"}], **grammar})

    serve(does)
    assert threads and threading.main_thread() not in threads


def test_missing_fields_and_other_spellings_of_clients(serve: Serve) -> None:
    async def does(server: Server) -> None:
        server.http.headers["x-api-key"] = "sk-a"
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
        post = server.http.post
        assert (await post("/apply-template", json=chat)).json() == {"prompt": "user: Hi\nassistant:"}
        curl = {"content-type": "application/x-www-form-urlencoded"}
        answer = await post("/v1/chat/completions", content=json.dumps(chat | {"max_tokens": 2}), headers=curl)
        told = answer.json()
        assert answer.status_code == 200 and told["model"] == MODEL, answer.text
        for path, body in (("chat/completions", chat), ("responses", {"input": "Hi"})):
            counted = (await post(f"/v1/{path}/input_tokens", json=body)).json()
            assert counted == {"object": "response.input_tokens", "input_tokens": told["usage"]["prompt_tokens"]}
        wanted = {"type": "json_object", "schema": SCHEMA}
        for kind in (wanted, {"type": "json_schema", "json_schema": {"schema": SCHEMA}}):
            kept = (await post("/v1/chat/completions", json=chat | {"response_format": kind, "max_tokens": 99})).json()
            assert set(json.loads(kept["choices"][0]["message"]["content"])) == {"count", "colour"}
        streamed = await post("/v1/chat/completions", json=chat | {"stream": True, "max_tokens": 2})
        begun, *_, last = (json.loads(event[6:]) for event in streamed.text.split("\n\n")[:-2])
        assert begun["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "length"

    serve(does, keys=["sk-a"])


SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}, "colour": {"enum": ["red", "blue"]}},
    "required": ["count", "colour"],
    "additionalProperties": False,
}


def test_a_random_model_calls_required_tools(serve: Serve) -> None:
    tools = [
        {"type": "function", "function": {"name": "count", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "stop", "parameters": {"enum": [{}]}}},
    ]

    async def call(server: Server, choice: Any, seed: int) -> tuple[str, Any]:
        reply = await server.chat("Hi", tools=tools, tool_choice=choice, temperature=1, seed=seed, max_tokens=100)
        (answer,) = reply["choices"]
        assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
        (made,) = answer["message"]["tool_calls"]
        return made["function"]["name"], json.loads(made["function"]["arguments"])

    async def does(server: Server) -> None:
        required = [await call(server, "required", seed) for seed in range(2)]
        assert {name for name, _ in required} <= {"count", "stop"}
        named = [await call(server, {"type": "function", "function": {"name": name}}, 1) for name in ("count", "stop")]
        assert [(name, set(arguments)) for name, arguments in named] == [
            ("count", {"count", "colour"}),
            ("stop", set()),
        ]
        half = {"tools": tools, "tool_choice": "required", "max_tokens": 12}
        (cut,) = (await server.chat("Hi", **half))["choices"]
        assert cut["finish_reason"] == "length"
        message = {"role": "assistant", "refusal": None}
        assert cut["message"] == message | {"content": cut["message"]["content"]}
        assert cut["message"]["content"].startswith("<tool_call>"), "half a call is text"
        messages = [{"role": "user", "content": "Hi"}]
        told = await server.http.post(
            "/v1/chat/completions", json=GREEDY | half | {"messages": messages, "stream": True}
        )
        assert "tool_calls" not in told.text and '"finish_reason":"length"' in told.text
        bound = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in tools]
        free = await server.chat("Hi", tools=tools, max_tokens=8)
        kept = await server.chat("Hi", tools=bound, parallel_tool_calls=False, max_tokens=8, n=2)
        assert [choice["message"] for choice in kept["choices"]] == [free["choices"][0]["message"]] * 2
        said = await server.chat("Hi", tools=tools, tool_choice="none", max_tokens=4)
        plain = await server.chat("Hi", max_tokens=4)
        assert said["choices"][0]["message"]["content"] == plain["choices"][0]["message"]["content"]

    serve(does)
