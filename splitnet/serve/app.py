"""The HTTP interface: which paths there are, and what each of them does."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from scheduler.facts import missing_blocks
from splitnet.directory.record import facts_of
from splitnet.errors import CoverageError, SplitnetError
from splitnet.limits import FairAccount
from splitnet.serve.admission import Admission, Client
from splitnet.serve.answers import Answer, ChatAnswer, CompletionAnswer
from splitnet.serve.dashboard import Dashboard, dashboard_router
from splitnet.serve.events import EventStream, Numbered, events, unless_gone
from splitnet.serve.failures import ApiError, ErrorReply, failure_of
from splitnet.serve.gate import ON_THIS_MACHINE, ApiKeys, Gate, client_of
from splitnet.serve.generation import Ask, Generations
from splitnet.serve.grammars import Grammar, Grammars
from splitnet.serve.metrics import GatewayMetrics, instrument
from splitnet.serve.openai import ChatRequest, CompletionRequest, ParsingRoute, Preparing, SamplingRequest
from splitnet.serve.prompts import Prompts
from splitnet.serve.sampling import Sampling, SamplingDefaults
from splitnet.wire.endpoints import LinkState

COMPLETION_TOKENS = 16
"""Of a completion that does not say how many it wants; OpenAI's default."""

MAX_SCORES = 2**19
"""Of the tokens of the prompts of one request, with those of the likeliest tokens beside them."""

UNREAD_BYTES = 64 * 2**20
"""Of streams, whose clients read more slowly than the model answers."""

EXPIRY_S = 5.0
"""How often it is looked whether kept sessions have expired."""

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 404, 413, 429, 500, 502, 503)
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, as a whole or as a stream.", "content": {"text/event-stream": {}}}
}


@dataclass(frozen=True)
class Gateway:
    """What the paths use.

    Attributes:
        model: the name that answers give.
        defaults: of what requests leave out.
        other_names: of the model, which requests may give, too.
    """

    model: str
    generations: Generations
    prompts: Prompts
    grammars: Grammars
    admission: Admission
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    other_names: Sequence[str] = ()
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    preparing: Preparing = field(default_factory=Preparing)
    unread: FairAccount = field(default_factory=lambda: FairAccount(UNREAD_BYTES))

    @property
    def names(self) -> list[str]:
        """All that requests may give."""
        return list(dict.fromkeys([self.model, *self.other_names]))

    def check_model(self, name: str) -> None:
        """Refuses other models."""
        if name not in self.names:
            use = " or ".join(map(repr, self.names))
            raise ApiError(404, f"this server has no model {name!r}: use {use}", param="model", code="model_not_found")

    def grammar_of(self, body: ChatRequest) -> Grammar | None:
        """What the answer to a chat must keep to, if to anything."""
        if body.tools_to_call:
            return self.grammars.of_calls(body.tools_to_call, required=True)
        if body.offered_tools and body.binds_calls:
            several = body.parallel_tool_calls is not False
            return self.grammars.of_calls(body.offered_tools, required=False, several=several)
        return self.grammars.of_schema(body.schema_of_answer) if body.schema_of_answer is not None else None

    def run(self, client: Client, asks: Sequence[Ask], answer: str) -> AsyncGenerator[Numbered]:
        """See `splitnet.serve.events.events`."""
        return self.metrics.watch(events(self.generations, self.admission, client, asks, answer), asks)


