"""OpenAI's Responses API with OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response
from pydantic import BaseModel

from splitnet.serve.answers.grammars import Grammars
from tests.unit.serve.fake_model import FakeModel
from tests.unit.serve.serving import MODEL, Server

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}"
)
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Place(BaseModel):
    wet: bool


@pytest.fixture
def asking(model: FakeModel, tokenizer: Any, grammars: Grammars) -> Iterator[Callable[..., Any]]:
    """Runs the coroutine of a test with OpenAI's client."""
    made: list[Server] = []

    def run(does: Callable[..., Any], template: str = TEMPLATE, **options: Any) -> Any:
        tokenizer.chat_template = template
        made.append(Server(model, tokenizer, grammars=grammars, **options))
        return made[-1].with_openai(does)

    yield run
    for server in made:
        server.generations.close()


def asked(**given: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "Bees", "temperature": 0, "max_output_tokens": 6} | given


def test_a_stream_equals_the_whole_response(asking: Callable[..., Any]) -> None:
    async def does(client: AsyncOpenAI, server: Server) -> None:
        whole = await client.responses.create(**asked())
        assert whole.status == "incomplete" and whole.incomplete_details
        assert whole.incomplete_details.reason == "max_output_tokens"
        assert whole.usage and whole.usage.output_tokens == 6 and whole.model == MODEL
        async with client.responses.stream(**asked()) as stream:
            events = [event async for event in stream]
        kinds, last = [event.type for event in events], events[-1]
        assert [event.sequence_number for event in events] == [*range(len(events))]
        assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.incomplete"
        assert last.type == "response.incomplete" and last.response.output_text == whole.output_text
        chat = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Bees"}], temperature=0, max_tokens=6
        )
        assert whole.output_text == chat.choices[0].message.content

    asking(does)


def test_calls_and_their_results(asking: Callable[..., Any]) -> None:
    async def does(client: AsyncOpenAI, server: Server) -> None:
        given = asked(tools=[TOOL], tool_choice="required", max_output_tokens=60, input="Weather?")
        first = await client.responses.create(**given)
        (call,) = [item for item in first.output if item.type == "function_call"]
        assert first.status == "completed" and call.name == "weather"
        assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
        gave: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        later = await client.responses.create(**asked(input=[gave], previous_response_id=first.id))
        said: list[Any] = [{"role": "user", "content": "Weather?"}, *first.output, gave]
        alike = await client.responses.create(**asked(input=said))
        assert later.output_text == alike.output_text and later.usage and alike.usage
        assert later.usage.input_tokens == alike.usage.input_tokens
        dumped = [item.model_dump() if isinstance(item, BaseModel) else item for item in said]
        again = await client.responses.create(**asked(input=dumped))
        assert again.output_text == alike.output_text
        assert later.previous_response_id == first.id

    asking(does, TEMPLATE.partition("{% if enable_thinking")[0])  # a random model would never stop thinking


def test_formats_and_reasoning(asking: Callable[..., Any]) -> None:
    async def does(client: AsyncOpenAI, server: Server) -> None:
        parsed = await client.responses.parse(**asked(text_format=Place, max_output_tokens=60))
        assert isinstance(parsed.output_parsed, Place)
        thinking = await client.responses.create(**asked(reasoning={"effort": "low", "summary": "auto"}))
        (item,) = thinking.output
        assert item.type == "reasoning" and item.content and item.content[0].text and item.status == "incomplete"
        plain = await client.responses.create(**asked(reasoning={"effort": "none"}))
        assert plain.output[0].type == "message"

    asking(does)


def test_stored_responses_belong_to_their_key(asking: Callable[..., Any]) -> None:
    async def does(client: AsyncOpenAI, server: Server) -> None:
        made = await client.responses.create(**asked(instructions="Be kind.", metadata={"a": "b"}))
        found = await client.responses.retrieve(made.id)
        assert found == made and isinstance(found, Response) and found.instructions == "Be kind."
        other = client.with_options(api_key="b")
        with pytest.raises(openai.NotFoundError, match="there is no response 'resp_"):
            await other.responses.retrieve(made.id)
        with pytest.raises(openai.NotFoundError) as refused:
            await other.responses.create(**asked(previous_response_id=made.id))
        assert (refused.value.code, refused.value.param) == ("response_not_found", "previous_response_id")
        unkept = await client.responses.create(**asked(store=False))
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(unkept.id)
        await client.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made.id)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="c").responses.create(**asked())

    asking(does, keys=["a", "b"])


def test_instructions_apply_to_one_response(asking: Callable[..., Any]) -> None:
    async def does(client: AsyncOpenAI, server: Server) -> None:
        first = await client.responses.create(**asked(instructions="Be kind.", max_output_tokens=1))
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Bees"}]
        assert first.usage and first.usage.input_tokens == len(server.prompt(messages))
        follow = asked(previous_response_id=first.id, input="Wasps", max_output_tokens=1)
        second = await client.responses.create(**follow)
        said = [messages[1], {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "Wasps"}]
        assert second.usage and second.usage.input_tokens == len(server.prompt(said))
        both = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Bees"}]
        third = await client.responses.create(**asked(instructions="Be kind.", input=both, max_output_tokens=1))
        joined = [{"role": "system", "content": "Be kind.\n\nBe brief."}, messages[1]]
        assert third.usage and third.usage.input_tokens == len(server.prompt(joined))

    asking(does)


def test_unsupported_parameters_are_refused_by_name(asking: Callable[..., Any]) -> None:
    async def does(client: AsyncOpenAI, server: Server) -> None:
        for wrong, param in [
            ({"tools": [{"type": "web_search"}]}, "tools"),
            ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
            ({"truncation": "auto"}, "truncation"),
            ({"conversation": "x"}, "conversation"),
        ]:
            with pytest.raises(openai.BadRequestError) as refused:
                await client.responses.create(**asked(**wrong))
            assert refused.value.param == param

    asking(does)
