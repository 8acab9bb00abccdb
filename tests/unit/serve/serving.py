"""Gateways in this process: an app with a client that needs no socket, or an app that listens at a port."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import httpx
import uvicorn
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from splitnet.security.identity import KeyOptions
from splitnet.serve.admission import Admission
from splitnet.serve.answers.grammars import Grammars
from splitnet.serve.answers.sampling import SamplingDefaults
from splitnet.serve.gateway import Gateway
from splitnet.serve.generation import Generations
from splitnet.serve.pooling import Pooling
from splitnet.serve.prompts import Prompts
from splitnet.serve.request_gate import ApiKeys
from splitnet.serve.responses import ServedModel
from splitnet.serve.server import make_app
from splitnet.serve.session_cache import KeepLimits
from splitnet.serve.shared_state import SharedState
from tests.unit.serve.fake_model import VOCABULARY

MODEL = "small"
URL = "http://127.0.0.1/v1"
GREEDY = {"model": MODEL, "temperature": 0}
TEMPLATE = "{{ tools or '' }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


class Server:
    """The app of a gateway for a model, with a client that needs no socket.

    Attributes:
        generations: runs requests on the model.
        admission: counts running and waiting requests.
        http: the client; it exists only within `running`.
    """

    http: httpx.AsyncClient

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        grammars: Grammars | None = None,
        positions: int = 256,
        at_a_time: int = 4,
        waiting: int = 4,
        keep: int = 4,
        speculate: str | None = None,
        keys: Sequence[str] | Mapping[str, KeyOptions] = (),
        defaults: SamplingDefaults | None = None,
        names: Sequence[str] = (),
        origins: Sequence[str] = (),
        pooling: Pooling | None = None,
        prompts: Prompts | None = None,
        state: SharedState | None = None,
        names_route: bool = True,
    ) -> None:
        prompts = prompts or Prompts(tokenizer, VOCABULARY, positions)
        self.prompt = partial(prompts.tokens_of_chat, tools=[])
        self.generations = Generations(model, prompts.decode, at_a_time, KeepLimits(keep, 10_000, 300.0), speculate)
        self.admission = Admission(at_a_time, waiting)
        served = ServedModel(
            MODEL,
            self.generations,
            prompts,
            grammars or Grammars(tokenizer, VOCABULARY, self.generations.end_tokens),
            self.admission,
            defaults or SamplingDefaults(),
            names,
            pooling or Pooling(),
            state=state,
        )
        options = keys if isinstance(keys, Mapping) else {key: KeyOptions() for key in keys}
        gateway = Gateway(served, created=0)
        self.app = make_app(gateway, ApiKeys(options), origins=origins, names_route=names_route)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as self.http:
            yield self

    def run(self, does: Callable[[Server], Awaitable[Any]]) -> Any:
        """Runs the coroutine of a test."""

        async def running() -> Any:
            async with self.running():
                return await does(self)

        return asyncio.run(running())

    def with_openai(self, does: Callable[[AsyncOpenAI, Server], Awaitable[Any]]) -> Any:
        """Runs the coroutine of a test with OpenAI's client."""

        async def asking(server: Server) -> Any:
            http: Any = server.http
            return await does(AsyncOpenAI(base_url=URL, api_key="a", http_client=http, max_retries=0), server)

        return self.run(asking)

    async def complete(self, **body: Any) -> Any:
        """The reply to a completion that succeeds."""
        reply = await self.http.post("/v1/completions", json=GREEDY | body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def chat(self, *said: str, **body: Any) -> Any:
        """The reply to a chat in which user and assistant speak in turns."""
        messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(said)]
        reply = await self.http.post("/v1/chat/completions", json=GREEDY | {"messages": messages} | body)
        assert reply.status_code == 200, reply.text
        return reply.json()


Serve = Callable[..., Any]


@contextmanager
def servers(make: Callable[..., Server]) -> Iterator[Serve]:
    """Yields a function that runs the coroutine of a test with a new server; the servers end afterwards."""
    made: list[Server] = []

    def run(does: Callable[[Server], Awaitable[Any]], *given: Any, **options: Any) -> Any:
        made.append(make(*given, **options))
        return made[-1].run(does)

    yield run
    for server in made:
        server.generations.close()


async def until(condition: Callable[[], bool]) -> None:
    """Waits until other threads have made a condition true."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Runs an app that listens at a port; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class Told:
    """The server's present metrics for Prometheus."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self._series = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    @classmethod
    async def by(cls, server: Server, **options: Any) -> Told:
        reply = await server.http.get("/metrics", **options)
        assert reply.status_code == 200, reply.text
        return cls(reply.text)

    def __call__(self, name: str, **labels: str) -> float:
        return self._series[f"splitnet_gateway_{name}", frozenset(labels.items())]
