"""Metrics of peers and gateway: the document and the dashboard have all that are exported, and no others."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from peers import peer_metrics as metrics_server
from peers.counters import Counters, Histogram
from peers.peer_metrics import MetricsServer, registry_of
from peers.power import EnergyMeter
from peers.prefixes import PrefixStore
from peers.queue import WorkQueue
from peers.sessions import MemoryAccount, SessionTable
from peers.speed import ObservedSpeed
from scheduler.batching import Load
from splitnet.cli.arguments import parse_host_port
from splitnet.drafts.draft_stats import Counts
from splitnet.errors import AddressInUse, SplitnetError
from splitnet.security.identity import Identity
from splitnet.serve.admission import Admission
from splitnet.serve.answer_records import AnswerRecords
from splitnet.serve.metrics import GatewayMetrics, instrument
from splitnet.serve.session_cache import KeepLimits, SessionCache
from splitnet.session.events import Cause, Recovered
from splitnet.wire.endpoints import Connection, Endpoint
from splitnet.wire.messages import Chunk, Ping, Step, Timing, encode
from tests.attacks import gateway

ROOT = Path(__file__).resolve().parents[3]
UNITS = {"seconds": "s", "bytes": "bytes", "watts": "W", "joules": "J"}

CLIENT = Connection(b"client", Identity.generate().public.curve_raw)
NEXT = Endpoint("tcp://192.0.2.1:7000", Identity.generate().public)


def peer_of(counters: Counters) -> Any:
    """A peer with a sample of everything."""
    weights = SimpleNamespace(kind="int8")
    span = SimpleNamespace(start=0, end=12, kv_bytes_per_position=24.0, weights=weights, device="cpu")
    service = SimpleNamespace(
        sessions=SessionTable(1000), queue=WorkQueue(), training_memory=MemoryAccount(1000, "", ""), load=Load()
    )
    service.leaving, service.rows = False, SimpleNamespace(cached_bytes=0.0)
    service.sessions.prefixes = PrefixStore("", lambda: 1000)
    helper = SimpleNamespace(reservations=4, streams=SimpleNamespace(taken=5), passed_bytes=6)
    hidden = SimpleNamespace(relays=("a", "b"), streams=SimpleNamespace(taken=3))
    return SimpleNamespace(
        identity=Identity.generate(),
        checkpoint=SimpleNamespace(name="model"),
        counters=counters,
        service=service,
        server=SimpleNamespace(span=span, speed=ObservedSpeed((1.0,) * 5), service=service),
        transport=SimpleNamespace(
            refused_connections=3,
            connections=SimpleNamespace(ended={"stalled": 2}),
            sending=SimpleNamespace(used=2, limit=20, refused=5),
            receiving=SimpleNamespace(used=1, limit=10),
        ),
        paths=SimpleNamespace(hidden=hidden, helper=helper),
    )


def peer_registry(counters: Counters | None = None) -> CollectorRegistry:
    return registry_of(peer_of(counters or Counters(EnergyMeter(watts=15.0))))


def gateway_metrics() -> GatewayMetrics:
    """With a sample of everything."""
    metrics = GatewayMetrics()
    kept: SessionCache[None] = SessionCache(KeepLimits(1, 100, 60.0), lambda _: None)
    kept.keep_session("me", [1, 2, 3], 8, None)
    generations: Any = SimpleNamespace(
        model=SimpleNamespace(speculator=SimpleNamespace(counts=Counts(9, 6, 20, 8)), auditor=None),
        kept=kept,
        observer=None,
    )
    state: Any = SimpleNamespace(is_up=True)
    served: Any = SimpleNamespace(
        name="model", generations=generations, admission=Admission(1, 1), metrics=metrics, state=state
    )
    instrument(FastAPI(), served, AnswerRecords())
    metrics.count_request("/health", "200", 0.01)
    cache: Any = SimpleNamespace(session=None)
    look = metrics.watch_session(cache)
    cache.session = SimpleNamespace(
        timings=(Timing(1000, 2000, 4000), Timing(0, 1000, 0)),
        recoveries=[Recovered(("gone",), 20.0, 150.0, Cause.LOST)],
        traffic=SimpleNamespace(bytes_sent=100, bytes_received=50),
    )
    look()
    return metrics


def families() -> list[Metric]:
    return [*peer_registry().collect(), *gateway_metrics().registry.collect()]


def told(registry: CollectorRegistry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The value of each series, as Prometheus reads it."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return told(registry)[name, frozenset(labels.items())]


def full_name(family: Metric) -> str:
    return family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")


def table_row(family: Metric) -> str:
    """What the document says of a metric."""
    labels = ", ".join(f"`{label}`" for label in family.samples[0].labels if label != "le")
    unit = next((unit for word, unit in UNITS.items() if word in full_name(family).split("_")), "")
    cells = (f"`{full_name(family)}`", family.type, labels, unit, family.documentation)
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def test_the_document_has_exactly_the_metrics_that_are_exported() -> None:
    written = [line for line in (ROOT / "docs/metrics.md").read_text().splitlines() if line.startswith("| `splitnet_")]
    assert written == [table_row(family) for family in families()]


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads((ROOT / "deploy/grafana/splitnet.json").read_text())


def test_the_dashboard_shows_every_metric_and_no_other(dashboard: Any) -> None:
    exported = {sample.name for family in families() for sample in family.samples}
    used = {
        name
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        for name in re.findall(r"splitnet_\w+", target["expr"])
    }
    variables = [variable for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    used_by_variables = {name for each in variables for name in re.findall(r"splitnet_\w+", each["definition"])}
    assert used | used_by_variables <= exported
    families_used = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    assert families_used == {full_name(family) for family in families()}


def test_panels_of_the_dashboard_do_not_overlap(dashboard: Any) -> None:
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_panels_of_the_dashboard_have_units_and_the_data_source_that_is_chosen(dashboard: Any) -> None:
    (source,) = (each for each in dashboard["templating"]["list"] if each["type"] == "datasource")
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels:
        assert panel["fieldConfig"]["defaults"]["unit"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert {each["uid"] for each in sources} == {f"${{{source['name']}}}"}


def test_the_example_of_prometheus_scrapes_peers_and_gateway() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
    assert [job["job_name"] for job in config["scrape_configs"]] == ["splitnet-gateway", "splitnet-peers"]


@given(st.lists(st.floats(0, 100)), st.lists(st.floats(0, 100), min_size=1, unique=True).map(sorted))
def test_a_histogram_has_each_value_in_one_bucket(values: list[float], bounds: list[float]) -> None:
    histogram = Histogram(bounds)
    for each in values:
        histogram.observe(each)
    up_to = [sum(histogram.counts[: index + 1]) for index in range(len(bounds))]
    assert up_to == [sum(each <= bound for each in values) for bound in bounds]
    assert sum(histogram.counts) == len(values) and histogram.total == sum(values)


def test_bytes_are_told_by_link_and_codec() -> None:
    counters = Counters()
    registry = peer_registry(counters)
    step = Step(bytes(16), 0, 1, (Chunk(1, 0, 1, 1),), None, 0, 0, b"12345678")
    unknown = Step(bytes(16), 0, 1, (Chunk(1, 0, 1, 1),), None, 0, 200, b"1234")
    for message in (step, unknown, Ping(1)):
        counters.traffic.count(CLIENT, message, encode(message), sent=False)
    counters.traffic.count(CLIENT, None, [b"nonsense"], sent=False)
    counters.traffic.count(NEXT, step, encode(step), sent=True)
    size, others = (sum(map(len, encode(step))), sum(len(f) for each in (unknown, Ping(1)) for f in encode(each)) + 8)
    received = "splitnet_peer_received_bytes_total"
    assert value(registry, received, link="incoming", codec="none") == size
    assert value(registry, received, link="incoming", codec="other") == others
    assert value(registry, "splitnet_peer_sent_bytes_total", link="outgoing", codec="none") == size
    assert value(registry, received, link="outgoing", codec="none") == 0
    assert value(registry, "splitnet_peer_refused_total", cause="not_authorized") == 3
    assert value(registry, "splitnet_peer_refused_total", cause="connection_stalled") == 2
    assert value(registry, "splitnet_peer_refused_total", cause="not_sent") == 5
    assert value(registry, "splitnet_peer_buffer_bytes", state="sent_limit") == 20


def test_the_gateway_tells_what_its_sessions_met() -> None:
    registry = gateway_metrics().registry
    assert value(registry, "splitnet_gateway_failover_seconds_sum", cause="lost") == pytest.approx(0.15)
    assert value(registry, "splitnet_gateway_failover_seconds_count", cause="leaving") == 0
    for part, seconds in (("wait", 0.001), ("compute", 0.003), ("link", 0.002)):
        assert value(registry, "splitnet_gateway_hop_seconds_sum", part=part) == pytest.approx(seconds)
    assert value(registry, "splitnet_gateway_kept_tokens") == 3
    assert value(registry, "splitnet_gateway_accepted_tokens_total") == 6
    assert value(registry, "splitnet_gateway_tokens_with_drafts_total") == 20
    assert value(registry, "splitnet_gateway_round_trips_with_drafts_total") == 8


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    with MetricsServer("127.0.0.1", 0) as server:
        yield server


def port_of(server: MetricsServer) -> int:
    return int(server.url.removesuffix("/metrics").rpartition(":")[2])


def asked(server: MetricsServer, path: str, host: str = "localhost") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=10)
    try:
        connection.request("GET", path, headers={"Host": host})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_metrics_are_read_over_http(server: MetricsServer) -> None:
    server.serve(peer_registry())
    with socket.create_connection(("127.0.0.1", port_of(server))) as stranger:
        stranger.sendall(b"\0\xff" * 1000 + b"\r\n\r\n")
        status, text = asked(server, "/metrics")
    assert status == 200
    names = {family.name for family in text_string_to_metric_families(text)}
    assert names >= {
        "splitnet_peer_info",
        "splitnet_peer_tokens",
    }
    assert asked(server, "/")[0] == 404


def test_metrics_that_cannot_be_collected_do_not_end_the_server(server: MetricsServer) -> None:
    class Failing:
        fails = True

        def collect(self) -> list[Metric]:
            if self.fails:
                raise RuntimeError("not now")
            return []

    failing: Any = Failing()
    server.serve(failing)
    assert asked(server, "/metrics")[0] == 500
    failing.fails = False
    assert asked(server, "/metrics")[0] == 200


def test_connections_to_the_metrics_are_few_and_leave_room_for_others(server: MetricsServer) -> None:
    server.serve(peer_registry())
    before = threading.active_count()
    with ExitStack() as stack:
        for _ in range(4 * metrics_server.MOST_CONNECTIONS):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", port_of(server)), 10))
            silent.sendall(b"GET /metrics HT")
        assert asked(server, "/metrics")[0] == 200
        assert threading.active_count() - before <= 2 * metrics_server.MOST_CONNECTIONS


def test_a_request_for_metrics_that_trickles_ends(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "REQUEST_S", 0.2)
    server.serve(peer_registry())
    deadline = time.monotonic() + 20
    with socket.create_connection(("127.0.0.1", port_of(server)), 0.05) as slow, suppress(ConnectionError):
        slow.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        while True:
            assert time.monotonic() < deadline, "a byte now and then keeps it open"
            slow.sendall(b"a")
            with suppress(TimeoutError):
                assert slow.recv(100) == b""
                break


def test_pages_of_other_sites_do_not_read_metrics(server: MetricsServer) -> None:
    server.serve(peer_registry())
    assert set(gateway.rebound_names(server.url.removesuffix("/metrics"), seconds=0.1)) == {"403"}
    for known in ("localhost", "127.0.0.1:80", "[::1]", "peer:9101", socket.gethostname()):
        assert asked(server, "/metrics", known)[0] == 200


def test_a_port_that_is_taken_is_named(server: MetricsServer) -> None:
    with pytest.raises(AddressInUse, match="choose another --metrics-port"):
        MetricsServer("127.0.0.1", port_of(server))
    with pytest.raises(SplitnetError, match="cannot listen on 192"):
        MetricsServer("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9100", ("127.0.0.1", 9100)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:9100", ("::1", 9100)),
        ("box.local:65535", ("box.local", 65535)),
    ],
)
def test_places_to_listen(text: str, expected: tuple[str, int]) -> None:
    assert parse_host_port(text) == expected


@pytest.mark.parametrize("text", ["", "a", ":1", "1:2:3", "host:", "host:65536", "::1:9100"])
def test_what_is_no_place_to_listen(text: str) -> None:
    with pytest.raises(SplitnetError, match="write PORT or HOST:PORT"):
        parse_host_port(text)
