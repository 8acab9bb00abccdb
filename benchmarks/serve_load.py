"""A minute of concurrent streams through `splitnet serve`, with one peer killed in the middle; prints Markdown.

    python -m benchmarks.serve_load CHECKPOINT [--streams 16] [--seconds 60] [--tokens 48] [--weights float32]

Four daemons serve the model, two of them the same middle blocks. Each of `--streams` clients of OpenAI's own package
requests one greedy chat after the other, each with a different prompt. Half-way, one of the two daemons with the same
blocks that has sessions gets SIGKILL. Every answer must equal, token for token, the answer that the same prompt got
before without other streams; at the end no peer may hold a session. With weights other than float32 answers may differ
after the kill, because the rounding of passes differs.

    sudo .venv/bin/python -m benchmarks.serve_load CHECKPOINT --speculate off auto --streams 8 --delay 20 --seconds 20

With --speculate, the benchmark instead runs gateways with these kinds of drafts in turns, `--rounds` times, over three
daemons with a third of the blocks each, on an emulated network of 100 Mbit/s (docs/netlab.md), and kills no peer. It
prints the tokens/s of all streams together.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from openai import AsyncOpenAI
from transformers import AutoConfig

from benchmarks.netlab import Lab
from benchmarks.netlab.peers import LabPeers, even_spans
from splitnet.checkpoint.checkpoint import Checkpoint

TOPICS = (
    "tides", "bread", "volcanoes", "chess", "bees", "rainbows", "bridges", "glaciers",
    "violins", "maps", "coffee", "comets", "paper", "owls", "lighthouses", "clocks",
)  # fmt: skip
START_S = 300.0
FREED_S = 30.0


@dataclass
class Stream:
    """One answer: the time of the request, the time of each token (seconds), and the text."""

    topic: str
    asked_at: float
    came_at: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class Peer:
    """A running daemon, with access to its metrics."""

    process: subprocess.Popen[bytes]
    address_file: Path
    log: Path

    @property
    def port(self) -> str:
        """The port at which the daemon receives activations."""
        return self._said(r" at tcp://[^:]+:(\d+)")

    def metric(self, name: str) -> float:
        """A figure of its metrics; `name` includes the labels."""
        with urllib.request.urlopen(self._said(r"(http://[^/]+/metrics)")) as reply:
            found = re.search(rf"^{re.escape(name)} (\S+)$", reply.read().decode(), re.MULTILINE)
        assert found is not None, f"no metric {name}"
        return float(found.group(1))

    def _said(self, pattern: str) -> str:
        found = re.search(pattern, self.log.read_text())
        assert found is not None, self.log.read_text()
        return found.group(1)


def main() -> int:
    """Runs the benchmark; returns 1 if an answer was lost or wrong, or a session was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=48, help="maximum tokens of an answer")
    parser.add_argument("--weights", default="float32", help="weight format of the peers and of the head")
    parser.add_argument("--speculate", nargs="+", help="drafts to compare; the first is the baseline")
    parser.add_argument("--delay", type=float, default=20.0, help="with --speculate: ms one way")
    parser.add_argument("--rounds", type=int, default=3, help="with --speculate")
    arguments = parser.parse_args()
    if arguments.speculate:
        return compare(arguments)
    blocks = AutoConfig.from_pretrained(arguments.checkpoint).num_hidden_layers
    first, second = blocks // 3, 2 * blocks // 3
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        peers: list[Peer] = []
        for span in ((0, first), (first, second), (first, second), (second, blocks)):
            peers.append(running.enter_context(peer(Path(folder), arguments, span, peers)))
        url = running.enter_context(gateway(Path(folder), arguments, peers[0].address_file.read_text().strip()))
        return asyncio.run(measure(url, peers, arguments))


