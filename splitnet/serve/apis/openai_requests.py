"""The requests of OpenAI's API, with parameters of vLLM and llama.cpp. Unlisted parameters and values are refused."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar

from llguidance.gbnf_to_lark import any_to_lark
from pydantic import BeforeValidator, Field, StrictInt, model_validator
from pydantic_core import from_json

from splitnet.serve.apis.strict import (
    MAX_TOKENS,
    MESSAGES,
    NAMES,
    STOP_STRINGS,
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
from splitnet.serve.message_parts import content_of, image_at

TOP_LOGPROBS = 20
CHOICES = 16
PROMPTS = 256

TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(fail_fast=True, min_length=1)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
KnownToken = Annotated[StrictInt, Field(ge=0)]
Rule = Annotated[str, Field(min_length=1, max_length=2**16)]
Choices = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=NAMES)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class PlainFormat(Strict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object, or JSON that fits a schema (llama.cpp's form)."""

    type: Literal["json_object"]
    schema_: Annotated[dict[str, Any], Field(alias="schema", default_factory=lambda: {"type": "object"})]


class NamedSchema(Strict):
    """A JSON schema that the answer fits, whether `strict` is set or not."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[PlainFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


RULES = 256  # Maximum number of rules of a grammar


def most(*counts: int | None) -> int | None:
    """The largest count; None: all are None."""
    return max((count for count in counts if count is not None), default=None)


def _schema(given: Any, param: str) -> dict[str, Any]:
    """A JSON schema, given as an object or as JSON text. Raises ApiError if it is not a JSON object."""
    try:
        schema = from_json(given, allow_inf_nan=False) if isinstance(given, str) else given
    except ValueError:
        schema = None
    if not isinstance(schema, dict):
        raise ApiError(400, f"{param} is not a JSON schema: give an object", param=param)
    return schema


class StructuredOutputs(Strict):
    """A constraint on the answer in vLLM's form: only one of json, regex, choice, grammar and json_object is given."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: Rule | None = None
    choice: Choices | None = None
    grammar: Rule | None = None
    json_object: Literal[True] | None = None
    # Options of vLLM's implementation, which are accepted without effect.
    disable_fallback: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: Literal[False] | None = None
    whitespace_pattern: None = None

    @property
    def given(self) -> dict[str, Any]:
        found = {"json": self.json_, "regex": self.regex, "choice": self.choice, "grammar": self.grammar}
        return {name: each for name, each in (found | {"json_object": self.json_object}).items() if each is not None}


def _lark(kind: str, given: Any) -> str:
    """A grammar in Lark for the constraint `kind` of `StructuredOutputs`. Raises ApiError if `given` is invalid."""
    if kind == "regex":
        escaped = re.sub(r"\\.|/", lambda match: "\\/" if match[0] == "/" else match[0], given, flags=re.DOTALL)
        return f"start: /{escaped}/"
    if kind == "choice":
        return f"start: {' | '.join(map(json.dumps, given))}"
    if sum(":" in line for line in given.splitlines()) > RULES:
        raise ApiError(400, f"the grammar has more than {RULES} rules: use a simpler one", param="grammar")
    try:
        return any_to_lark(given)
    except Exception as error:  # the converter raises errors of many types
        raise ApiError(400, f"the grammar cannot be read: {error}", param="grammar") from None


