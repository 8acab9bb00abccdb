"""The server of `splitnet serve`: its app, its socket, the loading of models, and its shutdown."""

from __future__ import annotations

import asyncio
import gc
import html
import importlib
import ipaddress
import signal
import socket
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.demand import DemandPublisher
from splitnet.directory.interface import SwarmDirectory
from splitnet.errors import CoverageError, ModelNotFound, SplitnetError, UnsupportedModel
from splitnet.hf.causal_lm import RemoteCausalLM, attached
from splitnet.hf.image_text import attached_with_images
from splitnet.hf.peft_adapters import check_served, load_adapter
from splitnet.limits import FairAccount
from splitnet.process import Watchdog
from splitnet.serve.admission import Admission
from splitnet.serve.answer_records import AnswerRecords
from splitnet.serve.answers.grammars import Grammars
from splitnet.serve.answers.sampling import choose_defaults
from splitnet.serve.apis import anthropic, embeddings, ollama, openai, openai_responses, tokens
from splitnet.serve.dashboard import HEADERS, Dashboard, dashboard_router
from splitnet.serve.failures import ApiError, api_error_of
from splitnet.serve.gateway import KEPT_MODELS, Gateway, LoadableModel
from splitnet.serve.generation import Generations
from splitnet.serve.image_hosts import ImageHosts
from splitnet.serve.metrics import instrument
from splitnet.serve.pooling import Pooling
from splitnet.serve.prompts import Prompts
from splitnet.serve.request_gate import IDLE_CONNECTIONS, ON_THIS_MACHINE, Api, ApiKeys, BoundedHttp, Gate, api_of
from splitnet.serve.responses import ServedModel
from splitnet.serve.session_cache import KeepLimits
from splitnet.serve.shared_state import SharedState
from splitnet.serve.trace import ROUTE_HEADER, TIMING_HEADER
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.swarm import Swarm
from splitnet.transport.addresses import listen_at

# The protocols that are served; the first protocol also writes the errors of paths that belong to no protocol.
APIS = (openai.API, openai_responses.API, embeddings.API, anthropic.API, ollama.API, tokens.API)
ERRORS = (400, 401, 404, 413, 429, 500, 502, 503)  # Statuses that each path may answer
SHARE_S = 0.5  # Time between two reports of spent tokens to other gateways
EXPIRY_S = 5.0  # Time between two checks for expired sessions


def make_app(
    gateway: Gateway,
    keys: ApiKeys,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
    tuned: Path | None = None,
    *,
    names_route: bool = True,
) -> FastAPI:
    """Makes the app. hosts, origins, names_route: see `Gate`; `*` allows any. tuned: see `Dashboard`."""
    served = gateway.served
    state = served.state
    records = AnswerRecords(state)

    async def expire_regularly() -> None:
        while True:
            await asyncio.sleep(EXPIRY_S)
            for each in gateway.loaded:
                each.generations.kept.expire()
            await gateway.refresh()

    async def share_regularly(state: SharedState) -> None:
        while True:
            await asyncio.sleep(SHARE_S)
            await state.check()
            for client in keys.clients:
                if client.bucket.unshared:
                    await state.share_spending(client)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(expire_regularly())]
        if state is not None:
            tasks.append(asyncio.create_task(share_regularly(state)))
        yield
        while tasks:
            for task in tasks:
                task.cancel()
            # Again, because `asyncio.wait_for` of Python 3.11 loses a cancellation at the end of its wait.
            tasks = list((await asyncio.wait(tasks, timeout=0.1))[1])
        if state is not None:
            await state.close()

    app = FastAPI(title="splitnet", lifespan=lifespan, docs_url=None, redoc_url=None, responses=_errors(APIS[0]))
    app.state.preparing = served.preparing
    app.add_middleware(
        Gate, apis=APIS, keys=keys, hosts=hosts, origins=origins, records=records, names_route=names_route
    )
    instrument(app, served, records)
    # Added outside of the gate, because browsers send no key with a CORS preflight request.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_origin_regex=ON_THIS_MACHINE,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["Retry-After", "X-Request-Id", "Request-Id", TIMING_HEADER, ROUTE_HEADER],
    )
    app.include_router(dashboard_router(Dashboard(gateway, tuned)))
    app.state.gateway = gateway
    for kind in (SplitnetError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _error_response)

    @app.get("/health")
    def health() -> dict[str, str]:
        """Says whether peers serve every block of the model, and whether the shared state answers; needs no API key."""
        if missing := served.missing_blocks():
            total = served.generations.model.swarm.facts.num_blocks
            raise CoverageError(
                f"blocks {missing} of {total} are served by nobody: start peers for them, or wait while peers load them"
            )
        return {"status": "ok"} | ({} if state is None else {"state": "ok" if state.is_up else "unreachable"})

    @app.get("/docs", include_in_schema=False)
    def docs() -> Response:
        """A page that lists the paths of the server."""
        rows = [
            f"<li><code>{method.upper()} {path}</code> {html.escape(operation.get('description', ''))}"
            for path, methods in app.openapi()["paths"].items()
            for method, operation in methods.items()
        ]
        page = f"<!doctype html><meta charset=utf-8><title>splitnet</title><h1>Paths</h1><ul>{''.join(rows)}</ul>"
        return HTMLResponse(f'{page}<p>For programs: <a href="openapi.json">openapi.json</a>', headers=HEADERS)

    for api in reversed(APIS):  # other protocols take some requests of shared paths, so the first protocol comes last
        app.include_router(api.router(gateway), responses=_errors(api))
    return app


