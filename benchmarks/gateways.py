"""Several gateways as one service: chats through nginx while gateways and the shared state fail; prints Markdown.

    python -m benchmarks.gateways [CHECKPOINT] [--gateways 3] [--clients 64] [--seconds 300] [--tokens 32]

Two daemons with one thread each serve the model in float32; gateways with one Valkey (`--state`) stand behind nginx
with `deploy/nginx.conf`. Each client has an API key and holds greedy chats of three turns; every second client streams.
One gateway gets SIGKILL after a sixth of the time, one is drained and replaced after a third, and Valkey is killed
after half of it, and started empty 30 s later. With `--gateways 1` nothing fails. A client sends a stream that broke
again with `Last-Event-ID`, as browsers do; nothing else is sent twice. Every answer must equal that to the same chat of
other clients. Afterwards, without failures, connections of one key use up its quota at one gateway, those of another
key at all, at the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.serve_load import TOPICS, Peer, at, peer
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.demo import demo_checkpoint
from splitnet.quant.native import processor
from tests.nginx import nginx
from tests.valkey import Valkey

TURNS = ("Tell me about {}, please.", "Which part of it matters most?", "And what else is known?")
AWAY_S = 30.0  # How long Valkey is away
QUOTA = 3000  # Tokens per minute
QUOTA_S = 150.0
ASKING = 6  # Connections of each key with a quota
QUOTA_KEYS = ("quota-at-one", "quota-at-all")


@dataclass
class Answer:
    """An answer to a turn of a chat. Times in seconds since the load began; gap_s: the longest time without a token."""

    chat: tuple[str, int]
    asked_s: float
    streamed: bool
    text: str = ""
    first_s: float = 0.0
    ended_s: float = 0.0
    gap_s: float = 0.0
    tokens: int = 0
    cached: int = 0
    resumed: int = 0
    error: str = ""


@dataclass
class Gateway:
    """A process of `splitnet serve`, which can be replaced at the same port."""

    command: list[str]
    log: Path
    port: str = "0"
    process: Any = field(init=False)

    def start(self) -> None:
        with self.log.open("ab") as errors:
            command = [*self.command, "--port", self.port]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        line = self.process.stdout.readline().decode()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if found is None:
            raise SystemExit(f"a gateway did not start: {line}{self.log.read_text()}")
        self.port = found[1]

    def stop(self, number: signal.Signals) -> float:
        """Ends the process; returns the seconds that it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        self.process.wait()
        return time.monotonic() - began


@contextmanager
def gateways(
    folder: Path, arguments: argparse.Namespace, model: str, address: str, state: str
) -> Iterator[list[Gateway]]:
    keys = folder / "keys"
    lines = [f"client-{number}" for number in range(arguments.clients)]
    keys.write_text("\n".join([*lines, *(f"{key} tokens-per-minute={QUOTA}" for key in QUOTA_KEYS)]) + "\n")
    command = [sys.executable, "-m", "splitnet", "serve", model, "--join", address, "--codec", "none", "--state", state]
    command += ["--local-weights", "float32", "--api-key-file", str(keys), "--max-requests", "32"]
    command += ["--keep-sessions", "64", "--speculate", "off"]
    each = [Gateway(command, folder / f"gateway{number}") for number in range(arguments.gateways)]
    try:
        for one in each:
            one.start()
        yield each
    finally:
        for one in each:
            if hasattr(one, "process"):
                one.process.terminate()
                one.process.wait()


