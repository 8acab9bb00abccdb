"""OpenAI's Responses API: its requests, paths and events, and stored responses that later requests continue."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field, TypeAdapter, model_validator
from pydantic_core import from_json, to_json
from starlette.responses import Response

from splitnet.serve.answer_records import created_at, random_hex
from splitnet.serve.apis import openai
from splitnet.serve.apis.openai_requests import (
    FunctionDefinition,
    NamedFunction,
    NamedSchema,
    ObjectFormat,
    PlainFormat,
)
from splitnet.serve.apis.strict import MESSAGES, TOOLS, Share, Strict, Temperature, TokenCount, few
from splitnet.serve.chat import Chat, Delta, answer_chat, prompt_of, with_thinking
from splitnet.serve.failures import ApiError
from splitnet.serve.gateway import Gateway
from splitnet.serve.generation import Ended
from splitnet.serve.message_parts import content_of, image_at
from splitnet.serve.request_gate import ParsingRoute
from splitnet.serve.responses import EVENTS, KEEP_ALIVE, ServedModel, framed
from splitnet.serve.shared_state import SharedState, digest_of

DELETED = b"-"  # The value in the shared state of a response that one gateway has deleted, and others may still hold
KEPT_BYTES = 64 * 2**20  # Maximum number of bytes of stored responses; one client can use half of these


class SentObject(Strict):
    """An object whose null fields count as missing, because clients send back objects of their types with nulls."""

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, sent: Any) -> Any:
        return {name: each for name, each in sent.items() if each is not None} if isinstance(sent, dict) else sent


class ResponsesTextPart(SentObject):
    type: Literal["input_text", "output_text", "reasoning_text", "summary_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputImage(SentObject):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None  # without effect: the processor scales images


def _parts(text: Any) -> Any:
    return [{"type": "input_text", "text": text}] if isinstance(text, str) else text


Parts = Annotated[list[ResponsesTextPart], Field(fail_fast=True)]
Texts = Annotated[Parts, BeforeValidator(_parts, json_schema_input_type=str | Parts)]
SeenParts = Annotated[
    list[Annotated[ResponsesTextPart | InputImage, Field(discriminator="type")]], Field(fail_fast=True)
]
Seen = Annotated[SeenParts, BeforeValidator(_parts, json_schema_input_type=str | SeenParts)]


class _Item(SentObject):
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class ResponsesMessage(_Item):
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Seen
    phase: str | None = None


class Thought(_Item):
    type: Literal["reasoning"]
    summary: Texts | None = None
    content: Texts | None = None


class ResponsesToolCall(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutput(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Seen


def _typed(item: Any) -> Any:
    return {"type": "message", **item} if isinstance(item, dict) else item


def _listed(text: Any) -> Any:
    return [{"role": "user", "content": text}] if isinstance(text, str) else text


Item = Annotated[ResponsesMessage | Thought | ResponsesToolCall | CallOutput, Field(discriminator="type")]
Items = Annotated[
    list[Annotated[Item, BeforeValidator(_typed)]], Field(fail_fast=True, min_length=1, max_length=MESSAGES)
]
Input = Annotated[Items, BeforeValidator(_listed, json_schema_input_type=str | Items)]
OUTPUT: TypeAdapter[list[Item]] = TypeAdapter(Items)


class FunctionTool(FunctionDefinition):
    type: Literal["function"]


class ResponsesToolChoice(NamedFunction):
    type: Literal["function"]


class ResponsesSchemaFormat(NamedSchema):
    type: Literal["json_schema"]


class TextConfig(SentObject):
    format: Annotated[PlainFormat | ObjectFormat | ResponsesSchemaFormat, Field(discriminator="type")] = PlainFormat(
        type="text"
    )
    verbosity: Literal["medium"] | None = None


Note = Annotated[str, Field(max_length=512)]
Summary = Literal["auto", "concise", "detailed"]  # Accepted without effect, because reasoning is sent unchanged


class ResponsesReasoning(SentObject):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Summary | None = None
    generate_summary: Summary | None = None


class ResponseRequest(SentObject):
    """The body of `/v1/responses`."""

    model: str | None = None
    input: Input
    instructions: str | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=TOOLS), Field(default_factory=list)]
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig = TextConfig()
    reasoning: ResponsesReasoning | None = None
    max_output_tokens: TokenCount | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    previous_response_id: str | None = None
    store: bool = True
    stream: bool | None = None
    metadata: Annotated[dict[str, Note], Field(max_length=16), BeforeValidator(few), Field(default_factory=dict)]
    # Accepted from clients, without effect on answers.
    stream_options: dict[Literal["include_obfuscation"], Literal[False]] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None

    @model_validator(mode="after")
    def _tool_is_there(self) -> ResponseRequest:
        if self.tool_choice not in ("none", "auto") and not self.tools_to_call:
            raise ValueError("tool_choice asks for a tool that is not in tools: add it there")
        return self

    @property
    def tools_to_call(self) -> list[FunctionTool]:
        """The model must call one of these tools; empty: no call is required."""
        if isinstance(self.tool_choice, ResponsesToolChoice):
            return [tool for tool in self.tools if tool.name == self.tool_choice.name]
        return self.tools if self.tool_choice == "required" else []

    def chat(self, messages: Sequence[dict[str, Any]]) -> Chat:
        """The chat of the request with these messages, without the template's variables for reasoning."""
        wanted = self.text.format
        return Chat(
            messages=messages,
            functions=self.tools if self.tool_choice != "none" else [],
            to_call=self.tools_to_call,
            several_calls=self.parallel_tool_calls,
            answer_schema=None if isinstance(wanted, PlainFormat) else wanted.schema_,
            schema_param="text",
            sampling={"temperature": self.temperature, "top_p": self.top_p},
            max_tokens=self.max_output_tokens,
            fits=False,
        )


