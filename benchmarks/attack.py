"""Runs every known attack against a swarm and a gateway of real daemons on this machine, while honest clients use them.

Two daemons serve each half of the model, and a gateway serves the model over HTTP. Honest clients compare every answer
with the answer of plain transformers: first without an attack, then during one attack after another, then again without
an attack. Each attack of tests/attacks has one key and runs in a separate process of low priority. For each attack, the
benchmark prints the 95th percentile of the honest clients' time per token, as a multiple of the undisturbed one, and
the largest memory of a process of the swarm.

    make attack [MINUTES=10] [MODEL=...]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.soak import Question, ask_locally
from splitnet.blocks.attention import SCORE_BYTES
from splitnet.blocks.passes import GRAPH_BYTES, SpanPasses
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.demo import demo_checkpoint
from splitnet.cli.demo import EXACT, LocalSwarm
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import SplitnetError
from splitnet.hf.causal_lm import attach
from splitnet.security.identity import PublicKey
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.wire.endpoints import Endpoint
from tests.attacks import directory, fairness, frames, gateway, memory, relay, transport, weights
from tests.image_models import IMAGE_MODELS
from tests.swarm.test_serve_images import write_processor

CLIENTS = 1
"""Honest clients besides the client of the gateway: together with the attacker they keep two cores busy."""
HALVES = 2
REPLICAS = 2
KV_MEMORY = "128MiB"
TRAINING_MEMORY = "256MiB"
API_KEYS = ("key-of-an-honest-client", "key-of-an-attacker")
LOOK_S = 0.2
CALM_S = 45.0
START_TIMEOUT_S = 120.0
MOST_SLOWER = 1.5
"""Limit of the 95th percentile of honest clients' time per token, as a multiple of the undisturbed one."""
MOST_GROWTH_MIB = 512
"""Limit of the additional memory of a process. A daemon needs it for KV and training memory, and 128 MiB of waiting
steps."""
LONG_PASSES = "passes as long as the context"
LONG_PASS = 2048
"""Positions of a long pass. No memory account includes the memory of its backward pass, see `pass_mib`."""
REQUESTS = 16
"""Concurrent requests to the gateway, which keeps a thread for each."""
MOST_DESCRIPTORS, MOST_THREADS = 16, 4
"""Limits of additional descriptors and threads at the end, on top of `REQUESTS`."""


