"""Errors that splitnet raises on purpose; each message is one sentence that says what happened and how to fix it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class SplitnetError(Exception):
    """Base of all errors that a user can act on; the command line prints them without a traceback.

    Attributes:
        generated: token ids `[batch, seq]`, prompt included, that a `generate()` had made before the error ended it;
            another `generate()` can continue from them. None otherwise.
    """

    generated: Any = None


class ModelNotFound(SplitnetError):
    """The model id or folder does not exist or holds no usable checkpoint."""


class UnsupportedModel(SplitnetError):
    """The architecture of the model cannot be cut into spans."""


class WeightsError(SplitnetError):
    """Blocks cannot hold their weights in the requested format."""


class KernelsError(SplitnetError):
    """The requested kernels do not exist for this CPU."""


class UnsupportedParameter(SplitnetError, ValueError):
    """A parameter of `generate()` or `forward()` is not supported with remote blocks."""


class ProtocolError(SplitnetError):
    """A frame breaks the wire protocol: the sender's fault."""


class ProtocolVersionError(ProtocolError):
    """The other side speaks another version of the protocol."""


class CodecError(ProtocolError):
    """A tensor payload does not fit its codec, shape or bounds."""


class NotFinite(CodecError):
    """Activations are inf, NaN or too large to send, and no single peer is at fault."""


class AdapterError(SplitnetError):
    """Parameters that a client wants to add to blocks do not fit them."""


class DataError(SplitnetError):
    """Training data or files of an earlier run of training cannot be used."""


class NotAuthorized(SplitnetError):
    """The peer does not accept this key, or the record of a peer is not signed by its key."""


class WrongKey(NotAuthorized):
    """The process at the address of a peer has another key, for example after a restart with a new key."""


class KeyFileError(SplitnetError):
    """A key file or list of keys cannot be read."""


class DirectoryError(SplitnetError):
    """The directory cannot be joined or does not answer."""


class NoSwarm(DirectoryError):
    """No swarm is given, and none is found on the local network."""


class LanError(SplitnetError):
    """This machine cannot find peers on its local network, or cannot be found there."""


class ConfigurationError(SplitnetError):
    """The configuration file holds a name or a value that no option accepts."""


class CoverageError(SplitnetError):
    """No peer serves some blocks of the model."""


class OtherWeights(CoverageError):
    """All peers of some blocks hold weights in another format than the session's peers did, and the caller does not
    allow it."""


class WrongSwarm(SplitnetError):
    """The swarm serves other weights than the ones the client holds."""


class PeerBusy(SplitnetError):
    """A peer has no room for another session."""


class PeerLost(SplitnetError):
    """A peer of the route stopped answering."""


class SessionLost(PeerLost):
    """A peer answers, but does not hold the session."""


class SessionClosed(SplitnetError):
    """The session was closed while it was used."""


class PeerLeaving(PeerLost):
    """A peer is about to end; it serves the session until it is replaced."""


class PeerLied(SplitnetError):
    """An audit shows that a peer has not computed its blocks, so that the peer is not used any more; or a new peer was
    lost before its work was examined."""


class PeerFailed(SplitnetError):
    """A peer answered with an error."""


class ContextTooLong(SplitnetError):
    """The sequence is longer than the model or the session allows."""


class TooLongForPeers(ContextTooLong, PeerBusy):
    """No route of the present peers could hold this many positions, even without other sessions."""


class OutOfMemory(SplitnetError):
    """The blocks do not fit in the memory of the device."""


class AddressInUse(SplitnetError):
    """The address to listen on is taken."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or else the name of its type, to quote in a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def replace_library_errors(refusal: Callable[[str], SplitnetError]) -> Iterator[None]:
    """Replaces errors of a library that reads untrusted input, and may raise any error, such as a panic of Rust.
    refusal: gives the error to raise instead, for the first line of the library's error."""
    try:
        yield
    except SplitnetError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refusal(first_line(error)) from error


@contextmanager
def explain_listen_errors(place: str, option: str, fix: str) -> Iterator[None]:
    """Replaces errors of code that listens at an address. Raises AddressInUse: the address is taken, and `option`
    chooses another; SplitnetError: this machine does not have the address; `fix` says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"{place} is taken: choose another {option}, or 0 for any free one") from None
        raise SplitnetError(f"cannot listen on {place} ({error.strerror}): {fix}") from None
