"""The requests of OpenAI's API. A parameter that is not listed here, or has a value that is not, is refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, StrictInt, model_validator

from splitnet.serve.apis.strict import (
    MAX_TOKENS,
    MESSAGES,
    TOOLS,
    Penalty,
    RepetitionPenalty,
    Seed,
    Share,
    StopStrings,
    Strict,
    Temperature,
    Text,
    TokenCount,
    few,
)
from splitnet.serve.chat import Chat
from splitnet.serve.failures import ApiError

TOP_LOGPROBS = 20
CHOICES = 16
PROMPTS = 256

TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(fail_fast=True, min_length=1)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class PlainFormat(Strict):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class NamedSchema(Strict):
    """A JSON schema; the answer keeps to it, strict or not."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]


class SamplingRequest(Strict):
    """What both kinds of generation take."""

    model: str
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Share | None = None
    repetition_penalty: RepetitionPenalty | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    seed: Seed | None = None
    stop: Text | StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], BeforeValidator(few)] | None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def sampling(self) -> dict[str, Any]:
        """See `splitnet.serve.chat.sampling_of`."""
        names = "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"
        penalties = {name: getattr(self, name) or 0.0 for name in ("frequency_penalty", "presence_penalty")}
        bias = tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())
        return {name: getattr(self, name) for name in names} | penalties | {"bias": bias}

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for streams: leave it out, or set stream to true")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """What an assistant has called; `arguments` is JSON."""

    name: str
    arguments: str


class MadeCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


Content = str | Annotated[list[TextPart], Field(fail_fast=True)]


class UserMessage(Strict):
    """From the user, or an instruction how to answer."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: str | None = None


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[MadeCall], Field(fail_fast=True)] | None = None
    # What clients send back with the answers that they got.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Content
    name: str | None = None
    tool_call_id: str


Message = Annotated[UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def _for_template(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: text in one piece, arguments of calls as objects."""
    role = "system" if message.role == "developer" else message.role
    content = message.content
    text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
    said: dict[str, Any] = {"role": role, "content": text}
    if message.name is not None:
        said["name"] = message.name
    if isinstance(message, ToolMessage):
        said["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage) and message.tool_calls:
        said["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        for call in said["tool_calls"]:
            try:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
            except (ValueError, RecursionError):
                raise ApiError(400, "the arguments of a tool call are not valid JSON", param="messages") from None
    return said


class FunctionDefinition(Strict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    name: str


class ChosenTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingRequest):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MESSAGES)]
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(few)] | None = None
    # What clients send that changes no answer.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set logprobs to true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools_to_call:
            raise ValueError("tool_choice asks for a tool that is not there: give it in tools")
        if self.stop_strings and self.tools_to_call:
            raise ValueError("stop ends texts, and the answer is to be a call: leave out stop, or tool_choice")
        return self

    @property
    def chat(self) -> Chat:
        """What is wanted. Raises ApiError if the arguments of a call are no JSON."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return Chat(
            messages=[_for_template(message) for message in self.messages],
            functions=[tool.function for tool in self.offered_tools],
            to_call=[tool.function for tool in self.tools_to_call],
            several_calls=self.parallel_tool_calls is not False,
            answer_schema=self.schema_of_answer,
            variables={"chat_template_kwargs": self.chat_template_kwargs or {}, "reasoning_effort": effort},
            sampling=self.sampling,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            choices=self.n or 1,
            stop_strings=self.stop_strings,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    @property
    def offered_tools(self) -> list[Tool]:
        """Those that the model may call."""
        return self.tools if self.tools and self.tool_choice != "none" else []

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
        wanted = self.response_format
        if isinstance(wanted, SchemaFormat):
            return wanted.json_schema.schema_
        return {"type": "object"} if wanted is not None and wanted.type == "json_object" else None


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

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts; there may be one that stands alone."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return self.prompt  # pyright: ignore[reportReturnType]
