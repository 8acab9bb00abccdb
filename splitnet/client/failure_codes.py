"""Which error a peer's `Failure` means at the client."""

from __future__ import annotations

from splitnet.errors import (
    ContextTooLong,
    PeerBusy,
    PeerFailed,
    PeerLeaving,
    SessionLost,
    SplitnetError,
    WrongSwarm,
)
from splitnet.net.endpoints import Endpoint
from splitnet.net.messages import Failure, FailureCode

_ERROR_OF_CODE: dict[int, type[SplitnetError]] = {
    FailureCode.BUSY: PeerBusy,
    FailureCode.WRONG_MODEL: WrongSwarm,
    FailureCode.TOO_LONG: ContextTooLong,
    FailureCode.UNKNOWN_SESSION: SessionLost,
    FailureCode.OUT_OF_ORDER: SessionLost,
    FailureCode.STALE_EPOCH: SessionLost,
    FailureCode.LEAVING: PeerLeaving,
}


def error_of(failure: Failure, source: Endpoint) -> SplitnetError:
    """The exception that a peer's answer means; any code that has none of its own is `PeerFailed`."""
    kind = _ERROR_OF_CODE.get(failure.code, PeerFailed)
    return kind(f"the peer at {source.address} answered: {failure.text}")
