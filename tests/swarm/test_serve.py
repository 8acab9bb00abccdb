"""The server on a small swarm: answers of the model in each protocol, and sessions on the peers."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from scheduler.speculation import Window
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.logs import JsonFormatter
from splitnet.serve.answers.sampling import SamplingDefaults
from tests.e2e.small_model import small_model
from tests.swarm.generation import force_window
from tests.swarm.harness import LocalSwarm, local_swarm
from tests.unit.serve.serving import GREEDY, MODEL, TEMPLATE, Serve, Server, Told, servers, until

pytestmark = pytest.mark.swarm

HELLO = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}, "colour": {"enum": ["red", "blue"]}},
    "required": ["count", "colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def small(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_model(tmp_path_factory.mktemp("serve") / MODEL, demo_checkpoint, seed=0)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def swarm(small: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with local_swarm(small, [(0, 2), (2, 6)], node=node) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(swarm: LocalSwarm) -> RemoteCausalLM:
    return swarm.model()


@pytest.fixture(scope="module")
def whole(small: Path) -> Any:
    """The same model in transformers, without peers."""
    return AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(small: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(small)
    tokenizer.infill_marks = ["<issue_start>", "<issue_comment>", "<issue_closed>"]
    return tokenizer


@pytest.fixture
def serve(model: RemoteCausalLM, tokenizer: Any) -> Iterator[Serve]:
    """Runs the coroutine of a test with a new server."""
    with servers(lambda on=model, **options: Server(on, tokenizer, **options)) as run:
        yield run


def sessions(swarm: LocalSwarm) -> list[int]:
    return [len(peer.service.sessions) for peer in swarm.peers]


def greedy(whole: Any, ids: list[int], tokens: int) -> list[int]:
    prompt = torch.tensor([ids])
    output = whole.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.full
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_change_neither_answers_nor_scores(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    force_window(monkeypatch, Window(3, 2))
    body = {"prompt": "one two three one two three one two", "max_tokens": 24, "logprobs": 2, "seed": 5}

    async def does(server: Server) -> Any:
        answers = [await server.complete(**body, temperature=temperature) for _ in range(2)]
        return [(answer["choices"][0]["text"], answer["choices"][0]["logprobs"]["tokens"]) for answer in answers]

    plain, again = serve(does)
    assert plain == again
    assert serve(does, speculate="prompt-lookup") == [plain, again]


def test_a_completion_equals_that_of_transformers(serve: Serve, whole: Any, tokenizer: Any) -> None:
    ids = tokenizer("Bees fly").input_ids
    expected = tokenizer.decode(greedy(whole, ids, 12))

    async def does(server: Server) -> None:
        for prompt in ("Bees fly", ids, ["Bees fly"], [ids]):
            reply = await server.complete(prompt=prompt, max_tokens=12)
            (choice,) = reply["choices"]
            assert choice == {"index": 0, "text": expected, "logprobs": None, "finish_reason": "length"}
            assert reply["usage"]["prompt_tokens"] == len(ids) and reply["usage"]["completion_tokens"] == 12

    serve(does)


@pytest.mark.parametrize(
    ("path", "body", "text_of"),
    [
        (
            "/v1/responses",
            {"input": "Hi", "temperature": 0, "max_output_tokens": 9},
            lambda told: told["output"][0]["content"][0]["text"],
        ),
        (
            "/v1/messages",
            {"messages": HELLO, "temperature": 0, "max_tokens": 9},
            lambda told: told["content"][0]["text"],
        ),
        (
            "/api/chat",
            {"messages": HELLO, "stream": False, "options": {"num_predict": 9, "temperature": 0}},
            lambda told: told["message"]["content"],
        ),
        (
            "/infill",
            {"input_prefix": "a", "input_suffix": "b", "temperature": 0, "n_predict": 9},
            lambda told: told["content"],
        ),
    ],
)
def test_an_answer_in_each_protocol_equals_that_of_transformers(
    serve: Serve, whole: Any, tokenizer: Any, path: str, body: dict[str, Any], text_of: Callable[[Any], str]
) -> None:
    gap = path == "/infill"
    prompt = "<issue_start>a<issue_comment>b<issue_closed>" if gap else "user: Hi\nassistant:"
    expected = tokenizer.decode(greedy(whole, tokenizer(prompt).input_ids, 9), skip_special_tokens=True)

    async def does(server: Server) -> None:
        reply = await server.http.post(path, json={"model": MODEL} | body)
        assert reply.status_code == 200 and text_of(reply.json()) == expected

    serve(does)


def test_recommendations_of_a_checkpoint_are_used_only_on_request(
    serve: Serve, swarm: LocalSwarm, whole: Any, tokenizer: Any
) -> None:
    ids = tokenizer("Bees fly").input_ids
    penalty = 0.1  # below 1 it favours repetition, as this model repeats no token by itself
    penalised = whole.generate(
        torch.tensor([ids]), max_new_tokens=12, do_sample=False, repetition_penalty=penalty, eos_token_id=None
    )
    recommending = swarm.model()
    recommending.generation_config = GenerationConfig(repetition_penalty=penalty, eos_token_id=2)

    async def does(server: Server) -> str:
        return (await server.complete(prompt=ids, max_tokens=12))["choices"][0]["text"]

    assert serve(does, on=recommending) == tokenizer.decode(greedy(whole, ids, 12))
    taken = serve(does, on=recommending, defaults=SamplingDefaults(repetition_penalty=penalty))
    assert taken == tokenizer.decode(penalised[0, len(ids) :]) != tokenizer.decode(greedy(whole, ids, 12))

    async def asks(server: Server) -> list[str]:
        asked = ({"repetition_penalty": penalty}, {"temperature": 1, "top_k": 1}, {"temperature": 1, "min_p": 1})
        replies = [await server.complete(prompt=ids, max_tokens=12, **each) for each in asked]
        return [reply["choices"][0]["text"] for reply in replies]

    assert serve(asks) == [taken, *[tokenizer.decode(greedy(whole, ids, 12))] * 2]
    # Parameters of a request override defaults of the checkpoint.
    assert serve(asks, defaults=SamplingDefaults(repetition_penalty=3.0, top_k=7))[0] == taken


def test_scores_of_a_prompt_equal_those_of_transformers(serve: Serve, whole: Any, tokenizer: Any) -> None:
    ids = tokenizer("One two three four five six").input_ids
    with torch.no_grad():
        logprobs = whole(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logprobs[index, token]) for index, token in enumerate(ids[1:])]

    async def does(server: Server) -> None:
        for tokens in (0, 1):
            reply = await server.complete(prompt=ids, max_tokens=tokens, echo=True, logprobs=2)
            (choice,) = reply["choices"]
            scores = choice["logprobs"]
            assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
            assert scores["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
            assert scores["tokens"][: len(ids)] == [tokenizer.decode([token]) for token in ids]
            assert len(scores["tokens"]) == len(ids) + tokens == len(scores["text_offset"])
            assert "".join(scores["tokens"]) == choice["text"]
            assert [choice["text"][offset:][:1] for offset in scores["text_offset"]] == [
                token[:1] for token in scores["tokens"]
            ]
            # lm-eval reads the likeliest token to find whether the model itself would write the text.
            best = [max(top.values()) for top in scores["top_logprobs"][1:]]
            assert best[: len(ids) - 1] == pytest.approx(logprobs.max(-1).values[:-1].tolist(), abs=1e-4)
        assert reply["choices"][0]["text"] == tokenizer.decode(ids + greedy(whole, ids, 1))

    serve(does)


@pytest.mark.default_cases(choices=(8,))
@pytest.mark.parametrize("choices", [5, 8, 16])
def test_many_answers_to_a_short_prompt_fit(serve: Serve, choices: int) -> None:
    async def does(server: Server) -> None:
        short = {"prompt": "Bees fly", "max_tokens": 5}
        alone = (await server.complete(**short))["choices"][0]["text"]
        reply = await server.complete(**short, n=choices)
        assert [choice["text"] for choice in reply["choices"]] == [alone] * choices
        sampled = (await server.complete(**short, n=choices, temperature=1, seed=1))["choices"]
        assert [choice["index"] for choice in sampled] == list(range(choices))
        assert len({choice["text"] for choice in sampled}) > choices // 2
        one = await server.complete(**short, temperature=1, seed=1)
        assert one["choices"][0] == sampled[0]

    serve(does, keep=0)


def test_answers_of_a_random_model_fit_a_schema(serve: Serve) -> None:
    async def does(server: Server) -> None:
        wanted = {"type": "json_schema", "json_schema": {"name": "counted", "schema": SCHEMA}}
        reply = await server.chat("Hi", response_format=wanted, n=3, temperature=1, seed=1, max_tokens=100)
        answers = [json.loads(choice["message"]["content"]) for choice in reply["choices"]]
        assert all(set(answer) == {"count", "colour"} and 0 <= answer["count"] <= 99 for answer in answers)
        assert {choice["finish_reason"] for choice in reply["choices"]} == {"stop"}
        assert len({answer["count"] for answer in answers}) > 1
        greedy = await server.chat("Hi", response_format=wanted, max_tokens=100)
        assert json.loads(greedy["choices"][0]["message"]["content"])["colour"] in ("red", "blue")
        anything = await server.chat("Hi", response_format={"type": "json_object"}, max_tokens=4)
        assert anything["choices"][0]["message"]["content"].startswith("{")

    serve(does)


def test_the_next_turn_computes_only_new_positions(serve: Serve, swarm: LocalSwarm, whole: Any, tokenizer: Any) -> None:
    async def does(server: Server) -> None:
        first = await server.chat("Who are you?", max_tokens=8)
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        said = first["choices"][0]["message"]["content"]
        second = await server.chat("Who are you?", said, "And I?", max_tokens=8)
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= first["usage"]["prompt_tokens"]
        assert sessions(swarm) == [1, 1]
        # The same text as without a kept session.
        prompt = f"user: Who are you?\nassistant: {said}\nuser: And I?\nassistant:"
        expected = tokenizer.decode(greedy(whole, tokenizer(prompt).input_ids, 8), skip_special_tokens=True)
        assert second["choices"][0]["message"]["content"] == expected
        # A repeated request computes only one position of its prompt.
        again = await server.chat("Who are you?", said, "And I?", max_tokens=8)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == again["usage"]["prompt_tokens"] - 1
        assert again["choices"] == second["choices"]

    serve(does)


def test_a_kept_session_that_the_peers_have_lost_is_repaired(serve: Serve, swarm: LocalSwarm) -> None:
    async def does(server: Server) -> None:
        first = await server.chat("Who are you?", max_tokens=8)
        for peer in swarm.peers:
            service = peer.service
            for session in list(service.sessions):
                service.sessions.remove(session)
        again = await server.chat("Who are you?", max_tokens=8)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert again["choices"] == first["choices"]
        assert (await Told.by(server))("failover_seconds_count", cause="session_lost") > 0

    serve(does)


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_frees_the_peers(serve: Serve, swarm: LocalSwarm, stream: bool) -> None:
    """Speaks ASGI directly, because httpx cannot disconnect during an answer."""

    async def does(server: Server) -> None:
        body = json.dumps(GREEDY | {"prompt": "Bees", "max_tokens": 250, "stream": stream}).encode()
        gone = asyncio.Event()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            if incoming:
                return incoming.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }
        call = asyncio.create_task(server.app(scope, receive, send))
        await until(lambda: sessions(swarm) == [1, 1] and (len(sent) > 3 or not stream))
        gone.set()
        async with asyncio.timeout(10):
            await call
        await until(lambda: sessions(swarm) == [0, 0])
        assert not server.generations.kept.clear()
        # The answer was ended before its last token.
        assert b"[DONE]" not in b"".join(message.get("body", b"") for message in sent)
        told = await Told.by(server)
        assert told("requests_total", path="/v1/completions", status="200" if stream else "499") == 1
        assert told("cancelled_total") == 1 and told("requests_running") == 0

    serve(does)


def test_kept_sessions_make_room_for_requests(small: Path, serve: Serve) -> None:
    # Room for 300 positions in 6 blocks, of 256 bytes each.
    with local_swarm(small, [(0, 6)], kv_memory=6 * 256 * 300) as swarm:
        model = swarm.model()

        async def does(server: Server) -> None:
            await server.complete(prompt="Bees", max_tokens=160)
            assert sessions(swarm) == [1]
            await server.complete(prompt="Something else entirely", max_tokens=160)
            assert sessions(swarm) == [1]
            refused = await server.http.post(
                "/v1/completions", json=GREEDY | {"prompt": "Bees", "max_tokens": 200, "n": 4, "temperature": 1}
            )
            assert refused.status_code == 400, "it fits no peer"
            assert refused.json()["error"]["code"] == "context_length_exceeded", refused.text

        serve(does, on=model)
        model.close()


def test_missing_blocks_are_reported(small: Path, serve: Serve) -> None:
    with local_swarm(small, [(0, 4)]) as swarm:
        model = swarm.model()

        async def does(server: Server) -> None:
            for reply in (
                await server.http.post("/v1/completions", json=GREEDY | {"prompt": "Bees"}),
                await server.http.post("/v1/completions", json=GREEDY | {"prompt": "Bees", "stream": True}),
                await server.http.get("/health"),
            ):
                assert reply.status_code == 503
                assert int(reply.headers["retry-after"]) > 0
                assert "blocks 4..5" in reply.json()["error"]["message"]

        serve(does, on=model)
        model.close()


def test_metrics_count_hops_and_drafts(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    force_window(monkeypatch, Window(3, 2))

    async def does(server: Server) -> None:
        before = await Told.by(server)
        reply = await server.complete(prompt="one two three one two three one two", max_tokens=24)
        told = await Told.by(server)
        assert told("hop_seconds_count", part="compute") % 2 == 0 < told("hop_seconds_sum", part="compute")
        assert told("sent_bytes_total") > told("received_bytes_total") > 0
        drafted, accepted = (
            told(f"{name}_tokens_total") - before(f"{name}_tokens_total") for name in ("drafted", "accepted")
        )
        assert drafted >= accepted >= 0 < drafted and accepted < reply["usage"]["completion_tokens"]

    serve(does, speculate="prompt-lookup")


def test_neither_prompts_nor_tokens_nor_keys_are_logged(
    serve: Serve, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret, key = "Violet herons whisper seventeen riddles", "sk-unmistakable"
    ids = tokenizer(secret).input_ids
    assert len(ids) > 4

    async def does(server: Server) -> None:
        server.http.headers["authorization"] = f"Bearer {key}"
        reply = await server.complete(prompt=secret, max_tokens=12)
        await server.chat(secret, max_tokens=4)
        await server.http.post("/v1/completions", json={"model": MODEL, "prompt": secret, "wrong": secret})
        answers.append(reply["choices"][0]["text"])

    answers: list[str] = []
    serve(does, keys=[key])
    assert caplog.records, "nothing is logged at all, so this shows nothing"
    logged = "\n".join(JsonFormatter().format(record) for record in caplog.records) + caplog.text
    for kept_back in (secret, "herons", str(ids)[1:-1], str(tuple(ids))[1:-1], key, answers[0]):
        assert kept_back not in logged
