"""Port mapping: a port of the router that leads to a port of this machine, by NAT-PMP (RFC 6886) or else by UPnP.

The answer of a router is not trusted: other peers connect to the port before it is announced.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from splitnet.errors import SplitnetError
from splitnet.wire.endpoints import host_and_port

log = logging.getLogger(__name__)

Thing = TypeVar("Thing")

LEASE_S = 3600  # requested lease, renewed after half of it; the port of a dead peer stays open at most this long
LEAST_LEASE_S = 60  # a shorter lease is renewed as late as a lease of this length
NAT_PMP, UPNP = "NAT-PMP", "UPnP"
NAT_PMP_PORT = 5351
_WAITS_S = (0.25, 0.5, 1.0)  # waits for an answer by NAT-PMP, one for each attempt
_UPNP_S = 15.0  # longest run of `upnp.py`
_ANSWER_BYTES = {0: 12, 2: 16}  # length of an answer by NAT-PMP, by operation
_RESULTS = {1: "it speaks another version", 2: "it is set to refuse", 3: "it has no network", 4: "it has no port left"}


class MappingError(SplitnetError):
    """No router gives a port; the message says why."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """A port of a router: its public address (`tcp://IP:port`), and the protocol that mapped it."""

    address: str
    by: str
    gateway: str = ""  # IPv4 address of the router; empty for UPnP, which looks for the router again


class PortMapping:
    """Keeps one port of the router for a TCP port of this machine. Every call may take seconds.

    mapped: the port of the router. by: the last protocol that mapped a port; `close` keeps it.
    """

    def __init__(self, port: int) -> None:
        self.mapped: Mapped | None = None
        self.by = ""
        self._port = port
        self._renew_at = 0.0

    def request_port(self) -> str:
        """Maps a port; renews the mapping if there is one already. Returns `tcp://IP:port`. Raises MappingError."""
        wanted = host_and_port(self.mapped.address)[1] if self.mapped else self._port
        self.mapped, seconds = _ask(self._port, wanted)
        self._renew_at = time.monotonic() + max(seconds, LEAST_LEASE_S) / 2
        self.by = self.mapped.by
        return self.mapped.address

    def renew(self) -> str:
        """Calls `request_port` if half of the lease is over. Returns `tcp://IP:port`. Raises MappingError."""
        if self.mapped is None or time.monotonic() >= self._renew_at:
            return self.request_port()
        return self.mapped.address

    def close(self) -> None:
        """Removes the mapping; does not fail if the router does not answer."""
        mapped, self.mapped = self.mapped, None
        if mapped is None:
            return
        with suppress(MappingError, OSError):
            if mapped.by == NAT_PMP:
                _nat_pmp(mapped.gateway, 2, struct.pack("!HHHI", 0, self._port, 0, 0))
            else:
                _upnp("close", host_and_port(mapped.address)[1])


def look_for_router() -> str:
    """Finds a router that gives ports, without opening one. Returns its public address and protocol as text for users.
    Raises MappingError."""
    return _either(
        lambda: f"{_host(_nat_pmp(default_gateway(), 0)[8:])} ({NAT_PMP})", lambda: f"{_upnp('look')[0]} ({UPNP})"
    )


def _ask(port: int, wanted: int) -> tuple[Mapped, float]:
    """Maps a port of the router, preferably `wanted`. Returns the mapped port and its lease in seconds."""

    def by_nat_pmp() -> tuple[Mapped, float]:
        gateway = default_gateway()
        host = _host(_nat_pmp(gateway, 0)[8:])
        answer = _nat_pmp(gateway, 2, struct.pack("!HHHI", 0, port, wanted, LEASE_S))
        inside, outside, seconds = struct.unpack("!HHI", answer[8:])
        if inside != port or not outside or not seconds:
            raise MappingError("the router maps a port of this machine that was not requested")
        return Mapped(f"tcp://{host}:{outside}", NAT_PMP, gateway), min(seconds, LEASE_S)

    def by_upnp() -> tuple[Mapped, float]:
        host, outside = _upnp("open", port, wanted, LEASE_S)
        if not 0 < outside < 65536:
            raise MappingError(f"the router gives the invalid port {outside}")
        return Mapped(f"tcp://{host}:{outside}", UPNP), LEASE_S

    return _either(by_nat_pmp, by_upnp)


def _either(by_nat_pmp: Callable[[], Thing], by_upnp: Callable[[], Thing]) -> Thing:
    refused: list[str] = []
    for name, ask in ((NAT_PMP, by_nat_pmp), (UPNP, by_upnp)):
        try:
            return ask()
        except (MappingError, OSError) as error:
            refused.append(f"{name}: {error}")
    raise MappingError("; ".join(refused))


def _host(raw: bytes) -> str:
    host = ipaddress.IPv4Address(raw)
    if host.is_unspecified or host.is_loopback or host.is_multicast:
        raise MappingError(f"the router gives {host} as its public address")
    return str(host)


def _nat_pmp(gateway: str, operation: int, rest: bytes = b"") -> bytes:
    """Sends a request, and returns the answer of the router. Raises MappingError, OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((gateway, NAT_PMP_PORT))  # so that datagrams of other senders are not received
        for wait_s in _WAITS_S:
            asking.send(bytes((0, operation)) + rest)
            until = time.monotonic() + wait_s
            while (left_s := until - time.monotonic()) > 0:
                asking.settimeout(left_s)
                try:
                    answer = asking.recv(64)
                except TimeoutError:
                    break
                except ConnectionError:
                    raise MappingError("the router does not support it") from None
                if len(answer) < 4 or answer[1] != 128 + operation:
                    continue  # an answer to an earlier request
                if result := int.from_bytes(answer[2:4], "big"):
                    raise MappingError(f"the router refuses: {_RESULTS.get(result, f'error {result}')}")
                if len(answer) == _ANSWER_BYTES[operation]:
                    return answer
    raise MappingError("the router does not answer")


