"""Agents that repeatedly send the same long prefixes, with and without the prefix store; prints Markdown.

    python -m benchmarks.prefixes CHECKPOINT [--requests 200] [--tool-tokens 7000] [--in-flight 3] [--weights float32]

Runs three daemons of one thread, with a third of the blocks each, and `splitnet serve`, which keeps no sessions. Each
of `--agents` agents sends one of `--tool-sets` texts as its system prompt, and a history that grows by the agent's
questions, the tools' answers, and the model's answers; after `--turns` turns the history begins anew. Half-way all
daemons end (SIGTERM) and start again on the same ports. Then daemons with `--prefix-store off` answer the same requests
(all, or every `--off-every`th), and the greedy texts must be equal. Links have no codec. Last, the benchmark times
questions after a known prefix and questions alone, in turns and one at a time.

    python -m benchmarks.prefixes CHECKPOINT --kill 1000 8000 [--rounds 3] [--standby 16MiB]

With --kill, the benchmark instead kills (kill -9) the middle hop of three, which has a replica, after prompts of these
lengths, and measures how long the text pauses: if the replica holds the keys and values of the prompt (warm), if it
holds none (cold), and, with `--standby SIZE`, if it copies them all the time. Another text is generated meanwhile. The
tokens must equal those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from openai import AsyncOpenAI

from benchmarks.long_prefill import with_room
from benchmarks.netlab.generation import generate
from benchmarks.netlab.peers import GuidedSwarm, even_spans
from benchmarks.serve_load import START_S, Peer, Stream, at, client_of, gateway, peer
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.hf.causal_lm import attach
from splitnet.quant.native import processor
from splitnet.security.identity import Identity
from splitnet.swarm.plan import PlannedHop
from splitnet.swarm.swarm import ModelFacts
from splitnet.tools.bench.backends import Clock, gaps_s

VERBS = ("read", "list", "find", "move", "copy", "open", "close", "send", "count", "merge", "check", "print")
NOUNS = ("file", "table", "invoice", "letter", "ticket", "order", "branch", "photo", "sensor", "route", "account")
KINDS = ("string", "number", "boolean", "array")
AFTER = 120  # tokens before a hop is killed, while the replica copies keys and values
MORE = 16  # tokens after the hop is killed
Messages = list[Any]


@dataclass
class Request:
    """A request of an agent, and its result."""

    messages: Messages
    stream: Stream
    prompt: int = 0
    cached: int = 0

    @property
    def ttft_ms(self) -> float:
        return (self.stream.came_at[0] - self.stream.asked_at) * 1000


@dataclass
class Agent:
    """A simulated agent: sends a text with tools and a history, which restarts after some turns."""

    system: str
    turns: int
    draw: random.Random
    history: Messages = field(default_factory=list[Any])

    def ask(self) -> Messages:
        if len(self.history) >= 2 * self.turns:
            self.history = []
        verb, noun, number = self.draw.choice(VERBS), self.draw.choice(NOUNS), self.draw.randrange(10_000)
        told = f"Result of the last call: {number} entries, the first of {noun} {self.draw.randrange(100)}. "
        self.history.append({"role": "user", "content": f"{told if self.history else ''}Now {verb} {noun} {number}."})
        return [{"role": "system", "content": self.system}, *self.history]


def main() -> int:
    """Runs the benchmark; returns 1 if an answer differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--agents", type=int, default=10)
    parser.add_argument("--tool-sets", type=int, default=3)
    parser.add_argument("--tool-tokens", type=int, default=7000, help="of each tool set; histories need more")
    parser.add_argument("--turns", type=int, default=8, help="of a history")
    parser.add_argument("--tokens", type=int, default=16, help="maximum tokens of an answer")
    parser.add_argument("--in-flight", type=int, default=3)
    parser.add_argument("--off-every", type=int, default=1)
    parser.add_argument("--questions", type=int, default=5, help="number of questions of each kind, one at a time")
    parser.add_argument("--weights", default="float32", help="weight format of the peers and of the head")
    parser.add_argument("--kv-memory", default="1GiB", help="of each peer")
    parser.add_argument("--question-words", type=int, nargs="+", default=[10, 200])
    parser.add_argument("--disk", default="2GiB", help="of each peer's store, see `splitnet peer --prefix-store`")
    parser.add_argument("--kill", type=int, nargs="+", help="lengths of the prompts after which a hop is killed")
    parser.add_argument("--rounds", type=int, default=3, help="with --kill")
    parser.add_argument("--kinds", nargs="*", default=["cold", "warm"], help="with --kill")
    parser.add_argument("--standby", help="with --kill: bytes per second that the second peer copies")
    arguments = parser.parse_args()
    arguments.streams = arguments.in_flight
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the daemons end with this process
    torch.set_num_threads(1)
    print(f"{processor()}, weights {arguments.weights}, codec none\n")
    with tempfile.TemporaryDirectory(prefix="splitnet-prefixes-") as folder:
        os.environ |= {"SPLITNET_CACHE": f"{folder}/cache", "SPLITNET_KEY_FILE": f"{folder}/key"}
        if arguments.kill:
            return kill(Path(folder), arguments)
        return trace(Path(folder), arguments)


