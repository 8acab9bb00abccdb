"""Two gateways of one swarm with one state, and nginx before them: no answer is lost when a gateway ends."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.daemons import Background, background
from tests.e2e.test_serve_command import ready
from tests.nginx import NEEDS_NGINX, nginx
from tests.swarm.harness import wait_until
from tests.valkey import NEEDS_VALKEY, Valkey

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240), NEEDS_VALKEY]

ASKED = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200, "seed": 7, "stream": True}


def streamed(url: str, headers: dict[str, str], most: int = 10**9) -> Iterator[tuple[str, str]]:
    """Ids and texts of the first events of a stream."""
    with httpx.stream("POST", f"{url}/chat/completions", json=ASKED, headers=headers, timeout=60) as reply:
        assert reply.status_code == 200, reply.read()
        id = ""
        for line in reply.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                id = value
            if name == "data" and value != "[DONE]":
                choices: list[Any] = json.loads(value)["choices"]
                yield id, "".join(choice["delta"].get("content") or "" for choice in choices)
                most -= 1
                if not most:
                    return


def test_a_stream_goes_on_at_another_gateway_after_the_first_was_killed(small: Path, duo: str, tmp_path: Path) -> None:
    with ExitStack() as ends:
        valkey = ends.enter_context(closing(Valkey(tmp_path)))
        options = ("--codec", "none", "--port", "0", "--join", duo, "--state", valkey.url)
        gateways: list[Background] = []
        for name in ("first", "second"):
            (home := tmp_path / name).mkdir()
            gateways.append(ends.enter_context(background(home, "serve", str(small), *options)))
        first, second = gateways
        one, two = (ready(gateway, small.name) for gateway in gateways)
        begun = list(streamed(one, {"Idempotency-Key": "answer"}, most=20))
        # A second connection waits for the end of the answer when the gateway is killed.
        cut = streamed(one, {"Last-Event-ID": begun[-1][0]})
        begun.append(next(cut))
        first.stop(signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            begun += list(cut)
        rest = list(streamed(two, {"Last-Event-ID": begun[-1][0]}))
        alone = list(streamed(two, {}))
        assert "".join(text for _, text in begun + rest) == "".join(text for _, text in alone)
        numbers = [int(id.rpartition(".")[2]) for id, _ in begun + rest]
        assert numbers == list(range(1, len(numbers) + 1))
        assert second.stop(signal.SIGTERM).code == 0


@NEEDS_NGINX
def test_no_request_is_lost_while_gateways_are_replaced(small: Path, duo: str, tmp_path: Path) -> None:
    with ExitStack() as ends:
        valkey = ends.enter_context(closing(Valkey(tmp_path)))
        options = ("--codec", "none", "--join", duo, "--state", valkey.url)

        def started(port: str) -> Background:
            return ends.enter_context(background(tmp_path, "serve", str(small), *options, "--port", port))

        gateways = [started("0") for _ in range(2)]
        ports = [re.findall(r":(\d+)", ready(gateway, small.name))[-1] for gateway in gateways]
        socket = ends.enter_context(nginx(tmp_path, ports))
        over = threading.Event()
        answers: list[list[tuple[int, str]]] = [[], [], [], []]
        asked = ASKED | {"max_tokens": 20}

        def chat(answers: list[tuple[int, str]], asked: dict[str, Any]) -> None:
            with httpx.Client(transport=httpx.HTTPTransport(uds=socket), timeout=60) as client:
                while not over.is_set():
                    reply = client.post("http://localhost/v1/chat/completions", json=asked)
                    texts = re.findall(r'"content":"(.*?)"|"finish_reason":"(.*?)"', reply.text)
                    answers.append((reply.status_code, "".join(text + finish for text, finish in texts)))

        clients = [
            threading.Thread(target=chat, args=(given, asked | {"stream": number % 2 == 0}))
            for number, given in enumerate(answers)
        ]
        for client in clients:
            client.start()
        try:
            for number, port in enumerate(ports):
                counts = [len(given) for given in answers]

                def all_served(counts: list[int] = counts) -> bool:
                    return all(len(given) > count + 1 for given, count in zip(answers, counts, strict=True))

                assert gateways[number].stop(signal.SIGTERM).code == 0
                gateways[number] = started(port)
                ready(gateways[number], small.name)
                wait_until(all_served)
        finally:
            over.set()
            for client in clients:
                client.join()
        ((status, text),) = {answer for given in answers for answer in given}
        assert status == 200 and text.endswith("length") and len(text) > 20, text
