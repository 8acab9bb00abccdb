"""Anthropic's Messages API: its requests, paths, answers and errors."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from splitnet.images import Prompt, image
from splitnet.serve.answer_records import random_hex
from splitnet.serve.apis import openai
from splitnet.serve.apis.strict import MESSAGES, TOOLS, Share, StopStrings, Strict, Temperature, TokenCount
from splitnet.serve.chat import Chat, Delta, answer_chat, prompt_of, with_thinking
from splitnet.serve.failures import ApiError
from splitnet.serve.gateway import Gateway
from splitnet.serve.generation import Ended
from splitnet.serve.message_parts import Part, content_of, image_at
from splitnet.serve.request_gate import Api, ParsingRoute
from splitnet.serve.responses import EVENTS, ServedModel, framed

VERSION = "anthropic-version"  # All clients of this API send this header; clients of other APIs do not send it
# Signature of thinking blocks, because some clients send back only signed blocks; the server does not check signatures
SIGNATURE = "splitnet"
# Some clients begin with a system text with this prefix. The text is not meant for models, and changes in each request,
# so that the prefix of the prompt would change, too.
IGNORED_SYSTEM_PREFIX = "x-anthropic-billing-header"

Each = TypeVar("Each")
# Accepted without effect, because all prompts are cached
CacheControl = dict[Literal["type", "ttl"], Literal["ephemeral", "5m", "1h"]]


def _blocks(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Content = Annotated[
    list[Each], Field(fail_fast=True), BeforeValidator(_blocks, json_schema_input_type=str | list[dict[str, Any]])
]


class TextBlock(Strict):
    type: Literal["text"]
    text: str
    citations: None = None
    cache_control: CacheControl | None = None


class ImageData(Strict):
    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str


class ImageAtUrl(Strict):
    type: Literal["url"]
    url: str


class ImageBlock(Strict):
    type: Literal["image"]
    source: Annotated[ImageData | ImageAtUrl, Field(discriminator="type")]
    cache_control: CacheControl | None = None


class ThinkingBlock(Strict):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUse(Strict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[Literal["type"], Literal["direct"]] | None = None
    cache_control: CacheControl | None = None


class ToolResult(Strict):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Content[Annotated[TextBlock | ImageBlock, Field(discriminator="type")]] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class AnthropicUserMessage(Strict):
    """A message of the user, or an instruction for the answer."""

    role: Literal["user", "system"]
    content: Content[Annotated[TextBlock | ImageBlock | ToolResult, Field(discriminator="type")]]


class AnthropicAssistantMessage(Strict):
    role: Literal["assistant"]
    content: Content[Annotated[TextBlock | ThinkingBlock | ToolUse, Field(discriminator="type")]]


Message = Annotated[AnthropicUserMessage | AnthropicAssistantMessage, Field(discriminator="role")]


def _for_template(
    system: str, messages: Sequence[AnthropicUserMessage | AnthropicAssistantMessage]
) -> list[dict[str, Any]]:
    """Messages in the form that chat templates expect; consecutive texts of a user become one message.

    An instruction that is not at the beginning becomes a text of the user, because many templates refuse or omit later
    system messages.
    """
    said: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for message in messages:
        if isinstance(message, AnthropicAssistantMessage):
            said.append({"role": "assistant", "content": _joined(message.content)})
        for block in message.content:
            if isinstance(block, ThinkingBlock):
                said[-1]["reasoning_content"] = said[-1].get("reasoning_content", "") + block.thinking
            elif isinstance(block, ToolUse):
                call = {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
                said[-1].setdefault("tool_calls", []).append(call)
            elif isinstance(block, ToolResult):
                parts = [*map(_read, block.content or [])]
                if block.is_error:
                    parts = (
                        [f"Error: {parts[0]}", *parts[1:]]
                        if parts and isinstance(parts[0], str)
                        else ["Error: ", *parts]
                    )
                content = content_of(parts, "tool", "\n")
                said.append({"role": "tool", "content": content, "tool_call_id": block.tool_use_id})
            elif message.role != "assistant":
                role = message.role if not said or said[-1]["role"] == "system" else "user"
                if said and said[-1]["role"] == role:
                    before = said[-1]["content"]
                    parts = [before] if isinstance(before, str) else [part.get("text", part) for part in before]
                    said[-1]["content"] = content_of([*parts, _read(block)], role, "\n")
                else:
                    said.append({"role": role, "content": content_of([_read(block)], role)})
    return said


def _read(block: TextBlock | ImageBlock) -> Part:
    if isinstance(block, TextBlock):
        return block.text
    source = block.source
    return image(source.data) if isinstance(source, ImageData) else image_at(source.url, "messages")


def _joined(blocks: Sequence[Any]) -> str:
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))


class AnthropicTool(Strict):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Field(alias="input_schema")]
    strict: bool | None = None
    cache_control: CacheControl | None = None
    defer_loading: Literal[False] | None = None
    eager_input_streaming: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None


class ToolChoice(Strict):
    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Strict):
    """Options of thinking; `budget_tokens` has no effect, because `max_tokens` bounds thinking and answer together."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: TokenCount | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ContextEdit(Strict):
    """Accepted without effect: the chat template determines which earlier thinking the model reads."""

    type: Literal["clear_thinking_20251015"]
    keep: Any = None


