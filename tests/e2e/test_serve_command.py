"""`splitnet serve`, run like a user runs it: OpenAI's own client, the real model, daemons in separate processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import DirectoryError
from splitnet.serve.answers.sampling import Sampling, TokenChooser
from splitnet.serve.server import ModelSpec, ServeOptions, serve
from splitnet.serve.session_cache import KeepLimits
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.swarm import ModelFacts, Swarm, short_key
from splitnet.wire.endpoints import Endpoint
from tests.e2e.daemons import Background, background
from tests.e2e.test_commands import NOBODY

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

MODEL = "served"
KEY = "sk-test"
STARTING = "opening the checkpoint ...\njoining the swarm and loading the client part ...\n"
"""The output of a healthy server on stderr."""
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
# The demo model was not trained to call tools, but it repeats the example in its prompt.
SHOWN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TURN = "<|im_start|>{role}\n{content}<|im_end|>\n"
EXAMPLE = TURN.format(role="user", content="What is the weather in Paris?") + TURN.format(
    role="assistant", content=SHOWN
)
WITH_TOOLS = (
    EXAMPLE * 3
    + "{% for message in messages %}"
    + TURN.format(role="{{ message.role }}", content="{{ message.content }}")
    + "{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def served(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model. The folder also has its tokenizer with a chat template for tools."""
    folder = tmp_path_factory.mktemp("serve")
    tokenizer = Checkpoint.open(demo_checkpoint).tokenizer()
    tokenizer.chat_template = f"{{% if tools %}}{WITH_TOOLS}{{% else %}}{tokenizer.chat_template}{{% endif %}}"
    tokenizer.save_pretrained(folder)
    (folder / f"{MODEL}.gguf").symlink_to(demo_checkpoint)
    return folder / f"{MODEL}.gguf"


def ready(server: Background, model: str = MODEL) -> str:
    """The URL that a server prints once it serves."""
    assert server.process.stdout is not None
    line = server.process.stdout.readline().decode()
    assert line.startswith(f"serving {model} at http://127.0.0.1:"), line
    return line.split()[-1]


@pytest.fixture(scope="module")
def url(served: Path, address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that runs until the tests of this file are done."""
    home = tmp_path_factory.mktemp("home")
    (home / "keys").write_text(f"{KEY}\n")
    options = ("--codec", "none", "--port", "0", "--api-key-file", str(home / "keys"))
    with background(
        home, "serve", str(served), "--tokenizer", str(served.parent), "--join", address, *options
    ) as server:
        yield ready(server)
        finished = server.stop(signal.SIGTERM)
    assert finished.code == 0 and finished.errors == STARTING, finished.errors


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def free_positions(served: Path, address: str) -> Iterator[Callable[[], list[int]]]:
    """Reads the free KV memory of the daemons."""
    with Swarm(ModelFacts.of(Checkpoint.open(served)), [address]) as swarm:
        endpoints = [Endpoint(record.address, record.key) for record in swarm.peers()]

        def ask() -> list[int]:
            return [swarm.ping(endpoint).result(10).kv_free_positions for endpoint in endpoints]

        yield ask


def until(condition: Callable[[], bool]) -> None:
    """Checks until it is true, for at most 20 s; every check waits for the daemons' answers."""
    out_of_time = threading.Event()
    timer = threading.Timer(20, out_of_time.set)
    timer.start()
    try:
        while not condition():
            assert not out_of_time.is_set()
    finally:
        timer.cancel()
        timer.join()


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def expected(local: Any, tokenizer: Any, messages: list[Any], tokens: int) -> str:
    """The answer of plain transformers."""
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = local.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_chat_of_two_turns(client: OpenAI, local: Any, tokenizer: Any) -> None:
    messages = user("What is the capital of France?")
    first = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=16)
    said = first.choices[0].message.content
    assert said == expected(local, tokenizer, messages, 16) and said and "Paris" in said
    assert first.choices[0].finish_reason == "stop"
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And of Italy?"}]
    second = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_completion_tokens=12)
    assert second.choices[0].message.content == expected(local, tokenizer, messages, 12)
    assert first.usage and second.usage and second.usage.prompt_tokens_details
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens  # pyright: ignore


def test_answers_tell_their_times_and_their_route(client: OpenAI, served: Path, address: str, tmp_path: Path) -> None:
    def headers(asked: OpenAI, stream: bool) -> Any:
        answers = asked.completions.with_raw_response
        return answers.create(model=MODEL, prompt="Bees", max_tokens=2, stream=stream).headers

    with Swarm(ModelFacts.of(Checkpoint.open(served)), [address]) as swarm:
        records = sorted(swarm.peers(), key=lambda record: record.start)
    route = ", ".join(f"{record.start}:{record.end} {short_key(record.key.text)}" for record in records)
    for stream in (False, True):
        told = headers(client, stream)
        assert told["x-splitnet-route"] == route
        found = re.fullmatch(
            r"prepare;dur=.*, queue;dur=.*, prefill;dur=([\d.]+)(, decode;dur=[\d.]+)?, total;.*", told["server-timing"]
        )
        assert found is not None and float(found[1]) > 0 and (found[2] is None) == stream
    options = ("--codec", "none", "--port", "0", "--no-route-header")
    with (
        background(
            tmp_path, "serve", str(served), "--tokenizer", str(served.parent), "--join", address, *options
        ) as server,
        OpenAI(base_url=ready(server), api_key="any", max_retries=0) as asked,
    ):
        for stream in (False, True):
            told = headers(asked, stream)
            assert "server-timing" in told and "x-splitnet-route" not in told


