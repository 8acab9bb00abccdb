"""`/metrics` of a peer over HTTP, for Prometheus to read."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from splitnet.errors import AddressInUse, SplitnetError

log = logging.getLogger(__name__)

PATH = "/metrics"
REQUEST_S = 5.0
"""A connection ends after so long, whatever it has said by then."""
MOST_CONNECTIONS = 16
"""At the same time: the oldest ends for one more."""


class MetricsServer:
    """Listens from the start, answers once it serves. Use it as a context manager.

    Args:
        host, port: where to listen; port 0: any free one.

    Raises:
        AddressInUse: something else listens there.
        SplitnetError: it is not an address of this machine.
    """

    def __init__(self, host: str, port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        try:
            self._http = _Server(host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(f"{shown}:{port} is taken: choose another --metrics-port, or 0 for any") from None
            raise SplitnetError(
                f"cannot listen on {shown}:{port} ({error.strerror}): give --metrics-port PORT, or HOST:PORT with a "
                "host of this machine"
            ) from None
        self.url = f"http://{shown}:{self._http.server_address[1]}{PATH}"
        self._thread = threading.Thread(target=self._http.serve_forever, name="splitnet-metrics", daemon=True)

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def serve(self, registry: CollectorRegistry) -> None:
        """Answers with the metrics of `registry` from now on."""
        self._http.registry = registry
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        if self._thread.ident is not None:
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()


class _Server(ThreadingTCPServer):
    allow_reuse_address = sys.platform != "win32"  # where others could take the port, too
    daemon_threads = True
    registry: CollectorRegistry

    def __init__(self, host: str, port: int) -> None:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}
        """By which requests may name this machine."""
        self._until: dict[socket.socket, float] = {}
        """Of connections that have not ended, the oldest first."""
        self._places = threading.BoundedSemaphore(2 * MOST_CONNECTIONS)
        super().__init__(address[:2], _Handler)  # pyright: ignore[reportArgumentType]

    def process_request(self, request: Any, client_address: Any) -> None:
        self.service_actions()
        while len(present := list(self._until)) >= MOST_CONNECTIONS:
            self._end(present[0])
        if not self._places.acquire(timeout=REQUEST_S):
            super().shutdown_request(request)
            return
        self._until[request] = time.monotonic() + REQUEST_S
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def shutdown_request(self, request: Any) -> None:
        self._until.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Ends connections whose time is up; called for each new one, and twice a second."""
        now = time.monotonic()
        for request, until in list(self._until.items()):
            if now >= until:
                self._end(request)

    def _end(self, request: socket.socket) -> None:
        self._until.pop(request, None)
        with suppress(OSError):  # its thread, which waits for it, has closed it just now
            request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Whoever asked is gone, or does not speak HTTP.
        log.debug("a reader of the metrics was lost", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if not self._names_this_machine():
            self.send_error(403, "this name is not known here: ask by IP address, or give --metrics-port NAME:PORT")
            return
        if self.path.partition("?")[0] != PATH:
            self.send_error(404, f"there is only {PATH}")
            return
        try:
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            body = encode(self.server.registry)
        except Exception:
            log.exception("the metrics could not be collected")
            self.send_error(500, "the metrics could not be collected: see the log")
            return
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _names_this_machine(self) -> bool:
        """False for a name that a page of another site may have been given for this address."""
        host = urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname or ""
        if "." not in host or host in self.server.names:
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug(format, *arguments)
