"""Who may connect: answers ZeroMQ's questions about the keys of clients (ZAP, RFC 27)."""

from __future__ import annotations

import logging
from typing import ClassVar, cast

import zmq

from splitnet.net.identity import AuthorizedKeys

log = logging.getLogger(__name__)


_AT_ONCE = 64


class Gatekeeper:
    """The ZAP handler of a context. Its `socket` belongs to the thread that polls it and calls `answer`.

    Args:
        context: whose CURVE servers ask.
        authorized: whose keys are accepted; None accepts any.

    Attributes:
        refused: how many connections were refused.
    """

    DOMAIN: ClassVar[bytes] = b"splitnet"

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], authorized: AuthorizedKeys | None) -> None:
        self._authorized = authorized
        self.refused = 0
        self.socket = context.socket(zmq.REP)
        self.socket.bind("inproc://zeromq.zap.01")

    def answer(self) -> None:
        """Answers what is asked, many at once: who comes must not wait for messages of those who are there."""
        for _ in range(_AT_ONCE):
            try:
                self._answer(self.socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return

    def _answer(self, request: list[bytes]) -> None:
        version, request_id = request[0], request[1] if len(request) > 1 else b""
        curve = request[6] if len(request) == 7 and request[5] == b"CURVE" else b""
        if len(curve) == 32 and (self._authorized is None or self._authorized.allows(curve)):
            reply = [version, request_id, b"200", b"OK", curve.hex().encode(), b""]
        else:
            self.refused += 1
            key = curve.hex()
            log.info("connection refused: key %s is not authorised", key, extra={"curve_key": key})
            reply = [version, request_id, b"400", b"not authorised", b"", b""]
        self.socket.send_multipart(reply)


def proven_key(frame: zmq.Frame) -> bytes:
    """The CURVE key that a gatekeeper vouched for, of a frame that came over that connection; 32 bytes."""
    return bytes.fromhex(cast(str, frame.get("User-Id")))
