"""Attacks on a gateway in a separate process: the costs for an honest client, and the growth of memory."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.attacks import gateway as attacks
from tests.e2e.daemons import background

PROGRAM = (sys.executable, "-m", "tests.unit.serve.gateway_process")
MIB = 2**20
REQUEST_S = 4
ANN, BOB = "sk-ann", "sk-bob"
KEYS = f"{ANN} weight=1\ntokens-per-minute=100000000,weight=2 {BOB}\nsk-poor tokens-per-minute=20\n"


@dataclass
class Gateway:
    """A running server; `key`: that of the honest client."""

    url: str
    process: psutil.Process
    key: str | None = None

    def ask(self, path: str = "/v1/completions", *, key: str | None = None, **body: Any) -> httpx.Response:
        """The reply to a request of the honest client."""
        given = key or self.key
        headers = {"Authorization": f"Bearer {given}"} if given else {}
        prompt = {} if "messages" in body else {"prompt": "Bees fly"}
        asked = {"model": "small", "max_tokens": 4, "temperature": 0} | prompt | body
        return httpx.post(self.url + path, json=asked, headers=headers, timeout=60)

    @contextmanager
    def under(
        self, attack: Callable[[], attacks.Outcomes], *, enough: threading.Event | None = None
    ) -> Iterator[Beside]:
        """Runs an attack, with requests of the honest client meanwhile, and yields the measurements after its end.

        enough: set once five honest requests were answered.
        """
        beside = Beside(self._rss())
        expected = self.ask().json()["choices"]
        running = threading.Thread(target=lambda: beside.outcomes.update(attack()))
        running.start()
        while running.is_alive():
            before = self._computed_s()
            reply = self.ask()
            beside.seconds.append(self._computed_s() - before)
            assert reply.status_code == 200, reply.text
            assert reply.json()["choices"] == expected
            beside.rss = max(beside.rss, self._rss())
            if enough is not None and len(beside.seconds) >= 5:
                enough.set()
            running.join(0.02)
        yield beside

    def _computed_s(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def _rss(self) -> int:
        return self.process.memory_info().rss


@dataclass
class Beside:
    """Measurements during an attack. seconds: the server's computing time until each answer to the honest client."""

    rss_before: int

    def __post_init__(self) -> None:
        self.outcomes = attacks.Outcomes()
        self.seconds: list[float] = []
        self.rss = self.rss_before

    @property
    def readings(self) -> float:
        """The longest of `seconds` in units of `reading_s`, which grows on a slow machine, too."""
        return max(self.seconds) / min(reading_s() for _ in range(3))

    @property
    def grown_mib(self) -> float:
        return (self.rss - self.rss_before) / MIB


def reading_s() -> float:
    """Computing time of this machine for the parsing of a body of 300,000 values, as large as the attackers' bodies."""
    body = json.dumps({"prompt": [1.5] * 300_000})
    began = time.thread_time()
    json.loads(body)
    return time.thread_time() - began


@contextmanager
def gateway(home: Path, *options: str, key: str | None = None) -> Iterator[Gateway]:
    with background(home, *options, program=PROGRAM) as server:
        assert server.process.stdout is not None
        line = server.process.stdout.readline().decode()
        assert line.startswith("serving small at http://"), line
        yield Gateway(line.split()[-1].removesuffix("/v1"), psutil.Process(server.process.pid), key)
        finished = server.stop(signal.SIGTERM)
    assert finished.code == 0 and "Traceback" not in finished.errors, finished.errors


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A server without keys."""
    with gateway(tmp_path_factory.mktemp("public"), "2", "32", str(REQUEST_S)) as running:
        yield running


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A server with keys; Ann is honest."""
    home = tmp_path_factory.mktemp("keyed")
    (home / "keys").write_text(KEYS)
    with gateway(home, "4", "8", "10", str(home / "keys"), key=ANN) as running:
        yield running


def test_bodies_full_of_errors(public: Gateway) -> None:
    with public.under(lambda: attacks.wrong_values(public.url, seconds=0, count=300_000)) as beside:
        assert set(beside.outcomes) <= {"400", "413"} and beside.outcomes["400"] >= 10, beside.outcomes
        assert beside.readings < 100 and beside.grown_mib < 300, (beside.readings, beside.grown_mib)


def test_texts_longer_than_the_context(public: Gateway) -> None:
    with public.under(lambda: attacks.long_texts(public.url, seconds=0)) as beside:
        assert set(beside.outcomes) == {"400"}, beside.outcomes
        assert beside.readings < 100 and beside.grown_mib < 200, (beside.readings, beside.grown_mib)