class Load:
    """Clients that chat, each at its own pace; all their answers."""

    def __init__(self, client: httpx.AsyncClient, model: str, tokens: int) -> None:
        self._client, self._model, self._tokens = client, model, tokens
        self._began = time.monotonic()
        self.answers: list[Answer] = []
        self.over = asyncio.Event()

    def now(self) -> float:
        return time.monotonic() - self._began

    async def chat(self, number: int) -> None:
        """Chats of a client, one after the other."""
        at_topic = number
        while not self.over.is_set():
            topic, messages = TOPICS[at_topic % len(TOPICS)], list[dict[str, str]]()
            at_topic += 1
            for turn, question in enumerate(TURNS):
                messages.append({"role": "user", "content": question.format(topic)})
                answer = Answer((topic, turn), self.now(), streamed=number % 2 == 0)
                self.answers.append(answer)
                body = {"model": self._model, "messages": messages, "max_tokens": self._tokens, "temperature": 0}
                key = {"Authorization": f"Bearer client-{number}"}
                try:
                    await (self._stream if answer.streamed else self._whole)(answer, body, key)
                except (httpx.HTTPError, ValueError) as error:
                    answer.error = f"{type(error).__name__}: {error}"
                answer.ended_s = self.now()
                if answer.error or self.over.is_set():
                    break
                messages.append({"role": "assistant", "content": answer.text})

    async def _whole(self, answer: Answer, body: dict[str, Any], key: dict[str, str]) -> None:
        reply = await self._client.post("/v1/chat/completions", json=body, headers=key)
        if reply.status_code != 200:
            raise ValueError(f"{reply.status_code} {reply.text}")
        told = reply.json()
        answer.text = told["choices"][0]["message"]["content"]
        self._count(answer, told["usage"])

    async def _stream(self, answer: Answer, body: dict[str, Any], key: dict[str, str]) -> None:
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        key["Idempotency-Key"] = os.urandom(8).hex()
        last_s = 0.0
        while True:
            try:
                async with self._client.stream("POST", "/v1/chat/completions", json=body, headers=key) as reply:
                    if reply.status_code != 200:
                        raise ValueError(f"{reply.status_code} {(await reply.aread()).decode()}")
                    async for line in reply.aiter_lines():
                        name, _, value = line.partition(": ")
                        if name == "id":
                            key["Last-Event-ID"] = value
                        if name != "data":
                            continue
                        if value == "[DONE]":
                            return
                        event = json.loads(value)
                        if event.get("error", {}).get("code") == "server_ending":
                            break
                        if "error" in event:
                            raise ValueError(value)
                        if event.get("usage"):
                            self._count(answer, event["usage"])
                        text = "".join(each["delta"].get("content") or "" for each in event["choices"])
                        if text:
                            answer.text += text
                            answer.first_s = answer.first_s or self.now()
                            answer.gap_s = max(answer.gap_s, self.now() - last_s if last_s else 0.0)
                            last_s = self.now()
            except httpx.RemoteProtocolError:
                if "Last-Event-ID" not in key:
                    raise
            answer.resumed += 1

    def _count(self, answer: Answer, usage: dict[str, Any]) -> None:
        answer.tokens = usage["completion_tokens"]
        answer.cached = usage["prompt_tokens_details"]["cached_tokens"]


async def fail(load: Load, each: list[Gateway], valkey: Valkey, seconds: float) -> tuple[float, float]:
    """Kills, drains and replaces gateways and Valkey; returns when Valkey was away, in seconds of the load."""

    async def until(part: float) -> None:
        await asyncio.sleep(max(0.0, part * seconds - load.now()))

    def tell(text: str) -> None:
        print(f"- {load.now():.0f} s: {text}", flush=True)

    await until(1 / 6)
    await asyncio.to_thread(each[0].stop, signal.SIGKILL)
    tell("a gateway was killed")
    await asyncio.to_thread(each[0].start)
    tell("it serves again")
    await until(1 / 3)
    took = await asyncio.to_thread(each[1].stop, signal.SIGTERM)
    tell(f"a gateway was drained in {took:.1f} s, with code {each[1].process.returncode}")
    await asyncio.to_thread(each[1].start)
    tell("it serves again")
    await until(1 / 2)
    gone = load.now()
    valkey.close()
    tell("Valkey was killed")
    await asyncio.sleep(min(AWAY_S, seconds / 8))
    valkey.start()
    tell("Valkey was started, empty")
    return gone, load.now()


async def quotas(model: str, each: list[Gateway], tokens: int) -> dict[str, int]:
    """The tokens that two keys with the same quota get, one at the last gateway and one at all of them."""
    got: dict[str, int] = defaultdict(int)
    over = time.monotonic() + QUOTA_S

    async def ask(key: str, port: str) -> None:
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": tokens}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            while time.monotonic() < over:
                reply = await client.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})
                if reply.status_code == 200:
                    got[key] += reply.json()["usage"]["total_tokens"]
                elif reply.status_code == 429:
                    await asyncio.sleep(1)
                else:
                    raise SystemExit(f"{reply.status_code} {reply.text}")

    ports = [one.port for one in each]
    await asyncio.gather(
        *(ask(QUOTA_KEYS[0], ports[-1]) for _ in range(ASKING)),
        *(ask(QUOTA_KEYS[1], ports[number % len(ports)]) for number in range(ASKING)),
    )
    return got


