"""Daemons of `splitnet peer` in hosts of a lab, slowed to given speeds by waiting.

Many simulated devices share the cores of one machine. Each computes a model so small that a pass takes almost no time;
then the pass waits until it has lasted as long as on the simulated device. All daemons are forked from one process that
has imported all modules, so that a start takes a fraction of a second, and most memory is shared.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import os
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.netlab.errors import LabError
from benchmarks.netlab.lab import Lab, enter
from scheduler.facts import Speed

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
_FORMAT = "dqqd"
_LOOKS, _LOOKS_EACH = 6, 4

LATE = 1.1
"""A pass counts as late if it lasts this many times as long as intended, because other programs used the cores."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Counts of one daemon: busy seconds of its device with sessions, number of passes, number of late passes."""

    busy_s: float
    passes: int
    late: int


class Meter:
    """The counts of a daemon, and its slowdown factor, in a file, so that the values outlive the daemon."""

    def __init__(self, file: Path) -> None:
        if not file.exists():
            file.write_bytes(struct.pack(_FORMAT, 0.0, 0, 0, 1.0))
        with file.open("r+b") as opened:
            self._values = mmap.mmap(opened.fileno(), 0)

    @property
    def measured(self) -> Measured:
        return Measured(*struct.unpack_from("dqq", self._values))

    @measured.setter
    def measured(self, value: Measured) -> None:
        struct.pack_into("dqq", self._values, 0, value.busy_s, value.passes, value.late)

    @property
    def slower(self) -> float:
        (slower,) = struct.unpack_from("d", self._values, struct.calcsize("dqq"))
        return slower

    @slower.setter
    def slower(self, factor: float) -> None:
        struct.pack_into("d", self._values, struct.calcsize("dqq"), factor)


class Nursery:
    """Starts processes in hosts; all modules are already imported in these processes. Use with `with`."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload([f"{__package__}.preloaded"])
        self._processes: list[BaseProcess] = []

    def __enter__(self) -> Nursery:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # else the fork server would not inherit it
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()

    def run(self, host: str, log: Path, act: Callable[..., None], *arguments: Any) -> BaseProcess:
        """Calls a function of a module in a host, in a separate process."""
        process = self._context.Process(target=_inside, args=(self._lab.door(host), log, act, *arguments))
        process.start()
        self._processes.append(process)
        return process

    def queue(self) -> Any:
        """A queue for messages of these processes."""
        return self._context.Queue()


class SlowedPeers:
    """Daemons in hosts of a lab, one per host, each slowed to a given speed. Use with `with`.

    The daemon of the first host begins the swarm; the others ask it for records, so that they need no node of the DHT.

    Args:
        lab, nursery: the hosts, and the starter of processes.
        checkpoint: the folder of the checkpoint.
        spans: blocks `[start, end)` by host.
        speeds: the speed of each simulated device, by host.
        options: additional options of the daemons, as on the command line.

    Attributes:
        join: address of the first daemon, tcp://...
    """

    def __init__(
        self,
        lab: Lab,
        nursery: Nursery,
        checkpoint: str,
        spans: Mapping[str, tuple[int, int]],
        speeds: Mapping[str, Speed],
        options: Sequence[str],
    ) -> None:
        self._lab = lab
        self._nursery = nursery
        self._checkpoint = checkpoint
        self._spans = spans
        self._speeds = speeds
        self._options = options
        self.join = ""
        self._processes: dict[str, BaseProcess] = {}
        self._lives: dict[str, int] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="splitnet-lab-")

    def __enter__(self) -> SlowedPeers:
        try:
            first, *others = self._spans
            self.begin(first)
            self.await_start(first)
            self.join = next(word for word in reversed(self.log(first).split()) if word.startswith("tcp://"))
            for host in others:
                self.begin(host)
            for host in others:
                self.await_start(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.join(_STOP_TIMEOUT_S)
            process.kill()
        self._folder.cleanup()

    def begin(self, host: str, *, again: bool = False) -> None:
        """Starts the daemon of a host, with a new key and a new port. again: the last daemon did not serve."""
        self._file(host, "address").unlink(missing_ok=True)
        self._lives[host] = self._lives.get(host, -1) + (not again)
        start, end = self._spans[host]
        arguments = ["peer", self._checkpoint, "--blocks", f"{start}:{end}", "--no-lan"]
        arguments += ["--join", self.join] if self.join else []
        arguments += ["--listen", f"tcp://{self._lab.address(host)}:0", *self._options]
        arguments += ["--address-file", str(self._file(host, "address"))]
        self._processes[host] = self._nursery.run(
            host, self._file(host, "log"), serve, arguments, self._speeds[host], self._meter_file(host)
        )

    def await_start(self, host: str) -> None:
        """Waits until the daemon of a host serves. Raises LabError if the daemon ends."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._file(host, "address").exists():
            if not self._processes[host].is_alive():
                raise LabError(f"the daemon in {host} ended: {self.log(host).strip()}")
            if time.monotonic() > deadline:
                raise LabError(f"the daemon in {host} did not start in {_START_TIMEOUT_S:.0f} s: is the machine busy?")
            time.sleep(0.02)

    def kill(self, host: str) -> None:
        """kill -9 of the daemon: its host refuses further connections."""
        self._processes[host].kill()
        self._processes[host].join()

    def stop(self, host: str) -> None:
        """Makes the daemon leave the swarm and end, as Ctrl-C does."""
        self._processes[host].terminate()
        self._processes[host].join(_STOP_TIMEOUT_S)

    def meters(self, host: str) -> list[Meter]:
        """Meters of all daemons that a host has had, in the order of their starts."""
        return [Meter(self._meter_file(host, life)) for life in range(self._lives[host] + 1)]

    def log(self, host: str) -> str:
        """The output of the daemons of a host."""
        return self._file(host, "log").read_text(errors="replace")

    def _meter_file(self, host: str, life: int | None = None) -> Path:
        return self._file(host, f"meter{self._lives[host] if life is None else life}")

    def _file(self, host: str, kind: str) -> Path:
        return Path(self._folder.name) / f"{host}.{kind}"


