"""A lab: hosts on this machine with an emulated network between them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_HUB_SOURCE = Path(__file__).with_name("hub.c")
_TUN = Path("/dev/net/tun")
_STOP_TIMEOUT_S = 10.0
_CLONE_NEWNET = 0x40000000


class LabError(Exception):
    """The lab cannot do what was asked; says why and how to fix it."""


class Lab:
    """Hosts whose packets to each other take time, are limited in rate, get lost and can be cut off. Use with `with`.

    Every host is a network namespace with an address of its own. What a link does is said for a pair of hosts, for a
    host's own (access) link, or for all; a pair's value counts instead of what the two access links say. At the end,
    also after an exception, Ctrl-C or a kill, everything that runs in a host is stopped and the hosts are gone.

    Args:
        hosts: their names; at most 64.
        delay_ms: one way, between any two hosts.
        rate_mbit: of every host's access link, in each direction, in Mbit/s; 0 is no limit.
        loss_percent: of packets, between any two hosts.

    Raises:
        LabError: the machine lacks what a lab needs, or a value is out of range.
    """

    def __init__(
        self, hosts: Sequence[str], *, delay_ms: float = 0.0, rate_mbit: float = 0.0, loss_percent: float = 0.0
    ) -> None:
        if len(set(hosts)) != len(hosts):
            raise LabError("two hosts have the same name")
        self.hosts = tuple(hosts)
        self._everywhere = (delay_ms, rate_mbit, loss_percent)
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[Any]] = []
        self._namespaces: dict[str, int] = {}
        self._hub: subprocess.Popen[str] | None = None
        self.is_realtime = False
        """Whether the hub has real-time priority; without, packets may be late on a busy machine."""

    def __enter__(self) -> Lab:
        _check_machine()
        try:
            self._start_hub()
            delay_ms, rate_mbit, loss_percent = self._everywhere
            passed = (1 - _share(loss_percent)) ** 0.5  # two access links in a row lose what was asked for
            for host in self.hosts:
                self.access(host, delay_ms=delay_ms / 2, rate_mbit=rate_mbit, loss_percent=(1 - passed) * 100)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops everything that runs in the hosts, first kindly, and removes them."""
        try:
            running = [process for process in self._processes if process.poll() is None]
            for process in running:
                process.terminate()
            deadline = time.monotonic() + _STOP_TIMEOUT_S
            for process in running:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
        finally:
            hub, self._hub = self._hub, None
            if hub is not None:
                assert hub.stdin is not None and hub.stdout is not None
                with suppress(OSError):  # it has ended already
                    hub.stdin.close()
                # The hub kills what the processes above left behind in their hosts.
                hub.wait()
                hub.stdout.close()
            for process in self._processes:
                process.wait()
            for namespace in self._namespaces.values():
                os.close(namespace)
            self._namespaces.clear()

    def address(self, host: str) -> str:
        """The IPv4 address of a host, such as `10.77.0.1`."""
        return f"10.77.0.{self._number(host) + 1}"

    def access(self, host: str, *, delay_ms: float = 0.0, rate_mbit: float = 0.0, loss_percent: float = 0.0) -> None:
        """Sets a host's own link, which its traffic with all hosts shares.

        Args:
            delay_ms: one way; the delay between two hosts is the sum of theirs.
            rate_mbit: Mbit/s in each direction; 0 is no limit.
            loss_percent: of packets, in each direction.
        """
        self._tell(f"access {self._number(host)} {delay_ms} {rate_mbit} {_share(loss_percent) * 100}")

    def delay(self, a: str, b: str, ms: float | None) -> None:
        """Sets the one-way delay between two hosts, in both directions; None: what their access links say."""
        self._tell_pair("delay", a, b, ms)

    def rate(self, a: str, b: str, mbit: float | None) -> None:
        """Gives two hosts a link of their own rate in Mbit/s, in each direction; 0: no limit; None: access links."""
        self._tell_pair("rate", a, b, mbit)

    def loss(self, a: str, b: str, percent: float | None) -> None:
        """Sets how many packets get lost between two hosts, in each direction; None: what their access links say."""
        self._tell_pair("loss", a, b, None if percent is None else _share(percent) * 100)

    def cut(self, a: str, b: str) -> None:
        """Drops everything between two hosts, as a broken cable does: nobody is told."""
        first, second = self._number(a), self._number(b)
        self._tell(f"cut {first} {second}", f"cut {second} {first}")

    def down(self, host: str) -> None:
        """Drops everything from and to a host."""
        self._tell(f"down {self._number(host)}")

    def up(self, host: str) -> None:
        """Ends `down`."""
        self._tell(f"up {self._number(host)}")

    def heal(self) -> None:
        """Ends all cuts, and brings all hosts up."""
        self._tell("heal")

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """Puts the calling thread into a host.

        Sockets that it opens, threads and processes that it starts belong to the host, also afterwards.
        """
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _enter(self._namespace(host))
            try:
                yield
            finally:
                _enter(before)
        finally:
            os.close(before)

    def run(self, host: str, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a process in a host; the lab stops it at the end at the latest.

        Args:
            options: of `subprocess.Popen`.
        """
        with self.inside(host):
            process = subprocess.Popen(command, **options)
        self._processes.append(process)
        return process

    def entrance(self, host: str) -> str:
        """The shell command before which another program, in another terminal, runs in a host."""
        assert self._hub is not None
        self._namespace(host)
        return f"nsenter --net=/proc/{self._hub.pid}/fd/{self._descriptors[self._number(host)]}"

    def _start_hub(self) -> None:
        with tempfile.TemporaryDirectory(prefix="netlab-") as folder:
            program = str(Path(folder) / "hub")
            built = subprocess.run(
                ["gcc", "-std=gnu11", "-O2", "-Wall", "-o", program, str(_HUB_SOURCE), "-lm"],
                capture_output=True,
                text=True,
            )
            if built.returncode:
                raise LabError(f"gcc cannot build {_HUB_SOURCE}: {built.stderr.strip()}")
            self._hub = subprocess.Popen(
                [program, str(len(self.hosts))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            word, *values = self._hear().split()
        assert word == "ready"
        self.is_realtime = values[0] == "1"
        self._descriptors = [int(value) for value in values[1:]]
        for host, descriptor in zip(self.hosts, self._descriptors, strict=True):
            self._namespaces[host] = os.open(f"/proc/{self._hub.pid}/fd/{descriptor}", os.O_RDONLY)

    def _number(self, host: str) -> int:
        if host not in self.hosts:
            raise LabError(f"the lab has no host {host}: it has {', '.join(self.hosts)}")
        return self.hosts.index(host)

    def _namespace(self, host: str) -> int:
        self._number(host)
        if host not in self._namespaces:
            raise LabError("the lab is not open: use it as `with Lab(...) as lab`")
        return self._namespaces[host]

    def _tell_pair(self, what: str, a: str, b: str, value: float | None) -> None:
        first, second = self._number(a), self._number(b)
        text = "-" if value is None else str(float(value))
        self._tell(f"{what} {first} {second} {text}", f"{what} {second} {first} {text}")

    def _tell(self, *commands: str) -> None:
        """Gives the hub commands; when this returns they are in force."""
        if self._hub is None or self._hub.stdin is None:
            raise LabError("the lab is not open: use it as `with Lab(...) as lab`")
        with self._lock:
            for command in commands:
                try:
                    self._hub.stdin.write(f"{command}\n")
                except OSError:
                    raise LabError("the hub of the lab has ended: start the lab again") from None
                self._hear()

    def _hear(self) -> str:
        assert self._hub is not None and self._hub.stdout is not None
        answer = self._hub.stdout.readline().strip()
        if not answer:
            raise LabError("the hub of the lab has ended: start the lab again")
        word, _, text = answer.partition(" ")
        if word == "error":
            missing_rights = "; in a container, add --cap-add NET_ADMIN --cap-add SYS_ADMIN --device /dev/net/tun"
            raise LabError(f"{text}{missing_rights if 'not permitted' in text else ''}")
        return answer


def _check_machine() -> None:
    if sys.platform != "linux":
        raise LabError("a lab needs network namespaces, which only Linux has: use a Linux machine, virtual or not")
    if os.geteuid() != 0:
        raise LabError(
            "a lab needs root to make network namespaces: put sudo before the command, "
            "or `unshare --user --map-root-user --net` where users may do that"
        )
    if shutil.which("gcc") is None:
        raise LabError("a lab needs gcc to build its hub: install it (Debian: apt install gcc libc6-dev)")
    if not _TUN.exists():
        raise LabError(f"{_TUN} is missing: run `modprobe tun`; in a container, add --device {_TUN}")


def _share(percent: float) -> float:
    if not 0 <= percent <= 100:
        raise LabError(f"a loss of {percent} percent: give 0 to 100")
    return percent / 100


_libc = ctypes.CDLL(None, use_errno=True)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise LabError(f"cannot enter a host: {os.strerror(number)}")