@dataclass
class Phase:
    """Observations during a phase."""

    name: str
    answers: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    token_ms: list[float] = field(default_factory=list)
    gateway_s: list[float] = field(default_factory=list)
    most_mib: dict[str, float] = field(default_factory=dict)
    least: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The fewest descriptors and threads of each process in the phase; the number varies, as links are opened for
    measurements and closed."""
    attacker_cores: float = 0.0
    """Processor seconds of the attacker per second."""

    @property
    def slow_ms(self) -> float:
        """The 95th percentile of token times."""
        return statistics.quantiles(self.token_ms, n=20)[-1] if len(self.token_ms) > 20 else float("nan")


class TokenTimes:
    """A streamer of `generate()` that records the time of each token after the first in the present phase."""

    def __init__(self, phase: Callable[[], Phase]) -> None:
        self._phase = phase
        self._last: float | None = None
        self._is_prompt = True

    def put(self, value: Any) -> None:
        now = time.perf_counter()
        if self._is_prompt:
            self._is_prompt = False
            return
        if self._last is not None:
            self._phase().token_ms.append((now - self._last) * 1000)
        self._last = now

    def end(self) -> None:
        pass


class Honest:
    """Honest clients in threads, each with its own key, that request and compare answers until they are stopped."""

    def __init__(self, checkpoint: Checkpoint, addresses: Sequence[str], questions: Sequence[Question]) -> None:
        self.phase = Phase("none")
        self._questions = questions
        self._stop = threading.Event()
        self._models = [
            attach(checkpoint, Swarm(ModelFacts.of(checkpoint), addresses), codec="none", local_weights="float32")
            for _ in range(CLIENTS)
        ]
        self._threads = [threading.Thread(target=self._ask, args=(model,)) for model in self._models]

    def __enter__(self) -> Honest:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for model in self._models:
            model.close()

    def _ask(self, model: Any) -> None:
        choices = random.Random(id(model))
        while not self._stop.is_set():
            question, phase = choices.choice(self._questions), self.phase
            try:
                got = model.generate(
                    question.prompt,
                    attention_mask=torch.ones_like(question.prompt),
                    max_new_tokens=question.answer.shape[1] - question.prompt.shape[1],
                    do_sample=False,
                    speculate=None,
                    streamer=TokenTimes(lambda: self.phase),  # an answer may begin in one phase and end in the next one
                )
            except SplitnetError as error:
                phase.errors.append(str(error))
                continue
            phase.answers += 1
            phase.wrong += not torch.equal(got, question.answer)


class Reader:
    """Repeatedly asks the gateway for a few tokens, with a separate API key."""

    def __init__(self, url: str, key: str) -> None:
        self.phase = Phase("none")
        self._url, self._key = url, key
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._expected: str | None = None

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        body = json.dumps(
            {
                "model": gateway.model_of(self._url, self._key),
                "prompt": "The capital of France is",
                "max_tokens": 8,
                "temperature": 0,
            }
        )
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        while not self._stop.wait(0.5):
            phase, began = self.phase, time.perf_counter()
            try:
                request = urllib.request.Request(f"{self._url}/v1/completions", body.encode(), headers)
                with urllib.request.urlopen(request, timeout=60) as answer:
                    text = json.load(answer)["choices"][0]["text"]
            except (OSError, ValueError) as error:
                phase.errors.append(f"gateway: {error}")
                continue
            phase.gateway_s.append(time.perf_counter() - began)
            self._expected = self._expected or text
            phase.wrong += text != self._expected


class Watcher:
    """Repeatedly measures the memory, descriptors and threads of each process of the swarm."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self.phase = Phase("none")
        self.processes = processes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_S):
            most, least = self.phase.most_mib, self.phase.least
            for name, process in self.processes.items():
                most[name] = max(most.get(name, 0.0), process.memory_info().rss / 2**20)
                descriptors, threads = process.num_fds(), process.num_threads()
                fewest = least.get(name, (descriptors, threads))
                least[name] = min(descriptors, fewest[0]), min(threads, fewest[1])


@dataclass(frozen=True)
class Target:
    """The knowledge of an attacker.

    Attributes:
        addresses: addresses of DHT nodes.
        peer: the endpoint of a daemon that serves `blocks` and has memory for `free_positions`.
        facts: the facts of the model.
        url: the URL of the gateway.
        key: the attacker's own API key.
    """

    addresses: list[str]
    peer: Endpoint
    blocks: tuple[int, int]
    free_positions: int
    facts: ModelFacts
    url: str
    key: str


def compute(seconds: float) -> int:
    """A baseline: keeps one core busy without connections, which shows the slowdown by sharing the machine alone."""
    until, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        rounds += sum(range(10_000)) > 0
    return rounds