def _inside(door: str, log: Path, act: Callable[..., None], *arguments: Any) -> None:
    with log.open("ab") as opened:
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    namespace = os.open(door, os.O_RDONLY)
    enter(namespace)
    os.close(namespace)
    act(*arguments)


def serve(arguments: Sequence[str], speed: Speed, meter_file: Path) -> None:
    """Runs `splitnet ARGUMENTS` with a device of this speed."""
    import torch

    from peers.counters import Counters
    from peers.peer_links import Neighbours
    from peers.power import EnergyMeter
    from scheduler.batching import BatchingDelay
    from splitnet.blocks.span import Span
    from splitnet.cli import main

    torch.set_num_threads(1)
    # Each device has a separate speed, which differs from this machine's.
    os.environ["SPLITNET_CACHE"] = str(meter_file.parent / f"{meter_file.stem}-cache")
    meter = Meter(meter_file)
    forward, ran, begin, look = Span.forward, BatchingDelay.observe_pass, Counters.__init__, Neighbours.look_around
    looks = itertools.count()

    def held_forward(self: Span, hidden: Any, parts: Any, taps: Any = ()) -> Any:
        began = time.perf_counter()
        lasts_s = speed.block_ms_at(len(hidden)) * (self.end - self.start) * meter.slower / 1000
        output = forward(self, hidden, parts, taps)
        time.sleep(max(0.0, began + lasts_s - time.perf_counter()))
        if time.perf_counter() - began > LATE * lasts_s:
            before = meter.measured
            meter.measured = Measured(before.busy_s, before.passes, before.late + 1)
        return output

    def begin_to_count(self: Counters, energy: EnergyMeter | None = None) -> None:
        begin(self, energy)
        passed = self.step_passes.observe

        def count(seconds: float, positions: int, rows: int) -> None:
            passed(seconds, positions, rows)
            before = meter.measured
            meter.measured = Measured(before.busy_s + seconds, before.passes + 1, before.late)

        self.step_passes.observe = count

    # A device that waits counts as if it had a processor all the time.
    def ran_all_the_time(self: BatchingDelay, sources: Any, took_s: float, computed_s: float, now: float) -> None:
        ran(self, sources, took_s, took_s, now)

    # Probes of links, 64 KiB each, are the main load of an idle daemon.
    def look_less(self: Neighbours) -> None:
        number = next(looks)
        if number < _LOOKS or number % _LOOKS_EACH == 0:
            look(self)

    Span.forward, Counters.__init__, BatchingDelay.observe_pass = held_forward, begin_to_count, ran_all_the_time
    Neighbours.look_around = look_less
    sys.argv = ["splitnet", *arguments]
    try:
        main.main()
    except SystemExit:
        pass
    finally:
        logging.shutdown()
        os._exit(0)
