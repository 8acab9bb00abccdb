"""What a client is told of an error that is not its own."""

from __future__ import annotations

import logging

import torch

from splitnet.net.messages import FailureCode

log = logging.getLogger(__name__)


def failure_of(error: Exception, what: str) -> tuple[FailureCode, str]:
    """Code and text for an error that came while `what` was computed; its cause goes to the log."""
    if isinstance(error, torch.OutOfMemoryError):
        return FailureCode.BUSY, "the device ran out of memory"
    log.error("a %s failed", what, exc_info=error)
    return FailureCode.INTERNAL, f"the peer could not compute this {what}; see its log"