def _upnp(what: str, *numbers: int) -> tuple[str, int]:
    """The output of `upnp.py`: the router's public address, and the port. Raises MappingError."""
    if find_spec("miniupnpc") is None:
        raise MappingError("the package miniupnpc is not installed")
    command = [sys.executable, "-P", str(Path(__file__).with_name("upnp.py")), default_gateway(), what]
    command += map(str, numbers)
    try:
        done = subprocess.run(command, capture_output=True, timeout=_UPNP_S, stdin=subprocess.DEVNULL, check=False)
    except (OSError, subprocess.SubprocessError):
        raise MappingError("the router takes too long") from None
    try:
        host, port = json.loads(done.stdout[-200:])
        return _host(ipaddress.IPv4Address(host).packed), int(port)
    except (ValueError, TypeError):
        log.debug("UPnP: %s", done.stderr[-500:])
        raise MappingError("no router gives a port") from None


def default_gateway() -> str:
    """IPv4 address of the router on this machine's default route. Raises MappingError."""
    try:
        if sys.platform == "linux":
            return _gateway_of_linux(Path("/proc/thread-self/net/route").read_text(encoding="utf-8"))
        command = ["route", "print", "-4", "0.0.0.0"] if sys.platform == "win32" else ["route", "-n", "get", "default"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=5.0, check=False).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise MappingError(f"the routes of this machine are unknown: {error}") from None
    found = re.search(r"^\s*(?:gateway:|0\.0\.0\.0\s+0\.0\.0\.0)\s+(\d+\.\d+\.\d+\.\d+)", told, re.MULTILINE)
    if found is None:
        raise MappingError("this machine has no default route")
    return found[1]


def _gateway_of_linux(table: str) -> str:
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 2 and fields[1] == "00000000" and fields[2] != "00000000":
            return socket.inet_ntoa(struct.pack("=I", int(fields[2], 16)))
    raise MappingError("this machine has no default route")
