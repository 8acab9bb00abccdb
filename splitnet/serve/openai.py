"""OpenAI's HTTP API: paths, answers and errors. Nothing else in the server knows its protocol."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from splitnet.serve.failures import ApiError, failure_of
from splitnet.serve.gate import Api, ParsingRoute
from splitnet.serve.generation import Ask, Ended, Numbered, Piece, ScoredPrompt
from splitnet.serve.grammars import Grammar
from splitnet.serve.openai_requests import ChatRequest, CompletionRequest, SamplingRequest
from splitnet.serve.responses import ServedModel, framed
from splitnet.serve.sampling import Sampling, ScoredToken
from splitnet.serve.text import ToolCall, ToolCallParser

DONE = "data: [DONE]\n\n"  # The last event of a stream
COMPLETION_TOKENS = 16  # Of a completion that does not say how many it wants; OpenAI's default
MAX_SCORES = 2**19  # Of the tokens of the prompts of one request, with those of the likeliest tokens beside them


class ErrorDetails(BaseModel):
    """What OpenAI's clients read of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """The body of every error."""

    error: ErrorDetails


_ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def error_body(failure: ApiError) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(failure.status, "invalid_request_error" if failure.status < 500 else "server_error")
    details = ErrorDetails(message=str(failure), type=kind, param=failure.param, code=failure.code)
    return ErrorReply(error=details).model_dump()