def show(answers: list[Answer], away: tuple[float, float] | None, seconds: float) -> int:
    """Prints the figures; returns the number of answers that were lost or wrong."""
    texts: dict[tuple[str, int], set[str]] = defaultdict(set)
    done = [each for each in answers if not each.error]
    lost = [each for each in answers if each.error]
    for each in done:
        texts[each.chat].add(each.text)
    wrong = {chat: found for chat, found in texts.items() if len(found) > 1}
    streams = [each for each in done if each.streamed]
    firsts, gaps = [each.first_s - each.asked_s for each in streams], [each.gap_s for each in streams]
    wholes = [each.ended_s - each.asked_s for each in done if not each.streamed]
    later = [each for each in done if each.chat[1]]
    resumed = [each for each in done if each.resumed]
    rows: list[tuple[str, str]] = [
        ("answers", f"{len(done)}"),
        ("lost", f"{len(lost)}"),
        ("chats whose answers differ between clients", f"{len(wrong)} of {len(texts)}"),
        ("streams resumed at another gateway", f"{len(resumed)}"),
        ("tokens/s", f"{sum(each.tokens for each in done) / seconds:.1f}"),
        ("first token of a stream, s: median, 95 %", f"{median(firsts):.2f}, {at(95, firsts):.2f}"),
        ("longest pause of a stream, s: median, most", f"{median(gaps):.2f}, {max(gaps):.2f}"),
        ("longest pause of a resumed stream, s", f"{max((each.gap_s for each in resumed), default=0.0):.2f}"),
        ("whole answers, s: median, 95 %, most", f"{median(wholes):.2f}, {at(95, wholes):.2f}, {max(wholes):.2f}"),
        ("later turns that found their session", f"{sum(each.cached > 0 for each in later) / len(later):.1%}"),
    ]
    if away is not None:
        during = [each for each in answers if each.asked_s < away[1] and each.ended_s > away[0]]
        count = sum(bool(each.error) for each in during)
        rows.append(("answers while Valkey was away; lost of them", f"{len(during)}; {count}"))
    print("\n| | |\n|---|---|")
    for row in rows:
        print(f"| {row[0]} | {row[1]} |")
    for each in lost[:5]:
        print(f"\n{each.asked_s:.1f} s, {each.chat}, after {each.resumed}: {each.error}")
    for chat, found in list(wrong.items())[:3]:
        print(f"\n{chat}: {found}")
    return len(lost) + len(wrong)


async def measure(arguments: argparse.Namespace, model: str, socket: str, each: list[Gateway], valkey: Valkey) -> int:
    transport = httpx.AsyncHTTPTransport(uds=socket, limits=httpx.Limits(max_connections=None))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=600) as client:
        load = Load(client, model, arguments.tokens)
        chats = [asyncio.create_task(load.chat(number)) for number in range(arguments.clients)]
        away = await fail(load, each, valkey, arguments.seconds) if len(each) > 1 else None
        await asyncio.sleep(max(0.0, arguments.seconds - load.now()))
        load.over.set()
        await asyncio.gather(*chats)
    faults = show(load.answers, away, load.now())
    if len(each) > 1:
        got = await quotas(model, each, arguments.tokens)
        one, every = (got[key] for key in QUOTA_KEYS)
        print(
            f"\nOf {QUOTA} tokens per minute in {QUOTA_S:.0f} s, {ASKING} connections of a key got {one} tokens at one "
            f"gateway, and {every} at {len(each)}: {every / one:.3f} times as many."
        )
    return faults


def main() -> int:
    """Runs the benchmark; returns 1 if an answer was lost or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--gateways", type=int, default=3)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--tokens", type=int, default=32, help="maximum tokens of an answer")
    arguments = parser.parse_args()
    model = str(arguments.checkpoint or demo_checkpoint())
    blocks = Checkpoint.open(model).num_blocks
    serving = argparse.Namespace(checkpoint=model, weights="float32")
    with tempfile.TemporaryDirectory(prefix="splitnet-gateways-") as name, ExitStack() as running:
        folder, peers = Path(name), list[Peer]()
        for span in ((0, blocks // 2), (blocks // 2, blocks)):
            peers.append(running.enter_context(peer(folder, serving, span, peers, ("--kv-memory", "3GiB"))))
        address = peers[0].address_file.read_text().strip()
        valkey = running.enter_context(closing(Valkey(folder)))
        each = running.enter_context(gateways(folder, arguments, model, address, valkey.url))
        socket = running.enter_context(nginx(folder, [one.port for one in each]))
        served = httpx.get(
            f"http://127.0.0.1:{each[0].port}/v1/models", headers={"Authorization": "Bearer client-0"}
        ).json()
        print(f"{processor()}, {os.cpu_count()} cores; {len(each)} gateways, {arguments.clients} clients\n", flush=True)
        return int(bool(asyncio.run(measure(arguments, served["data"][0]["id"], socket, each, valkey))))


if __name__ == "__main__":
    sys.exit(main())