ATTACKS: dict[str, Callable[[Target, float], object]] = {
    "nothing but computing": lambda at, seconds: compute(seconds),
    "frames with bytes changed": lambda at, seconds: frames.flood(at.peer, at.facts, seconds=seconds, blocks=at.blocks),
    "messages of many frames": lambda at, seconds: transport.endless_message(at.peer, seconds=seconds),
    "silent connections": lambda at, seconds: transport.silent_connections(at.peer, seconds=seconds),
    "connections of one key": lambda at, seconds: transport.connections_of_one_key(at.peer, seconds=seconds),
    "answers that are not read": lambda at, seconds: transport.unread_answers(
        at.peer, seconds=seconds, model=at.facts.fingerprint, blocks=at.blocks[1], hidden=at.facts.hidden_size
    ),
    "names for addresses": lambda at, seconds: transport.hosts_by_name(
        at.peer, seconds=seconds, model=at.facts.fingerprint, blocks=at.blocks[1]
    ),
    "64 sessions that decode": lambda at, seconds: fairness.decodes(
        at.peer, at.facts, seconds=seconds, blocks=at.blocks
    ),
    "8 prefills": lambda at, seconds: fairness.prefills(at.peer, at.facts, seconds=seconds, blocks=at.blocks),
    "training": lambda at, seconds: fairness.trains(at.peer, at.facts, seconds=seconds, blocks=at.blocks),
    "look-ups without end": lambda at, seconds: fairness.recalls(at.peer, at.facts, seconds=seconds, blocks=at.blocks),
    "a session with all KV memory": lambda at, seconds: fairness.squats(
        at.peer, at.facts, seconds=seconds, reservation=at.free_positions, blocks=at.blocks
    ),
    "1,024 sessions": lambda at, seconds: fairness.crowds(at.peer, at.facts, seconds=seconds, blocks=at.blocks),
    "rows of one position": lambda at, seconds: memory.tiny_rows(
        at.peer, at.facts, seconds=seconds, reservation=4096, blocks=at.blocks
    ),
    "steps faster than the device": lambda at, seconds: memory.waiting_steps(
        at.peer, at.facts, seconds=seconds, reservation=4096, blocks=at.blocks
    ),
    LONG_PASSES: lambda at, seconds: memory.long_passes(
        at.peer, at.facts, seconds=seconds, length=LONG_PASS, blocks=at.blocks
    ),
    "passes that are kept": lambda at, seconds: memory.tiny_passes(
        at.peer, at.facts, seconds=seconds, blocks=at.blocks
    ),
    "replays without end": lambda at, seconds: memory.replays(
        at.peer, at.facts, seconds=seconds, reservation=4096, blocks=at.blocks
    ),
    "values that are all wrong": lambda at, seconds: gateway.wrong_values(at.url, seconds=seconds, key=at.key),
    "texts of megabytes": lambda at, seconds: gateway.long_texts(at.url, seconds=seconds, key=at.key),
    "schemas nested deep": lambda at, seconds: gateway.deep_schemas(at.url, seconds=seconds, key=at.key),
    "requests that unfold": lambda at, seconds: gateway.bombs(at.url, seconds=seconds, key=at.key),
    "images that unfold": lambda at, seconds: gateway.hostile_images(at.url, seconds=seconds, key=at.key),
    "bodies without an end": lambda at, seconds: gateway.unfinished_bodies(at.url, seconds=seconds, key=at.key),
    "bodies that trickle": lambda at, seconds: gateway.trickled_bodies(at.url, seconds=seconds, key=at.key),
    "half requests": lambda at, seconds: gateway.half_requests(at.url, seconds=seconds, key=at.key),
    "streams that are not read": lambda at, seconds: gateway.stalled_readers(at.url, seconds=seconds, key=at.key),
    "200 dashboards": lambda at, seconds: gateway.many_dashboards(at.url, seconds=seconds, key=at.key),
    "64 requests at a time": lambda at, seconds: gateway.crowd(at.url, seconds=seconds, key=at.key),
    "answers that nobody asked for": lambda at, seconds: weights.unasked_answers(seconds=seconds),
    "one piece in many places": lambda at, seconds: weights.pieces_everywhere(seconds=seconds),
    "helpers that flood": lambda at, seconds: relay.hostile_helpers("Floods", seconds),
    "helpers that take no calls": lambda at, seconds: relay.hostile_helpers("TakesNoCalls", seconds),
    "helpers that let nobody stay": lambda at, seconds: relay.hostile_helpers("Drops", seconds),
    "questions about nothing": lambda at, seconds: directory.ask_of_nothing(at.peer, seconds=seconds),
    # Last, because the announced records outlast the attack.
    "records without end": lambda at, seconds: directory.flood_records(
        at.addresses, at.facts.fingerprint, seconds=seconds
    ),
    "models without end": lambda at, seconds: directory.list_models(
        at.addresses, at.facts.fingerprint, seconds=seconds
    ),
    "nodes that withhold records": lambda at, seconds: directory.withhold(
        at.addresses, at.facts.fingerprint, seconds=seconds
    ),
    "peers that do not exist": lambda at, seconds: directory.announce_fakes(
        at.addresses, at.facts.fingerprint, seconds=seconds, end=at.facts.num_blocks, num_blocks=at.facts.num_blocks
    ),
}