def make_app(
    gateway: Gateway, keys: ApiKeys, created: int, hosts: Collection[str] = (), origins: Collection[str] = ()
) -> FastAPI:
    """The app.

    Args:
        keys: that are accepted.
        created: seconds since 1970 that are told of the model.
        hosts: names by which it may be asked where there are no keys; see `splitnet.serve.gate.Gate`.
        origins: whose pages may use it, as browsers write them, besides those of this machine; `*`: of any.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        expiring = asyncio.create_task(_expire_regularly(gateway))
        yield
        expiring.cancel()
        with suppress(asyncio.CancelledError):
            await expiring

    app = FastAPI(title="splitnet", lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS)
    app.router.route_class = ParsingRoute
    app.state.preparing = gateway.preparing
    app.add_middleware(Gate, keys=keys, hosts=hosts, origins=origins)
    instrument(app, gateway.metrics, gateway.model, gateway.generations, gateway.admission)
    # Around the gate, as browsers send no key with the question whether a page may ask.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_origin_regex=ON_THIS_MACHINE,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
    )
    app.include_router(dashboard_router(Dashboard(gateway.generations, gateway.admission, gateway.model)))
    app.state.names = gateway.names
    for kind in (SplitnetError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _told)

    def entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "splitnet"}

    @app.get("/health")
    def health() -> dict[str, str]:
        """Whether every block of the model is served; needs no key."""
        swarm = gateway.generations.model.swarm
        # A record outlives a peer that was killed; whom nobody can connect to does not serve.
        present = [
            facts_of(record)
            for record in swarm.peers()
            if record.serves and swarm.links.state(record.endpoint) is not LinkState.DOWN
        ]
        holes = missing_blocks(present, swarm.facts.num_blocks)
        if holes:
            missing = ", ".join(f"{start}..{end - 1}" for start, end in holes)
            raise CoverageError(f"blocks {missing} are served by nobody: start peers for them")
        return {"status": "ok"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        """The model that is served, once for each of its names."""
        return {"object": "list", "data": [entry(name) for name in gateway.names]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        """The model, if it has this name."""
        gateway.check_model(name)
        return entry(name)

    @app.post("/v1/chat/completions", response_model=None, responses=STREAMED)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The next message of a chat."""
        gateway.check_model(body.model)
        tools, prompts = body.offered_tools, gateway.prompts
        client, size = client_of(request), len(await request.body())
        prompt = await gateway.preparing.run(size, prompts.of_chat, body.messages, tools, body.template_variables)
        ask = Ask(
            prompt=prompt,
            max_tokens=prompts.room_for(prompt, body.max_completion_tokens or body.max_tokens),
            sampling=_sampling(gateway, body),
            choices=body.n or 1,
            stop_strings=body.stop_strings,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=await gateway.preparing.run(size, gateway.grammar_of, body),
            owner=client.name,
        )
        answer = ChatAnswer(
            gateway.model,
            len(prompt),
            choices=ask.choices,
            with_tools=bool(tools),
            only_calls=bool(body.tools_to_call),
            with_logprobs=bool(body.logprobs),
            text_of=prompts.text_of,
        )
        return await _answered(gateway, body, request, [ask], answer)

    @app.post("/v1/completions", response_model=None, responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """How texts go on."""
        gateway.check_model(body.model)
        prompts = gateway.prompts
        client, size = client_of(request), len(await request.body())
        texts = _prompts_of(body)
        tokenized = await gateway.preparing.run(size, lambda: [prompts.of_text(text) for text in texts])
        if body.echo and body.logprobs is not None:
            _check_scores(sum(map(len, tokenized)) * (1 + body.logprobs))
        max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        sampling = _sampling(gateway, body)
        asks = [
            Ask(
                prompt=prompt,
                max_tokens=prompts.room_for(prompt, max_tokens),
                sampling=replace(sampling, prompt=number),
                choices=body.n or 1,
                stop_strings=body.stop_strings,
                top_logprobs=body.logprobs,
                score_prompt=bool(body.echo) and body.logprobs is not None,
                goes_on=True,
                owner=client.name,
            )
            for number, prompt in enumerate(tokenized)
        ]
        echoed = [text if isinstance(text, str) else prompts.decode_all(text) for text in texts] if body.echo else []
        begins: list[list[int]] = []
        if body.echo and body.logprobs is not None:
            begins = await gateway.preparing.run(size, lambda: [*map(prompts.begins, tokenized, echoed)])
        answer = CompletionAnswer(
            gateway.model,
            sum(map(len, tokenized)),
            prompts=echoed or [""] * len(texts),
            begins=begins or [[]] * len(texts),
            choices=body.n or 1,
            with_logprobs=body.logprobs is not None,
            text_of=prompts.text_of,
        )
        return await _answered(gateway, body, request, asks, answer)

    return app


async def _answered(
    gateway: Gateway, body: SamplingRequest, request: Request, asks: Sequence[Ask], answer: Answer
) -> Response:
    """Runs a request; the session ends when the client goes."""
    client = client_of(request)
    running = gateway.run(client, asks, answer.id)
    if not body.stream:
        async with aclosing(running):
            return JSONResponse(await unless_gone(request, answer.whole(running)))
    # Until the first event an error still has a status of its own.
    try:
        first = await unless_gone(request, _first_of(running))
    except BaseException:
        await running.aclose()
        raise
    chunks = answer.chunks(first, running, with_usage=body.wants_usage)
    return EventStream(chunks, running, gateway.unread, client)


async def _first_of(running: AsyncGenerator[Numbered]) -> Numbered:
    return await anext(running)


def _sampling(gateway: Gateway, body: SamplingRequest) -> Sampling:
    bias = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    gateway.prompts.check_known(bias, "logit_bias")
    defaults = gateway.defaults
    return Sampling(
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        bias=tuple(bias.items()),
        top_k=defaults.top_k if body.top_k is None else max(body.top_k, 0),
        min_p=defaults.min_p if body.min_p is None else body.min_p,
        repetition_penalty=(
            defaults.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty
        ),
    )


def _check_scores(scores: int) -> None:
    """Refuses more scores of prompts than are made and told in one go."""
    if scores > MAX_SCORES:
        raise ApiError(
            400,
            f"{scores} scores of prompts are more than {MAX_SCORES}: ask for fewer logprobs or fewer prompts at once",
            param="logprobs",
        )


def _prompts_of(body: CompletionRequest) -> list[str] | list[list[int]]:
    """All prompts of a request, which may be one that stands alone."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]  # pyright: ignore[reportReturnType]
    return prompt  # pyright: ignore[reportReturnType]


async def _told(request: Request, error: Exception) -> Response:
    failure = failure_of(error)
    if isinstance(error, HTTPException) and failure.status in (404, 405):
        served = ", ".join(
            f"{method.upper()} {path}" for path, methods in request.app.openapi()["paths"].items() for method in methods
        )
        names = " or ".join(map(repr, request.app.state.names))
        failure = ApiError(failure.status, f"{error.detail}: this server has {served}, for the model {names}")
    return JSONResponse(failure.reply(), failure.status, failure.headers)


async def _expire_regularly(gateway: Gateway) -> None:
    while True:
        await asyncio.sleep(EXPIRY_S)
        gateway.generations.kept.expire()
