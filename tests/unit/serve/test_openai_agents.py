"""Agents of three libraries finish a task with two tools, with a model that writes its calls with or without marks."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from splitnet.checkpoint.checkpoint import Checkpoint
from tests.unit.serve.serving import listening
from tests.unit.serve.stand_in import MODEL, served

pytestmark = pytest.mark.full

TASK = "Add 2 and 3 and multiply the sum by 4."
STEPS = [("add", {"a": 2, "b": 3}), ("multiply", {"a": 5, "b": 4}), ("final_answer", {"answer": "It is 20."})]
LAST = "It is 20."


def writes(marks: bool, prompt: str) -> Sequence[str]:
    """The next call of the task, or its end; with marks where a grammar binds calls."""
    step = prompt.count("<|im_start|>tool") + prompt.count("Observation:\n")
    if step >= 2 and "final_answer" not in prompt:
        return [LAST]
    name, arguments = STEPS[min(step, 2)]
    written = json.dumps({"name": name, "arguments": arguments})
    tagged = f"<tool_call>\n{written}\n</tool_call>"
    return [tagged] if marks else [written, tagged]


@pytest.fixture(params=[True, False], ids=["with marks", "without marks"])
def url(request: pytest.FixtureRequest, demo_checkpoint: Path) -> Iterator[str]:
    app, _ = served(Checkpoint.open(demo_checkpoint).tokenizer(), lambda prompt: writes(request.param, prompt))
    with listening(app) as url:
        yield url


@pytest.fixture
def called() -> list[str]:
    return []


@pytest.fixture
def tools(called: list[str]) -> list[Any]:
    def add(a: int, b: int) -> int:
        """Adds two numbers.

        Args:
            a: a number
            b: another one
        """
        called.append("add")
        return a + b

    def multiply(a: int, b: int) -> int:
        """Multiplies two numbers.

        Args:
            a: a number
            b: another one
        """
        called.append("multiply")
        return a * b

    for each in (add, multiply):
        each.__annotations__ = {"a": int, "b": int, "return": int}
    return [add, multiply]


def test_smolagents(url: str, tools: list[Any], called: list[str]) -> None:
    smolagents: Any = pytest.importorskip("smolagents")
    model = smolagents.OpenAIServerModel(MODEL, api_base=f"{url}/v1", api_key="none")
    agent = smolagents.ToolCallingAgent(
        [smolagents.tool(each) for each in tools], model, max_steps=4, verbosity_level=0
    )
    assert agent.run(TASK) == LAST and called == ["add", "multiply"]


@pytest.mark.parametrize("stream", [False, True])
def test_pydantic_ai(url: str, tools: list[Any], called: list[str], stream: bool) -> None:
    pydantic_ai: Any = pytest.importorskip("pydantic_ai")
    openai: Any = importlib.import_module("pydantic_ai.models.openai")
    providers: Any = importlib.import_module("pydantic_ai.providers.openai")
    model = openai.OpenAIChatModel(MODEL, provider=providers.OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
    agent = pydantic_ai.Agent(model, tools=tools)

    async def run() -> str:
        if not stream:
            return (await agent.run(TASK)).output
        async with agent.run_stream(TASK) as answer:
            return await answer.get_output()

    # Ends the threads that `run_sync` leaves.
    assert asyncio.run(run()) == LAST and called == ["add", "multiply"]


@pytest.mark.parametrize("api", ["openai", "responses", "anthropic", "ollama"])
def test_langchain(api: str, url: str, tools: list[Any], called: list[str]) -> None:
    agents: Any = pytest.importorskip("langchain.agents")
    if api in ("openai", "responses"):
        of: Any = pytest.importorskip("langchain_openai")
        options = {"base_url": f"{url}/v1", "api_key": "none", "use_responses_api": api == "responses"}
        model = of.ChatOpenAI(model=MODEL, **options)
    elif api == "anthropic":
        of = pytest.importorskip("langchain_anthropic")
        model = of.ChatAnthropic(model=MODEL, base_url=url, api_key="none", max_tokens=200)
    else:
        of = pytest.importorskip("langchain_ollama")
        model = of.ChatOllama(model=MODEL, base_url=url)
    agent = agents.create_agent(model, tools)
    said = agent.invoke({"messages": [{"role": "user", "content": TASK}]})["messages"]
    assert said[-1].text == LAST and called == ["add", "multiply"]
