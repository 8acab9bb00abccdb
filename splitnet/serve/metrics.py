"""Metrics of the gateway for Prometheus: requests, tokens and their times, and what sessions measure at peers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Counted
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from splitnet.errors import SplitnetError
from splitnet.hf.cache import RemoteCache
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.serve.admission import Admission
from splitnet.serve.answer_records import AnswerRecords
from splitnet.serve.failures import api_error_of
from splitnet.serve.generation import Ended, GenerationRequest, Generations, Numbered, TextDelta
from splitnet.serve.shared_state import SharedState
from splitnet.session.events import Cause
from splitnet.version import __version__
from splitnet.wire.messages import Timing

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
HOP_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

OTHER_PATH = "other"
GONE_STATUS = "499"  # for a client that disconnected before the answer, as in nginx


class GatewayMetrics:
    """The metrics of one app, in a separate registry."""

    def __init__(self) -> None:
        # Without the creation times of the series, which Prometheus ignores in the text format.
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests that were answered.", "path", "status")
        whole = "Time from the arrival of a request to the end of its answer."
        self._seconds = self._histogram("request_seconds", whole, SECONDS, "path")
        failed = "Requests that the model did not answer to the end, by the code of the error."
        self._failures = self._counter("failures", failed, "cause")
        for code in ("overloaded", "peers_busy"):
            self._failures.labels(code)
        self._cancelled = self._counter("cancelled", "Requests whose client disconnected before the end of the answer.")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._cached = self._counter("cached_tokens", "Tokens of prompts that the peers held from an earlier turn.")
        self._completion = self._counter("completion_tokens", "Tokens of answers.")
        first = "Time from the arrival of a request to its first token, waiting included."
        self._first_token = self._histogram("time_to_first_token_seconds", first, SECONDS)
        between = "Mean time between the tokens of an answer."
        self._per_token = self._histogram("time_per_output_token_seconds", between, SECONDS)
        repaired = "Time from noticing that a route needs failover until generation continued, by cause."
        self._failover = self._histogram("failover_seconds", repaired, SECONDS, "cause")
        for cause in Cause:
            self._failover.labels(cause.value)
        hop = "Time of a step at a hop: waiting for the device, computing, and travelling to the next hop."
        self._hop = self._histogram("hop_seconds", hop, HOP_SECONDS, "part")
        self._sent = self._counter("sent_bytes", "Bytes that sessions sent to peers.")
        self._received = self._counter("received_bytes", "Bytes that sessions got from peers.")

    async def watch_answer(
        self, source: AsyncGenerator[Numbered], asks: Sequence[GenerationRequest]
    ) -> AsyncGenerator[Numbered]:
        began = time.perf_counter()
        current, got_token = -1, False
        tokens: Counted[int] = Counted()
        first_at = last_at = 0.0
        try:
            async with aclosing(source):
                async for number, event in source:
                    ask = asks[number]
                    if number != current:  # prompts of a request run one after the other
                        current = number
                        tokens.clear()
                        self._prompt.inc(len(ask.prompt))
                    if isinstance(event, TextDelta) and ask.max_tokens:
                        last_at = time.perf_counter()
                        if not got_token:
                            got_token = True
                            self._first_token.observe(last_at - began)
                        if not tokens:
                            first_at = last_at
                        tokens[event.choice] += 1
                        self._completion.inc()
                    elif isinstance(event, Ended):
                        self._cached.inc(event.cached_tokens)
                        gaps = max(tokens.values(), default=0) - 1  # all answers to a prompt get a token in each step
                        if gaps > 0:
                            self._per_token.observe((last_at - first_at) / gaps)
                    yield number, event
        except (GeneratorExit, asyncio.CancelledError):
            self._cancelled.inc()
            raise
        except SplitnetError as error:
            self._failures.labels(api_error_of(error).code or "other").inc()
            raise
        except Exception:
            self._failures.labels("unexpected").inc()
            raise

    def watch_session(self, cache: RemoteCache) -> Callable[[], None]:
        """Returns a function that counts the new measurements of a cache's session at each call.

        If several steps ran between two calls, only the times of the last step are known. A cache has no session before
        its first step.
        """
        timings: tuple[Timing, ...] = ()
        repairs = sent = received = 0
        if cache.session is not None:
            timings, repairs = cache.session.timings, len(cache.session.recoveries)
            sent, received = cache.session.traffic.bytes_sent, cache.session.traffic.bytes_received

        def look() -> None:
            nonlocal timings, repairs, sent, received
            session = cache.session
            if session is None:
                return
            if session.timings != timings:
                timings = session.timings
                for timing in timings:
                    self._hop.labels("wait").observe(timing.wait_us / 1e6)
                    self._hop.labels("compute").observe(timing.compute_us / 1e6)
                    if timing.next_rtt_us:
                        self._hop.labels("link").observe(timing.next_rtt_us / 2e6)
            recoveries, traffic = session.recoveries, session.traffic
            for recovered in recoveries[repairs:]:
                self._failover.labels(recovered.cause.value).observe(recovered.total_ms / 1000)
            repairs = len(recoveries)
            self._sent.inc(traffic.bytes_sent - sent)
            self._received.inc(traffic.bytes_received - received)
            sent, received = traffic.bytes_sent, traffic.bytes_received

        return look

    def count_request(self, path: str, status: str, seconds: float) -> None:
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"splitnet_gateway_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"splitnet_gateway_{name}", help, labels, buckets=buckets, registry=self.registry)


class MeasuredModel(Protocol):
    """What metrics read of a `splitnet.serve.responses.ServedModel`."""

    @property
    def name(self) -> str: ...
    @property
    def generations(self) -> Generations: ...
    @property
    def admission(self) -> Admission: ...
    @property
    def metrics(self) -> GatewayMetrics: ...
    @property
    def state(self) -> SharedState | None: ...


class _PresentMetrics(Collector):
    """Metrics whose values are read when Prometheus scrapes: present states, and counters of other modules."""

    def __init__(self, served: MeasuredModel, records: AnswerRecords) -> None:
        self._served = served
        self._records = records

    def collect(self) -> Iterable[Metric]:
        served, generations = self._served, self._served.generations
        model: RemoteCausalLM = generations.model
        counts = model.speculator.counts
        kept = generations.kept
        info = {"model": served.name, "version": __version__}
        yield InfoMetricFamily("splitnet_gateway", "What the gateway serves.", info)
        for metric, help, value in (
            ("requests_running", "Requests that the model is answering.", served.admission.running),
            ("requests_waiting", "Requests that wait for their turn.", served.admission.waiting),
            ("kept_sessions", "Sessions that are kept for the next turns of chats.", len(kept)),
            ("kept_tokens", "Tokens whose keys and values the peers hold for kept sessions.", kept.tokens),
            *((("state_up", "Whether the shared state answers.", int(served.state.is_up)),) if served.state else ()),
        ):
            yield GaugeMetricFamily(f"splitnet_gateway_{metric}", help, value)
        for name, help, value in (
            ("drafted_tokens", "Drafted tokens that were sent to peers.", counts.drafted),
            ("accepted_tokens", "Drafted tokens that the model has accepted.", counts.accepted),
            ("tokens_with_drafts", "Tokens of answers with a source of drafts.", counts.tokens),
            (
                "round_trips_with_drafts",
                "Round trips through the blocks for tokens of answers with a source of drafts.",
                counts.round_trips,
            ),
            ("resumed_answers", "Answers that have gone on after a lost connection.", self._records.resumed),
            *_audits_of(model),
        ):
            yield CounterMetricFamily(f"splitnet_gateway_{name}", help, value)


def _audits_of(model: RemoteCausalLM) -> Iterable[tuple[str, str, float]]:
    counts = model.auditor.counts if model.auditor is not None else Counted[str]()
    for name, help in (
        ("audits", "Pieces of the work of peers that were computed again."),
        ("audited_positions", "Positions that audits have computed again."),
        ("lies", "Peers that audits have named."),
        ("disagreements", "Links whose ends have signed different things."),
    ):
        yield name, help, counts[name]


class _RequestWatch:
    """ASGI middleware that counts requests."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics, routes: Iterable[Any]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = ""

        async def noting_receive() -> Message:
            nonlocal status
            message = await receive()
            if message["type"] == "http.disconnect":
                status = status or GONE_STATUS
            return message

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = status or str(message["status"])
            await send(message)

        try:
            await self._app(scope, noting_receive, noting_send)
        finally:
            self._metrics.count_request(self._path_of(scope), status or GONE_STATUS, time.perf_counter() - began)

    def _path_of(self, scope: Scope) -> str:
        """The declared path of the route: a label with few values, independent of the paths that clients request."""
        routed = scope.get("route")
        if routed is None:  # the request was refused before routing
            routed = next((route for route in self._routes if route.matches(scope)[0] is not Match.NONE), None)
        return routed.path if isinstance(routed, Route) else OTHER_PATH


def instrument(app: FastAPI, served: MeasuredModel, records: AnswerRecords) -> None:
    """Adds `/metrics` to an app, and counts its requests and the work of this model."""
    metrics = served.metrics
    metrics.registry.register(_PresentMetrics(served, records))
    served.generations.watch_session = metrics.watch_session

    @app.get("/metrics", include_in_schema=False)
    def tell(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), media_type=content_type)  # pyright: ignore[reportArgumentType]

    app.add_middleware(_RequestWatch, metrics=metrics, routes=app.routes)
