"""`/metrics` of a peer over HTTP, for Prometheus to read."""

from __future__ import annotations

import errno
import logging
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from splitnet.errors import AddressInUse, SplitnetError

log = logging.getLogger(__name__)

PATH = "/metrics"
PATIENCE_S = 5.0
"""A client that says nothing for so long is cut off."""


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
        super().__init__(address[:2], _Handler)  # pyright: ignore[reportArgumentType]

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Whoever asked is gone, or does not speak HTTP.
        log.debug("a reader of the metrics was lost", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE_S
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
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

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug(format, *arguments)
