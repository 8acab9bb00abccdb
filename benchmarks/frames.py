"""Sends mutated frames to a peer, a client and a node of the DHT: whether these survive, and how much memory they use.

Each target is a separate process on this machine, with a small random model. Frames are those of honest messages,
changed, cut, joined and sent again (`tests/attacks/frames.py`, `hop.py`, `requests.py`). The node's functions are also
called without a network, which is faster.

    python -m benchmarks.frames [--seconds 60] [--at peer client node functions port]
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.demo import EXACT, LocalSwarm
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.wire.endpoints import Endpoint
from tests.attacks import frames, requests
from tests.attacks.directory import fake_record
from tests.attacks.hop import HostileHop, use
from tests.unit.random_models import random_checkpoint

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
LOOK_S = 0.2
BEGINS_S = 5.0
"""Seconds after which the memory of a process counts as the baseline: by then, imports and first answers are done."""


class Watched:
    """A process and its children under attack: their largest memory, early and in total."""

    def __init__(self, pid: int) -> None:
        self.early_mib = self.most_mib = 0.0
        self._process = psutil.Process(pid)
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                all_of_it = (self._process, *self._process.children(recursive=True))
                held = sum(one.memory_info().rss for one in all_of_it) / 2**20
            except psutil.Error:
                return
            if time.monotonic() - self._began < BEGINS_S:
                self.early_mib = max(self.early_mib, held)
            self.most_mib = max(self.most_mib, held)


def report(at: str, sent: int, seconds: float, lives: bool, watched: Watched) -> None:
    memory = f"{watched.early_mib:.0f} | {watched.most_mib:.0f}"
    print(f"| {at} | {sent:,} | {seconds:.0f} | {0 if lives else 1} | {memory} |", flush=True)


def at_peer(folder: Path, seconds: float) -> None:
    facts = ModelFacts.of(Checkpoint.open(folder))
    with LocalSwarm(str(folder), 1, (*EXACT, "--kv-memory", "64MiB")) as peers:
        with Swarm(facts, [peers.wait()]) as swarm:
            [record] = swarm.peers(fresh=True)
        began = time.monotonic()
        with Watched(peers.processes[0].pid) as watched:
            endpoint, blocks = Endpoint(record.address, record.key), (record.start, record.end)
            sent = frames.flood(endpoint, facts, seconds=seconds, blocks=blocks)
        report("a peer", sent, time.monotonic() - began, peers.processes[0].poll() is None, watched)


def at_client(folder: Path, seconds: float) -> None:
    facts = ModelFacts.of(Checkpoint.open(folder))
    with DhtDirectory.start(listen=[LOOPBACK]) as node, HostileHop(facts) as hop:

        def announce() -> None:
            at = {"address": hop.endpoint.address, "end": facts.num_blocks, "num_blocks": facts.num_blocks}
            node.announce(fake_record(hop.identity, facts.fingerprint, **at), hop.identity)

        announce()
        _in_child("a client", use, (folder, node.addresses, seconds), announce)


def at_node(_: Path, seconds: float) -> None:
    with node_process() as (process, address):
        began = time.monotonic()
        with Watched(process.pid) as watched:
            sent = requests.ask(address, seconds=seconds)
        report("a node of the DHT", sent, time.monotonic() - began, process.poll() is None, watched)


def at_functions(_: Path, seconds: float) -> None:
    _in_child("a node's functions", requests.hand_over, (seconds,))


def at_port(_: Path, seconds: float) -> None:
    with node_process() as (process, address):
        began = time.monotonic()
        with Watched(process.pid) as watched:
            sent = requests.speak(address, seconds=seconds)
        requests.ask(address, count=1)
        report("a node's port", sent, time.monotonic() - began, process.poll() is None, watched)


@contextmanager
def node_process() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`splitnet dht` and its address."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "address"
        command = [sys.executable, "-m", "splitnet", "dht", "--listen", LOOPBACK, "--address-file", str(file)]
        command += ["--key-file", str(Path(folder) / "key")]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                while not file.exists() and process.poll() is None:
                    time.sleep(0.1)
                yield process, file.read_text().strip()
            finally:
                process.terminate()


def _in_child(
    at: str, attacked: Callable[..., None], arguments: tuple[Any, ...], announce: Callable[[], None] | None = None
) -> None:
    """Runs the attack in a process that counts the messages."""
    context = multiprocessing.get_context("spawn")
    heard = context.Value("q", 0, lock=False)
    process = context.Process(target=attacked, args=(*arguments, heard))
    began = time.monotonic()
    process.start()
    assert process.pid is not None
    with Watched(process.pid) as watched:
        while process.is_alive():
            process.join(10.0)
            if announce is not None:
                announce()
    report(at, heard.value, time.monotonic() - began, process.exitcode == 0, watched)


TARGETS = {"peer": at_peer, "client": at_client, "node": at_node, "functions": at_functions, "port": at_port}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each")
    parser.add_argument("--at", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    arguments = parser.parse_args()
    logging.getLogger("splitnet").setLevel(logging.ERROR)
    print("| at | frames | s | deaths | MiB in the first 5 s | most |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_checkpoint("llama", Path(folder) / "model", blocks=4, hidden=64)
        for name in arguments.at:
            TARGETS[name](checkpoint, arguments.seconds)


if __name__ == "__main__":
    main()
