"""Asks the router for a port by UPnP. A program of its own: what talks to routers is in C, and may take long.

    python upnp.py look | open INSIDE OUTSIDE SECONDS | close OUTSIDE

Prints a line of JSON: the router's public address and the port. It has to run without splitnet's modules.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

DISCOVER_MS = 1500
TRIES = 4
"""Ports that are asked for, if others have the first ones."""
MOST_BYTES = 512 << 20
"""Of address space: what answers may send without end."""


def main(what: str, *numbers: str) -> None:
    miniupnpc: Any = import_module("miniupnpc")

    with suppress(ImportError):  # Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    router = miniupnpc.UPnP()
    router.discoverdelay = DISCOVER_MS
    router.discover()
    router.selectigd()
    port = 0
    if what == "open":
        port = _open(router, *map(int, numbers))
    elif what == "close":
        router.deleteportmapping(int(numbers[0]), "TCP")
    print(json.dumps([router.externalipaddress(), port]))


def _open(router: Any, inside: int, outside: int, seconds: int) -> int:
    for port in range(outside, min(outside + TRIES, 65536)):
        for lease_s in (seconds, 0):  # some routers know only mappings without end
            try:
                router.addportmapping(port, "TCP", router.lanaddr, inside, "splitnet", "", lease_s)
                return port
            except Exception as error:  # the module has no kind of its own
                if "OnlyPermanentLeases" not in str(error):
                    break
    raise SystemExit("the router gives no port")


if __name__ == "__main__":
    main(*sys.argv[1:])