def _errors(api: Api) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": api.error} for status in ERRORS}


async def _error_response(request: Request, error: Exception) -> Response:
    failure = api_error_of(error)
    if isinstance(error, HTTPException) and failure.status in (404, 405):
        paths = request.app.openapi()["paths"]
        has = ", ".join(f"{method.upper()} {path}" for path, methods in paths.items() for method in methods)
        names = " or ".join(map(repr, request.app.state.gateway.model_names))
        told = f"{error.detail}: this server has {has}, for the models {names}; see {request.base_url}docs"
        failure = ApiError(failure.status, told)
    api = api_of(request.url.path, request.headers, APIS)
    return JSONResponse(api.error_body(failure), failure.status, failure.headers)


@dataclass(frozen=True)
class ServeOptions:
    """The options of `splitnet serve`, see its help."""

    host: str
    port: int
    api_key_file: Path | None
    max_requests: int
    max_waiting: int
    keep: KeepLimits
    drain_s: float
    checkpoint_sampling: bool = False
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    tuned: Path | None = None
    keep_models: int = KEPT_MODELS
    image_hosts: Sequence[str] = ()
    state: str | None = None  # URL, see `SharedState`
    names_route: bool = True


@dataclass(frozen=True)
class ModelSpec:
    """A model to serve: its names, and how to load its client part and join its swarm."""

    names: Sequence[str]  # names that requests may give; answers contain the first name
    checkpoint: Checkpoint
    tokenizer: Any  # created beforehand, because its creation stops all threads for about 0.2 s
    join: Callable[[Checkpoint], Swarm]
    options: ConnectionOptions
    speculate: Any = None
    adapter: Path | None = None