def _joined(parts: Sequence[ResponsesTextPart] | None) -> str:
    return "".join(part.text for part in parts or ())


def _read(parts: Sequence[ResponsesTextPart | InputImage], role: str, before: str = "") -> Any:
    """The content of a message whose first text is `before`."""
    read = [part.text if isinstance(part, ResponsesTextPart) else image_at(part.image_url, "input") for part in parts]
    return content_of([before, *read], role, param="input")


def for_template(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Makes messages for chat templates; consecutive reasoning, texts and calls of the assistant become one message."""
    said: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, CallOutput):
            said.append({"role": "tool", "content": _read(item.output, "tool"), "tool_call_id": item.call_id})
            continue
        role = item.role.replace("developer", "system") if isinstance(item, ResponsesMessage) else "assistant"
        if role != "assistant" or not said or said[-1]["role"] != role:
            said.append({"role": role, "content": ""})
        message = said[-1]
        if isinstance(item, ResponsesMessage):
            message["content"] = _read(item.content, role, message["content"])
        elif isinstance(item, Thought):
            thought = _joined(item.content) or _joined(item.summary)
            message["reasoning_content"] = message.get("reasoning_content", "") + thought
        else:
            try:
                function = {"name": item.name, "arguments": from_json(item.arguments, allow_inf_nan=False)}
            except ValueError:
                raise ApiError(400, "the arguments of a function_call are not valid JSON", param="input") from None
            call = {"id": item.call_id, "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
    return said


class KeptResponses:
    """Stored responses as JSON; each is only for the client that asked for it. If space runs out, the oldest response
    of the client with the most bytes is dropped. state: where other gateways find the responses of this one."""

    def __init__(self, state: SharedState | None = None) -> None:
        self._state = state
        self._kept: dict[str, tuple[str, bytes]] = {}  # by id: owner, JSON of response and messages
        self._held: Counter[str] = Counter()

    async def keep_response(self, owner: str, response: dict[str, Any], messages: Sequence[dict[str, Any]]) -> None:
        """Stores a response with all messages of the conversation, including its own, without instructions.

        owner: see `ApiClient.shared_name`.
        """
        id, text = response["id"], to_json([response, messages])
        self._kept[id] = owner, text
        self._held[owner] += len(text)
        if self._state is not None:
            await self._state.store(_name_of(owner, id), text)
        while self._held[owner] > KEPT_BYTES // 2 or self._held.total() > KEPT_BYTES:
            full = owner if self._held[owner] > KEPT_BYTES // 2 else max(self._held, key=self._held.__getitem__)
            await self.drop(full, next(id for id, (holder, _) in self._kept.items() if holder == full))

    async def find_response(
        self, owner: str, id: str, param: str | None = None
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A response and its messages. Raises ApiError if the client has no response with this id."""
        shared = None if self._state is None else await self._state.stored(_name_of(owner, id))
        holder, text = self._kept.get(id, ("", b""))
        if shared:
            holder, text = owner, shared
        if holder != owner or not text or text == DELETED:
            gone = (
                f"there is no response {id!r}: it was not stored, or was dropped for newer ones; send all items again"
            )
            raise ApiError(404, gone, param=param, code="response_not_found")
        response, messages = from_json(text)
        return response, messages

    async def drop(self, owner: str, id: str) -> None:
        """Deletes a response. Raises ApiError as `find_response` does."""
        await self.find_response(owner, id)
        self._held[owner] -= len(self._kept.pop(id, ("", b""))[1])
        self._held += Counter()  # removes clients without bytes
        if self._state is not None:
            await self._state.store(_name_of(owner, id), DELETED)


def _name_of(owner: str, id: str) -> str:
    return f"response:{digest_of(owner, id)}"


def router(gateway: Gateway) -> APIRouter:
    """The paths of the API."""
    paths, kept = APIRouter(route_class=ParsingRoute), KeptResponses(gateway.served.state)

    async def wanted(body: ResponseRequest, request: Request) -> tuple[ServedModel, list[dict[str, Any]], Chat]:
        """The model, the messages of the conversation without instructions, and the chat."""
        owner = request.state.client.shared_name
        served, before = await gateway.find_model(body.model), list[dict[str, Any]]()
        if body.previous_response_id is not None:
            _, before = await kept.find_response(owner, body.previous_response_id, "previous_response_id")
        messages = [*before, *await served.prepare(request, lambda: for_template(body.input))]
        said = [*([{"role": "system", "content": body.instructions}] if body.instructions else []), *messages]
        # Many templates accept only one system message.
        while len(said) > 1 and said[0]["role"] == said[1]["role"] == "system":
            said[:2] = [{"role": "system", "content": f"{said[0]['content']}\n\n{said[1]['content']}"}]
        chat, effort = body.chat(said), body.reasoning.effort if body.reasoning else None
        on, effort = effort and effort != "none", {"minimal": "low", "xhigh": "high"}.get(effort or "", effort)
        chat = await with_thinking(served, request, chat, "reasoning", on, effort)
        if on and not chat.variables["reasoning"]:
            raise ApiError(400, "this model's chat template has no place for effort: leave it out", param="reasoning")
        return served, messages, chat

    @paths.post("/v1/responses", response_model=None, responses=openai.STREAMED)
    async def respond(body: ResponseRequest, request: Request) -> Response:
        """Generates the next items of a conversation."""
        owner = request.state.client.shared_name
        served, messages, chat = await wanted(body, request)

        async def keep(response: dict[str, Any]) -> None:
            if body.store:
                await kept.keep_response(
                    owner, response, [*messages, *for_template(OUTPUT.validate_python(response["output"]))]
                )

        return await answer_chat(
            served, request, chat, ResponsesWriter(served.name, body, keep), stream=bool(body.stream)
        )

    @paths.post("/v1/responses/input_tokens")
    async def count(body: ResponseRequest, request: Request) -> dict[str, Any]:
        """Counts the tokens of a conversation's prompt."""
        served, _, chat = await wanted(body, request)
        return {"object": "response.input_tokens", "input_tokens": len((await prompt_of(served, request, chat)).tokens)}

    @paths.get("/v1/responses/{id}")
    async def stored(id: str, request: Request) -> dict[str, Any]:
        """Gives a stored response."""
        return (await kept.find_response(request.state.client.shared_name, id))[0]

    @paths.delete("/v1/responses/{id}")
    async def forget(id: str, request: Request) -> dict[str, Any]:
        """Deletes a stored response."""
        await kept.drop(request.state.client.shared_name, id)
        return {"id": id, "object": "response", "deleted": True}

    return paths


API = replace(openai.API, paths=("/v1/responses",), router=router)

_ECHOED = {"instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "previous_response_id", "reasoning"}
_ECHOED |= {"store", "temperature", "text", "tool_choice", "tools", "top_p", "truncation"}


Told = Iterator[dict[str, Any]]


@dataclass(eq=False)
class ResponsesWriter:
    """Writes the events of a request in OpenAI's form, see `splitnet.serve.responses.AnswerWriter`.

    keep: called with the complete response when the answer has ended.
    """

    model: str
    body: ResponseRequest
    keep: Callable[[dict[str, Any]], Awaitable[None]]

    media_type = EVENTS
    alive = KEEP_ALIVE

    def __post_init__(self) -> None:
        self.id = f"resp_{random_hex(12)}"
        self._created = created_at()
        self._output: list[dict[str, Any]] = []
        self._finish = ""
        self._usage: dict[str, Any] | None = None
        self._number = 0  # sequence number of the next event

    async def whole_body(self, events: AsyncIterator[Delta | Ended]) -> dict[str, Any]:
        async for event in events:
            for _ in self._take_event(event):
                pass
        return await self._last()

    async def event_stream(self, events: AsyncIterator[Delta | Ended]) -> AsyncGenerator[str]:
        for kind in ("created", "in_progress"):
            yield self._framed(kind, {"response": self._response("in_progress")})
        async for event in events:
            for told in self._take_event(event):
                yield self._framed(**told)
        last = await self._last()
        yield self._framed(last["status"], {"response": last})

    def error_event(self, failure: ApiError) -> str:
        error = {"code": "rate_limit_exceeded" if failure.status == 429 else "server_error", "message": str(failure)}
        return self._framed("failed", {"response": self._response("failed") | {"error": error}})

    def _framed(self, kind: str, told: dict[str, Any]) -> str:
        event = {"type": f"response.{kind}", "sequence_number": self._number, **told}
        self._number += 1
        return f"event: {event['type']}\n{framed(event)}"

    def _take_event(self, event: Delta | Ended) -> Told:
        """Takes an event; yields stream events for the new parts in the event.

        Each stream event must be written before the next one is requested.
        """
        if isinstance(event, Ended):
            self._usage = {
                "input_tokens": event.prompt_tokens,
                "input_tokens_details": {"cached_tokens": event.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": event.answer_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},  # not counted separately
                "total_tokens": event.prompt_tokens + event.answer_tokens,
            }
            return
        self._finish = event.finish or ""
        for kind, text in (("reasoning", event.reasoning), ("message", event.text)):
            if text or (kind == "message" and event.finish and not self._output):
                yield from self._write_text(kind, text)
        for call in event.calls:
            yield from self._end_item("completed")
            named = {"call_id": call.id, "name": call.name}
            yield from self._begin_item("fc", {"type": "function_call", **named, "arguments": ""})
            self._output[-1]["arguments"] = call.arguments
            yield self._of_item("function_call_arguments.delta", delta=call.arguments)
            yield self._of_item("function_call_arguments.done", name=call.name, arguments=call.arguments)
            yield from self._end_item("completed")
        if event.finish:
            yield from self._end_item(self._status)

    def _write_text(self, kind: str, text: str) -> Told:
        """Yields stream events for new text of a message or of reasoning."""
        if not self._output or self._output[-1]["type"] != kind:
            yield from self._end_item("completed")
            if kind == "message":
                yield from self._begin_item("msg", {"type": kind, "role": "assistant", "content": []})
                part = {"type": "output_text", "text": "", "annotations": []}
            else:
                yield from self._begin_item("rs", {"type": kind, "summary": [], "content": []})
                part = {"type": "reasoning_text", "text": ""}
            self._output[-1]["content"].append(part)
            yield self._of_item("content_part.added", content_index=0, part=part)
        part = self._output[-1]["content"][0]
        part["text"] += text
        if text:
            yield self._of_text(part, "delta", text)

    def _begin_item(self, prefix: str, item: dict[str, Any]) -> Told:
        self._output.append({"id": f"{prefix}_{random_hex(12)}", **item, "status": "in_progress"})
        yield self._of_item("output_item.added", item=self._output[-1])

    def _end_item(self, status: str) -> Told:
        """Ends the last item if it is open."""
        if self._output and self._output[-1]["status"] == "in_progress":
            item = self._output[-1]
            for part in item.get("content", ()):
                yield self._of_text(part, "done", part["text"])
                yield self._of_item("content_part.done", content_index=0, part=part)
            item["status"] = status
            yield self._of_item("output_item.done", item=item)

    def _of_text(self, part: dict[str, Any], kind: str, text: str) -> dict[str, Any]:
        own: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
        told = {"delta" if kind == "delta" else "text": text, **own}
        return self._of_item(f"{part['type']}.{kind}", content_index=0, **told)

    def _of_item(self, kind: str, **told: Any) -> dict[str, Any]:
        id = {} if "item" in told else {"item_id": self._output[-1]["id"]}
        return {"kind": kind, "told": {"output_index": len(self._output) - 1, **id, **told}}

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish == "length" else "completed"

    async def _last(self) -> dict[str, Any]:
        """Makes the complete response and passes it to `keep`."""
        response = self._response(self._status)
        await self.keep(response)
        return response

    def _response(self, status: str) -> dict[str, Any]:
        return {
            **self.body.model_dump(mode="json", by_alias=True, include=_ECHOED),
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.model,
            "output": self._output,
            "usage": self._usage,
        }
