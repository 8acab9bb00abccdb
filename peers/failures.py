"""What a client is told of an error that came while something of its was computed."""

from __future__ import annotations

import logging

import torch

from splitnet.errors import AdapterError
from splitnet.net.messages import FailureCode

log = logging.getLogger(__name__)


def failure_of(error: Exception, what: str) -> tuple[FailureCode, str]:
    """Code and text for an error that came while `what` was computed; its cause goes to the log.

    An adapter that does not fit is the client's own: some layers show it only when they run.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return FailureCode.BUSY, "the device ran out of memory"
    if isinstance(error, AdapterError):
        return FailureCode.BAD_MESSAGE, str(error)
    log.error("a %s failed", what, exc_info=error)
    return FailureCode.INTERNAL, f"the peer could not compute this {what}; see its log"