class SamplingRequest(Strict):
    """Parameters of both chats and completions."""

    model: str | None = None
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
    # Parameters of vLLM and llama.cpp.
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    stop_token_ids: Annotated[list[KnownToken], Field(fail_fast=True, max_length=STOP_STRINGS)] | None = None
    truncate_prompt_tokens: TokenCount | Literal[-1] | None = None  # -1: as many tokens as leave room for the answer
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Rule | None = None
    guided_choice: Choices | None = None
    guided_grammar: Rule | None = None
    json_schema: dict[str, Any] | None = None
    grammar: Rule | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    timings_per_token: bool | None = None
    # Accepted from clients, without effect on answers.
    metadata: Annotated[dict[str, Any], BeforeValidator(few)] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    cache_prompt: bool | None = None
    add_special_tokens: Literal[True] | None = None
    skip_special_tokens: Literal[True] | None = None
    include_stop_str_in_output: Literal[False] | None = None
    use_beam_search: Literal[False] | None = None
    length_penalty: Literal[1] | None = None
    truncation_side: Literal["left"] | None = None

    @property
    def constraints(self) -> dict[str, dict[str, Any]]:
        """A `schema` or a `rule` for the answer, by parameter, see `AnswerConstraints`. Raises ApiError if invalid."""
        guided = ("json", "regex", "choice", "grammar")
        given: dict[str, tuple[str, Any]] = {
            f"guided_{kind}": (kind, getattr(self, f"guided_{kind}")) for kind in guided
        }
        given |= {"json_schema": ("json", self.json_schema), "grammar": ("grammar", self.grammar)}
        if (wanted := self.structured_outputs) is not None:
            given |= {f"structured_outputs.{kind}": (kind, each) for kind, each in wanted.given.items()}
        found: dict[str, dict[str, Any]] = {}
        for param, (kind, value) in given.items():
            if value is not None and kind in ("json", "json_object"):
                found[param] = {"schema": {"type": "object"} if value is True else _schema(value, param)}
            elif value is not None:
                found[param] = {"rule": _lark(kind, value)}
        return found

    @property
    def bounds(self) -> dict[str, Any]:
        """The single constraint with its `param`; empty: no constraint is given. Raises ApiError if several are."""
        found = self.constraints
        if len(found) > 1:
            raise ApiError(400, f"an answer can have only one of {' and '.join(found)}: leave out the others")
        if found and (self.ignore_eos or self.min_tokens):
            raise ApiError(400, f"{next(iter(found))} sets where an answer ends: leave out ignore_eos and min_tokens")
        return {name: each | {"param": name} for name, each in found.items()}.popitem()[1] if found else {}

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def sampling(self) -> dict[str, Any]:
        """See `splitnet.serve.chat.sampling_of`."""
        names = "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "min_tokens"
        penalties = {name: getattr(self, name) or 0.0 for name in ("frequency_penalty", "presence_penalty")}
        bias = tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())
        return {name: getattr(self, name) for name in names} | penalties | {"bias": bias}

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for streams: leave it out, or set stream to true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is for whole answers only: leave out prompt_logprobs or stream")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # without effect: the model's processor scales images


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class CalledFunction(Strict):
    """A function that an assistant called; `arguments` is JSON text."""

    name: str
    arguments: str


class MadeCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


Content = str | Annotated[list[TextPart], Field(fail_fast=True)]
SeenContent = str | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(fail_fast=True)]


class UserMessage(Strict):
    """A message of the user, or an instruction for the answer."""

    role: Literal["system", "developer", "user"]
    content: SeenContent
    name: str | None = None


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[MadeCall], Field(fail_fast=True)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    # Fields of earlier answers that clients send back, without effect.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: SeenContent
    name: str | None = None
    tool_call_id: str


