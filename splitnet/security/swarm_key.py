"""The swarm key of a closed swarm: a secret of its members, with which they ask for, read and write records.

Without the key a process cannot name a model in a question to a member, read an answer, or announce a record. A peer's
authorized keys decide earlier which connections the peer accepts.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Final

import nacl.bindings
import nacl.exceptions

from splitnet.errors import KeyFileError, NotAuthorized

KEY_BYTES: Final = 32
NONCE_BYTES: Final = nacl.bindings.crypto_aead_xchacha20poly1305_ietf_NPUBBYTES
SEAL_BYTES: Final = NONCE_BYTES + nacl.bindings.crypto_aead_xchacha20poly1305_ietf_ABYTES  # added by `seal`

_PREFIX = "splitnet-swarm-1 "
_MAX_FILE_BYTES = 1 << 21


class OpenSwarm:
    """A swarm without a key: names and records are not encrypted."""

    is_closed = False

    def place(self, model: str) -> str:
        """The name in a question for the model with this fingerprint, or for all models (empty)."""
        return model

    def seal(self, data: bytes) -> bytes:
        """Encrypts records for the wire."""
        return data

    def unseal(self, data: bytes | memoryview) -> bytes:
        """Decrypts the output of `seal`. Raises NotAuthorized: `data` was not sealed with the key of this swarm."""
        return bytes(data)


class SwarmKey(OpenSwarm):
    """A closed swarm: only holders of its key, 32 random bytes, can ask for records. No code prints the key."""

    is_closed = True

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_BYTES:
            raise KeyFileError(f"a swarm key has {KEY_BYTES} bytes, not {len(raw)}")
        self._raw = raw
        # Separate keys for names and for records, so that one key reveals nothing about the other.
        self._places, self._records = (hmac.digest(raw, use, "sha256") for use in (b"places", b"records"))

    @classmethod
    def generate(cls) -> SwarmKey:
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def parse(cls, text: str) -> SwarmKey:
        """The key with the `secret_text` `text`. Raises KeyFileError: `text` is not a swarm key."""
        try:
            return cls(secret_bytes(text, _PREFIX))
        except ValueError:  # the cause would show the secret
            raise KeyFileError("this is not a swarm key: copy the whole line of `splitnet key --swarm-key`") from None

    @classmethod
    def load(cls, path: Path) -> SwarmKey:
        """The key in a file. Raises KeyFileError: the file is damaged, or other users can read it."""
        return cls.parse(read_secret_file(path))

    @classmethod
    def create(cls, path: Path) -> SwarmKey:
        """Creates a new key in a new file. Raises KeyFileError: the file exists, or cannot be written."""
        key = cls.generate()
        write_secret_file(path, key.secret_text + "\n")
        return key

    @property
    def secret_text(self) -> str:
        """The key in the format of a file."""
        return f"{_PREFIX}{self._raw.hex()}"

    def place(self, model: str) -> str:
        return hmac.new(self._places, model.encode(), hashlib.sha256).hexdigest()

    def seal(self, data: bytes) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + nacl.bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(data, b"", nonce, self._records)

    def unseal(self, data: bytes | memoryview) -> bytes:
        sealed = bytes(data)
        try:
            return nacl.bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(
                sealed[NONCE_BYTES:], b"", sealed[:NONCE_BYTES], self._records
            )
        except (nacl.exceptions.CryptoError, ValueError):
            raise NotAuthorized("it has another swarm key, or none") from None

    def __repr__(self) -> str:
        return "SwarmKey()"

    def __reduce__(self) -> str:
        raise TypeError("a SwarmKey holds a secret and is not pickled; load it from its file instead")


OPEN: Final = OpenSwarm()


def secret_bytes(text: str, prefix: str) -> bytes:
    """The bytes of a secret, which stand in hexadecimal digits after `prefix`. Raises ValueError: there are none."""
    before, _, digits = text.strip().rpartition(" ")
    if before != prefix.strip():
        raise ValueError("prefix")
    return bytes.fromhex(digits)


def read_secret_file(path: Path) -> str:
    """The text of a secret file. Raises KeyFileError: other users can read the file, or it is not a valid text."""
    try:
        with path.open("rb") as file:
            if os.name == "posix" and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise KeyFileError(f"others can read the secrets in {path}; run: chmod 600 {path}")
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read ({error.strerror or error}): give another file") from None
    if len(content) > _MAX_FILE_BYTES:
        raise KeyFileError(f"{path} has more than {_MAX_FILE_BYTES} bytes: it is not a secret file of splitnet")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise KeyFileError(f"{path} does not hold text: it is not a secret file of splitnet") from None


def write_secret_file(path: Path, text: str) -> None:
    """Creates a file that only its owner can read. Raises KeyFileError: the file exists, or cannot be written."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise KeyFileError(f"{path} exists already: give another file, or move it away") from None
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written ({error.strerror or error}): give another file") from None