@contextmanager
def peer(
    folder: Path,
    arguments: argparse.Namespace,
    span: tuple[int, int],
    before: Sequence[Peer],
    options: Sequence[str] = (),
    cache: Path | None = None,
) -> Iterator[Peer]:
    """A serving daemon, with additional `options` and a separate cache folder."""
    number = len(before)
    address_file, log = folder / f"address{number}", folder / f"log{number}"
    command = [sys.executable, "-m", "splitnet", "peer", arguments.checkpoint, "--blocks", f"{span[0]}:{span[1]}"]
    command += ["--weights", arguments.weights, "--threads", "1", "--listen", "tcp://127.0.0.1:0"]
    command += ["--address-file", str(address_file), "--metrics-port", "0"]
    for other in before[:1]:
        command += ["--join", other.address_file.read_text().strip()]
    environment = {**os.environ, "SPLITNET_CACHE": str(cache)} if cache is not None else None
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + START_S
        while not address_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"a peer did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield Peer(process, address_file, log)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def gateway(folder: Path, arguments: argparse.Namespace, address: str, speculate: str = "auto") -> Iterator[str]:
    """Runs `splitnet serve`; yields its URL."""
    command = [sys.executable, "-m", "splitnet", "serve", arguments.checkpoint, "--join", address, "--port", "0"]
    command += ["--keep-sessions", "0", "--max-requests", str(arguments.streams), "--codec", "none"]
    command += ["--local-weights", arguments.weights, "--speculate", speculate]
    with (folder / "gateway").open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line}{(folder / 'gateway').read_text()}")
        yield found.group()
    finally:
        process.terminate()
        process.wait()


def compare(arguments: argparse.Namespace) -> int:
    """Compares tokens/s of all streams by the source of drafts, in turns."""
    hosts = ("first", "middle", "last")
    spans = even_spans(Checkpoint.open(arguments.checkpoint).num_blocks, hosts)
    options = ("--threads", "1", "--weights", arguments.weights)
    speeds: dict[str, list[float]] = {arm: [] for arm in arguments.speculate}
    with (
        tempfile.TemporaryDirectory() as folder,
        Lab(["client", *hosts], delay_ms=arguments.delay, rate_mbit=100.0) as lab,
        LabPeers(lab, arguments.checkpoint, spans, options) as peers,
        lab.inside("client"),
        ExitStack() as running,
    ):
        address = next(iter(peers.addresses.values()))
        urls: dict[str, str] = {}
        for arm in speeds:
            own = Path(tempfile.mkdtemp(dir=folder))
            urls[arm] = running.enter_context(gateway(own, arguments, address, arm))
        for turn in range(arguments.rounds + 1):
            for arm in speeds if turn % 2 else reversed(speeds):
                speeds[arm].append(asyncio.run(speed(urls[arm], arguments)))
    print("| drafts | tokens/s of all streams, median (range) | times the first, median |\n|---|---|---|")
    for arm, every in speeds.items():
        seen = every[1:]  # the first round warms up
        ratio = statistics.median(
            one / base for one, base in zip(seen, speeds[arguments.speculate[0]][1:], strict=True)
        )
        print(f"| {arm} | {statistics.median(seen):.1f} ({min(seen):.1f}-{max(seen):.1f}) | {ratio:.3f} |")
    return 0


async def speed(url: str, arguments: argparse.Namespace) -> float:
    """Tokens/s of streams that ask continuously, counted until the last answer ends."""
    client = client_of(url)
    (model,) = [model.id async for model in client.models.list()]
    done: list[Stream] = []
    began = time.perf_counter()

    async def keep_asking(topic: str) -> None:
        while time.perf_counter() < began + arguments.seconds:
            done.append(await ask(client, model, topic, arguments.tokens))

    await asyncio.gather(*(keep_asking(TOPICS[index % len(TOPICS)]) for index in range(arguments.streams)))
    await client.close()
    return sum(stream.tokens for stream in done) / (time.perf_counter() - began)


