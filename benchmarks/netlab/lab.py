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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.netlab.errors import LabError
from benchmarks.netlab.gateway import Gateway
from benchmarks.netlab.router import TRANSPORTS, Router

from . import gateway

_HUB_SOURCE = Path(__file__).with_name("hub.c")
_TUN = Path("/dev/net/tun")
_STOP_TIMEOUT_S = 10.0
_PRIVATE = gateway.ADDRESS.rpartition(".")[0]
_CLONE_NEWNET = 0x40000000


class Lab:
    """Hosts with delayed, rate-limited and lossy links that can be cut. Use with `with`.

    Every host is a network namespace with a separate address. Delay, rate and loss can be set for all hosts, for the
    access link of one host, or for a pair of hosts; a pair's value replaces the values of the two access links. When
    the lab ends, also after an exception, Ctrl-C or a kill, it stops all processes in the hosts and removes the hosts.

    Hosts behind a router share a separate network, without delay or limits, and reach other hosts through the router
    and its access link. A router is a host, too: only hosts behind the router reach its programs, at `address(router)`.

    Args:
        hosts: names of the hosts; at most 64 hosts and routers together.
        delay_ms: one-way delay between any two hosts, except within a network behind a router.
        rate_mbit: rate of each access link of a host or router, in each direction, in Mbit/s; 0: no limit.
        loss_percent: share of packets lost between any two hosts, except within a network behind a router.
        routers: the address translation of each router, by the router's name.
        behind: the router of each host or router that is behind one; all others are public.
        public: the first three numbers of public addresses. Programs may treat such private addresses differently.

    Raises:
        LabError: the machine lacks what a lab needs, or a value is out of range.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        delay_ms: float = 0.0,
        rate_mbit: float = 0.0,
        loss_percent: float = 0.0,
        routers: Mapping[str, Router] | None = None,
        behind: Mapping[str, str] | None = None,
        public: str = "10.77.0",
    ) -> None:
        self.hosts = tuple(hosts)
        self.routers = dict(routers or {})
        self._behind = dict(behind or {})
        self._names = (*self.hosts, *self.routers)
        if len(set(self._names)) != len(self._names):
            raise LabError("two hosts have the same name")
        for name, router in self._behind.items():
            self._number(name)
            if router not in self.routers:
                raise LabError(f"{name} is behind {router}, which is not a router of the lab")
            self._outwards(name)
        self._public = public
        self._addresses = {name: self._numbered(name) for name in self._names}
        self._gateways: list[Gateway] = []
        self._everywhere = (delay_ms, rate_mbit, loss_percent)
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[Any]] = []
        self._namespaces: dict[str, int] = {}
        self._hub: subprocess.Popen[str] | None = None
        self.is_realtime = False
        """Whether the hub has real-time priority; otherwise packets may be late on a busy machine."""

    def __enter__(self) -> Lab:
        _check_machine()
        try:
            self._start_hub()
            delay_ms, rate_mbit, loss_percent = self._everywhere
            # Two consecutive access links together lose the given percentage.
            passed = (1 - _share(loss_percent)) ** 0.5
            for name in self._names:
                if name not in self._behind:
                    self.access(name, delay_ms=delay_ms / 2, rate_mbit=rate_mbit, loss_percent=(1 - passed) * 100)
            for name, router in self.routers.items():
                self.configure(name, router)
                if router.protocols:
                    self._gateways.append(self._gateway(name, router))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops all programs in the hosts, first with a request to end, and removes the hosts."""
        for answering in self._gateways:
            answering.close()
        self._gateways.clear()
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
                with suppress(OSError):  # the process has ended already
                    hub.stdin.close()
                # The hub kills processes that the programs above left in their hosts.
                hub.wait()
                hub.stdout.close()
            for process in self._processes:
                process.wait()
            for namespace in self._namespaces.values():
                os.close(namespace)
            self._namespaces.clear()

    def address(self, host: str) -> str:
        """The IPv4 address of a host in its network, such as `10.77.0.1`; a router's in the network behind it."""
        self._number(host)
        return gateway.ADDRESS if host in self.routers else self._addresses[host]

    def public_address(self, host: str) -> str:
        """The source address of a host's packets at public hosts: that of the host, or of its outermost router."""
        self._number(host)
        return self._addresses[self._outwards(host)[-1]]

    def address_from(self, viewer: str, host: str) -> str:
        """The address at which `viewer` reaches `host`: in their common network, or else the public one."""
        self._number(host)
        self._number(viewer)
        network = viewer if viewer in self.routers else self._behind.get(viewer)
        if host == network:
            return self.address(host)
        return self._addresses[host] if self._behind.get(host) == network else self.public_address(host)

    def configure(self, router: str, what: Router) -> None:
        """Changes a router's address translation. The router forgets all mappings, as after a restart, but keeps
        forwarded ports.

        The protocols for forwarded ports stay the same.
        """
        self._tell(f"nat {self._router(router)} {what.command}")
        self.routers[router] = what

    def forward(self, router: str, protocol: str, port: int, host: str, host_port: int) -> None:
        """Forwards a `tcp` or `udp` port of a router to a port of a host behind it.

        Raises:
            LabError: the host is not behind the router, the port is already forwarded, or the protocol or port does not
                exist.
        """
        number, host_number = self._router(router), self._number(host)
        self._tell(f"forward {number} {_protocol(protocol)} {port} {host_number} {host_port}")

    def unforward(self, router: str, protocol: str, port: int) -> None:
        """Ends `forward`."""
        self._tell(f"unforward {self._router(router)} {_protocol(protocol)} {port}")

    def access(self, host: str, *, delay_ms: float = 0.0, rate_mbit: float = 0.0, loss_percent: float = 0.0) -> None:
        """Sets the access link of a host, which the traffic with all other hosts shares.

        Args:
            delay_ms: one-way delay of the link; the delay between two hosts is the sum over their access links.
            rate_mbit: Mbit/s in each direction; 0: no limit.
            loss_percent: share of lost packets in each direction.
        """
        self._tell(f"access {self._number(host)} {delay_ms} {rate_mbit} {_share(loss_percent) * 100}")

    def delay(self, a: str, b: str, ms: float | None) -> None:
        """Sets the one-way delay between two hosts, in both directions; None: use their access links."""
        self._tell_pair("delay", a, b, ms)

    def rate(self, a: str, b: str, mbit: float | None) -> None:
        """Sets a rate for the link between two hosts, in Mbit/s in each direction; 0: no limit; None: use
        their access links.
        """
        self._tell_pair("rate", a, b, mbit)

    def loss(self, a: str, b: str, percent: float | None) -> None:
        """Sets the share of lost packets between two hosts, in each direction; None: use their access links."""
        self._tell_pair("loss", a, b, None if percent is None else _share(percent) * 100)

    def cut(self, a: str, b: str) -> None:
        """Drops all packets between two hosts without notice, like a broken cable."""
        first, second = self._pair(a, b)
        self._tell(f"cut {first} {second}", f"cut {second} {first}")

    def down(self, host: str) -> None:
        """Drops all packets from and to a host."""
        self._tell(f"down {self._number(host)}")

    def up(self, host: str) -> None:
        """Ends `down`."""
        self._tell(f"up {self._number(host)}")

    def heal(self) -> None:
        """Ends all cuts, and brings all hosts up."""
        self._tell("heal")

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """Puts the calling thread into a host for the duration of the `with`.

        Sockets, threads and processes that the thread creates inside stay in the host, also after the `with`.
        """
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            enter(self._namespace(host))
            try:
                yield
            finally:
                enter(before)
        finally:
            os.close(before)

    def run(self, host: str, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a process in a host; the lab stops the process when the lab ends, at the latest.

        Args:
            options: further arguments of `subprocess.Popen`.
        """
        with self.inside(host):
            process = subprocess.Popen(command, **options)
        self._processes.append(process)
        return process

    def entrance(self, host: str) -> str:
        """The prefix of a shell command that runs a program in a host, for use in another terminal."""
        return f"nsenter --net={self.door(host)}"

    def door(self, host: str) -> str:
        """The file of a host's network namespace, for `setns`."""
        assert self._hub is not None
        self._namespace(host)
        return f"/proc/{self._hub.pid}/fd/{self._descriptors[self._number(host)]}"

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
                [program, *self._arguments()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            word, *values = self._hear().split()
        assert word == "ready"
        self.is_realtime = values[0] == "1"
        self._descriptors = [int(value) for value in values[1:]]
        for host, descriptor in zip(self._names, self._descriptors, strict=True):
            self._namespaces[host] = os.open(f"/proc/{self._hub.pid}/fd/{descriptor}", os.O_RDONLY)

    def _arguments(self) -> Iterator[str]:
        """The hub's arguments for each host and router."""
        for name in self._names:
            behind = f"@{self._number(self._behind[name])}" if name in self._behind else ""
            yield f"{'r' if name in self.routers else ''}{self._addresses[name]}{behind}"

    def _numbered(self, name: str) -> str:
        """The address of a host or router as seen from outside. All networks behind routers use the same addresses."""
        if name in self._behind:
            together = [other for other in self._names if self._behind.get(other) == self._behind[name]]
            return f"{_PRIVATE}.{together.index(name) + 2}"
        return f"{self._public}.{self._number(name) + 1}"

    def _outwards(self, name: str) -> list[str]:
        """A host or router, followed by the routers that it is behind, the outermost router last."""
        passed = [name]
        while passed[-1] in self._behind:
            passed.append(self._behind[passed[-1]])
            if len(passed) > len(self._names):
                raise LabError(f"the routers of {name} are behind each other in a circle")
        return passed

    def _adjacent(self, a: str, b: str) -> bool:
        """Whether two hosts are in one network, or one is the router of the other."""
        return self._behind.get(a) in (b, self._behind.get(b)) or self._behind.get(b) == a

    def _gateway(self, name: str, router: Router) -> Gateway:
        hosts = {self._addresses[host]: host for host in self._names if self._behind.get(host) == name}
        forward, unforward = partial(self.forward, name), partial(self.unforward, name)
        with self.inside(name):
            return Gateway(self._addresses[name], hosts, forward, unforward, router.protocols)

    def _number(self, host: str) -> int:
        if host not in self._names:
            raise LabError(f"the lab has no host {host}: it has {', '.join(self._names)}")
        return self._names.index(host)

    def _pair(self, a: str, b: str) -> tuple[int, int]:
        """The numbers of two hosts between which there is a link."""
        first, second = self._number(a), self._number(b)
        ways = [(x, y) for x in self._outwards(a) for y in self._outwards(b) if x != y and self._adjacent(x, y)]
        if a != b and (a, b) not in ways:
            x, y = ways[0]
            raise LabError(f"{a} and {b} have no direct link, routers connect them: name {x} and {y} instead")
        return first, second

    def _router(self, name: str) -> int:
        if name not in self.routers:
            raise LabError(f"the lab has no router {name}: it has {', '.join(self.routers) or 'none'}")
        return self._number(name)

    def _namespace(self, host: str) -> int:
        self._number(host)
        if host not in self._namespaces:
            raise LabError("the lab is not open: use it as `with Lab(...) as lab`")
        return self._namespaces[host]

    def _tell_pair(self, what: str, a: str, b: str, value: float | None) -> None:
        first, second = self._pair(a, b)
        text = "-" if value is None else str(float(value))
        self._tell(f"{what} {first} {second} {text}", f"{what} {second} {first} {text}")

    def _tell(self, *commands: str) -> None:
        """Sends commands to the hub, and waits until the hub has applied them."""
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
        raise LabError("a lab needs network namespaces, which only Linux has: use Linux, also in a virtual machine")
    if os.geteuid() != 0:
        raise LabError(
            "a lab needs root to make network namespaces: put sudo before the command, "
            "or `unshare --user --map-root-user --net` where users may do that"
        )
    if shutil.which("gcc") is None:
        raise LabError("a lab needs gcc to build its hub: install it (Debian: apt install gcc libc6-dev)")
    if not _TUN.exists():
        raise LabError(f"{_TUN} is missing: run `modprobe tun`; in a container, add --device {_TUN}")


def _protocol(name: str) -> int:
    if name not in TRANSPORTS:
        raise LabError(f"a forwarded port has the protocol {' or '.join(TRANSPORTS)}, not {name}")
    return TRANSPORTS[name]


def _share(percent: float) -> float:
    if not 0 <= percent <= 100:
        raise LabError(f"a loss of {percent} percent: give 0 to 100")
    return percent / 100


_libc = ctypes.CDLL(None, use_errno=True)


def enter(namespace: int) -> None:
    """Moves the calling thread into a network namespace, given by a descriptor."""
    if _libc.setns(namespace, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise LabError(f"cannot enter a host: {os.strerror(number)}")
