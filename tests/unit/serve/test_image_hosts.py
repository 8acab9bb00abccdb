"""Images that the gateway fetches from listed hosts, which are servers on this machine."""

from __future__ import annotations

import asyncio
import base64
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from splitnet.images import MOST_BYTES, ImageError
from splitnet.serve import image_hosts
from splitnet.serve.admission import ANYONE, ApiClient
from splitnet.serve.image_hosts import ImageHosts, is_public
from tests.images import of_one_colour

PNG = base64.b64decode(of_one_colour("red"))
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def replying(*parts: bytes) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    return handle


def reply(body: bytes, status: str = "200 OK", *headers: str) -> Handler:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return replying("\r\n".join([*lines, "", ""]).encode(), body)


@asynccontextmanager
async def serving(handler: Handler, host: str = "127.0.0.1", port: int = 0, tls: Any = None) -> AsyncIterator[int]:
    async with await asyncio.start_server(handler, host, port, ssl=tls) as server:
        yield server.sockets[0].getsockname()[1]


def fetched(handler: Handler, path: str = "/a.png", scheme: str = "http", tls: Any = None) -> bytes:
    """The image that a listed server at an IP address gives."""

    async def fetching() -> bytes:
        async with serving(handler, tls=tls) as port:
            at = f"127.0.0.1:{port}"
            (data,) = await ImageHosts([at]).fetch_all([f"{scheme}://{at}{path}"], ANYONE)
            return base64.b64decode(data)

    return asyncio.run(fetching())


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    "handler",
    [
        reply(PNG),
        replying(CHUNKED, b"%x\r\n" % len(PNG) + PNG + b"\r\n", b"0\r\n\r\n"),
        replying(UNTIL_CLOSED, PNG),
        replying(b"HTTP/1.1 103 Early Hints\r\n\r\n" + UNTIL_CLOSED, PNG),
    ],
)
def test_images_of_listed_hosts_are_fetched(handler: Handler) -> None:
    assert fetched(handler) == PNG


def test_the_server_is_asked_for_the_path_and_query() -> None:
    asked: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(UNTIL_CLOSED + PNG)
        writer.close()

    fetched(handle, "?size=2&a=b#part")
    head = asked[0].lower()
    assert head.startswith(b"get /?size=2&a=b http/1.1\r\n") and b"\r\nhost: 127.0.0.1:" in head


