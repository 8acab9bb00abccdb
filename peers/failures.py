"""What a client is told of an error that came while something of its was computed."""

from __future__ import annotations

import logging
import time

import torch

from splitnet.errors import AdapterError, PeerBusy
from splitnet.net.messages import FailureCode

log = logging.getLogger(__name__)

TELL_S = 60.0
"""The same error is told so rarely, as whoever causes it may do so a thousand times a second."""

_told: dict[tuple[type[Exception], int], float] = {}
"""When errors were told, by kind and place in the code."""


def failure_of(error: Exception, what: str) -> tuple[FailureCode, str]:
    """Code and text for an error that came while `what` was computed; its cause goes to the log.

    An adapter that does not fit is the client's own: some layers show it only when they run.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return FailureCode.BUSY, "the device ran out of memory"
    if isinstance(error, PeerBusy):
        return FailureCode.BUSY, str(error)
    if isinstance(error, AdapterError):
        return FailureCode.BAD_MESSAGE, str(error)
    now, trace = time.monotonic(), error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = type(error), trace.tb_lineno if trace is not None else 0
    if now >= _told.get(place, 0.0):
        _told[place] = now + TELL_S
        log.error("a %s failed", what, exc_info=error)
    return FailureCode.INTERNAL, f"the peer could not compute this {what}; see its log"
