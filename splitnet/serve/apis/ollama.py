"""Ollama's API: its requests, paths, answers and errors."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from starlette.responses import Response
from torch import Tensor

from splitnet.images import image
from splitnet.serve.answer_records import random_hex
from splitnet.serve.apis import openai
from splitnet.serve.apis.embeddings import JSON, listed, written
from splitnet.serve.apis.openai_requests import Batch, Tool
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
)
from splitnet.serve.chat import Chat, Delta, answer_chat, with_thinking
from splitnet.serve.failures import ApiError
from splitnet.serve.gateway import Gateway
from splitnet.serve.generation import Ended
from splitnet.serve.message_parts import content_of
from splitnet.serve.reading import CONTEXT, embed
from splitnet.serve.request_gate import Api, ParsingRoute
from splitnet.serve.responses import ServedModel

VERSION = "0.12.6"  # The version of Ollama that this API corresponds to: programs require a minimum version
LINES = "application/x-ndjson"
LATEST = ":latest"  # The suffix of a model's name that clients may add or leave out
Nothing = Annotated[list[Any], Field(max_length=0)]
Images = Annotated[list[str], Field(fail_fast=True)]

_NEUTRAL = {"mirostat": 0, "tfs_z": 1, "typical_p": 1, "repeat_last_n": -1}
_NEUTRAL |= dict.fromkeys(("logits_all", "vocab_only", "embedding_only"), False)
_UNUSED = {"mirostat_tau", "mirostat_eta", "penalize_newline", "num_keep", "num_batch", "num_gpu", "main_gpu"}
_UNUSED |= {"num_thread", "numa", "low_vram", "f16_kv", "use_mmap", "use_mlock"}


def _used(options: Any) -> Any:
    """Removes options without effect on answers: settings of Ollama's engine, details of unsupported options, and
    neutral values."""
    given = options.items() if isinstance(options, dict) else ()
    neutral = {name: (None, value) for name, value in _NEUTRAL.items()}
    used = {name: value for name, value in given if name not in _UNUSED and value not in neutral.get(name, ())}
    return used if isinstance(options, dict) else options


class Options(Strict):
    """Options of sampling and of the answer's length."""

    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Share | None = None
    seed: Seed | None = None
    num_predict: Annotated[int, Field(ge=-2, le=MAX_TOKENS)] | None = None
    stop: Text | StopStrings | None = None
    repeat_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    num_ctx: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None

    _only_used = model_validator(mode="before")(_used)


class Generating(Strict):
    """Parameters of both `/api/chat` and `/api/generate`."""

    model: str
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: float | str | None = None
    truncate: Literal[False] | None = None
    shift: Literal[False] | None = None

    @property
    def chat(self) -> Chat:
        """The chat of the request, without its messages."""
        options = self.options or Options()
        sampling = options.model_dump(exclude={"num_predict", "stop", "repeat_penalty", "num_ctx"})
        sampling |= {"repetition_penalty": options.repeat_penalty, "seed": None if options.seed == -1 else options.seed}
        stop, most = options.stop, options.num_predict or 0
        return Chat(
            messages=(),
            answer_schema={"type": "object"} if self.format in ("json", {}) else self.format or None,
            schema_param="format",
            sampling=sampling,
            max_tokens=most if most > 0 else None,
            fits=False,
            stop_strings=[stop] if isinstance(stop, str) else stop or [],
        )


class OllamaFunctionCall(Strict):
    name: str
    arguments: dict[str, Any]
    index: int | None = None


class OllamaToolCall(Strict):
    id: str | None = None
    type: Literal["function"] | None = None
    function: OllamaFunctionCall