@pytest.mark.parametrize(
    ("handler", "says"),
    [
        (reply(b"", "404 Not Found"), "status 404"),
        (reply(PNG, "301 Moved", "Location: http://127.0.0.1/"), "status 301"),
        (reply(PNG[:-9], "206 Partial Content"), "status 206"),
        (replying(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", PNG), "without sending complete"),
        (replying(b"nothing\r\n\r\n"), "illegal"),
        (replying(b"HTTP/1.1 200 OK\r\n", *[b"X: %s\r\n" % (b"x" * 1000)] * 1000), "Receive buffer too long"),
        (replying(), "closed connection|without sending|ConnectionClosed|unexpected|closed"),
        (replying(UNTIL_CLOSED, *[bytes(2**20)] * (MOST_BYTES // 2**20 + 9)), f"more than {MOST_BYTES} bytes"),
    ],
)
def test_answers_that_are_no_image_are_refused(handler: Handler, says: str) -> None:
    with pytest.raises(ImageError, match=rf"'http://127.*a.png' cannot be fetched \(.*({says})"):
        fetched(handler)


def test_https_needs_a_valid_certificate(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cats.example")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1))
    (tmp_path / "certificate").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "key").write_bytes(secret)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    with pytest.raises(ImageError, match="certificate verify failed"):
        fetched(reply(PNG), scheme="https", tls=tls)


def test_a_server_that_drips_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_hosts, "FETCH_S", 0.3)
    cut = threading.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(UNTIL_CLOSED)
        try:
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.01)
        except ConnectionError:
            cut.set()

    async def fetching() -> None:
        async with serving(drip) as port:
            with pytest.raises(ImageError, match="it takes more than"):
                await ImageHosts([f"127.0.0.1:{port}"]).fetch_all([f"http://127.0.0.1:{port}/"], ANYONE)
            async with asyncio.timeout(20):
                await asyncio.to_thread(cut.wait)

    asyncio.run(fetching())


@contextmanager
def resolved(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> Iterator[list[str]]:
    """Names get these addresses, one answer after the other; yields the names that were looked up."""
    names: list[str] = []

    async def addresses_of(host: str, port: int) -> list[str]:
        names.append(host)
        return answers[min(len(names), len(answers)) - 1]

    with monkeypatch.context() as patch:
        patch.setattr(image_hosts, "addresses_of", addresses_of)
        yield names


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.0.0.1", "169.254.169.254", "::ffff:127.0.0.1"])
def test_a_listed_name_must_have_a_public_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with resolved(monkeypatch, [address]), pytest.raises(ImageError, match="its name has no public address"):
        asyncio.run(ImageHosts(["cats.example"]).fetch_all(["http://cats.example/a"], ANYONE))


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetching() -> list[str]:
        async with serving(reply(PNG), "127.0.0.2") as port, serving(reply(b"secret"), "127.0.0.1", port):
            at = f"cats.example:{port}"
            return await ImageHosts([at]).fetch_all([f"http://{at}/a"], ANYONE)

    monkeypatch.setattr(image_hosts, "is_public", lambda address: address == "127.0.0.2")
    with resolved(monkeypatch, ["127.0.0.1", "127.0.0.2"], ["127.0.0.1"]) as names:
        assert asyncio.run(fetching()) == [base64.b64encode(PNG).decode()]
    assert names == ["cats.example"]


@pytest.mark.parametrize(
    "url",
    [
        "http://dogs.example/a",
        "http://cats.example:8080/a",
        "https://cats.example:80/a",
        "http://cats.example@127.0.0.1/",
        "http://user@cats.example/",
        "http://cats.example./",
        "http://127.1/",
        "http://",
        "http://cats.example\\@dogs.example/",
    ],
)
def test_other_hosts_and_ports_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with resolved(monkeypatch, ["127.0.0.1"]) as names, pytest.raises(ImageError, match="images are not fetched from"):
        asyncio.run(ImageHosts(["cats.example", "127.0.0.1"]).fetch_all([url], ANYONE))
    assert not names


@pytest.mark.parametrize("url", ["http://[", "http://cats.example/\u00e9", "http://cats.example/a b"])
def test_urls_that_are_invalid_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetching() -> None:
        async with serving(reply(PNG)) as port:
            host = f"127.0.0.1:{port}"
            await ImageHosts([host]).fetch_all([url.replace("cats.example", host)], ANYONE)

    with pytest.raises(ImageError, match="cannot be fetched"):
        asyncio.run(fetching())


def test_a_client_fetches_for_one_prompt_at_a_time() -> None:
    async def fetching() -> None:
        running, most, go_on = set[int](), 0, asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal most
            running.add(id(writer))
            most = max(most, len(running))
            await reader.readuntil(b"\r\n\r\n")
            await go_on.wait()
            running.remove(id(writer))
            writer.write(UNTIL_CLOSED + PNG)
            writer.close()

        async with serving(handle) as port:
            hosts, url = ImageHosts([f"127.0.0.1:{port}"]), f"http://127.0.0.1:{port}/"
            greedy = [asyncio.create_task(hosts.fetch_all([url], ApiClient("greedy"))) for _ in range(5)]
            while not running:
                await asyncio.sleep(0)
            other = asyncio.create_task(hosts.fetch_all([url], ApiClient("other")))
            while len(running) < 2:
                await asyncio.sleep(0)
            go_on.set()
            await asyncio.gather(*greedy, other)
        assert most == 2

    asyncio.run(fetching())


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2600::1", True),
        ("192.168.1.5", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.1.1", False),
        ("240.0.0.1", False),
        ("fe80::1", False),
        ("fec0::1", False),
        ("ff0e::1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_addresses_of_private_networks_are_not_public(address: str, public: bool) -> None:
    assert is_public(address) == public