def test_schemas_nested_too_deep(public: Gateway) -> None:
    outcomes = attacks.deep_schemas(public.url, seconds=0)
    assert outcomes == {"200": 1, "400": 3, "413": 1}, outcomes


@pytest.mark.timeout(300)
def test_requests_that_unfold(keyed: Gateway) -> None:
    """Through all APIs: honest answers stay the same, and the gateway neither ends nor grows."""
    kinds = len(attacks.bombs_of("small"))
    with keyed.under(lambda: attacks.bombs(keyed.url, seconds=0, key=BOB, count=2)) as beside:
        assert beside.outcomes.keys() <= {"200", "400", "413"} and beside.outcomes.total() == 2 * kinds, beside.outcomes
        assert beside.outcomes["400"] >= 2 * (kinds - 4), beside.outcomes
        assert beside.grown_mib < 200, beside.grown_mib


@pytest.mark.full
def test_bodies_that_never_end(public: Gateway) -> None:
    with public.under(lambda: attacks.unfinished_bodies(public.url, seconds=4)) as beside:
        assert beside.outcomes["open"] <= 4, beside.outcomes
        assert beside.readings < 150 and beside.grown_mib < 200, (beside.readings, beside.grown_mib)


@pytest.mark.full
def test_requests_that_never_end(public: Gateway) -> None:
    descriptors = public.process.num_fds()
    with public.under(lambda: attacks.half_requests(public.url, seconds=1, count=400)) as beside:
        assert beside.outcomes["open"] <= 256, beside.outcomes
        assert beside.readings < 100, beside.readings
    five = threading.Event()
    attack = partial(attacks.trickled_bodies, public.url, seconds=1, over=five)
    with public.under(attack, enough=five) as beside:
        assert beside.outcomes["open"] <= 256, beside.outcomes
    attacked = attacks.half_requests(public.url, seconds=REQUEST_S + 0.5, count=10)
    assert attacked["open"] == 0, attacked
    assert public.process.num_fds() < descriptors + 20


@pytest.mark.full
def test_readers_that_stall_hold_no_places(public: Gateway) -> None:
    five = threading.Event()
    attack = partial(attacks.stalled_readers, public.url, seconds=12, count=2, prompts=40, over=five)
    with public.under(attack, enough=five) as beside:
        assert five.is_set(), "others were answered while nobody read"
        assert beside.grown_mib < 200, beside.grown_mib


@pytest.mark.full
def test_dashboards_without_end(public: Gateway) -> None:
    with public.under(lambda: attacks.many_dashboards(public.url, seconds=3)) as beside:
        assert beside.outcomes["open"] <= 32, beside.outcomes
        assert beside.grown_mib < 50 and beside.readings < 150, (beside.readings, beside.grown_mib)


def test_dns_rebinding_is_refused(public: Gateway) -> None:
    outcomes = attacks.rebound_names(public.url, seconds=0)
    assert set(outcomes) == {"403"}, outcomes
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000", "192.0.2.7:80"):
        assert httpx.get(public.url + "/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.full
def test_a_key_that_asks_without_end(keyed: Gateway) -> None:
    with keyed.under(lambda: attacks.crowd(keyed.url, seconds=4, key=BOB, count=32, max_tokens=60)) as beside:
        assert set(beside.outcomes) <= {"200", "429"} and beside.outcomes["429"], beside.outcomes
        assert len(beside.seconds) >= 5 and beside.readings < 150, beside.seconds


@pytest.mark.full
def test_guessing_prompts_of_others(keyed: Gateway) -> None:
    system = {"role": "system", "content": "You are the helpdesk of a hospital. " * 2}
    secret = [system, {"role": "user", "content": "I am Ann and I have a cold."}]
    assert keyed.ask("/v1/chat/completions", messages=secret).status_code == 200
    guess = [system, {"role": "user", "content": "I am Ann and I have a cold."}]
    assert attacks.guessed_prompts(keyed.url, [guess], key=BOB) == [0]
    assert attacks.guessed_prompts(keyed.url, [guess], key=ANN)[0] > 10, "the owner's is kept"


@pytest.mark.full
def test_a_key_that_has_used_its_tokens(keyed: Gateway) -> None:
    assert keyed.ask(key="sk-poor", max_tokens=40).status_code == 200
    refused = keyed.ask(key="sk-poor")
    assert refused.status_code == 429 and 30 < int(refused.headers["Retry-After"]) < 120
    assert "20 tokens per minute" in json.loads(refused.text)["error"]["message"]
    assert keyed.ask().status_code == 200
