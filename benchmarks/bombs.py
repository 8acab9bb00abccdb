"""Sends small requests that expand to large ones to `splitnet serve`, next to honest streams; prints Markdown.

    python -m benchmarks.bombs CHECKPOINT [--bombs 64] [--at-once 16] [--streams 8]

Runs two daemons with half of the blocks each, and a gateway with two API keys. One key keeps `--streams` streams open
at all times; the other sends `--bombs` requests of all kinds in `tests/attacks/gateway.py:bombs_of` through all APIs,
`--at-once` at a time. Gaps are the ms between two events of a stream, first without the bombs, then with them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import httpx
import psutil

from tests.attacks.gateway import _ask, bombs_of
from tests.e2e.daemons import background, daemons
from tests.e2e.test_serve_command import ready

HONEST, HOSTILE = "sk-honest", "sk-hostile"
QUIET_S = 10.0


class Stream(threading.Thread):
    """Requests honest streams, one after the other. gaps: seconds between two events, in the order of their ends."""

    def __init__(self, url: str, model: str, over: threading.Event) -> None:
        super().__init__()
        self.gaps: list[tuple[float, float]] = []
        self._url, self._model, self._over = url, model, over

    def run(self) -> None:
        body = {"model": self._model, "prompt": "Once upon a time", "max_tokens": 200, "stream": True}
        with httpx.Client(headers={"Authorization": f"Bearer {HONEST}"}, timeout=120) as http:
            while not self._over.is_set():
                with http.stream("POST", f"{self._url}/v1/completions", json=body) as reply:
                    last = None
                    for line in reply.iter_lines():
                        if line.startswith("data: {"):
                            now = time.monotonic()
                            if last is not None:
                                self.gaps.append((now, now - last))
                            last = now
                        if self._over.is_set():
                            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bombs", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--streams", type=int, default=8)
    given = parser.parse_args()
    home = Path(tempfile.mkdtemp())
    (home / "keys").write_text(f"{HONEST}\n{HOSTILE}\n")
    blocks = 30
    with daemons(home, given.checkpoint, [(0, blocks // 2), (blocks // 2, blocks)], "--kv-memory", "256MiB") as peers:
        options = ("--port", "0", "--api-key-file", str(home / "keys"), "--speculate", "off")
        with background(home, "serve", str(given.checkpoint), "--join", peers[0].address(), *options) as server:
            url = ready(server, given.checkpoint.name).removesuffix("/v1")
            _attack(url, given.checkpoint.name, psutil.Process(server.process.pid), given)


def _attack(url: str, model: str, gateway: psutil.Process, given: argparse.Namespace) -> None:
    over = threading.Event()
    streams = [Stream(url, model, over) for _ in range(given.streams)]
    for stream in streams:
        stream.start()
    while not all(len(stream.gaps) > 5 for stream in streams):
        time.sleep(0.1)
    quiet_from, before, most = time.monotonic(), gateway.memory_info().rss, 0
    time.sleep(QUIET_S)
    bombs_from = time.monotonic()
    kinds = list(islice(cycle(bombs_of(model)), given.bombs))
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    slowest: Counter[str] = Counter()

    def send(bomb: tuple[str, str, str]) -> None:
        nonlocal most
        name, path, body = bomb
        began = time.monotonic()
        answers[name][_ask(url, path, body, HOSTILE)[0]] += 1
        slowest[name] = max(slowest[name], round(1000 * (time.monotonic() - began)))  # pyright: ignore[reportArgumentType]
        most = max(most, gateway.memory_info().rss)

    with ThreadPoolExecutor(given.at_once) as threads:
        list(threads.map(send, kinds))
    ended = time.monotonic()
    over.set()
    for stream in streams:
        stream.join()
    sizes = {name: len(body) for name, _, body in bombs_of(model)}
    print("| kind | bytes | answers | slowest, ms |\n|---|---|---|---|")
    for name, told in answers.items():
        print(f"| {name} | {sizes[name]:,} | {json.dumps(told)[1:-1]} | {slowest[name]:,} |")
    for what, begin, end in (("without", quiet_from, bombs_from), ("beside", bombs_from, ended)):
        gaps = sorted(1000 * gap for stream in streams for at, gap in stream.gaps if begin <= at < end)
        share = f"95 % {gaps[len(gaps) * 95 // 100]:.0f}, longest {gaps[-1]:.0f}" if gaps else "none"
        print(f"\n{len(gaps)} gaps {what} bombs in {end - begin:.1f} s: {share} ms")
    print(f"\nGateway: {before >> 20} MiB before, {most >> 20} MiB at most.")


if __name__ == "__main__":
    main()
