"""Measures members that use a helper while strangers abuse the helper (tests/attacks/relay.py), over loopback.

    python -m benchmarks.relay_abuse [--seconds 8]

The helper, a hidden peer, a member that calls it, and the strangers are separate processes. For each attack, the
benchmark prints the round trip of a message of 700 bytes through the helper (median and 99th percentile), the maximum
memory and descriptors of the helper, and the time from a new call of another member until its first message returns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from benchmarks.ways import SMALL, Caller
from splitnet.nat.relay import RelayServer
from splitnet.nat.stream import StreamLoop
from splitnet.security.identity import Identity, PublicKey
from splitnet.wire.endpoints import Endpoint, Relay
from tests.attacks import relay as attacks
from tests.attacks.transport import in_background

LOOK_S = 0.05
PAUSE_S = 0.02
"""Seconds between two messages of the member: a typical time between two tokens."""


def help_others() -> None:
    loop, identity = StreamLoop(), Identity.generate()
    helper = RelayServer(loop, identity, "tcp://127.0.0.1:0")
    helper.start()
    print(helper.port, identity.public.text, flush=True)
    sys.stdin.read()
    helper.close()
    loop.close()


def started(module: str, *arguments: str) -> tuple[subprocess.Popen[str], list[str]]:
    command = [sys.executable, "-m", module, "--role", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()


class Watch:
    """The largest memory and number of descriptors of a process during a `with` block."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.most_mib, self.most_fds = self._now()

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _now(self) -> tuple[float, int]:
        return self._process.memory_info().rss / (1 << 20), self._process.num_fds()

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            mib, fds = self._now()
            self.most_mib, self.most_fds = max(self.most_mib, mib), max(self.most_fds, fds)


def measure(seconds: float) -> None:
    helper, (port, helper_key) = started("benchmarks.relay_abuse", "help")
    peer, (_, key) = started("benchmarks.ways", "hide", port, helper_key, "0")
    relay = Relay(f"tcp://127.0.0.1:{port}", PublicKey.parse(helper_key).raw)
    endpoint = Endpoint("tcp://127.0.0.1:9", PublicKey.parse(key), (relay,))
    member = Caller(endpoint)
    process = psutil.Process(helper.pid)
    print("| beside | ms, median | ms, 99 % | a new call, ms | helper: MiB | descriptors |")
    print("|---|---|---|---|---|---|")

    def row(name: str, attack: Callable[..., Any] | None) -> None:
        with Watch(process) as watch:
            if attack is None:
                figures = times(member, endpoint, seconds)
            else:
                with in_background(attack, relay, seconds=seconds + 5):
                    time.sleep(2.0)  # time for the attacker to import modules and to begin
                    figures = times(member, endpoint, seconds)
        median, slow, first = figures
        figures = f"{median:.2f} | {slow:.1f} | {first:.0f} | {watch.most_mib:.0f} | {watch.most_fds}"
        print(f"| {name} | {figures} |", flush=True)

    row("nothing", None)
    for name, attack in attacks.ATTACKS.items():
        row(name, attack)
    time.sleep(1.0)
    row("nothing, afterwards", None)
    member.transport.close()
    for process_ in (peer, helper):
        process_.communicate()


def times(member: Caller, endpoint: Endpoint, seconds: float) -> tuple[float, float, float]:
    """Round trips in ms: the median, the 99th percentile, and the first one of another member."""
    until, found = time.monotonic() + seconds, list[float]()
    while time.monotonic() < until:
        found.append(member.round_trip_ms(SMALL))
        time.sleep(PAUSE_S)
    other = Caller(endpoint)
    other.transport.close()
    return statistics.median(found), statistics.quantiles(found, n=100)[-1], other.first_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--role", default="measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "help":
        help_others()
    else:
        measure(options.seconds)


if __name__ == "__main__":
    main()