@contextmanager
def daemons(
    folder: Path, arguments: argparse.Namespace, names: Sequence[str], options: Sequence[str] = ()
) -> Iterator[dict[str, Peer]]:
    """Daemons by name, such as `0` and `1b`, each with a third of the blocks and a separate folder for its key, its
    cache and its last port.
    """
    spans = list(even_spans(Checkpoint.open(arguments.checkpoint).num_blocks, ("0", "1", "2")).values())
    folders: dict[str, Path] = {}
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        folders[name] = Path(tempfile.mkdtemp(dir=folder / name))
    first = folders[names[0]] / "address0"
    with ExitStack() as stack, ThreadPoolExecutor() as pool:  # all daemons start at the same time

        def start(name: str) -> Peer:
            own = options if name == names[0] else (*options, "--join-file", str(first))
            return stack.enter_context(daemon(folders[name], arguments, spans[int(name[0])], own))

        yield dict(zip(names, pool.map(start, names), strict=True))


@contextmanager
def daemon(own: Path, arguments: argparse.Namespace, span: tuple[int, int], options: Sequence[str]) -> Iterator[Peer]:
    """A daemon, with a folder for this run inside the folder of all its runs."""
    home = own.parent
    port = home / "port"
    more = ["--key-file", str(home / "key"), "--kv-memory", arguments.kv_memory, *options]
    more += ["--listen", f"tcp://127.0.0.1:{port.read_text() if port.exists() else 0}"]
    with peer(own, arguments, span, [], more, home / "cache") as started:
        port.write_text(started.port)
        yield started


