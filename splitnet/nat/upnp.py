"""Asks the router for a port by UPnP. A separate program, because the library for it is written in C and may hang.

    python upnp.py GATEWAY look | open INSIDE OUTSIDE SECONDS | close OUTSIDE

The program asks only the gateway, by its IPv4 address, and only if the URL of its description has this address:
otherwise any machine on the local network could make this machine send requests to any address, also to its own. The
program prints one line of JSON: the router's public address and the port. It must run without splitnet's modules.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from contextlib import suppress
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

DISCOVER_S = 1.5  # how long to wait for the gateway's description
GROUP, PORT = "239.255.255.250", 1900
_KINDS = tuple(
    f"urn:schemas-upnp-org:{kind}"
    for kind in ("device:InternetGatewayDevice:1", "device:InternetGatewayDevice:2", "service:WANIPConnection:1")
)
TRIES = 4  # ports to ask for, if the first ones are in use
MOST_BYTES = 512 << 20  # of address space for this program, because a router may send data without end


def main(gateway: str, what: str, *numbers: str) -> None:
    miniupnpc: Any = import_module("miniupnpc")

    with suppress(ImportError):  # Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    router = miniupnpc.UPnP()
    router.selectigd(find_description(gateway))
    port = 0
    if what == "open":
        port = _open(router, *map(int, numbers))
    elif what == "close":
        router.deleteportmapping(int(numbers[0]), "TCP")
    print(json.dumps([router.externalipaddress(), port]))


def find_description(gateway: str) -> str:
    """The URL of the gateway's description. Ends the program if the gateway does not answer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for kind in _KINDS:
            head = f'M-SEARCH * HTTP/1.1\r\nHOST: {GROUP}:{PORT}\r\nMAN: "ssdp:discover"\r\n'
            question = f"{head}MX: 1\r\nST: {kind}\r\n\r\n"
            for address in (GROUP, gateway):  # some routers answer only one of the two
                with suppress(OSError):
                    asking.sendto(question.encode(), (address, PORT))
        until = time.monotonic() + DISCOVER_S
        while (left_s := until - time.monotonic()) > 0:
            asking.settimeout(left_s)
            try:
                answer, sender = asking.recvfrom(2048)
            except TimeoutError:
                break
            except ConnectionError:  # the gateway's own port is closed; it may still answer the multicast group
                continue
            if sender[0] == gateway and (found := location_of(answer, gateway)):
                return found
    raise SystemExit("the router does not answer")


def location_of(answer: bytes, gateway: str) -> str:
    """The URL of the description in an answer; empty: there is none, or it has another host than the gateway."""
    for line in answer.decode("latin-1").split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "location":
            value = value.strip()
            with suppress(ValueError):
                parts = urlsplit(value)
                if parts.scheme == "http" and parts.hostname == gateway and "@" not in parts.netloc:
                    return value
    return ""


def _open(router: Any, inside: int, outside: int, seconds: int) -> int:
    for port in range(outside, min(outside + TRIES, 65536)):
        for lease_s in (seconds, 0):  # some routers only accept permanent mappings
            try:
                router.addportmapping(port, "TCP", router.lanaddr, inside, "splitnet", "", lease_s)
                return port
            except Exception as error:  # the module has no exception class of its own
                if "OnlyPermanentLeases" not in str(error):
                    break
    raise SystemExit("the router gives no port")


if __name__ == "__main__":
    main(*sys.argv[1:])
