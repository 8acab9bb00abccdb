"""Fetches images in requests from hosts that the operator has listed."""

from __future__ import annotations

import asyncio
import socket
from base64 import b64encode
from collections.abc import Collection, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import SplitResult, urlsplit

import h11

from splitnet.images import MOST_BYTES, MOST_IMAGES, ImageError
from splitnet.serve.admission import Admission, ApiClient

FETCH_S = 15.0  # Time within which all images of a prompt must have arrived
PLACES = 4  # Number of prompts whose images are fetched at the same time, each of another client
PORTS = {"http": 80, "https": 443}


async def addresses_of(host: str, port: int) -> list[str]:
    """The IP addresses of a host. Raises OSError: it has none."""
    look_up = asyncio.get_running_loop().getaddrinfo
    return [str(address[0]) for *_, address in await look_up(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether an IP address is one of a machine on the internet, in no private network."""
    found: Any = ip_address(address)
    # An address of 6to4 contains any IPv4 address; addresses of NAT64 are reserved.
    others = (getattr(found, name, None) for name in ("is_multicast", "is_reserved", "is_site_local", "sixtofour"))
    return found.is_global and not any(others)


class ImageHosts:
    """Fetches images by http and https; redirects are not followed.

    hosts: names or IP addresses: `NAME` for the default ports, `NAME:PORT` for others. Names must have a public
    address; an IP address in this list may be private.
    """

    def __init__(self, hosts: Collection[str] = ()) -> None:
        self._hosts = hosts
        self._places = Admission(PLACES, 16 * PLACES, spare=PLACES - 1)

    async def fetch_all(self, urls: Sequence[str], client: ApiClient) -> list[str]:
        """The first `MOST_IMAGES` images at URLs in base64, together at most `MOST_BYTES`.

        Raises ImageError, and Overloaded if too many prompts wait.
        """
        files: list[bytes] = []
        try:
            split = [*map(urlsplit, urls[:MOST_IMAGES])]
            for url in split:
                if url.netloc.lower().removesuffix(f":{PORTS[url.scheme]}") not in self._hosts:
                    fix = "send a data URL such as data:image/png;base64,..., or start the server with --image-hosts"
                    raise ImageError(f"images are not fetched from {url.netloc!r}: {fix}")
            async with self._places.admitted(ApiClient(client.name, client.weight)):  # without the quota of tokens
                async with asyncio.timeout(FETCH_S):
                    for url in split:
                        files.append(await _fetch(url, MOST_BYTES - sum(map(len, files))))
        except (OSError, ValueError, h11.ProtocolError) as error:
            reason = getattr(error, "strerror", None) or str(error) or f"it takes more than {FETCH_S:.0f} s"
            raise ImageError(f"{urls[len(files)][:100]!r} cannot be fetched ({reason}): send a data URL") from None
        return [b64encode(file).decode() for file in files]


async def _fetch(url: SplitResult, most: int) -> bytes:
    """The body of an answer with status 200. Raises ValueError, ProtocolError, and OSError without a connection."""
    host, port = url.hostname or "", url.port or PORTS[url.scheme]
    # The connection goes to the address that is checked: the name may get another address meanwhile.
    allowed = [one for one in await addresses_of(host, port) if one == host or is_public(one)]
    if not allowed:
        raise ValueError("its name has no public address")
    tls: dict[str, Any] = {"ssl": True, "server_hostname": host} if url.scheme == "https" else {}
    reader, writer = await asyncio.open_connection(allowed[0], port, **tls)
    try:
        http, body = h11.Connection(h11.CLIENT), bytearray()
        target = f"{url.path or '/'}{url.query and '?'}{url.query}"
        headers = [("Host", url.netloc), ("Accept", "image/*"), ("User-Agent", "splitnet"), ("Connection", "close")]
        writer.write(http.send(h11.Request(method="GET", target=target, headers=headers)) or b"")
        while not isinstance(event := http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                http.receive_data(await reader.read(2**16))
            elif isinstance(event, h11.Response) and event.status_code != 200:
                raise ValueError(f"status {event.status_code}")
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > most:
                    raise ValueError(f"the images have more than {MOST_BYTES} bytes")
        return bytes(body)
    finally:
        writer.transport.abort()
