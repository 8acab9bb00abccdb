"""Measures whether the emulated links match their settings."""

from __future__ import annotations

import multiprocessing
import os
import select
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.netlab.lab import Lab

_DELAYS_MS = (0.0, 1.0, 5.0, 20.0, 100.0)
_RATES_MBIT = (1.0, 10.0, 100.0, 500.0)
_LOSSES_PERCENT = (0.0, 1.0, 10.0)
_DELAY_SAMPLES = 200
_LOSS_SAMPLES = 20_000
_RATE_SECONDS = 3.0
_PACKET_BYTES = 1500
_PAYLOAD_BYTES = 1448
"""Payload of a full TCP packet, in bytes."""
_SO_TIMESTAMPNS = 35


@dataclass(frozen=True)
class Delays:
    """One-way delays in ms: measured by the receiving host's kernel, and by a program in the receiving host."""

    kernel: list[float]
    program: list[float]


def check() -> None:
    """Prints tables of settings and measurements."""
    cores = os.cpu_count() or 1
    with Lab(["a", "b"]) as lab:
        print(f"{cores} cores; the hub {'has' if lab.is_realtime else 'could not get'} real-time priority.")
        print()
        print("One-way delay of a UDP packet in ms, median (99th percentile). On a busy machine every core has a")
        print("process that only computes: a program then sees packets late, which the network does not cause.")
        print()
        print("| asked | idle, at the kernel | at a program | busy, at the kernel | at a program |")
        print("|---|---|---|---|---|")
        for asked in _DELAYS_MS:
            lab.delay("a", "b", asked)
            idle = measure_delays(lab)
            with busy_cores(cores):
                busy = measure_delays(lab)
            cells = [_spread(delays) for delays in (idle.kernel, idle.program, busy.kernel, busy.program)]
            print(f"| {asked:g} | {' | '.join(cells)} |", flush=True)
        print()
        print("Rate of IP packets of one TCP connection in Mbit/s, at 5 ms one way:")
        print()
        print("| asked | idle | busy |")
        print("|---|---|---|")
        lab.delay("a", "b", 5.0)
        for asked in (*_RATES_MBIT, 0.0):
            lab.rate("a", "b", asked)
            idle_mbit = measure_rate(lab)
            with busy_cores(cores):
                busy_mbit = measure_rate(lab)
            print(f"| {f'{asked:g}' if asked else 'no limit'} | {idle_mbit:.1f} | {busy_mbit:.1f} |", flush=True)
        print()
        print(f"Loss of {_LOSS_SAMPLES} UDP packets in percent:")
        print()
        print("| asked | measured |")
        print("|---|---|")
        lab.rate("a", "b", None)
        lab.delay("a", "b", 1.0)
        for asked in _LOSSES_PERCENT:
            lab.loss("a", "b", asked)
            print(f"| {asked:g} | {measure_loss(lab):.2f} |", flush=True)
        lab.loss("a", "b", None)
        lab.cut("a", "b")
        cut = measure_loss(lab, 200)
        lab.heal()
        lab.down("b")
        down = measure_loss(lab, 200)
        lab.heal()
        print(f"| cut | {cut:.2f} |")
        print(f"| host down | {down:.2f} |")
        print(f"| healed | {measure_loss(lab, 200):.2f} |", flush=True)


def measure_delays(lab: Lab) -> Delays:
    """Sends packets one at a time from the first host to the second."""
    kernel: list[float] = []
    program: list[float] = []
    with _packets(lab) as (sender, receiver):
        receiver.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        for number in range(_DELAY_SAMPLES + 10):
            sent = time.time_ns()
            sender.send(bytes(100))
            _, (stamp, *_), _, _ = receiver.recvmsg(200, 100)
            received = time.time_ns()
            if number >= 10:  # the first packets only warm up caches
                seconds, nanoseconds = struct.unpack("qq", stamp[2])
                kernel.append((seconds * 1_000_000_000 + nanoseconds - sent) / 1e6)
                program.append((received - sent) / 1e6)
    return Delays(kernel, program)


def measure_rate(lab: Lab) -> float:
    """Mbit/s of IP packets that a TCP connection transfers from the first host to the second."""
    first, second = lab.hosts[:2]
    with lab.inside(second):
        listener = socket.create_server((lab.address(second), 0))
    with listener, lab.inside(first), socket.create_connection(listener.getsockname()[:2]) as sender:
        receiver, _ = listener.accept()
        with receiver:
            thread = threading.Thread(target=_send_until_closed, args=(sender,))
            thread.start()
            _receive_for(receiver, 1.0)  # TCP learns the rate first
            began = time.perf_counter()
            received = _receive_for(receiver, _RATE_SECONDS)
            seconds = time.perf_counter() - began
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        thread.join()
    return received * 8 / 1e6 / seconds * _PACKET_BYTES / _PAYLOAD_BYTES


def measure_loss(lab: Lab, samples: int = _LOSS_SAMPLES) -> float:
    """Percent of packets from the first host that do not reach the second."""
    arrived = 0
    with _packets(lab) as (sender, receiver):
        for start in range(0, samples, 100):
            last = min(100, samples - start)
            for _ in range(last):
                sender.send(b"x")
            while last and select.select([receiver], [], [], 0.05)[0]:
                receiver.recv(10)
                last -= 1
                arrived += 1
    return 100 * (samples - arrived) / samples


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Keeps `count` processes computing."""
    context = multiprocessing.get_context("spawn")
    ready = [context.Event() for _ in range(count)]
    processes = [context.Process(target=_compute, args=(event,), daemon=True) for event in ready]
    try:
        for process in processes:
            process.start()
        for event in ready:
            event.wait()
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _compute(ready: object) -> None:
    ready.set()  # type: ignore[attr-defined]
    while True:
        pass


@contextmanager
def _packets(lab: Lab) -> Iterator[tuple[socket.socket, socket.socket]]:
    """UDP sockets: one of the first host, connected to the second host's socket, and that socket."""
    first, second = lab.hosts[:2]
    with lab.inside(second):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with lab.inside(first):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender, receiver:
        receiver.bind((lab.address(second), 0))
        sender.connect(receiver.getsockname())
        yield sender, receiver


def _send_until_closed(sender: socket.socket) -> None:
    data = bytes(1 << 16)
    try:
        while True:
            sender.sendall(data)
    except OSError:
        pass


def _receive_for(receiver: socket.socket, seconds: float) -> int:
    """Bytes received in `seconds`."""
    buffer = bytearray(1 << 18)
    received = 0
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        received += receiver.recv_into(buffer)
    return received


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({statistics.quantiles(values, n=100)[98]:.2f})"