class MessagesRequest(Strict):
    """The body of `/v1/messages`, and of `/v1/messages/count_tokens`, which does not need `max_tokens`."""

    model: str
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MESSAGES)]
    system: Content[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Field(fail_fast=True, max_length=TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # an older name of `output_config.format`
    max_tokens: TokenCount | None = None
    stream: bool | None = None
    stop_sequences: StopStrings | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    # Accepted from clients, without effect on answers.
    metadata: dict[Literal["user_id"], str | None] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    cache_control: CacheControl | None = None
    context_management: dict[Literal["edits"], list[ContextEdit]] | None = None
    speed: Literal["standard"] | None = None

    @property
    def chat(self) -> Chat:
        """The chat without the template's variables for thinking. Raises ApiError if parameters are contradictory."""
        if isinstance(self.messages[-1], AnthropicAssistantMessage):
            raise ApiError(400, "the last message is from the assistant: end with a user message", param="messages")
        choice, tools = self.tool_choice or ToolChoice(type="auto"), self.tools or []
        if choice.name is not None and choice.type != "tool":
            raise ApiError(400, "tool_choice.name needs the type tool: leave out the name", param="tool_choice")
        to_call = [tool for tool in tools if choice.type == "any" or tool.name == choice.name]
        if choice.type in ("any", "tool") and not to_call:
            raise ApiError(400, "tool_choice asks for a tool that is not in tools: add it there", param="tool_choice")
        system = _joined([block for block in self.system or [] if not block.text.startswith(IGNORED_SYSTEM_PREFIX)])
        schema = (self.output_config and self.output_config.format) or self.output_format
        return Chat(
            messages=_for_template(system, self.messages),
            functions=tools if choice.type != "none" else [],
            to_call=to_call,
            several_calls=not choice.disable_parallel_tool_use,
            answer_schema=schema.schema_ if schema else None,
            schema_param="output_config",
            sampling={"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k},
            max_tokens=self.max_tokens,
            fits=False,
            stop_strings=self.stop_sequences or [],
        )


async def _prompted(served: ServedModel, request: Request, body: MessagesRequest) -> tuple[Chat, Prompt]:
    """The chat of a request, and its prompt."""
    on = None if body.thinking is None else body.thinking.type != "disabled"
    effort = body.output_config.effort if body.output_config else None
    chat = await served.prepare(request, lambda: body.chat)
    chat = await with_thinking(served, request, chat, "thinking", on, "high" if effort in ("xhigh", "max") else effort)
    return chat, await prompt_of(served, request, chat)


class AnthropicErrorBody(BaseModel):
    """The body of every error."""

    type: Literal["error"] = "error"
    error: dict[Literal["type", "message"], str]


_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ERROR_TYPES |= {408: "timeout_error", 413: "request_too_large", 503: "overloaded_error"}


def error_body(failure: ApiError) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(failure.status, "invalid_request_error" if failure.status < 500 else "api_error")
    error: dict[str, Any] = {"type": kind, "message": str(failure)}
    if failure.param == "thread":  # this code makes clients send whole conversations
        error["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": error}


class _OfItsClients(ParsingRoute):
    """A route for Anthropic's clients only, as OpenAI's API has the same path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return super().matches(scope) if VERSION in Headers(scope=scope) else (Match.NONE, {})


def router(gateway: Gateway) -> APIRouter:
    """The paths of the API."""
    paths, models = APIRouter(route_class=ParsingRoute), APIRouter(route_class=_OfItsClients)

    def entry(name: str) -> dict[str, Any]:
        created = datetime.fromtimestamp(gateway.created, UTC).isoformat()
        return {"type": "model", "id": name, "display_name": name, "created_at": created, "lifecycle": "active"}

    @models.get("/v1/models", include_in_schema=False)
    def listed() -> dict[str, Any]:
        names = gateway.model_names
        return {"data": [*map(entry, names)], "has_more": False, "first_id": names[0], "last_id": names[-1]}

    @models.get("/v1/models/{name:path}", include_in_schema=False)
    def one(name: str) -> dict[str, Any]:
        gateway.check_name(name)
        return entry(name)

    @paths.post("/v1/messages", response_model=None, responses=openai.STREAMED)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Generates the next message of a chat (Anthropic's API)."""
        if body.max_tokens is None:
            raise ApiError(400, "max_tokens is missing: say how long the answer may be", param="max_tokens")
        served = await gateway.find_model(body.model)
        chat, prompt = await _prompted(served, request, body)
        shows = body.thinking is None or body.thinking.display != "omitted"
        answer = AnthropicWriter(served.name, len(prompt.tokens), body.max_tokens, shows)
        return await answer_chat(served, request, chat, answer, stream=bool(body.stream), prompt=prompt)

    @paths.post("/v1/messages/count_tokens")
    async def count(body: MessagesRequest, request: Request) -> dict[str, int]:
        """Counts the tokens of a prompt."""
        served = await gateway.find_model(body.model)
        _, prompt = await _prompted(served, request, body)
        return {"input_tokens": len(prompt.tokens)}

    paths.include_router(models)
    return paths


API = Api(("/v1/messages",), router, error_body, openai.key_of, "x-api-key: KEY", "Bearer", AnthropicErrorBody, VERSION)

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _framed(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\n{framed(event)}"


@dataclass(eq=False)
class AnthropicWriter:
    """Writes the events of a request in Anthropic's form, see `splitnet.serve.responses.AnswerWriter`."""

    model: str
    prompt_tokens: int
    max_tokens: int
    shows_thinking: bool

    media_type = EVENTS
    alive = _framed({"type": "ping"})

    def __post_init__(self) -> None:
        self.id = f"msg_{random_hex(12)}"
        self._content: list[dict[str, Any]] = []
        self._last = Delta(0)
        self._ended = Ended(self.prompt_tokens, 0, 0)

    async def whole_body(self, events: AsyncIterator[Delta | Ended]) -> dict[str, Any]:
        async for event in events:
            for _ in self._take_event(event):
                pass
        return self._message()

    async def event_stream(self, events: AsyncIterator[Delta | Ended]) -> AsyncGenerator[str]:
        yield _framed({"type": "message_start", "message": self._message()})
        async for event in events:
            for told in self._take_event(event):
                yield _framed(told)
        yield _framed({"type": "message_delta", "delta": self._stopped(), "usage": self._usage()})
        yield _framed({"type": "message_stop"})

    def error_event(self, failure: ApiError) -> str:
        return _framed(error_body(failure))

    def _take_event(self, event: Delta | Ended) -> Iterator[dict[str, Any]]:
        """Takes an event; yields Anthropic's stream events for the new parts in the event."""
        if isinstance(event, Ended):
            self._ended = event
            return
        self._last = event
        for kind, text in (("thinking", event.reasoning if self.shows_thinking else ""), ("text", event.text)):
            if text:
                if not self._content or self._content[-1]["type"] != kind:
                    yield from self._begin_block(kind, {kind: ""})
                self._content[-1][kind] += text
                yield self._new({"type": f"{kind}_delta", kind: text})
        for call in event.calls:
            yield from self._begin_block("tool_use", {"id": call.id, "name": call.name, "input": {}})
            self._content[-1]["input"] = json.loads(call.arguments)
            yield self._new({"type": "input_json_delta", "partial_json": call.arguments})
        if event.finish:
            if not self._content:
                yield from self._begin_block("text", {"text": ""})
            yield from self._end_block()

    def _begin_block(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Ends the last content block and begins a new one."""
        yield from self._end_block()
        self._content.append({"type": kind, **block, **({"signature": ""} if kind == "thinking" else {})})
        # A copy, because the block grows before the event is written.
        yield {"type": "content_block_start", "index": len(self._content) - 1, "content_block": {**self._content[-1]}}

    def _end_block(self) -> Iterator[dict[str, Any]]:
        if self._content:
            if self._content[-1]["type"] == "thinking":
                self._content[-1]["signature"] = SIGNATURE
                yield self._new({"type": "signature_delta", "signature": SIGNATURE})
            yield {"type": "content_block_stop", "index": len(self._content) - 1}

    def _new(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta}

    def _message(self) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.model}
        return {**head, "content": self._content, **self._stopped(), "usage": self._usage()}

    def _stopped(self) -> dict[str, Any]:
        finish, stopped = self._last.finish, self._last.stopped
        reason = _REASONS[finish] if finish else None
        if reason == "end_turn" and stopped is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": stopped}
        if reason == "max_tokens" and self._ended.answer_tokens < self.max_tokens:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        """Token counts; `input_tokens` does not include the cached tokens of the prompt."""
        ended = self._ended
        return {
            "input_tokens": ended.prompt_tokens - ended.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": ended.cached_tokens,
            "output_tokens": ended.answer_tokens,
        }