def key_of(headers: Mapping[str, str]) -> str:
    """The key that a request gives; empty: none."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, as a whole or as a stream.", "content": {"text/event-stream": {}}}
}


def router(served: ServedModel, created: int) -> APIRouter:
    """The paths of the API; `created`: seconds since 1970 that are told of the model."""
    paths = APIRouter(route_class=ParsingRoute)

    def entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "splitnet"}

    @paths.get("/v1/models")
    def models() -> dict[str, Any]:
        """The model that is served, once for each of its names."""
        return {"object": "list", "data": [entry(name) for name in served.names]}

    @paths.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        """The model, if it has this name."""
        served.check_name(name)
        return entry(name)

    @paths.post("/v1/chat/completions", response_model=None, responses=STREAMED)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The next message of a chat."""
        served.check_name(body.model)
        prompts, size = served.prompts, len(await request.body())
        prompt = await served.preparing.run(
            size, lambda: prompts.of_chat(body.chat_messages, body.described_tools, body.template_variables)
        )
        ask = Ask(
            prompt=prompt,
            max_tokens=prompts.room_for(prompt, body.max_completion_tokens or body.max_tokens),
            sampling=_sampling(served, body),
            choices=body.n or 1,
            stop_strings=body.stop_strings,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=await served.preparing.run(size, _grammar_of, served, body),
            owner=request.state.client.name,
        )
        choices = [_ChatChoice(index, bool(body.logprobs), prompts.text_of, body) for index in range(ask.choices)]
        answer = Answer(CHAT, served.name, [ask], choices, with_usage=body.wants_usage)
        return await served.respond(request, [ask], answer, stream=bool(body.stream))

    @paths.post("/v1/completions", response_model=None, responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """How texts go on."""
        served.check_name(body.model)
        prompts, size = served.prompts, len(await request.body())
        texts = body.prompts
        tokenized = await served.preparing.run(size, lambda: [prompts.of_text(text) for text in texts])
        echoes_scores = bool(body.echo) and body.logprobs is not None
        scores = sum(map(len, tokenized)) * (1 + (body.logprobs or 0))
        if echoes_scores and scores > MAX_SCORES:
            many = f"{scores} scores of prompts are more than {MAX_SCORES}"
            raise ApiError(400, f"{many}: ask for fewer logprobs or fewer prompts at once", param="logprobs")
        max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        sampling = _sampling(served, body)
        asks = [
            Ask(
                prompt=prompt,
                max_tokens=prompts.room_for(prompt, max_tokens),
                sampling=replace(sampling, prompt=number),
                choices=body.n or 1,
                stop_strings=body.stop_strings,
                top_logprobs=body.logprobs,
                score_prompt=echoes_scores,
                goes_on=True,
                owner=request.state.client.name,
            )
            for number, prompt in enumerate(tokenized)
        ]
        echoed, begins = [""] * len(texts), [list[int]()] * len(texts)
        if body.echo:
            echoed = [text if isinstance(text, str) else prompts.decode_all(text) for text in texts]
        if echoes_scores:
            begins = await served.preparing.run(size, lambda: [*map(prompts.begins, tokenized, echoed)])
        each = [(text, offsets) for text, offsets in zip(echoed, begins, strict=True) for _ in range(body.n or 1)]
        choices = [
            _CompletionChoice(index, body.logprobs is not None, prompts.text_of, text, offsets)
            for index, (text, offsets) in enumerate(each)
        ]
        answer = Answer(COMPLETION, served.name, asks, choices, with_usage=body.wants_usage)
        return await served.respond(request, asks, answer, stream=bool(body.stream))

    return paths


API = Api(("/v1",), router, error_body, key_of, "Authorization: Bearer KEY", "Bearer", ErrorReply)


def _grammar_of(served: ServedModel, body: ChatRequest) -> Grammar | None:
    grammars = served.grammars
    if body.tools_to_call:
        return grammars.of_calls([tool.function for tool in body.tools_to_call], required=True)
    if body.offered_tools and body.binds_calls:
        several = body.parallel_tool_calls is not False
        return grammars.of_calls([tool.function for tool in body.offered_tools], required=False, several=several)
    return None if body.schema_of_answer is None else grammars.of_schema(body.schema_of_answer, "response_format")


def _sampling(served: ServedModel, body: SamplingRequest) -> Sampling:
    bias = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    served.prompts.check_known(bias, "logit_bias")
    chosen = asdict(served.defaults)
    chosen |= {name: value for name in chosen if (value := getattr(body, name)) is not None}
    return Sampling(
        **(chosen | {"top_k": max(chosen["top_k"], 0)}),
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        bias=tuple(bias.items()),
    )


@dataclass(frozen=True)
class Kind:
    """How answers of a kind are named: the beginning of their ids, and the `object` of a whole one and of a chunk."""

    id_prefix: str
    whole: str
    chunk: str


CHAT = Kind("chatcmpl", "chat.completion", "chat.completion.chunk")
COMPLETION = Kind("cmpl", "text_completion", "text_completion")


@dataclass(eq=False)
class Answer:
    """Writes the events of a request as OpenAI does, see `splitnet.serve.responses.Answer`.

    It has one of `asks` for each prompt, and the choices of the first prompt first; `with_usage` ends a stream.
    """

    kind: Kind
    model: str
    asks: Sequence[Ask]
    choices: Sequence[_ChatChoice | _CompletionChoice]
    _: KW_ONLY
    with_usage: bool

    def __post_init__(self) -> None:
        self.id = f"{self.kind.id_prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._per_prompt = self.asks[0].choices
        self._prompt_tokens = sum(len(ask.prompt) for ask in self.asks)
        self._answer_tokens = 0
        self._cached_tokens = 0

    async def whole(self, events: AsyncGenerator[Numbered]) -> dict[str, Any]:
        async for number, event in events:
            self._take(number, event)
        choices = [choice.whole() for choice in self.choices]
        return {**self._head(self.kind.whole), "choices": choices, "usage": self._usage()}

    async def chunks(self, first: Numbered, events: AsyncGenerator[Numbered]) -> AsyncGenerator[str]:
        head = self._head(self.kind.chunk)
        usage = {"usage": None} if self.with_usage else {}
        try:
            if (choice := self._take(*first)) is not None:
                yield framed({**head, "choices": [choice], **usage})
            async for number, event in events:
                if (choice := self._take(number, event)) is not None:
                    yield framed({**head, "choices": [choice], **usage})
        except Exception as error:
            yield self.failed(failure_of(error))
            return
        if self.with_usage:
            yield framed({**head, "choices": [], "usage": self._usage()})
        yield DONE

    def failed(self, failure: ApiError) -> str:
        return framed(error_body(failure))

    def _take(self, number: int, event: ScoredPrompt | Piece | Ended) -> dict[str, Any] | None:
        """Takes an event of the prompt with this number; returns the choice of a chunk, if there is news to tell."""
        if isinstance(event, Ended):
            self._answer_tokens += event.answer_tokens
            self._cached_tokens += event.cached_tokens
            return None
        choices = self.choices[number * self._per_prompt : (number + 1) * self._per_prompt]
        if isinstance(event, Piece):
            return choices[event.choice].take(event)
        for choice in choices:
            choice.scored_prompt = event.scored
        return None

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self.model}

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._answer_tokens,
            "total_tokens": self._prompt_tokens + self._answer_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


