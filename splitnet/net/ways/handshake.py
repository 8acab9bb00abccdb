"""Both ends of a stream prove their Ed25519 keys, to each other and for one purpose.

Each signs the nonces and keys of both, the purpose, on which side it stands, and the token of the call if there is one:
so no signature serves for another stream, another helper or anything else. Nothing is encrypted: what streams carry is.
"""

from __future__ import annotations

import secrets

from splitnet.errors import KeyFileError, NotAuthorized, ProtocolError
from splitnet.net.identity import Identity, PublicKey
from splitnet.net.ways.messages import NONCE_BYTES, VERSION, Hello, Proof, Purpose, Welcome

_DIALER, _LISTENER = b"d", b"l"


class Dialing:
    """The side that connects.

    Args:
        identity: proves itself.
        expected: the key that the other side must prove.
        token: of the call that the stream belongs to, which both know; empty: none.
    """

    def __init__(self, identity: Identity, expected: PublicKey, purpose: Purpose, token: bytes = b"") -> None:
        self._identity = identity
        self._expected = expected
        self._token = token
        self.hello = Hello(VERSION, purpose, identity.public.raw, secrets.token_bytes(NONCE_BYTES))

    def prove(self, welcome: Welcome) -> Proof:
        """The answer to what the other side has said. Raises NotAuthorized if that is not whom this side wants."""
        if welcome.key != self._expected.raw:
            raise NotAuthorized("another key than expected answers at the other end of a stream")
        if not self._expected.verify(_signed(_LISTENER, self.hello, welcome, self._token), welcome.signature):
            raise NotAuthorized("the other end of a stream does not have the key that it shows")
        return Proof(self._identity.sign(_signed(_DIALER, self.hello, welcome, self._token)))


class Answering:
    """The side that was connected to.

    Args:
        identity: proves itself.
        hello: what the other side began with.
        token: of the call that the stream belongs to.

    Attributes:
        key: of the other side; it counts after `check`.
        purpose: likewise.

    Raises:
        ProtocolError: it speaks another version, or is nonsense.
    """

    def __init__(self, identity: Identity, hello: Hello, token: bytes = b"") -> None:
        if hello.version != VERSION:
            raise ProtocolError(f"streams of version {hello.version} are not spoken here, only {VERSION}")
        try:
            self.key, self.purpose = PublicKey(hello.key), Purpose(hello.purpose)
        except (KeyFileError, ValueError) as error:
            raise ProtocolError(f"a stream begins with nonsense: {error}") from None
        self._hello = hello
        self._token = token
        unsigned = Welcome(identity.public.raw, secrets.token_bytes(NONCE_BYTES), b"")
        signature = identity.sign(_signed(_LISTENER, hello, unsigned, token))
        self.welcome = Welcome(unsigned.key, unsigned.nonce, signature)

    def check(self, proof: Proof) -> None:
        """Raises NotAuthorized if the other side does not have the key that it shows."""
        if not self.key.verify(_signed(_DIALER, self._hello, self.welcome, self._token), proof.signature):
            raise NotAuthorized("the other end of a stream does not have the key that it shows")


def _signed(side: bytes, hello: Hello, welcome: Welcome, token: bytes) -> bytes:
    return b"".join(
        (
            b"splitnet way\0",
            bytes((hello.version, hello.purpose)),
            side,
            hello.key,
            welcome.key,
            hello.nonce,
            welcome.nonce,
            token,
        )
    )
