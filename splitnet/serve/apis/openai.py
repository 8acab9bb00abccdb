"""OpenAI's API for chats and completions: its paths, answers and errors."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from splitnet.serve.answer_records import created_at, random_hex
from splitnet.serve.answers.grammars import AnswerConstraints
from splitnet.serve.answers.parser import ToolCall
from splitnet.serve.answers.sampling import ScoredToken
from splitnet.serve.apis.openai_requests import ChatRequest, CompletionRequest, SamplingRequest, most
from splitnet.serve.chat import Delta, answer_chat, check_scores, sampling_of
from splitnet.serve.failures import ApiError
from splitnet.serve.gateway import Gateway
from splitnet.serve.generation import Ended, GenerationRequest, Numbered, ScoredPrompt, TextDelta
from splitnet.serve.request_gate import Api, ParsingRoute
from splitnet.serve.responses import EVENTS, KEEP_ALIVE, framed
from splitnet.version import __version__

COMPLETION_TOKENS = 16  # Tokens of a completion without max_tokens; OpenAI's default
Gap = tuple[str, Sequence[tuple[str, str]]] | None
DONE = "data: [DONE]\n\n"  # The last event of a stream


class ErrorDetails(BaseModel):
    """The fields of an error that OpenAI's clients read."""

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
    """The API key in a request's headers, as clients of OpenAI or Anthropic send it; empty: there is no key."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return headers.get("x-api-key") or (key.strip() if kind.lower() == "bearer" else "")


STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, as a whole or as a stream.", "content": {"text/event-stream": {}}}
}


def router(gateway: Gateway) -> APIRouter:
    """The paths of the API."""
    paths = APIRouter(route_class=ParsingRoute)

    def entry(name: str) -> dict[str, Any]:
        told = {"id": name, "object": "model", "created": gateway.created, "owned_by": "splitnet"}
        sees = any(served.sees_images for served in gateway.loaded if name in served.model_names)
        return told | ({"input_modalities": ["text", "image"]} if sees else {})

    @paths.get("/v1/models")
    def models() -> dict[str, Any]:
        """Lists the models of the server, with an entry for each name of a model."""
        return {"object": "list", "data": [entry(name) for name in gateway.model_names]}

    @paths.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        """Describes the model with this name."""
        gateway.check_name(name)
        return entry(name)

    @paths.post("/v1/chat/completions", response_model=None, responses=STREAMED)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Generates the next message of a chat."""
        served = await gateway.find_model(body.model)
        text_of = served.prompts.text_of
        choices = [_ChatChoiceWriter(index, bool(body.logprobs), text_of, body) for index in range(body.n or 1)]
        answer = OpenAIWriter(CHAT, served.name, choices, body)
        wanted = await served.prepare(request, lambda: body.chat)
        return await answer_chat(served, request, wanted, answer, stream=bool(body.stream))

    @paths.post("/v1/completions", response_model=None, responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continues texts."""
        max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return await answer_completions(
            gateway, body, request, OpenAIWriter, max_tokens, (body.suffix, ()) if body.suffix else None
        )

    return paths


async def answer_completions(
    gateway: Gateway,
    body: CompletionRequest,
    request: Request,
    written: type[OpenAIWriter],
    max_tokens: int | None,
    gap: Gap,
) -> Response:
    """Continues texts, or fills a gap.

    gap: the text after the gap, and the names and texts of other files; None: the answer continues the text.
    max_tokens: maximum tokens of an answer; None: as many as the context has room for. Raises ApiError.
    """
    served = await gateway.find_model(body.model)
    prompts, texts = served.prompts, body.prompts
    prompts.check_known(body.stop_token_ids or (), "stop_token_ids")
    stops = set(body.stop_token_ids or ())
    last, top = prompts.last(body.truncate_prompt_tokens, max_tokens), most(body.logprobs, body.prompt_logprobs)

    def read(text: Any) -> list[int]:
        return prompts.tokens_of_text(text, last=last) if gap is None else prompts.tokens_of_gap(text, *gap, max_tokens)

    tokenized = await served.prepare(request, lambda: [*map(read, texts)])
    echoes_scores = bool(body.echo) and body.logprobs is not None
    if echoes_scores or body.prompt_logprobs is not None:
        check_scores(tokenized, top)

    def told(prompt: str | list[int], tokens: list[int]) -> str:
        """The text of the kept part of a prompt."""
        whole = prompt if isinstance(prompt, str) else prompts.decode_all(prompt)
        return whole if last is None else min(whole, prompts.decode_all(tokens), key=len)

    grammar = None
    if bounds := await served.prepare(request, lambda: body.bounds):
        grammar = await served.prepare(request, lambda: served.grammars.of_answer(AnswerConstraints(**bounds)))
    sampling = sampling_of(served, body.sampling)
    asks = [
        GenerationRequest(
            prompt=prompt,
            max_tokens=prompts.room_for(prompt, max_tokens),
            sampling=replace(sampling, prompt=number),
            choices=body.n or 1,
            stop_strings=body.stop_strings,
            top_logprobs=top,
            score_prompt=echoes_scores or body.prompt_logprobs is not None,
            grammar=grammar,
            stop_tokens=stops if gap is None or body.ignore_eos else stops | prompts.infill_ends,
            ignores_ends=bool(body.ignore_eos),
            continues_prompt=True,
            owner=request.state.client.name,
            reserve_max_tokens=max_tokens is not None,
        )
        for number, prompt in enumerate(tokenized)
    ]
    echoed, begins = [""] * len(texts), [list[int]()] * len(texts)
    if body.echo:
        echoed = await served.prepare(request, lambda: [*map(told, texts, tokenized)])
    if echoes_scores:
        begins = await served.prepare(request, lambda: [*map(prompts.begins, tokenized, echoed)])
    each = [(text, offsets) for text, offsets in zip(echoed, begins, strict=True) for _ in range(body.n or 1)]
    choices = [
        _CompletionChoiceWriter(index, body.logprobs is not None, prompts.text_of, body, text, offsets)
        for index, (text, offsets) in enumerate(each)
    ]
    answer = written(COMPLETION, served.name, choices, body, prompts=len(asks))
    running = served.running(request.state.client, asks, answer.id)
    return await served.respond(request, running, answer, stream=bool(body.stream))


API = Api(("/v1",), router, error_body, key_of, "Authorization: Bearer KEY", "Bearer", ErrorReply)


@dataclass(frozen=True)
class ObjectNames:
    """Names in one kind of answers: the prefix of ids, and the `object` of a whole answer and of a chunk."""

    id_prefix: str
    whole: str
    chunk: str


CHAT = ObjectNames("chatcmpl", "chat.completion", "chat.completion.chunk")
COMPLETION = ObjectNames("cmpl", "text_completion", "text_completion")


Event = Delta | Ended | Numbered  # chats have events `Delta` and `Ended`, completions have events `Numbered`


@dataclass(eq=False)
class OpenAIWriter:
    """Writes the events of a request in OpenAI's form, see `splitnet.serve.responses.AnswerWriter`.

    choices: in the order of the prompts.
    """

    kind: ObjectNames
    model: str
    choices: Sequence[_ChatChoiceWriter] | Sequence[_CompletionChoiceWriter]
    body: SamplingRequest
    _: KW_ONLY
    prompts: int = 1  # each prompt has the same number of choices

    media_type = EVENTS
    alive = KEEP_ALIVE

    def __post_init__(self) -> None:
        self.id = f"{self.kind.id_prefix}-{random_hex(12)}"
        self._created = created_at()
        self._ended: list[Ended] = []
        self._began, self._first_at, self._tokens = time.perf_counter(), 0.0, 0

    async def whole_body(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        async for event in events:
            self._take_event(event)
        choices = [choice.whole_choice() for choice in self.choices]
        more = self.choices[0].of_prompt() if self.kind is CHAT else {}
        if self.body.return_token_ids and self.kind is CHAT:
            more["prompt_token_ids"] = list(self._ended[0].prompt)
        elif self.body.return_token_ids:
            for number, choice in enumerate(choices):
                choice["prompt_token_ids"] = list(self._ended[number * self.prompts // len(choices)].prompt)
        return {**self._head(self.kind.whole), "choices": choices, "usage": self._usage(), **more, **self._timings()}

    async def event_stream(self, events: AsyncIterator[Event]) -> AsyncGenerator[str]:
        head = self._head(self.kind.chunk)
        usage = {"usage": None} if self.body.wants_usage else {}
        async for event in events:
            for choice in self._take_event(event):
                yield framed({**head, "choices": [choice], **usage, **self._timings()})
        if self.body.wants_usage:
            yield framed({**head, "choices": [], "usage": self._usage(), **self._timings()})
        yield DONE

    def error_event(self, failure: ApiError) -> str:
        return framed(error_body(failure))

    def _take_event(self, event: Event) -> list[dict[str, Any]]:
        """Takes an event; returns the choices of stream chunks with the new parts in the event."""
        number, said = event if isinstance(event, tuple) else (0, event)
        each = len(self.choices) // self.prompts
        choices: Sequence[Any] = self.choices[number * each : (number + 1) * each]
        if isinstance(said, Ended):
            self._ended.append(said)
        elif isinstance(said, ScoredPrompt):
            for choice in choices:
                choice.scored_prompt = said.scored
        elif isinstance(said, Delta | TextDelta):
            self._first_at = self._first_at or time.perf_counter()
            self._tokens += len(said.tokens)
            return choices[said.choice].take_delta(said)
        return []

    def _head(self, kind: str) -> dict[str, Any]:
        fingerprint = f"splitnet-{__version__}"
        head = {"id": self.id, "object": kind, "created": self._created, "model": self.model}
        return head | {"system_fingerprint": fingerprint}

    def _timings(self) -> dict[str, Any]:
        """Times in the form of llama.cpp's server; the time of a prompt ends with the first token of its answer."""
        if not self.body.timings_per_token:
            return {}
        first, now = self._first_at or time.perf_counter(), time.perf_counter()
        parts = {"prompt": sum(ended.prompt_tokens for ended in self._ended), "predicted": self._tokens}
        told: dict[str, Any] = {"cache_n": sum(ended.cached_tokens for ended in self._ended)}
        for (name, count), seconds in zip(parts.items(), (first - self._began, now - first), strict=True):
            told |= {f"{name}_n": count, f"{name}_ms": seconds * 1000}
            told[f"{name}_per_second"] = count / seconds if seconds else 0.0
        return {"timings": told}

    def _usage(self) -> dict[str, Any]:
        prompt_tokens = sum(ended.prompt_tokens for ended in self._ended)
        answer_tokens = sum(ended.answer_tokens for ended in self._ended)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": answer_tokens,
            "total_tokens": prompt_tokens + answer_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(ended.cached_tokens for ended in self._ended)},
        }