class _Choice:
    """One choice as it grows; `text_of`: the text of a token, also of a special one.

    `take` takes what is new and returns the choice of a chunk, if there is news to tell; `whole` returns all of it.
    """

    def __init__(self, index: int, with_logprobs: bool, text_of: Callable[[int], str]) -> None:
        self.scored_prompt: tuple[ScoredToken, ...] = ()
        self._index = index
        self._with_logprobs = with_logprobs
        self._text_of = text_of
        self._begun = False
        self._text = ""
        self._scored: list[ScoredToken] = []
        self._finish: str | None = None

    def _with(self, name: str, content: Any, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        logprobs = logprobs if self._with_logprobs else None
        return {"index": self._index, name: content, "logprobs": logprobs, "finish_reason": self._finish}


class _ChatChoice(_Choice):
    """A message of the assistant; where a call is required, text that is no whole call is not told."""

    def __init__(self, index: int, with_logprobs: bool, text_of: Callable[[int], str], body: ChatRequest) -> None:
        super().__init__(index, with_logprobs, text_of)
        self._only_calls = bool(body.tools_to_call)
        self._parser = ToolCallParser() if body.offered_tools else None
        self._calls: list[ToolCall] = []

    def take(self, piece: Piece) -> dict[str, Any] | None:
        text, calls = self._without_calls(piece)
        delta: dict[str, Any] = {} if self._begun else {"role": "assistant", "content": ""}
        if text:
            delta["content"] = text
        if calls:
            numbered = enumerate(calls, start=len(self._calls))
            delta["tool_calls"] = [{"index": index, **_call(call)} for index, call in numbered]
        self._begun = True
        self._text += text
        self._calls += calls
        self._scored += piece.scored
        self._finish = "tool_calls" if piece.finish == "stop" and self._calls else piece.finish
        if not delta and not piece.scored and not piece.finish:
            return None
        return self._with("delta", delta, self._logprobs(piece.scored))

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._text, "refusal": None}
        if self._calls or self._only_calls:
            message["content"] = self._text or None
        if self._calls:
            message["tool_calls"] = [_call(call) for call in self._calls]
        return self._with("message", message, self._logprobs(self._scored))

    def _without_calls(self, piece: Piece) -> tuple[str, list[ToolCall]]:
        if self._parser is None:
            return piece.text, []
        text, calls = self._parser.push(piece.text)
        if piece.finish:
            last_text, last_calls = self._parser.rest()
            text, calls = text + last_text, calls + last_calls
        return "" if self._only_calls else text, calls

    def _logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any]:
        content = [self._scored_token(each.token, each.logprob) for each in scored]
        for told, each in zip(content, scored, strict=True):
            told["top_logprobs"] = [self._scored_token(token, logprob) for token, logprob in each.top]
        return {"content": content, "refusal": None}

    def _scored_token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text_of(token)
        # The replacement character stands for a part of a character, whose bytes are not known here.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class _CompletionChoice(_Choice):
    """A text that goes on from `prompt`, which is told first (empty: it is not), with scored tokens at `begins`."""

    def __init__(
        self, index: int, with_logprobs: bool, text_of: Callable[[int], str], prompt: str, begins: Sequence[int]
    ) -> None:
        super().__init__(index, with_logprobs, text_of)
        self._prompt = prompt
        self._begins = list(begins)

    def take(self, piece: Piece) -> dict[str, Any] | None:
        told, text, scored = len(self._scored), piece.text, piece.scored
        if not self._begun:
            self._begun = True
            text, scored = self._prompt + text, self.scored_prompt + scored
        self._text += text
        self._scored += scored
        self._begins += [len(self._prompt) + piece.begins] * len(piece.scored)
        self._finish = piece.finish
        if not text and not scored and not piece.finish:
            return None
        return self._with("text", text, self._logprobs(told))

    def whole(self) -> dict[str, Any]:
        return self._with("text", self._text, self._logprobs(0))

    def _logprobs(self, first: int) -> dict[str, Any]:
        """The scores from the one with number `first` on."""
        scored = self._scored[first:]
        return {
            "tokens": [self._text_of(each.token) for each in scored],
            "token_logprobs": [each.logprob for each in scored],
            "top_logprobs": [self._top(each) for each in scored],
            "text_offset": self._begins[first:],
        }

    def _top(self, scored: ScoredToken) -> dict[str, float] | None:
        if scored.logprob is None:
            return None
        top: dict[str, float] = {}
        # Of tokens that look the same, the likeliest counts; the chosen one is always there.
        for token, logprob in (*scored.top, (scored.token, scored.logprob)):
            top.setdefault(self._text_of(token), logprob)
        return top
