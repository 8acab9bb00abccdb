"""Two gateways of one swarm with one state, and nginx before them: no answer is lost when a gateway ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.daemons import SPLITNET, Background, background, daemons
from tests.e2e.test_serve_command import ready
from tests.nginx import NEEDS_NGINX, nginx
from tests.swarm.harness import wait_until
from tests.valkey import NEEDS_VALKEY, Valkey

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240), NEEDS_VALKEY]

REPLACE = Path(__file__).resolve().parents[2] / "deploy" / "replace.sh"
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


class Replaceable:
    """Processes of splitnet that a shell starts and replaces, as a service manager does, and checks of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._checks: list[tuple[str, str]] = []

    def name(self, name: str, *arguments: str) -> None:
        """Sets the command of a process whose log, key and number are in the folder."""
        (self.folder / name).write_text(
            f"if read -r number < {name}.pid; then kill $number; while kill -0 $number; do sleep 0.1; done; fi\n"
            f"SPLITNET_KEY_FILE={name}.key {shlex.join([*SPLITNET, *arguments])} > {name}.log 2>&1 &\n"
            f"echo $! > {name}.pid\n"
        )

    def start(self, name: str, *arguments: str) -> None:
        self.name(name, *arguments)
        assert self.run(f"sh {name}").returncode == 0

    def check(self, name: str, command: str) -> None:
        """Waits until a command ends with 0, which says whether the process serves."""
        wait_until(lambda: self.run(command).returncode == 0)
        self._checks.append((command, f"sh {name}"))

    def replace(self) -> subprocess.CompletedProcess[str]:
        lines = "".join(f"{check} => {command}\n" for check, command in self._checks)
        (self.folder / "services").write_text(f"# all of them\n\n{lines}")
        return self.run(f"{REPLACE} services 60")

    def numbers(self) -> dict[str, int]:
        return {file.stem: int(file.read_text()) for file in self.folder.glob("*.pid")}

    def close(self) -> None:
        for number in self.numbers().values():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sh", "-c", command], cwd=self.folder, capture_output=True, text=True, check=False)


def free_ports(count: int) -> list[str]:
    with ExitStack() as sockets:
        opened = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [str(each.getsockname()[1]) for each in opened]


@NEEDS_NGINX
@pytest.mark.timeout(480)
def test_no_request_is_lost_while_nodes_and_gateways_are_replaced(small: Path, tmp_path: Path) -> None:
    with ExitStack() as ends:
        valkey = ends.enter_context(closing(Valkey(tmp_path)))
        services = ends.enter_context(closing(Replaceable(tmp_path)))
        ports, files = free_ports(4), [tmp_path / "0.address", tmp_path / "1.address"]
        commands = [
            ("dht", "--listen", f"/ip4/127.0.0.1/tcp/{port}", "--key-file", f"{file}.key", "--address-file", str(file))
            for port, file in zip(ports, files, strict=False)
        ]
        services.start("node0", *commands[0])
        wait_until(files[0].exists)
        services.start("node1", *commands[1], "--join", files[0].read_text().strip())
        wait_until(files[1].exists)
        services.name("node0", *commands[0], "--join", files[1].read_text().strip())
        nodes = [word for file in files for word in ("--join", file.read_text().strip())]
        ends.enter_context(daemons(tmp_path, small, [(0, 3), (3, 6)], *nodes))
        for number in range(2):
            status = shlex.join([*SPLITNET, "status", str(small), *nodes[2 * number : 2 * number + 2], "--json"])
            services.check(f"node{number}", f"{status} | grep -q '\"missing\": \\[\\]'")
        options = ("--codec", "none", *nodes, "--state", valkey.url)
        for port in ports[2:]:
            services.start(port, "serve", str(small), *options, "--port", port)
            health = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/health')"
            services.check(port, shlex.join([sys.executable, "-c", health]))
        front = ends.enter_context(nginx(tmp_path, ports[2:]))
        over = threading.Event()
        answers: list[list[tuple[int, str]]] = [[], [], [], []]
        asked = ASKED | {"max_tokens": 20}

        def chat(answers: list[tuple[int, str]], asked: dict[str, Any]) -> None:
            with httpx.Client(transport=httpx.HTTPTransport(uds=front), timeout=60) as client:
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
            wait_until(lambda: all(answers))
            before = services.numbers()
            replaced = services.replace()
            assert replaced.returncode == 0 and replaced.stdout.endswith("all were replaced\n"), replaced
            counts = [len(given) for given in answers]
            wait_until(lambda: all(len(given) > count + 1 for given, count in zip(answers, counts, strict=True)))
        finally:
            over.set()
            for client in clients:
                client.join()
        assert not set(before.values()) & set(services.numbers().values()) and len(before) == 4
        ((status, text),) = {answer for given in answers for answer in given}
        assert status == 200 and text.endswith("length") and len(text) > 20, text
        os.kill(services.numbers()[ports[2]], signal.SIGKILL)
        failed = services.replace()
        assert failed.returncode == 1 and "nothing was replaced" in failed.stderr
