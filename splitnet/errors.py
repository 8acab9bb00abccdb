"""Every error that splitnet raises on purpose: one sentence that says what happened and how to fix it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class SplitnetError(Exception):
    """Base of all errors that a user can act on; the command line prints them without a traceback.

    Attributes:
        generated: token ids `[batch, seq]`, prompt included, if the error ended a `generate()` that had come so far; a
            `generate()` that goes on from them loses nothing. None otherwise.
    """

    generated: Any = None


class ModelNotFound(SplitnetError):
    """The model id or folder does not exist or holds no usable checkpoint."""


class UnsupportedModel(SplitnetError):
    """The architecture of the model cannot be cut into spans."""


class WeightsError(SplitnetError):
    """Blocks cannot hold their weights in the form that was asked for."""


class KernelsError(SplitnetError):
    """There are no such kernels for this CPU as were asked for."""


class UnsupportedParameter(SplitnetError, ValueError):
    """A parameter of `generate()` or `forward()` asks for what cannot be had with remote blocks."""


class ProtocolError(SplitnetError):
    """A frame that breaks the wire protocol: the sender's fault."""


class ProtocolVersionError(ProtocolError):
    """The other side speaks another version of the protocol."""


class CodecError(ProtocolError):
    """A tensor payload does not fit its codec, shape or bounds."""


class NotFinite(CodecError):
    """Numbers are inf, NaN or too large to be sent, and no single peer is at fault."""


class AdapterError(SplitnetError):
    """Parameters that a client wants to add to blocks do not fit them."""


class DataError(SplitnetError):
    """Training data, or what an earlier run of training has left, cannot be used."""


class NotAuthorized(SplitnetError):
    """The peer does not accept this key, or the record of a peer is not signed by its key."""


class WrongKey(NotAuthorized):
    """What answers at the address of a peer has another key, as after a start with a new one."""


class KeyFileError(SplitnetError):
    """A key file or list of keys cannot be read."""


class DirectoryError(SplitnetError):
    """The DHT cannot be joined or answered nothing."""


class LanError(SplitnetError):
    """This machine cannot look for others on its local network, or be found there."""


class ConfigurationError(SplitnetError):
    """The configuration file holds what no option takes."""


class CoverageError(SplitnetError):
    """Some blocks of the model are served by nobody."""


class OtherWeights(CoverageError):
    """Who serves some blocks holds their weights otherwise than a session had them, and that was not allowed."""


class WrongSwarm(SplitnetError):
    """The swarm serves other weights than the ones the client holds."""


class PeerBusy(SplitnetError):
    """A peer has no room for another session."""


class PeerLost(SplitnetError):
    """A peer of the route stopped answering."""


class SessionLost(PeerLost):
    """A peer answers, but does not hold the session any more."""


class SessionClosed(SplitnetError):
    """The session was closed while it was used."""


class PeerLeaving(PeerLost):
    """A peer is about to end; it serves the session until it is replaced."""


class PeerFailed(SplitnetError):
    """A peer answered with an error."""


class ContextTooLong(SplitnetError):
    """The sequence is longer than the model or the session allows."""


class TooLongForPeers(ContextTooLong, PeerBusy):
    """No chain of the peers that are there holds so many positions, not even without other sessions."""


class OutOfMemory(SplitnetError):
    """The blocks do not fit in the memory of the device."""


class AddressInUse(SplitnetError):
    """The address to listen on is taken."""


def first_line(error: BaseException) -> str:
    """What an error says, for a sentence of ours: its first line, or else its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def stumbling(refusal: Callable[[str], SplitnetError]) -> Iterator[None]:
    """Around a library that reads what others wrote, and raises what it stumbles over: panics of Rust among it.
    `refusal`: called with what happened, gives the error to raise in its place."""
    try:
        yield
    except SplitnetError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refusal(first_line(error)) from error


@contextmanager
def listening_at(place: str, option: str, fix: str) -> Iterator[None]:
    """Around what listens at a place. Raises AddressInUse: it is taken, another is chosen with `option`; SplitnetError:
    it is not one of this machine, with the `fix`."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"{place} is taken: choose another {option}, or 0 for any free one") from None
        raise SplitnetError(f"cannot listen on {place} ({error.strerror}): {fix}") from None
