"""Prometheus metrics of peers about a client's work, read over HTTP."""

from __future__ import annotations

import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from peers.peer_metrics import MetricsServer, registry_of
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import PeerBusy
from splitnet.session.inference import Session
from splitnet.session.options import ConnectionOptions
from tests.swarm.generation import GREEDY, prompt
from tests.swarm.harness import LocalSwarm, shared_swarm

pytestmark = pytest.mark.swarm

PROMPT, ANSWER = 20, 30


class Told:
    """The series of one scrape."""

    def __init__(self, url: str) -> None:
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        self.series = Counter(
            {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
        )

    def __call__(self, name: str, **labels: str) -> float:
        key = (f"splitnet_peer_{name}", frozenset(labels.items()))
        assert key in self.series, key
        return self.series[key]


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with shared_swarm(folder, [(0, 2), (2, 6)], node=node) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def scrape(swarm: LocalSwarm) -> Iterator[Callable[[], list[Told]]]:
    """Reads the metrics of each peer."""
    with ExitStack() as stack:
        servers = [stack.enter_context(MetricsServer("127.0.0.1", 0)) for _ in swarm.peers]
        for server, peer in zip(servers, swarm.peers, strict=True):
            server.serve(registry_of(peer))
        yield lambda: [Told(server.url) for server in servers]


def test_metrics_count_a_generation(swarm: LocalSwarm, scrape: Callable[[], list[Told]]) -> None:
    model = swarm.model()
    before = scrape()
    with model.session():
        model.generate(**prompt(PROMPT), **{**GREEDY, "max_new_tokens": ANSWER, "speculate": "off"})
        during = scrape()
    for peer in swarm.peers:
        while len(peer.service.sessions):
            peer.service.sessions.wait_for_end(0.1)
    after = scrape()

    def done(index: int, name: str, **labels: str) -> float:
        return during[index](name, **labels) - before[index](name, **labels)

    for index, peer in enumerate(swarm.peers):
        span = peer.span
        assert during[index]("blocks") == span.end - span.start
        assert done(index, "tokens_total", kind="prefill") == PROMPT
        # The last token is never sent to the peers.
        assert done(index, "tokens_total", kind="decode") == done(index, "steps_total", kind="decode") == ANSWER - 1
        assert done(index, "tokens_total", kind="replay") == 0
        assert done(index, "pass_tokens_sum", work="steps") == PROMPT + ANSWER - 1
        assert done(index, "pass_seconds_count", work="steps") == done(index, "pass_rows_sum", work="steps")
        assert done(index, "queue_wait_seconds_count", kind="decode") == ANSWER - 1
        assert during[index]("kv_cached_bytes") == (PROMPT + ANSWER - 1) * span.kv_bytes_per_position
        assert during[index]("kv_bytes", state="reserved") >= during[index]("kv_cached_bytes")
        assert (during[index]("sessions"), after[index]("sessions")) == (1, 0)
        assert after[index]("kv_bytes", state="reserved") == after[index]("kv_cached_bytes") == 0
        assert after[index]("sessions_opened_total") - before[index]("sessions_opened_total") == 1
        closed = [scraped[index]("sessions_ended_total", cause="closed") for scraped in (before, after)]
        assert closed[1] - closed[0] == 1
        assert done(index, "received_bytes_total", link="incoming", codec="none") > 0
        assert done(index, "refused_total", cause="busy") == 0
    pushed = done(0, "sent_bytes_total", link="outgoing", codec="none")
    activations = (PROMPT + ANSWER - 1) * swarm.client.facts.hidden_size * 4
    assert activations < pushed == done(1, "received_bytes_total", link="incoming", codec="none")


def test_metrics_count_training(swarm: LocalSwarm, scrape: Callable[[], list[Told]]) -> None:
    model: Any = swarm.model()
    ids = prompt(8, batch=3)["input_ids"]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    before = scrape()
    model(inputs_embeds=embedded, labels=ids).loss.backward()
    after = scrape()
    for one, other in zip(before, after, strict=True):
        for kind in ("forward", "backward"):
            assert other("tokens_total", kind=kind) - one("tokens_total", kind=kind) == ids.numel()
            assert other("pass_rows_sum", work=kind) - one("pass_rows_sum", work=kind) == len(ids)
            assert other("pass_seconds_sum", work=kind) > one("pass_seconds_sum", work=kind)


def test_metrics_count_refusals_by_cause(swarm: LocalSwarm, scrape: Callable[[], list[Told]]) -> None:
    before = scrape()
    session = Session(swarm.client, ConnectionOptions(codec="none"), reservation=64)
    session.open()
    with pytest.raises(PeerBusy):
        session.reserve(1 << 23)
    session.close()
    for one, other in zip(before, scrape(), strict=True):
        assert other("refused_total", cause="busy") - one("refused_total", cause="busy") == 1