class InfillWriter(OpenAIWriter):
    """Writes the text of a gap in the form of llama.cpp's server."""

    async def whole_body(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        return self._body((await super().whole_body(events))["choices"][0]["text"], stop=True)

    async def event_stream(self, events: AsyncIterator[Event]) -> AsyncGenerator[str]:
        async for event in events:
            for choice in self._take_event(event):
                yield framed(self._body(choice["text"], stop=False))
        yield framed(self._body("", stop=True))

    def _body(self, text: str, *, stop: bool) -> dict[str, Any]:
        usage = self._usage()
        counted = {"tokens_predicted": self._tokens, "tokens_evaluated": usage["prompt_tokens"], "truncated": False}
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        told = {"index": 0, "content": text, "stop": stop, "id_slot": -1, "model": self.model}
        return {**told, **counted, "tokens_cached": cached, **self._timings()}


class _ChoiceWriter:
    """One growing choice. text_of: returns the text of a token, including special tokens.

    `take_delta` takes a new part and returns choices of stream chunks with it; `whole_choice` returns the whole choice.
    """

    def __init__(self, index: int, with_logprobs: bool, text_of: Callable[[int], str], body: SamplingRequest) -> None:
        self.body = body
        self._tokens: list[int] = []
        self.scored_prompt: tuple[ScoredToken, ...] = ()
        self._index = index
        self._with_logprobs = with_logprobs
        self._text_of = "token_id:{}".format if body.return_tokens_as_token_ids else text_of
        self._begun = False
        self._text = ""
        self._scored: list[ScoredToken] = []
        self._finish: str | None = None

    def _with(
        self, name: str, content: Any, logprobs: dict[str, Any] | None, tokens: Sequence[int] = ()
    ) -> dict[str, Any]:
        logprobs = logprobs if self._with_logprobs else None
        told = {"index": self._index, name: content, "logprobs": logprobs, "finish_reason": self._finish}
        return told | ({"token_ids": list(tokens)} if self.body.return_token_ids else {})

    def of_prompt(self) -> dict[str, Any]:
        """The scores of the prompt's tokens in vLLM's form; empty: the request does not ask for these scores."""
        if self.body.prompt_logprobs is None:
            return {}
        scores: list[Any] = []
        for each in self.scored_prompt:
            scored = dict(((each.token, each.logprob), *each.top[: self.body.prompt_logprobs]))
            told = {str(one): {"logprob": of, "decoded_token": self._text_of(one)} for one, of in scored.items()}
            scores.append(None if each.logprob is None else told)
        return {"prompt_logprobs": scores}


class _ChatChoiceWriter(_ChoiceWriter):
    """A choice that is a message of the assistant."""

    def __init__(self, index: int, with_logprobs: bool, text_of: Callable[[int], str], body: ChatRequest) -> None:
        super().__init__(index, with_logprobs, text_of, body)
        self._likeliest = body.top_logprobs or 0
        self._reasoning = ""
        self._calls: list[ToolCall] = []

    def take_delta(self, new: Delta) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        self.scored_prompt += new.scored_prompt
        if not self._begun:
            self._begun = True
            told.append(self._with("delta", {"role": "assistant", "content": ""}, None))
        delta = _reasoned(new.reasoning)
        if new.text:
            delta["content"] = new.text
        if new.calls:
            numbered = enumerate(new.calls, start=len(self._calls))
            delta["tool_calls"] = [{"index": index, **_call(call)} for index, call in numbered]
        self._text += new.text
        self._reasoning += new.reasoning
        self._calls += new.calls
        self._scored += new.scored
        self._tokens += new.tokens
        if delta or new.scored or (new.tokens and self.body.return_token_ids):
            told.append(self._with("delta", delta, self._logprobs(new.scored), new.tokens))
        self._finish = new.finish
        if new.finish:  # in a separate chunk, as OpenAI does: some clients read only the reason of the last chunk
            told.append(self._with("delta", {}, self._logprobs(())))
        return told

    def whole_choice(self) -> dict[str, Any]:
        content = None if self._calls and not self._text else self._text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        message |= _reasoned(self._reasoning)
        if self._calls:
            message["tool_calls"] = [_call(call) for call in self._calls]
        return self._with("message", message, self._logprobs(self._scored), self._tokens)

    def _logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any]:
        content = [self._scored_token(each.token, each.logprob) for each in scored]
        for told, each in zip(content, scored, strict=True):
            told["top_logprobs"] = [
                self._scored_token(token, logprob) for token, logprob in each.top[: self._likeliest]
            ]
        return {"content": content, "refusal": None}

    def _scored_token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text_of(token)
        # A replacement character stands for an incomplete character, whose bytes are unknown here.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _reasoned(text: str) -> dict[str, Any]:
    """Reasoning under the two names that different clients read."""
    return {"reasoning_content": text, "reasoning": text} if text else {}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class _CompletionChoiceWriter(_ChoiceWriter):
    """A choice that continues a text. prompt: the text to echo before the answer, or empty. begins: the index in the
    echoed text at which each scored token of the prompt begins, in characters."""

    def __init__(
        self,
        index: int,
        with_logprobs: bool,
        text_of: Callable[[int], str],
        body: CompletionRequest,
        prompt: str,
        begins: Sequence[int],
    ) -> None:
        super().__init__(index, with_logprobs, text_of, body)
        self._echoed = bool(body.echo)
        self._likeliest = body.logprobs
        self._prompt = prompt
        self._begins = list(begins)

    def take_delta(self, piece: TextDelta) -> list[dict[str, Any]]:
        told, text, scored = len(self._scored), piece.text, piece.scored
        if not self._begun:
            self._begun = True
            text, scored = self._prompt + text, (self.scored_prompt if self._echoed else ()) + scored
        self._text += text
        self._scored += scored
        self._begins += [len(self._prompt) + piece.begins] * len(piece.scored)
        self._finish = piece.finish
        self._tokens += piece.tokens
        if not text and not scored and not piece.finish and not (piece.tokens and self.body.return_token_ids):
            return []
        return [self._with("text", text, self._logprobs(told), piece.tokens)]

    def whole_choice(self) -> dict[str, Any]:
        return self._with("text", self._text, self._logprobs(0), self._tokens) | self.of_prompt()

    def _logprobs(self, first: int) -> dict[str, Any]:
        """The scores, beginning with index `first`."""
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
        # Of tokens with the same text, only the likeliest token gets an entry. The chosen token is always included.
        for token, logprob in (*scored.top[: self._likeliest], (scored.token, scored.logprob)):
            top.setdefault(self._text_of(token), logprob)
        return top