async def measure(url: str, peers: Sequence[Peer], arguments: argparse.Namespace) -> int:
    """Asks all prompts alone, then in concurrent streams; prints the results."""
    client = client_of(url)
    (model,) = [model.id async for model in client.models.list()]
    topics = [TOPICS[index % len(TOPICS)] + "!" * (index // len(TOPICS)) for index in range(arguments.streams)]
    alone = {topic: (await ask(client, model, topic, arguments.tokens)).text for topic in topics}
    print(f"{arguments.streams} streams for {arguments.seconds:.0f} s, weights {arguments.weights} ...", flush=True)
    done: list[Stream] = []
    began = time.perf_counter()
    end = began + arguments.seconds

    async def keep_asking(topic: str) -> None:
        while time.perf_counter() < end:
            done.append(await ask(client, model, topic, arguments.tokens))

    async def kill_one() -> float:
        await asyncio.sleep(arguments.seconds / 2)
        victim = max(peers[1:3], key=lambda one: one.metric("splitnet_peer_sessions"))
        print(f"killing a peer with {victim.metric('splitnet_peer_sessions'):.0f} sessions ...", flush=True)
        victim.process.send_signal(signal.SIGKILL)
        return time.perf_counter()

    killing = asyncio.create_task(kill_one())
    await asyncio.gather(*(keep_asking(topic) for topic in topics))
    killed_at = await killing
    elapsed = time.perf_counter() - began
    left = await sessions_left([one for one in peers if one.process.poll() is None])
    wrong = [stream for stream in done if stream.text != alone[stream.topic]]
    print_table(done, killed_at, elapsed)
    print(f"\n{len(done)} answers, {len(wrong)} of them other than alone; {left:.0f} sessions left on the peers.")
    for stream in wrong[:3]:
        print(f"\n{stream.topic}: {stream.text!r}\nalone: {alone[stream.topic]!r}")
    return int(bool(wrong) or left > 0)


def client_of(url: str) -> AsyncOpenAI:
    base = url if url.rstrip("/").endswith("/v1") else f"{url.rstrip('/')}/v1"
    return AsyncOpenAI(base_url=base, api_key="none", max_retries=0)


async def ask(client: AsyncOpenAI, model: str, topic: str, tokens: int) -> Stream:
    """One streamed chat; an error ends the benchmark."""
    stream = Stream(topic, time.perf_counter())
    question = f"Tell me about {topic}, please."
    events = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for event in events:
        if event.usage is not None:
            stream.tokens = event.usage.completion_tokens
        content = event.choices[0].delta.content if event.choices else None
        if content:
            stream.came_at.append(time.perf_counter())
            stream.text += content
    return stream


async def sessions_left(peers: Sequence[Peer]) -> float:
    """The number of sessions left on peers, after they have had some time to end."""
    deadline = time.monotonic() + FREED_S
    while True:
        left = sum(one.metric("splitnet_peer_sessions") for one in peers)
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.2)


def print_table(done: Sequence[Stream], killed_at: float, elapsed: float) -> None:
    """Prints latencies of all answers, and of the answers that were running when the peer was killed."""
    hit = [stream for stream in done if stream.asked_at < killed_at < stream.came_at[-1]]
    others = [stream for stream in done if stream not in hit]
    events = sum(len(stream.came_at) for stream in done)
    print(f"\n{events / elapsed:.1f} tokens/s (events that have text) in {elapsed:.1f} s\n")
    print("| answers | number | first token ms, median | 95 % | ms per token, median | 95 % | longest gap ms |")
    print("|---|---|---|---|---|---|---|")
    for name, streams in (("undisturbed", others), ("running when a peer was killed", hit)):
        if not streams:
            continue
        first = [(stream.came_at[0] - stream.asked_at) * 1000 for stream in streams]
        gaps = [
            (late - early) * 1000
            for stream in streams
            for early, late in zip(stream.came_at, stream.came_at[1:], strict=False)
        ]
        figures = (statistics.median(first), at(95, first), statistics.median(gaps), at(95, gaps), max(gaps))
        print(f"| {name} | {len(streams)} | " + " | ".join(f"{figure:.0f}" for figure in figures) + " |")


def at(percent: int, values: Sequence[float]) -> float:
    """A percentile of the values, by the nearest rank."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


if __name__ == "__main__":
    sys.exit(main())