def serve(
    first: ModelSpec,
    others: Sequence[ModelSpec],
    search: Callable[[SwarmDirectory], Sequence[ModelSpec]] | None,  # finds more models
    options: ServeOptions,
    say: Callable[[str], None],  # called with addresses and used options of the checkpoint, once requests are answered
    warn: Callable[[str], None],  # called with warnings
) -> None:
    """Serves models until SIGINT or SIGTERM. Raises AddressInUse, or SplitnetError if `first` cannot be served."""
    keys = ApiKeys.from_file(options.api_key_file)
    with listen_at(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        if not keys and not ipaddress.ip_address(host).is_loopback:
            warn(f"anyone who reaches {host}:{port} can use this server: give --api-key-file, or --host 127.0.0.1")
        loading = _ModelLoader(options, len(keys), warn)
        served = loading.load_model(first)
        gateway = Gateway(
            served,
            [*map(loading.offer, others)],
            None if search is None else lambda: [*map(loading.offer, search(served.generations.model.swarm.directory))],
            options.keep_models,
        )
        try:
            hosts = options.host, *options.hosts
            app = make_app(gateway, keys, hosts, options.origins, options.tuned, names_route=options.names_route)
            server = _Server(app, gateway, options.drain_s)
            # uvicorn raises a received signal again when it ends; the default handler would then end the process.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, server.handle_exit)
            shown = f"[{host}]" if ":" in host else host
            say(f"serving {' and '.join(gateway.model_names)} at http://{shown}:{port}/v1")
            say(f"the swarm and a chat are shown at http://{shown}:{port}/")
            for sentence in (*loading.said, served.pooling.sentence):
                say(sentence)
            # A garbage collection that visits all objects of torch and transformers stops answers for half a second.
            gc.freeze()
            server.run(sockets=[listener])
        finally:
            loading.close()
            gateway.close()


class _ModelLoader:
    """Loads models, which share the metrics and accounts of the server."""

    def __init__(self, options: ServeOptions, keys: int, warn: Callable[[str], None]) -> None:
        self._options = options
        self._warn = warn
        # If there are several keys, no client can take all places, so that another client soon gets a place.
        self._spare = options.max_requests // 4 if keys > 1 else 0
        self._shared: dict[str, Any] = {
            "image_hosts": ImageHosts(options.image_hosts),
            "state": SharedState(options.state) if options.state else None,
        }
        self._demand: DemandPublisher | None = None
        self.said: list[str] = []  # sentences about options of the first checkpoint, for the user

    def offer(self, spec: ModelSpec) -> LoadableModel:
        if spec.adapter is not None:
            importlib.import_module("peft")  # an import during answers would stop them for a while
        return LoadableModel(spec.names, partial(self.load_model, spec))

    def load_model(self, spec: ModelSpec) -> ServedModel:
        """Joins the model's swarm and loads its client part. Raises SplitnetError."""
        options, checkpoint, tokenizer = self._options, spec.checkpoint, spec.tokenizer
        swarm = spec.join(checkpoint)
        try:
            if self._demand is None:
                # Raises if all peers serve other weights. Not called for further models, which may get peers only after
                # requests have asked for these models.
                swarm.peers()
            remote, processor = self._attach(spec, swarm)
            if spec.adapter is not None:
                check_served(load_adapter(remote, spec.adapter), spec.adapter)
        except BaseException:
            swarm.close()
            raise
        defaults, said = choose_defaults(remote.generation_config, of_checkpoint=options.checkpoint_sampling)
        vocabulary = remote.config.get_text_config().vocab_size
        prompts = Prompts(tokenizer, vocabulary, checkpoint.max_positions, processor)
        generations = Generations(remote, prompts.decode, options.max_requests, options.keep, spec.speculate)
        grammars = Grammars(tokenizer, vocabulary, generations.end_tokens)
        if self._demand is None:
            grammars.read_tokenizer()
            self.said = said
            self._demand = DemandPublisher(swarm.directory, swarm.identity)
        served = ServedModel(
            spec.names[0],
            generations,
            prompts,
            grammars,
            Admission(options.max_requests, options.max_waiting, spare=self._spare),
            defaults,
            spec.names[1:],
            Pooling.of(checkpoint),
            note_demand=partial(self._demand.asked, swarm.facts),
            leave=swarm.close,
            **self._shared,
        )
        self._shared |= {name: getattr(served, name) for name in ("metrics", "preparing", "unread", "pixels")}
        return served

    def _attach(self, spec: ModelSpec, swarm: Swarm) -> tuple[RemoteCausalLM, Any]:
        """The model, and its processor; None: it reads text alone, or its images cannot be read here."""
        if spec.checkpoint.store.reads_images:
            try:
                processor = spec.checkpoint.with_towers.store.processor()
                return attached_with_images(spec.checkpoint, swarm, spec.options, spec.speculate), processor
            except (ModelNotFound, UnsupportedModel) as error:
                self._warn(f"{spec.names[0]} is served without images: {error}")
        return attached(spec.checkpoint, swarm, spec.options, spec.speculate, headless=True), None

    def close(self) -> None:
        """Stops the publishing of demand."""
        if self._demand is not None:
            self._demand.close()


class _Server(uvicorn.Server):
    """At shutdown, running requests have `drain_s` seconds to finish; after that, they end with an error."""

    def __init__(self, app: object, gateway: Gateway, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # pyright: ignore[reportArgumentType]
                log_config=None,
                access_log=False,
                server_header=False,
                http=partial(BoundedHttp, FairAccount(IDLE_CONNECTIONS)),  # pyright: ignore[reportArgumentType]
                ws="none",
                callback_notify=self._notify,
                timeout_notify=1,
            )
        )
        self._gateway = gateway
        self._drain_s = drain_s
        self._watchdog = Watchdog()

    async def _notify(self) -> None:
        self._watchdog.alive()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gateway.drain()
        ending = asyncio.get_running_loop().call_later(self._drain_s, self._gateway.end_requests)
        await super().shutdown(sockets)
        ending.cancel()
