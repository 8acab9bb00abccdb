"""The requests that are understood. A parameter that is not listed here, or has a value that is not, is refused."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, ValidationError, model_validator
from pydantic_core import from_json
from starlette.responses import Response

from splitnet.serve.failures import ApiError, refused

STOP_STRINGS = 16
TOP_LOGPROBS = 20
CHOICES = 16
PROMPTS = 256
BIASED_TOKENS = 1024
MAX_TOKENS = 2**24
MESSAGES = 2**14
TOOLS = 256


def _few(given: Any) -> Any:
    """Of an object pydantic collects an error for every name, so one with very many is refused before it looks."""
    if isinstance(given, dict) and len(given) > BIASED_TOKENS:
        raise ValueError(f"an object has {len(given)} names: give {BIASED_TOKENS} at most")
    return given


Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(fail_fast=True, min_length=1)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    _few_names = model_validator(mode="before")(_few)


class StreamOptions(_Strict):
    """How a stream ends."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(_Strict):
    """Any text."""

    type: Literal["text"]


class JsonFormat(_Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(_Strict):
    """A JSON schema; the answer keeps to it, strict or not."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(_Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class SamplingRequest(_Strict):
    """What both kinds of generation take."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(fail_fast=True, max_length=STOP_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], BeforeValidator(_few)] | None = None

    @property
    def stop_strings(self) -> list[str]:
        """As a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for streams: leave it out, or set stream to true")
        return self


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(_Strict):
    """What an assistant has called; `arguments` is JSON."""

    name: str
    arguments: str


class MadeCall(_Strict):
    """A call in the message of an assistant."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


Content = str | Annotated[list[TextPart], Field(fail_fast=True)]


class UserMessage(_Strict):
    """From who asks, or who says how to answer."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: str | None = None


class AssistantMessage(_Strict):
    """From the model."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[MadeCall], Field(fail_fast=True)] | None = None
    # What clients send back with the answers that they got.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(_Strict):
    """What a tool has answered."""

    role: Literal["tool"]
    content: Content
    name: str | None = None
    tool_call_id: str


Message = Annotated[UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class FunctionDefinition(_Strict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool that the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(_Strict):
    """A function by its name."""

    name: str


class ChosenTool(_Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingRequest):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_few)] | None = None
    # What clients send that changes no answer.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set logprobs to true")
        return self

    @model_validator(mode="after")
    def _json_or_tools(self) -> ChatRequest:
        if self.tools and self.schema_of_answer is not None:
            raise ValueError("an answer cannot both be JSON and call tools: leave out tools or response_format")
        return self

    @model_validator(mode="after")
    def _chosen_tools_are_there(self) -> ChatRequest:
        if self.tool_choice not in (None, "none", "auto") and not self.tools_to_call:
            raise ValueError("tool_choice asks for a tool that is not there: give it in tools")
        return self

    @model_validator(mode="after")
    def _a_call_is_no_text(self) -> ChatRequest:
        if self.stop_strings and self.tools_to_call:
            raise ValueError("stop ends texts, and the answer is to be a call: leave out stop, or tool_choice")
        return self

    @property
    def offered_tools(self) -> list[Tool]:
        """Those that the model may call."""
        return self.tools if self.tools and self.tool_choice != "none" else []

    @property
    def binds_calls(self) -> bool:
        """Whether calls, if the model makes some, must keep to anything."""
        return self.parallel_tool_calls is False or any(tool.function.strict for tool in self.offered_tools)

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template is given besides messages and tools."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return (self.chat_template_kwargs or {}) | effort

    @property
    def tools_to_call(self) -> list[Tool]:
        """One of these must be called; empty: the model may do as it likes."""
        if self.tool_choice == "required":
            return self.tools or []
        if isinstance(self.tool_choice, ChosenTool):
            return [tool for tool in self.tools or [] if tool.function.name == self.tool_choice.function.name]
        return []

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer keeps to; None: it is text."""
        if isinstance(self.response_format, SchemaFormat):
            return self.response_format.json_schema.schema_
        return {"type": "object"} if isinstance(self.response_format, JsonFormat) else None


Each = TypeVar("Each")
Batch = Annotated[list[Each], Field(fail_fast=True, min_length=1, max_length=PROMPTS)]


class CompletionRequest(SamplingRequest):
    """The body of `/v1/completions`."""

    prompt: str | TokenIds | Batch[str] | Batch[TokenIds]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


Result = TypeVar("Result")

LARGE_BYTES = 2**16
"""A request of more is prepared after others of that kind, so that small ones find a free core."""


class Preparing:
    """Does what a request needs before it runs in other threads: parsing, templates, tokens, grammars."""

    def __init__(self) -> None:
        self._small, self._large = CapacityLimiter(4), CapacityLimiter(1)

    async def run(self, size: int, work: Callable[..., Result], *arguments: Any) -> Result:
        """What `work` returns; `size`: bytes of the request."""
        limiter = self._large if size > LARGE_BYTES else self._small
        return await to_thread.run_sync(work, *arguments, limiter=limiter)


def parsed(kind: type[BaseModel], body: bytes) -> BaseModel:
    """The request that a body holds.

    Raises:
        ApiError: it is no JSON, or no such request.
    """
    try:
        document = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        deep = "recursion limit" in str(error)
        raise ApiError(400, "the body is nested too deep" if deep else "the body is not valid JSON") from None
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        raise refused([{**each, "loc": ("body", *each["loc"])} for each in errors]) from None


class ParsingRoute(APIRoute):
    """Parses bodies with `app.state.preparing`; FastAPI would do so on the event loop, and collect every error."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        kind = self.body_field.field_info.annotation if self.body_field is not None else None

        class Parsed(Request):
            async def json(self) -> Any:
                body = await self.body()
                return await self.app.state.preparing.run(len(body), parsed, kind, body)

        async def handle(request: Request) -> Response:
            return await handler(Parsed(request.scope, request.receive))

        return handle
