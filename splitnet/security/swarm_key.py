"""What closes a swarm: a secret of its members, with which they ask for records and read and write them.

Without it a process cannot name what it asks a member for, read an answer, or have a record announced. Which
connections a peer accepts at all is decided before, by its authorized keys.
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
SEAL_BYTES: Final = NONCE_BYTES + nacl.bindings.crypto_aead_xchacha20poly1305_ietf_ABYTES  # that sealing adds

_PREFIX = "splitnet-swarm-1 "
_MAX_FILE_BYTES = 1 << 21


class OpenSwarm:
    """A swarm that anybody may ask: names and records travel as they are."""

    is_closed = False

    def place(self, model: str) -> str:
        """The name in a question of the model with this fingerprint, or of all models (empty)."""
        return model

    def seal(self, data: bytes) -> bytes:
        """Records as they travel."""
        return data

    def unseal(self, data: bytes | memoryview) -> bytes:
        """Undoes `seal`. Raises NotAuthorized if no member has sealed it."""
        return bytes(data)


class SwarmKey(OpenSwarm):
    """A swarm that only holders of its key, 32 random bytes, may ask. Nothing prints the key."""

    is_closed = True

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_BYTES:
            raise KeyFileError(f"a swarm key has {KEY_BYTES} bytes, not {len(raw)}")
        self._raw = raw
        # One key for each use, so that none tells anything of another.
        self._places, self._records = (hmac.digest(raw, use, "sha256") for use in (b"places", b"records"))

    @classmethod
    def generate(cls) -> SwarmKey:
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def parse(cls, text: str) -> SwarmKey:
        """The key that `text` was written from. Raises KeyFileError."""
        prefix, _, digits = text.strip().rpartition(" ")
        try:
            if prefix != _PREFIX.strip():
                raise ValueError("prefix")
            return cls(bytes.fromhex(digits))
        except ValueError:  # the cause would show the secret
            raise KeyFileError("this is no swarm key: copy the whole line of `splitnet key --swarm-key`") from None

    @classmethod
    def load(cls, path: Path) -> SwarmKey:
        """The key in a file. Raises KeyFileError if it is damaged or others can read it."""
        return cls.parse(read_secret_file(path))

    @classmethod
    def create(cls, path: Path) -> SwarmKey:
        """A new key in a file that must not exist yet. Raises KeyFileError."""
        key = cls.generate()
        write_secret_file(path, key.secret_text + "\n")
        return key

    @property
    def secret_text(self) -> str:
        """The key as it stands in files."""
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


def read_secret_file(path: Path) -> str:
    """The text of a file that its owner alone can read. Raises KeyFileError."""
    try:
        with path.open("rb") as file:
            if os.name == "posix" and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise KeyFileError(f"others can read the secrets in {path}; run: chmod 600 {path}")
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read ({error.strerror or error}): give another file") from None
    if len(content) > _MAX_FILE_BYTES:
        raise KeyFileError(f"{path} has more than {_MAX_FILE_BYTES} bytes: it is no file of splitnet's secrets")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise KeyFileError(f"{path} is no text: it is no file of splitnet's secrets") from None


def write_secret_file(path: Path, text: str) -> None:
    """Makes a file that its owner alone can read, and that must not exist yet. Raises KeyFileError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise KeyFileError(f"{path} is there already: give another file, or move it away") from None
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written ({error.strerror or error}): give another file") from None