@contextmanager
def serving(models: Sequence[str], address: str, keys: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A running gateway, and its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "splitnet", "serve", *models, "--join", address, "--port", str(port)]
    command += ["--api-key-file", str(keys), "--codec", "none", "--max-requests", str(REQUESTS)]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not is_up(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SplitnetError("the gateway did not start: run `splitnet serve` to see why")
                time.sleep(0.2)
            yield process, url
        finally:
            process.terminate()


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def pass_phase(phase: Phase, seen: Sequence[Any], seconds: float) -> Phase:
    """Records observations in `phase` for some seconds."""
    for one in seen:
        one.phase = phase
    time.sleep(seconds)
    return phase


def print_header() -> None:
    columns = [
        "attack",
        "answers",
        "wrong",
        "lost",
        "ms per token, 95 %",
        "of undisturbed",
        "attacker, cores",
        "gateway, s, median (most)",
    ]
    columns += ["gateway, MiB", "largest daemon, MiB"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|", flush=True)


def report(phase: Phase, calm: Phase) -> None:
    gateway = f"{statistics.median(phase.gateway_s):.1f} ({max(phase.gateway_s):.1f})" if phase.gateway_s else "-"
    most = max((mib for name, mib in phase.most_mib.items() if name != "gateway"), default=0.0)
    print(
        f"| {phase.name} | {phase.answers + len(phase.gateway_s)} | {phase.wrong} | {len(phase.errors)} "
        f"| {phase.slow_ms:.0f} | {phase.slow_ms / calm.slow_ms:.2f} | {phase.attacker_cores:.1f} | {gateway} "
        f"| {phase.most_mib.get('gateway', 0.0):.0f} | {most:.0f} |",
        flush=True,
    )
    for error in dict.fromkeys(phase.errors):
        print(f"  {error}", file=sys.stderr)


def children_cpu_s() -> float:
    """Processor time of ended child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report_left(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> None:
    print("\n| process | descriptors before | after | threads before | after |\n|---|---|---|---|---|")
    for name, (descriptors, threads) in after.items():
        print(f"| {name} | {before[name][0]} | {descriptors} | {before[name][1]} | {threads} |", flush=True)


def pass_mib(checkpoint: Checkpoint, blocks: int) -> float:
    """The memory, in MiB, that the backward pass of one long sequence takes in a daemon outside its memory accounts. A
    daemon computes one pass at a time.

    The pass needs the kept tensors of all blocks within the limit, the saved tensors of one more block, and the
    attention scores.
    """
    passes = SpanPasses(Span.load(checkpoint, 0, 1, weights="float32"))
    hidden = torch.zeros(LONG_PASS, checkpoint.hidden_size)
    passes.backward(hidden, (LONG_PASS,), hidden, None, 0, 1)
    block = passes.bytes_to_keep((LONG_PASS,), None, 1) or 0
    return (min(GRAPH_BYTES, block * blocks) + block + SCORE_BYTES) / 2**20


def failures_of(phases: Sequence[Phase], calm: Phase, pass_mib: float) -> list[str]:
    """The failed checks. pass_mib: memory that long passes may take in a daemon, which keeps the memory for a while."""
    failures: list[str] = []
    most_growth = dict.fromkeys(calm.most_mib, float(MOST_GROWTH_MIB))
    for phase in phases:
        if phase.name == LONG_PASSES:
            most_growth |= {name: MOST_GROWTH_MIB + pass_mib for name in most_growth if name != "gateway"}
        if phase.wrong:
            failures.append(f"{phase.name}: {phase.wrong} answers were wrong")
        if phase.errors:
            failures.append(f"{phase.name}: {len(phase.errors)} answers were lost, the first with: {phase.errors[0]}")
        if not phase.slow_ms <= MOST_SLOWER * calm.slow_ms:
            failures.append(f"{phase.name}: tokens took {phase.slow_ms / calm.slow_ms:.2f} x as long")
        for name, mib in phase.most_mib.items():
            if mib > calm.most_mib[name] + most_growth[name]:
                failures.append(f"{phase.name}: {name} grew by {mib - calm.most_mib[name]:.0f} MiB")
    for name, (descriptors, threads) in phases[-1].least.items():
        was = calm.least[name]
        most_threads = was[1] + MOST_THREADS + (REQUESTS if name == "gateway" else 0)
        if descriptors > was[0] + MOST_DESCRIPTORS or threads > most_threads:
            failures.append(f"{name} has {descriptors} descriptors and {threads} threads; it had {was[0]} and {was[1]}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="GGUF file, folder or hub id (default: the demo's model)")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", nargs="+", choices=ATTACKS, help="these attacks alone")
    parser.add_argument("--attack", choices=ATTACKS, help=argparse.SUPPRESS)  # in a separate process
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.checkpoint or str(demo_checkpoint())
    checkpoint = Checkpoint.open(folder)
    if arguments.attack:
        os.nice(10)  # the attacker's work should not slow the swarm, which in reality runs on other machines
        given = json.loads(arguments.target)
        peer = Endpoint(given["peer"], PublicKey.parse(given["peer_key"]))
        target = Target(
            given["addresses"],
            peer,
            tuple(given["blocks"]),
            given["free_positions"],
            ModelFacts.of(checkpoint),
            given["url"],
            given["key"],
        )
        print(ATTACKS[arguments.attack](target, arguments.seconds))
        return 0
    questions = ask_locally(checkpoint)
    names = arguments.only or list(ATTACKS)
    with ExitStack() as stack:
        options = (*EXACT, "--kv-memory", KV_MEMORY, "--training-memory", TRAINING_MEMORY)
        first = stack.enter_context(LocalSwarm(folder, HALVES, options))
        address = first.wait()
        second = stack.enter_context(LocalSwarm(folder, HALVES, options, address))
        second.wait()
        work = stack.enter_context(tempfile.TemporaryDirectory())
        keys = Path(work) / "api-keys"
        keys.write_text("".join(f"{key}\n" for key in API_KEYS))
        # A small model that reads images, so that hostile images reach the program that decodes them.
        seeing = Path(work) / "seeing"
        IMAGE_MODELS["llava"].write(seeing)
        write_processor(seeing)
        third = stack.enter_context(LocalSwarm(str(seeing), 1, options, address))
        third.wait()
        gateway, url = stack.enter_context(serving((folder, str(seeing)), address, keys))
        daemons = [*first.processes, *second.processes, *third.processes]
        processes = {f"daemon {index + 1}": psutil.Process(one.pid) for index, one in enumerate(daemons)}
        watcher = stack.enter_context(Watcher(processes | {"gateway": psutil.Process(gateway.pid)}))
        node = stack.enter_context(DhtDirectory.start(initial_peers=[address]))
        record = next(one for one in node.peers(checkpoint.fingerprint) if one.serves and not one.start)
        target = {
            "addresses": [address],
            "peer": record.address,
            "peer_key": record.key.text,
            "blocks": (record.start, record.end),
            "free_positions": record.kv_free_positions,
            "url": url,
        }
        honest = stack.enter_context(Honest(checkpoint, [address], questions))
        reader = stack.enter_context(Reader(url, API_KEYS[0]))
        seen = (honest, reader, watcher)
        pass_phase(Phase("warm-up"), seen, CALM_S / 2)
        calm = pass_phase(Phase("nobody"), seen, CALM_S)
        print_header()
        report(calm, calm)
        seconds = 60 * arguments.minutes / len(names)
        phases = [calm]
        for name in names:
            command = [sys.executable, "-m", "benchmarks.attack", folder, "--attack", name, "--seconds", str(seconds)]
            command += ["--target", json.dumps(target | {"key": API_KEYS[1]})]
            began, computed_s = time.monotonic(), children_cpu_s()
            with subprocess.Popen(
                command,
                cwd=Path(__file__).parents[1],
                env=os.environ | {"SPLITNET_CACHE": work},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as one:
                phases.append(pass_phase(Phase(name), seen, seconds))
                try:
                    said, _ = one.communicate(timeout=seconds + 60)
                except subprocess.TimeoutExpired:
                    one.kill()
                    said = "ended, as it did not end by itself"
            if one.returncode > 0:  # negative for a process that was ended here while it waited for its last answers
                phases[-1].errors.append(said.strip().splitlines()[-1][:200] if said.strip() else "it ended early")
            phases[-1].attacker_cores = (children_cpu_s() - computed_s) / (time.monotonic() - began)
            report(phases[-1], calm)
            print(f"  {said.strip().splitlines()[-1][:200] if said.strip() else ''}", file=sys.stderr)
        pass_phase(Phase("settling"), seen, CALM_S)
        phases.append(pass_phase(Phase("nobody any more"), seen, CALM_S))
        report(phases[-1], calm)
        report_left(calm.least, phases[-1].least)
        failures = failures_of(phases, calm, pass_mib(checkpoint, record.end - record.start))
        ended = [name for name, process in watcher.processes.items() if not process.is_running()]
        failures += [f"{name} has ended" for name in ended]
    for failure in failures:
        print(f"FAILED: {failure}")
    print("attack failed: see the lines above and docs/security.md" if failures else "attack passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