def trace(folder: Path, arguments: argparse.Namespace) -> int:
    """Runs all variants, and prints the results."""
    tokenizer = Checkpoint.open(arguments.checkpoint).tokenizer()
    tools = [tool_set(number, arguments.tool_tokens, tokenizer) for number in range(arguments.tool_sets)]
    agents = [
        Agent(tools[number % len(tools)], arguments.turns, random.Random(number)) for number in range(arguments.agents)
    ]
    each = max(1, arguments.requests // len(agents) // 2)
    columns = ["daemons", "requests", "ms to the first token, p50", "p95", "positions computed by each", "cached"]
    columns += ["MiB of the stores", "of the daemons", "on disk"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    seen: list[Request] = []
    for name in ("with the store", "the same, started again"):
        with running(folder, arguments, "on") as (peers, url):
            began = work_of(peers)
            came = asyncio.run(play(url, agents, each, arguments))
            show(name, came, peers, began)
            seen += came
            if name != "with the store":
                asyncio.run(compare(url, tools[0], arguments))
    with running(folder, arguments, "off") as (peers, url):
        began = work_of(peers)
        again = asyncio.run(repeat(url, seen[:: arguments.off_every], arguments))
        show("without the store", again, peers, began)
    wrong = [
        (one.stream.text, other.stream.text)
        for one, other in zip(seen[:: arguments.off_every], again, strict=True)
        if one.stream.text != other.stream.text
    ]
    print(f"\n{len(wrong)} of {len(again)} answers differed without the store. {wrong[:3] or ''}")
    return int(bool(wrong))


@contextmanager
def running(folder: Path, arguments: argparse.Namespace, store: str) -> Iterator[tuple[list[Peer], str]]:
    """Three daemons and a gateway, with the prefix store or without."""
    options = ("--prefix-store", "off") if store == "off" else ("--prefix-store", arguments.disk)
    with daemons(folder / store, arguments, ("0", "1", "2"), options) as peers:
        address = peers["0"].address_file.read_text().strip()
        with gateway(folder, arguments, address, "off") as url:
            yield list(peers.values()), url


def tool_set(number: int | str, tokens: int, tokenizer: Any) -> str:
    """Descriptions of tools, of about this many tokens."""
    draw, text = random.Random(f"tools {number}"), f"You are assistant {number}. You may call these tools:\n"
    while len(tokenizer(text).input_ids) < tokens:
        for _ in range(5):
            parameters = ", ".join(
                f'"{draw.choice(NOUNS)}_{draw.randrange(100)}": {{"type": "{draw.choice(KINDS)}"}}' for _ in range(4)
            )
            name = f"{draw.choice(VERBS)}_{draw.choice(NOUNS)}_{draw.randrange(1000)}"
            text += f'{{"name": "{name}", "description": "{draw.choice(VERBS)}s a {draw.choice(NOUNS)} and '
            text += f'{draw.choice(VERBS)}s the {draw.choice(NOUNS)}.", "parameters": {{{parameters}}}}}\n'
    return tokenizer.decode(tokenizer(text).input_ids[:tokens])


async def play(url: str, agents: Sequence[Agent], each: int, arguments: argparse.Namespace) -> list[Request]:
    """`each` requests of each agent, one after the other; some agents at the same time."""
    places, came = asyncio.Semaphore(arguments.in_flight), list[Request]()

    async def go_on(client: AsyncOpenAI, model: str, agent: Agent) -> None:
        for _ in range(each):
            async with places:
                request = await ask(client, model, agent.ask(), arguments.tokens)
            agent.history.append({"role": "assistant", "content": request.stream.text})
            came.append(request)

    async with client_of(url) as client:
        (model,) = [model.id async for model in client.models.list()]
        await asyncio.gather(*(go_on(client, model, agent) for agent in agents))
    return came


async def repeat(url: str, requests: Sequence[Request], arguments: argparse.Namespace) -> list[Request]:
    """Sends the same requests again, some at the same time."""
    places = asyncio.Semaphore(arguments.in_flight)

    async def once_more(client: AsyncOpenAI, model: str, request: Request) -> Request:
        async with places:
            return await ask(client, model, request.messages, arguments.tokens)

    async with client_of(url) as client:
        (model,) = [model.id async for model in client.models.list()]
        return await asyncio.gather(*(once_more(client, model, request) for request in requests))


async def compare(url: str, tools: str, arguments: argparse.Namespace) -> None:
    """Prints the time to the first token of questions after a known prefix and of questions alone."""
    for length in arguments.question_words:
        times: dict[str, list[float]] = {tools: [], "You are kind.": []}
        async with client_of(url) as client:
            (model,) = [model.id async for model in client.models.list()]
            for number in range(arguments.questions + 1):
                for system, took in times.items():
                    draw = random.Random(f"{number} {length}")
                    words = " ".join(draw.choice((*VERBS, *NOUNS)) for _ in range(length))
                    chat = [{"role": "system", "content": system}, {"role": "user", "content": f"{number} {words}"}]
                    request = await ask(client, model, chat, 2)
                    took += [request.ttft_ms] if number else []  # the first request warms up
        known, alone = (statistics.median(took) for took in times.values())
        print(
            f"\nA question of {length} words, first token, median of {arguments.questions}: {known:.0f} ms after the "
            f"tools, {alone:.0f} ms without: {known / alone:.2f} times.",
            flush=True,
        )


async def ask(client: AsyncOpenAI, model: str, messages: Messages, tokens: int) -> Request:
    """One streamed chat; an error ends the benchmark."""
    request = Request(messages, Stream("", time.perf_counter()))
    events = await client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for event in events:
        if event.usage is not None and event.usage.prompt_tokens_details is not None:
            request.prompt, request.cached = (
                event.usage.prompt_tokens,
                event.usage.prompt_tokens_details.cached_tokens or 0,
            )
        if event.choices and event.choices[0].delta.content:
            request.stream.came_at.append(time.perf_counter())
            request.stream.text += event.choices[0].delta.content
    return request


def work_of(peers: Sequence[Peer]) -> float:
    """Mean number of positions that the peers have computed."""
    kinds = ("decode", "prefill", "replay")
    return statistics.fmean(
        sum(one.metric(f'splitnet_peer_tokens_total{{kind="{kind}"}}') for kind in kinds) for one in peers
    )


def show(name: str, requests: Sequence[Request], peers: Sequence[Peer], began: float) -> None:
    """Prints a row of the table; memory and disk are totals of all daemons."""
    times = [request.ttft_ms for request in requests]
    prompts, cached = (sum(getattr(each, name) for each in requests) for name in ("prompt", "cached"))
    resident = sum(psutil.Process(one.process.pid).memory_info().rss for one in peers)
    stores, disk = (
        sum(one.metric(f'splitnet_peer_prefix_bytes{{where="{where}"}}') for one in peers)
        for where in ("memory", "disk")
    )
    sizes = " | ".join(f"{size / 2**20:,.0f}" for size in (stores, resident, disk))
    figures = " | ".join(
        f"{figure:,.0f}" for figure in (statistics.median(times), at(95, times), work_of(peers) - began)
    )
    print(f"| {name} | {len(times)} | {figures} | {100 * cached / prompts:.1f} % | {sizes} |", flush=True)


@dataclass(frozen=True)
class Death:
    """The loss of a hop in an answer. Times are in ms; usual: the time per token before the loss."""

    pause: float
    usual: float
    other: float
    opened: float
    filled: float
    copied: int
    same: bool


def kill(folder: Path, arguments: argparse.Namespace) -> int:
    """Kills the middle hop in answers after prompts of given lengths, and prints the cost."""
    arguments.checkpoint = with_room(arguments.checkpoint, max(arguments.kill) + AFTER + MORE, folder)
    tokenizer, wrong = Checkpoint.open(arguments.checkpoint).tokenizer(), 0
    columns = ["positions", "the other peer is", "ms to the next token, median (range)", "planned, opened", "filled"]
    columns += ["ms per token before", "of the other text", "copied, MiB", "same tokens"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    with daemons(folder, arguments, ("0", "1", "1b", "2"), ("--prefix-store", "memory")) as peers, ExitStack() as again:
        client, span = Identity.generate(), even_spans(Checkpoint.open(arguments.checkpoint).num_blocks, "012")["1"]
        for positions in arguments.kill:
            deaths = {kind: list[Death]() for kind in (*arguments.kinds, *(["standby"] if arguments.standby else []))}
            for number in range(arguments.rounds):
                for kind, own_deaths in deaths.items():
                    text = tool_set(f"{number} {positions} {kind}", positions, tokenizer)
                    ids = torch.tensor([tokenizer(text).input_ids[: positions - AFTER]])
                    own_deaths.append(death(peers, arguments, client, ids, kind))
                    own = Path(tempfile.mkdtemp(dir=folder / "1"))
                    options = ("--prefix-store", "memory", "--join-file", str(peers["0"].address_file))
                    peers["1"] = again.enter_context(daemon(own, arguments, span, options))
            for kind, own_deaths in deaths.items():
                wrong += sum(not each.same for each in own_deaths)
                report(positions, kind, own_deaths)
    return int(bool(wrong))


def report(positions: int, kind: str, deaths: Sequence[Death]) -> None:
    pauses = [each.pause for each in deaths]
    opened, filled, usual, other = (
        statistics.median(getattr(each, name) for each in deaths) for name in ("opened", "filled", "usual", "other")
    )
    print(
        f"| {positions} | {kind} | {statistics.median(pauses):,.0f} ({min(pauses):,.0f}-{max(pauses):,.0f}) "
        f"| {opened:,.0f} | {filled:,.0f} | {usual:.1f} | {other:.1f} "
        f"| {statistics.median(each.copied for each in deaths) / 2**20:,.0f} "
        f"| {sum(each.same for each in deaths)} of {len(deaths)} |",
        flush=True,
    )


def death(
    peers: dict[str, Peer], arguments: argparse.Namespace, client: Identity, prompt: torch.Tensor, kind: str
) -> Death:
    """Generates a text undisturbed (for a warm start through the replica), and again while the hop is killed."""
    checkpoint = Checkpoint.open(arguments.checkpoint)
    facts, join = ModelFacts.of(checkpoint), [peers["0"].address_file.read_text().strip()]
    with GuidedSwarm(facts, join, identity=client) as swarm, GuidedSwarm(facts, join) as others:
        until = time.monotonic() + START_S
        while len(records := {record.address.rsplit(":")[-1]: record for record in swarm.peers(fresh=True)}) < 4:
            assert time.monotonic() < until, f"only {len(records)} peers are known"
            time.sleep(0.1)

        def route(middle: str) -> list[PlannedHop]:
            hops = [records[peers[name].port] for name in ("0", middle, "2")]
            return [PlannedHop(record, record.start, record.end) for record in hops]

        how: dict[str, Any] = {"codec": "none", "local_weights": arguments.weights}
        model, other = attach(checkpoint, swarm, **how), attach(checkpoint, others, **how)
        swarm.route, others.route = route("1b" if kind == "warm" else "1"), route("1b")
        expected = generate(model, prompt, AFTER + MORE, Clock())
        swarm.route = route("1")
        if kind == "standby":
            model = attach(checkpoint, swarm, **how, standby=arguments.standby)
        began: list[float] = []
        beside, ended = Clock(), threading.Event()
        text = threading.Thread(target=generate, args=(other, prompt[:, :32], 4000, beside, ended.is_set))
        with model.session() as cache:

            def happen(tokens: int) -> None:
                if tokens == 1:
                    text.start()
                    swarm.route = None
                if tokens == AFTER:
                    began.append(time.perf_counter())
                    peers["1"].process.kill()

            clock = Clock(happen)
            got = generate(model, prompt, AFTER + MORE, clock)
            session: Any = cache.session
            repairs, copies = list(session.recoveries), session.standby
        ended.set()
        text.join()
    assert repairs, "no hop was replaced"
    return Death(
        pause=1000 * (next(late for late in clock.times if late > began[0]) - began[0]),
        usual=1000 * statistics.median(gaps_s([each for each in clock.times if each < began[0]])),
        other=1000 * statistics.median(gaps_s([each for each in beside.times if each < began[0]])),
        opened=sum(each.opened_ms for each in repairs),
        filled=sum(each.total_ms - each.opened_ms for each in repairs),
        copied=copies.copied_bytes if copies is not None else 0,
        same=torch.equal(got, expected),
    )


if __name__ == "__main__":
    sys.exit(main())