def test_embeddings(client: OpenAI, local: Any, tokenizer: Any) -> None:
    texts = ["Bees fly.", "What is the capital of France?"]
    reply = client.embeddings.create(model=MODEL, input=texts)
    for text, found in zip(texts, reply.data, strict=True):
        with torch.no_grad():
            state = local.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        assert float(torch.cosine_similarity(torch.tensor(found.embedding), state, dim=0)) > 0.9999


def test_a_tool_is_called(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=user("What is the weather in Paris?"), temperature=0, max_tokens=48, tools=TOOLS
    ) as events:
        (choice,) = events.get_final_completion().choices
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


@pytest.mark.full
def test_concurrent_streams_equal_single_ones(url: str, local: Any, tokenizer: Any) -> None:
    def options(number: int) -> tuple[str, float]:
        return f"{number} is a number that", 0.9 if number % 2 else 0.0

    async def ask(client: AsyncOpenAI, number: int) -> str:
        prompt, temperature = options(number)
        stream = await client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=6, temperature=temperature, seed=number, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(16)))

    def alone(number: int) -> str:
        """The answer of plain transformers to one request alone."""
        prompt, temperature = options(number)
        inputs = tokenizer(prompt, return_tensors="pt")
        chooser = TokenChooser(Sampling(temperature, 1.0, seed=number), None)
        output = local.generate(**inputs, max_new_tokens=6, do_sample=False, logits_processor=[chooser])
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    together = asyncio.run(ask_all())
    assert together == [alone(number) for number in range(16)]
    assert len(set(together)) > 8


@pytest.mark.parametrize("prompt_tokens", [1, 6000])
def test_a_disconnected_client_frees_the_peers_at_once(
    url: str, free_positions: Callable[[], list[int]], prompt_tokens: int
) -> None:
    """The client disconnects in the middle of its answer, or of a prompt that takes the daemons seconds."""
    before = free_positions()

    async def go_in_the_middle() -> None:
        async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            asked: Any = client.completions.create(
                model=MODEL, prompt=[17] * prompt_tokens, max_tokens=2000, temperature=0, stream=prompt_tokens == 1
            )
            asking = asyncio.ensure_future(asked)
            await asyncio.to_thread(
                until, lambda: all(now < then for now, then in zip(free_positions(), before, strict=True))
            )
            if prompt_tokens == 1:
                await anext(aiter(await asking))
            assert asking.done() == (prompt_tokens == 1)
            asking.cancel()

    asyncio.run(go_in_the_middle())
    # The session of a complete answer would be kept.
    until(lambda: free_positions() == before)


def test_a_disconnected_client_ends_the_computation_of_its_embeddings(
    url: str, free_positions: Callable[[], list[int]]
) -> None:
    before = free_positions()

    async def go_in_the_middle() -> None:
        async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            asking = asyncio.ensure_future(client.embeddings.create(model=MODEL, input=[[17] * 1000] * 16))
            await asyncio.to_thread(until, lambda: all(map(int.__lt__, free_positions(), before)))
            assert not asking.done()
            asking.cancel()

    asyncio.run(go_in_the_middle())
    until(lambda: free_positions() == before)


@pytest.mark.full
def test_running_requests_end_with_the_server(served: Path, address: str, tmp_path: Path) -> None:
    options = ("--codec", "none", "--port", "0", "--drain", "0.2")
    with background(
        tmp_path, "serve", str(served), "--tokenizer", str(served.parent), "--join", address, *options
    ) as server:
        with OpenAI(base_url=ready(server), api_key="any", max_retries=0) as client:
            stream = client.completions.create(model=MODEL, prompt="Once", max_tokens=4000, temperature=0, stream=True)
            next(iter(stream))
            os.kill(server.process.pid, signal.SIGINT)
            with pytest.raises(openai.APIError, match="the server is ending"):
                list(stream)
        assert server.process.wait(20) == 0
        assert server.process.stderr is not None
        assert all(line.endswith(b" ...\n") for line in server.process.stderr)


@pytest.mark.default_cases(warned=(True,))
@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_a_server_open_to_other_machines_prints_a_warning(served: Path, host: str, warned: bool) -> None:
    options = ServeOptions(
        host=host,
        port=0,
        api_key_file=None,
        max_requests=1,
        max_waiting=1,
        keep=KeepLimits(0, 0, 0.0),
        drain_s=0.0,
    )
    checkpoint = Checkpoint.open(served, tokenizer=str(served.parent))
    warnings: list[str] = []
    with pytest.raises(DirectoryError):
        way = ModelSpec(
            [MODEL], checkpoint, None, lambda _: Swarm(ModelFacts.of(checkpoint), [NOBODY]), ConnectionOptions()
        )
        serve(way, [], None, options, say=pytest.fail, warn=warnings.append)
    assert [("--api-key-file" in warning) for warning in warnings] == [True] * warned
