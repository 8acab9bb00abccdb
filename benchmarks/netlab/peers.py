"""Peer daemons in the hosts of a lab, and a client whose route can be given."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from benchmarks.netlab.errors import LabError
from benchmarks.netlab.lab import Lab
from splitnet.cli.demo import EXACT
from splitnet.directory.record import PeerRecord
from splitnet.session.inference import Session
from splitnet.swarm.plan import PlannedHop
from splitnet.swarm.swarm import Swarm
from splitnet.wire.messages import Chunk

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 15.0


def even_spans(blocks: int, hosts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The blocks of a model, divided evenly among some hosts in order."""
    edges = [round(index * blocks / len(hosts)) for index in range(len(hosts) + 1)]
    return dict(zip(hosts, itertools.pairwise(edges), strict=True))


class LabPeers:
    """`splitnet peer` in some hosts, each with blocks of a checkpoint. Use with `with`.

    Possible events: `kill` (a peer's program dies), `freeze` and `thaw` (it hangs), `lab.down` and `lab.up` (its host
    loses the network), `stop` (it leaves properly), and `start` after its death.

    Args:
        lab: the hosts.
        checkpoint: hub id or folder.
        spans: blocks `[start, end)` by host; None lets the daemon choose.
        options: additional options for each, as on the command line.
        join: multiaddr of a DHT node that outlives the peers; empty: the first peer begins the swarm.
        programs: words of another program than `splitnet`, by host.
        own_caches: whether each daemon has a cache folder of its own, as on another machine.

    Attributes:
        addresses: multiaddrs to join with, by host.
    """

    def __init__(
        self,
        lab: Lab,
        checkpoint: str,
        spans: Mapping[str, tuple[int, int] | None],
        options: Sequence[str] = EXACT,
        join: str = "",
        programs: Mapping[str, Sequence[str]] | None = None,
        own_caches: bool = False,
    ) -> None:
        self.addresses: dict[str, str] = {}
        self._lab = lab
        self._checkpoint = checkpoint
        self._spans = spans
        self._options = options
        self._join = join
        self._programs, self._own_caches = programs or {}, own_caches
        self._processes: dict[str, subprocess.Popen[Any]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="splitnet-lab-")

    def __enter__(self) -> LabPeers:
        try:
            for host in self._spans:  # one after the other, so that each measures its speed alone on this machine
                self.start(host)
                self._join = self._join or self.addresses[host]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()

    def start(self, host: str) -> None:
        """Starts the daemon of a host with a new key and a new port, and waits until it serves."""
        if host in self._processes and self._processes[host].poll() is None:
            raise LabError(f"the daemon in {host} runs already")
        self._file(host, "address").unlink(missing_ok=True)
        self._launch(host)
        self._await_address(host)

    def kill(self, host: str) -> None:
        """kill -9 of the daemon: its host refuses further connections."""
        self._processes[host].kill()
        self._processes[host].wait()

    def stop(self, host: str) -> None:
        """Makes the daemon leave the swarm and end, as Ctrl-C does."""
        self._processes[host].terminate()
        self._processes[host].wait(_STOP_TIMEOUT_S)

    def freeze(self, host: str) -> None:
        """SIGSTOP: connections stay open, without answers."""
        self._processes[host].send_signal(signal.SIGSTOP)

    def thaw(self, host: str) -> None:
        """Ends `freeze`."""
        self._processes[host].send_signal(signal.SIGCONT)

    def pid(self, host: str) -> int:
        """The process of the daemon of a host."""
        return self._processes[host].pid

    def log(self, host: str) -> str:
        """The output of the daemon of a host."""
        return self._file(host, "log").read_text(errors="replace")

    def host_of(self, record: PeerRecord) -> str:
        """The host whose daemon published a record."""
        return next(host for host in self._spans if record.address.startswith(f"tcp://{self._lab.address(host)}:"))

    def _launch(self, host: str) -> None:
        span = self._spans[host]
        program = self._programs.get(host, (sys.executable, "-m", "splitnet"))
        command = [*program, "peer", self._checkpoint]
        env = os.environ | ({"SPLITNET_CACHE": str(self._file(host, "cache"))} if self._own_caches else {})
        command += ["--blocks", f"{span[0]}:{span[1]}"] if span else []
        command += ["--listen", f"tcp://{self._lab.address(host)}:0", "--no-lan"]
        command += ["--address-file", str(self._file(host, "address"))]
        command += ["--join", self._join] if self._join else []
        with self._file(host, "log").open("ab") as log:  # keeps the log from before a restart
            self._processes[host] = self._lab.run(
                host, [*command, *self._options], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )

    def _await_address(self, host: str) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._file(host, "address").exists():
            if self._processes[host].poll() is not None:
                raise LabError(f"the daemon in {host} ended: {self.log(host).strip()}")
            if time.monotonic() > deadline:
                raise LabError(f"the daemon in {host} did not start in {_START_TIMEOUT_S:.0f} s: is the machine busy?")
            time.sleep(0.05)
        self.addresses[host] = self._file(host, "address").read_text().strip()

    def _file(self, host: str, kind: str) -> Path:
        return Path(self._folder.name) / f"{host}.{kind}"


class GuidedSwarm(Swarm):
    """A swarm that uses `route`, if set, instead of planning."""

    route: Sequence[PlannedHop] | None = None

    def __enter__(self) -> Self:
        return self

    def plan_route(self, *arguments: Any, **options: Any) -> list[PlannedHop]:
        return super().plan_route(*arguments, **options) if self.route is None else list(self.route)


class RouteChanged(Exception):
    """A session left the route under measurement."""


@dataclass(frozen=True)
class StepTimes:
    """A prompt, and the decode steps after it, in ms."""

    prompt_ms: float
    total_ms: float
    """The median step."""
    mean_ms: float
    """If only some steps wait for other sessions' work, the median does not show this."""
    compute_ms: float
    """Median time on the devices of all hops."""


def measure_steps(session: Session, hidden: torch.Tensor, tokens: int) -> StepTimes:
    """Sends `hidden`, `[context, hidden]`, through a session as a prompt, then its last row as `tokens` decode steps.

    Raises:
        RouteChanged: a hop had to be replaced, so that the measurement is void.
    """
    context = len(hidden)
    began = time.perf_counter()
    session.step(hidden, [Chunk(1, 0, context, 1)])
    prompt_ms = (time.perf_counter() - began) * 1000
    totals: list[float] = []
    computes: list[float] = []
    for position in range(context, context + tokens):
        began = time.perf_counter()
        session.step(hidden[-1:], [Chunk(1, position, 1, 1)])
        totals.append((time.perf_counter() - began) * 1000)
        computes.append(session.compute_ms)
    if session.recoveries:
        raise RouteChanged(f"the route was repaired while it was measured: {session.recoveries}")
    return StepTimes(prompt_ms, statistics.median(totals), statistics.fmean(totals), statistics.median(computes))