class OllamaMessage(Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Images | None = None
    tool_calls: Annotated[list[OllamaToolCall], Field(fail_fast=True)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


def _for_template(messages: Sequence[OllamaMessage]) -> list[dict[str, Any]]:
    """Messages in the form that chat templates expect. Calls and results without an id, which many clients send, get an
    id."""
    said: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []  # the names and ids of calls without a result
    for message in messages:
        content = content_of([*map(image, message.images or ()), message.content or ""], message.role)
        one: dict[str, Any] = {"role": message.role, "content": content}
        if message.thinking:
            one["reasoning_content"] = message.thinking
        for number, call in enumerate(message.tool_calls or []):
            id, function = call.id or f"call_{len(said)}_{number}", call.function
            waiting.append((function.name, id))
            called = {"name": function.name, "arguments": function.arguments}
            one.setdefault("tool_calls", []).append({"id": id, "type": "function", "function": called})
        if message.role == "tool":
            fitting = [id for name, id in waiting if message.tool_name in (None, name)]
            one["tool_call_id"] = message.tool_call_id or next(iter(fitting), "")
            waiting = [each for each in waiting if each[1] != one["tool_call_id"]]
            one |= {"name": message.tool_name} if message.tool_name else {}
        said.append(one)
    return said


class OllamaChatRequest(Generating):
    """The body of `/api/chat`."""

    messages: Annotated[list[OllamaMessage], Field(fail_fast=True, max_length=MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=TOOLS)] | None = None

    @property
    def chat(self) -> Chat:
        functions = [tool.function for tool in self.tools or []]
        return replace(super().chat, messages=_for_template(self.messages or []), functions=functions)


class GenerateRequest(Generating):
    """The body of `/api/generate`."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: Literal[""] | None = None
    context: Nothing | None = None
    images: Images | None = None

    @model_validator(mode="after")
    def _raw_is_all(self) -> GenerateRequest:
        if bool(self.raw) + bool(self.suffix) + bool(self.system or self.think is not None) > 1:
            raise ValueError("raw, suffix, and system or think exclude each other: give only one of the three")
        return self

    @property
    def chat(self) -> Chat:
        asked = content_of([*map(image, self.images or ()), self.prompt or ""], "user")
        said = [("system", self.system or None), ("user", asked)] if asked or self.suffix else []
        messages = [{"role": role, "content": content} for role, content in said if content is not None]
        wanted = replace(super().chat, messages=messages, is_text=bool(self.raw or self.suffix))
        return replace(wanted, suffix=self.suffix or None)


class EmbedOneRequest(Strict):
    """The body of `/api/embeddings`."""

    model: str
    prompt: str
    options: Options | None = None
    keep_alive: float | str | None = None


class EmbedRequest(Strict):
    """The body of `/api/embed`."""

    model: str
    input: Annotated[Batch[str], BeforeValidator(listed, json_schema_input_type=str | Batch[str])]
    truncate: bool | None = None
    dimensions: TokenCount | None = None
    options: Options | None = None
    keep_alive: float | str | None = None


class ShowRequest(Strict):
    """The body of `/api/show`; `name` is an older name of `model`."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


class OllamaErrorBody(BaseModel):
    """The body of every error."""

    error: str


def error_body(failure: ApiError) -> dict[str, Any]:
    return {"error": str(failure)}


STREAMED: dict[int | str, dict[str, Any]] = {200: {"description": "A stream or whole.", "content": {LINES: {}}}}


def router(gateway: Gateway) -> APIRouter:
    """The paths of the API."""
    paths = APIRouter(route_class=ParsingRoute)

    async def find(name: str) -> ServedModel:
        return await gateway.find_model(name if name in gateway.model_names else name.removesuffix(LATEST))

    async def answered(body: Generating, request: Request) -> Response | dict[str, Any]:
        times = [time.perf_counter_ns()]
        served = await find(body.model)
        chat = await served.prepare(request, lambda: body.chat)
        times.append(time.perf_counter_ns())
        _check_context(served, body.options)
        answer = OllamaWriter(body.model, isinstance(body, OllamaChatRequest), times)
        if not chat.messages:  # clients load a model with such a request
            if body.keep_alive in (0, "0", "0s"):
                raise ApiError(400, "only the server closes models: leave out keep_alive", param="keep_alive")
            return answer.part(done=True, done_reason="load")
        on, effort = (True, body.think) if isinstance(body.think, str) else (body.think, None)
        chat = await with_thinking(served, request, chat, "think", on, effort)
        if on and not chat.variables["think"] and served.prompts.forms.reasoning is None:
            raise ApiError(400, f"{body.model!r} does not support thinking: leave out think", param="think")
        return await answer_chat(served, request, chat, answer, stream=body.stream is not False)

    @paths.post("/api/chat", response_model=None, responses=STREAMED)
    async def chat(body: OllamaChatRequest, request: Request) -> Response | dict[str, Any]:
        """Generates the next message of a chat (Ollama's API)."""
        return await answered(body, request)

    @paths.post("/api/generate", response_model=None, responses=STREAMED)
    async def generate(body: GenerateRequest, request: Request) -> Response | dict[str, Any]:
        """Answers a text, or continues it if `raw` is set."""
        return await answered(body, request)

    def entry(name: str, family: str = "") -> dict[str, Any]:
        """An entry of a list of models; the size is unknown, and the digest is derived from the name."""
        named = name if ":" in name else name + LATEST
        digest, modified = hashlib.sha256(name.encode()).hexdigest(), datetime.fromtimestamp(gateway.created, UTC)
        details = {"format": "", "family": family, "families": [family], "parameter_size": "", "quantization_level": ""}
        known = {"digest": digest, "modified_at": modified.isoformat(), "size": 0, "details": details}
        return {"name": named, "model": named, **known}

    @paths.get("/api/tags")
    def tags() -> dict[str, Any]:
        """Lists the models of the server, with an entry for each name of a model."""
        return {"models": [*map(entry, gateway.model_names)]}

    @paths.get("/api/ps")
    def running() -> dict[str, Any]:
        """Lists the loaded models."""
        more = {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0}  # models do not expire after a time
        return {"models": [entry(served.name, _family(served)) | more for served in gateway.loaded]}

    @paths.post("/api/show")
    async def show(body: ShowRequest, request: Request) -> dict[str, Any]:
        """Describes a model."""
        served = await find(body.model or body.name or "")
        facts, family = served.generations.model.swarm.facts, _family(served)
        sizes = {"context_length": facts.max_positions, "embedding_length": facts.hidden_size}
        known = {f"{family}.{name}": size for name, size in (sizes | {"block_count": facts.num_blocks}).items()}
        return {
            "details": entry(served.name, family)["details"],
            "model_info": {"general.architecture": family, **known},
            "capabilities": await served.prepare(request, lambda: _capabilities(served)),
        }

    @paths.get("/api/version")
    def version() -> dict[str, str]:
        """Gives the version of Ollama that this API corresponds to."""
        return {"version": VERSION}

    @paths.head("/", include_in_schema=False)
    def alive() -> None:
        """Lets clients check that the server runs."""

    def refuse() -> None:
        raise ApiError(403, "clients cannot change the models: give other models to `splitnet serve`")

    @paths.post("/api/embed", response_model=None)
    async def embedded(body: EmbedRequest, request: Request) -> Response:
        """Computes an embedding of each text."""
        began, served = time.perf_counter_ns(), await find(body.model)
        _check_context(served, body.options)
        truncate = None if body.truncate is False else CONTEXT
        vectors, tokens = await embed(served, request, body.input, dimensions=body.dimensions, truncate=truncate)
        times = {"total_duration": time.perf_counter_ns() - began, "load_duration": 0}
        told, rows = {"model": body.model, "prompt_eval_count": tokens, **times}, map(Tensor.tolist, vectors)
        work = partial(written, told, "embeddings", rows)
        return Response(await served.prepare(request, work, vectors.nbytes), media_type=JSON)

    @paths.post("/api/embeddings")
    async def embedded_one(body: EmbedOneRequest, request: Request) -> dict[str, list[float]]:
        """Computes the embedding of one text (older API)."""
        served = await find(body.model)
        _check_context(served, body.options)
        vectors, _ = await embed(served, request, [body.prompt], truncate=CONTEXT)
        return {"embedding": vectors[0].tolist()}

    for method, name in (*(("POST", name) for name in ("pull", "push", "create", "copy")), ("DELETE", "delete")):
        paths.add_api_route(f"/api/{name}", refuse, methods=[method], include_in_schema=False)
    return paths


API = Api(("/api",), router, error_body, openai.key_of, "Authorization: Bearer KEY", "Bearer", OllamaErrorBody)


def _check_context(served: ServedModel, options: Options | None) -> None:
    positions, wanted = served.generations.model.swarm.facts.max_positions, options and options.num_ctx
    if positions is not None and wanted is not None and wanted > positions:
        raise ApiError(400, f"options.num_ctx: the model's context is {positions}: give less", param="options")


def _family(served: ServedModel) -> str:
    return served.generations.model.config.model_type


def _capabilities(served: ServedModel) -> list[str]:
    prompts = served.prompts
    has = {"completion": not served.generations.model.headless, "embedding": served.pooling.told}
    has |= {"insert": prompts.marks is not None, "tools": prompts.takes_tools}
    has["vision"] = served.sees_images
    has["thinking"] = prompts.forms.reasoning is not None
    return [name for name, has_it in has.items() if has_it]


def _line(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(eq=False)
class OllamaWriter:
    """Writes the events of a request in Ollama's form, see `splitnet.serve.responses.AnswerWriter`."""

    model: str
    is_chat: bool
    times: list[int]  # in ns: arrival of the request, end of the model's loading, and later the first event

    media_type = LINES

    def __post_init__(self) -> None:
        self.id = f"ollama-{random_hex(12)}"
        self.alive = _line(self.part())  # an empty part, because clients read each line as a part of the answer
        self._finish: str | None = None
        self._ended = Ended(0, 0, 0)

    async def whole_body(self, events: AsyncIterator[Delta | Ended]) -> dict[str, Any]:
        said = [new async for event in events if (new := self._take_event(event)) is not None]
        text, reasoning = "".join(new.text for new in said), "".join(new.reasoning for new in said)
        return self.part(Delta(0, text, reasoning, [call for new in said for call in new.calls]), **self._last())

    async def event_stream(self, events: AsyncIterator[Delta | Ended]) -> AsyncGenerator[str]:
        async for event in events:
            new = self._take_event(event)
            if new is not None and (new.text or new.reasoning or new.calls):
                yield _line(self.part(new))
        yield _line(self.part(**self._last()))

    def error_event(self, failure: ApiError) -> str:
        return _line(error_body(failure))

    def part(self, new: Delta | None = None, *, done: bool = False, **more: Any) -> dict[str, Any]:
        """A line of the stream with the new parts of an answer."""
        new = new or Delta(0)
        said: dict[str, Any] = {"content" if self.is_chat else "response": new.text}
        if new.reasoning:
            said["thinking"] = new.reasoning
        if new.calls:
            called = [(call.id, {"name": call.name, "arguments": json.loads(call.arguments)}) for call in new.calls]
            said["tool_calls"] = [{"id": id, "function": function} for id, function in called]
        if self.is_chat:
            said = {"message": {"role": "assistant", **said}}
        return {"model": self.model, "created_at": datetime.now(UTC).isoformat(), **said, "done": done, **more}

    def _take_event(self, event: Delta | Ended) -> Delta | None:
        if len(self.times) == 2:
            self.times.append(time.perf_counter_ns())
        if isinstance(event, Ended):
            self._ended = event
            return None
        self._finish = event.finish
        return event

    def _last(self) -> dict[str, Any]:
        """The fields of the last part; the time of the prompt includes the wait for a place."""
        came, loaded, began, ended = *self.times, time.perf_counter_ns()
        return {
            "done": True,
            "done_reason": "length" if self._finish == "length" else "stop",
            "total_duration": ended - came,
            "load_duration": loaded - came,
            "prompt_eval_count": self._ended.prompt_tokens,
            "prompt_eval_duration": began - loaded,
            "eval_count": self._ended.answer_tokens,
            "eval_duration": ended - began,
        }