Message = Annotated[UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def _for_template(message: Message) -> dict[str, Any]:
    """A message in the form that chat templates expect: text in one piece, arguments of calls as objects."""
    role = "system" if message.role == "developer" else message.role
    parts = (
        message.content if isinstance(message.content, list) else [TextPart(type="text", text=message.content or "")]
    )
    read = [part.text if isinstance(part, TextPart) else image_at(part.image_url.url, "messages") for part in parts]
    said: dict[str, Any] = {"role": role, "content": content_of(read, role)}
    if message.name is not None:
        said["name"] = message.name
    if isinstance(message, ToolMessage):
        said["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage) and (reasoning := message.reasoning_content or message.reasoning):
        said["reasoning_content"] = reasoning
    if isinstance(message, AssistantMessage) and message.tool_calls:
        said["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        for call in said["tool_calls"]:
            try:
                call["function"]["arguments"] = from_json(call["function"]["arguments"] or "{}", allow_inf_nan=False)
            except ValueError:
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
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    # Accepted from clients, without effect on answers.
    modalities: list[Literal["text"]] | None = None
    verbosity: str | None = None
    reasoning_format: Literal["auto", "deepseek"] | None = None
    include_reasoning: Literal[True] | None = None
    parse_tool_calls: Literal[True] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set logprobs to true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools_to_call:
            raise ValueError("tool_choice asks for a tool that is not in tools: add it there")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise ValueError(
                    "add_generation_prompt begins an answer, continue_final_message continues one: leave one out"
                )
            if self.messages[-1].role != "assistant":
                raise ValueError("continue_final_message continues a message of the assistant: send it as the last one")
        elif self.echo:
            raise ValueError("echo repeats the message that an answer continues: set continue_final_message, too")
        if self.tools_to_call and self.constraints:
            raise ValueError(f"tool_choice requires a call: leave out {next(iter(self.constraints))}, or tool_choice")
        return self

    @property
    def chat(self) -> Chat:
        """The chat of the request. Raises ApiError if call arguments are not JSON, or there are several constraints."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        bounds, top = self.bounds, (self.top_logprobs or 0) if self.logprobs else None
        return Chat(
            messages=[_for_template(message) for message in self.messages],
            functions=[tool.function for tool in self.offered_tools],
            to_call=[tool.function for tool in self.tools_to_call],
            several_calls=self.parallel_tool_calls is not False,
            answer_schema=bounds.get("schema"),
            rule=bounds.get("rule"),
            schema_param=bounds.get("param", "response_format"),
            variables={"chat_template_kwargs": self.chat_template_kwargs or {}, "reasoning_effort": effort},
            sampling=self.sampling,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            choices=self.n or 1,
            stop_strings=self.stop_strings,
            top_logprobs=most(self.prompt_logprobs, top),
            stop_tokens=self.stop_token_ids or (),
            ignores_ends=bool(self.ignore_eos),
            scores_prompt=self.prompt_logprobs is not None,
            last_tokens=self.truncate_prompt_tokens,
            begins_answer=self.add_generation_prompt is not False,
            continues_last_message=bool(self.continue_final_message),
            echoes=bool(self.echo),
        )

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model may call."""
        return self.tools if self.tools and self.tool_choice != "none" else []

    @property
    def tools_to_call(self) -> list[Tool]:
        """The model must call one of these tools; empty: no call is required."""
        if self.tool_choice == "required":
            return self.tools or []
        if isinstance(self.tool_choice, ChosenTool):
            return [tool for tool in self.tools or [] if tool.function.name == self.tool_choice.function.name]
        return []

    @property
    def constraints(self) -> dict[str, dict[str, Any]]:
        wanted, found = self.response_format, super().constraints
        if isinstance(wanted, SchemaFormat):
            found["response_format"] = {"schema": wanted.json_schema.schema_}
        elif isinstance(wanted, ObjectFormat):
            found["response_format"] = {"schema": wanted.schema_}
        return found


Each = TypeVar("Each")
Batch = Annotated[list[Each], Field(fail_fast=True, min_length=1, max_length=PROMPTS)]


class CompletionRequest(SamplingRequest):
    """The body of `/v1/completions`."""

    prompt: str | TokenIds | Batch[str] | Batch[TokenIds]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _marks_are_the_servers(self) -> CompletionRequest:
        if self.suffix and (self.echo or self.truncate_prompt_tokens or not isinstance(self.prompts[0], str)):
            raise ValueError("suffix needs a text: leave out echo, truncate_prompt_tokens and tokens, or suffix")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, even if the request gives only one prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return self.prompt  # pyright: ignore[reportReturnType]


class OtherFile(Strict):
    text: str
    filename: str = "tmp"
    time: Any = None  # editors send this field; it has no effect


class InfillRequest(CompletionRequest):
    """The body of `/infill`, in the form of llama.cpp's server."""

    prompt: str | TokenIds | Batch[str] | Batch[TokenIds] = ""
    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: Annotated[list[OtherFile], Field(fail_fast=True, max_length=NAMES), Field(default_factory=list)]
    n_predict: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] = -1
    timings_per_token: bool | None = True
    # Accepted from editors, without effect on answers.
    id_slot: int | None = None
    samplers: list[str] | None = None
    n_indent: int | None = None
    t_max_prompt_ms: int | None = None
    t_max_predict_ms: int | None = None

    @model_validator(mode="after")
    def _is_one_text(self) -> InfillRequest:
        others = {"n", "echo", "logprobs", "prompt_logprobs", "return_token_ids", "suffix", "max_tokens"}
        wrong = sorted(others & self.model_fields_set)
        if wrong or self.truncate_prompt_tokens or not isinstance(self.prompt, str):
            raise ValueError(f"{(*wrong, 'a prompt of tokens or one that is cut')[0]} is not for /infill: leave it out")
        return self

    @property
    def prompts(self) -> list[str]:
        return [f"{self.input_prefix}{self.prompt}"]
