"""Key pairs of peers and clients, lists of authorized keys, and the rights of each key.

Every process has one Ed25519 key pair, which signs its records. The X25519 pair for CurveZMQ is derived from it (RFC
7748 and RFC 8032 share the curve), so the CURVE key to expect on a link follows from the signing key.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

import nacl.bindings
import nacl.exceptions
import platformdirs
from nacl.signing import SigningKey, VerifyKey
from zmq.utils import z85

from splitnet.errors import KeyFileError, SplitnetError
from splitnet.limits import parse_bytes
from splitnet.paths import lines_of
from splitnet.security.swarm_key import secret_bytes

logger = logging.getLogger(__name__)

KEY_FILE_VARIABLE: Final = "SPLITNET_KEY_FILE"
MAX_KEY_FILE_BYTES: Final = 1 << 20  # longest key file, or list of authorized keys
RELOAD_INTERVAL_S: Final = 1.0  # between two checks whether a list of keys has changed
ANYONE: Final[bytes | None] = None  # replaces the key in the entry for all keys that are not listed

_PUBLIC_PREFIX = "sn1"
_CHECKSUM_BYTES = 3  # 32 + 3 bytes are exactly 56 base32 characters: no padding, one text per key
_PUBLIC_TEXT_LENGTH = len(_PUBLIC_PREFIX) + 56
_SECRET_PREFIX = "splitnet-secret-1 "


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 public key. raw: 32 bytes. Raises KeyFileError: the bytes are not a point of the curve that is
    safe to use."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != nacl.bindings.crypto_sign_PUBLICKEYBYTES:
            raise KeyFileError(f"A public key has 32 bytes, not {len(self.raw)}; copy the whole key.")
        _ = self.curve_raw

    @cached_property
    def curve_raw(self) -> bytes:
        """The X25519 public key, 32 bytes, in the form that a ZAP handler gets."""
        try:
            return nacl.bindings.crypto_sign_ed25519_pk_to_curve25519(self.raw)
        except nacl.exceptions.CryptoError as error:
            raise KeyFileError("These 32 bytes are not an Ed25519 public key; copy the key again.") from error

    @property
    def curve(self) -> bytes:
        """The X25519 public key in Z85, 40 bytes, for `zmq.CURVE_SERVERKEY`."""
        return z85.encode(self.curve_raw)

    @cached_property
    def text(self) -> str:
        """The printable key: `sn1` and 56 base32 characters, with a checksum against typing errors."""
        return _printable(self.raw)

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """The key with the printable form `text`. Raises KeyFileError: `text` is not a key."""
        text = text.strip()
        shown = text if len(text) <= 70 else text[:67] + "..."
        if len(text) != _PUBLIC_TEXT_LENGTH or not text.startswith(_PUBLIC_PREFIX) or text != text.lower():
            raise KeyFileError(
                f"{shown!r} is not a splitnet key ({_PUBLIC_TEXT_LENGTH} characters that start with "
                f"{_PUBLIC_PREFIX}); copy what `splitnet key` prints."
            )
        try:
            body = base64.b32decode(text[len(_PUBLIC_PREFIX) :].upper())
        except ValueError as error:
            raise KeyFileError(f"{shown!r} holds a character that no key has; copy the key again.") from error
        raw, checksum = body[:-_CHECKSUM_BYTES], body[-_CHECKSUM_BYTES:]
        if checksum != _checksum(raw):
            raise KeyFileError(f"The checksum of {shown!r} is wrong: a character was changed; copy the key again.")
        return cls(raw)

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether `signature` (64 bytes) of `message` was made with the secret key of this public key."""
        if len(signature) != nacl.bindings.crypto_sign_BYTES:
            return False
        try:
            VerifyKey(self.raw).verify(message, signature)
        except nacl.exceptions.CryptoError:
            return False
        return True

    def __str__(self) -> str:
        return self.text


class Identity:
    """The key pair of this process or user. No code prints the secret key.

    public: the Ed25519 public key. curve_public, curve_secret: the derived X25519 pair in Z85, 40 bytes each, for
    `zmq.CURVE_PUBLICKEY` and `zmq.CURVE_SECRETKEY`.
    """

    def __init__(self, signing_key: SigningKey) -> None:
        self._signing_key = signing_key
        self.public = PublicKey(bytes(signing_key.verify_key))
        self.curve_public = self.public.curve
        self.curve_secret = z85.encode(bytes(signing_key.to_curve25519_private_key()))

    @classmethod
    def generate(cls) -> Identity:
        """A new key pair, which is only kept in memory."""
        return cls(SigningKey.generate())

    @classmethod
    def load_or_create(cls, path: Path | None = None) -> Identity:
        """The key pair in a file, which is created if it does not exist. path: None: `default_key_file()`.

        Two processes that create the file at the same time get the same key. Raises KeyFileError: the file is damaged,
        or other users can read it.
        """
        path = default_key_file() if path is None else path
        try:
            if not path.exists():
                _create_key_file(path)
            return cls(_read_key_file(path))
        except OSError as error:
            raise KeyFileError(
                f"The key file {path} cannot be used ({error.strerror or error}); "
                f"set {KEY_FILE_VARIABLE} to a file that you can write."
            ) from error

    @classmethod
    def parse(cls, text: str) -> Identity:
        """The key pair with the `secret_text` `text`. Raises KeyFileError: `text` is not a secret key."""
        try:
            return cls(SigningKey(secret_bytes(text, _SECRET_PREFIX)))
        except ValueError:  # the cause would show the secret
            raise KeyFileError("this is not a secret key of splitnet: copy the whole line") from None

    @property
    def secret_text(self) -> str:
        """The key pair in the format of a key file. Must only be written to a file that no other user can read."""
        return f"{_SECRET_PREFIX}{bytes(self._signing_key).hex()}"

    def sign(self, message: bytes) -> bytes:
        """The Ed25519 signature of `message`, 64 bytes."""
        return self._signing_key.sign(message).signature

    def derive(self, purpose: str) -> bytes:
        """32 bytes that only this key's owner can compute, different for each purpose (keyed BLAKE2b, RFC 7693)."""
        return hashlib.blake2b(purpose.encode(), key=bytes(self._signing_key), digest_size=32).digest()

    def __repr__(self) -> str:
        return f"Identity({self.public.text})"

    def __reduce__(self) -> str:
        raise TypeError("an Identity holds a secret key and is not pickled; load it from its key file instead")


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """The rights of a key.

    weight: keys share the device and the KV memory in proportion to their weights. kv: bytes of KV memory that sessions
    of the key may reserve; None: no bound. train: whether the peer computes gradients, and keeps passes for gradients,
    for the key. tokens_per_minute: positions that the peer computes for the key in a minute; None: no bound. share:
    name of a group whose keys use each other's stored prefixes if their clients ask for it; None: no group.
    """

    weight: float = 1.0
    kv: int | None = None
    train: bool = True
    tokens_per_minute: int | None = None
    share: str | None = None


STRANGER_WEIGHT: Final = 0.01  # weight of keys that are not in the list, unless the line `anyone` has another weight


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0.001 <= weight <= 1000:
        raise KeyFileError(f"weight={text}: a weight is a number from 0.001 to 1000")
    return weight


def _train(text: str) -> bool:
    if text not in ("yes", "no"):
        raise KeyFileError(f"train={text}: write train=yes or train=no")
    return text == "yes"


def _tokens(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 40:
        raise KeyFileError(f"tokens-per-minute={text}: write a whole number, 1 or more")
    return int(text)


def _kv(text: str) -> int:
    try:
        return parse_bytes(text)
    except SplitnetError as error:
        raise KeyFileError(f"kv={text}: {error}") from error


def _share(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", text):
        raise KeyFileError(f"share={text}: name a group with up to 32 letters, digits, - or _")
    return text


_PARSERS: dict[str, Callable[[str], Any]] = {
    "weight": _weight,
    "kv": _kv,
    "train": _train,
    "tokens-per-minute": _tokens,
    "share": _share,
}


def is_options(word: str) -> bool:
    """Whether a word next to a key consists of options."""
    return word.partition("=")[0] in _PARSERS


def parse_options(text: str, defaults: KeyOptions | None = None) -> KeyOptions:
    """The options in a text such as `weight=4,kv=8GiB,train=no`. Raises KeyFileError."""
    given: dict[str, Any] = {}
    for option in text.split(","):
        name, _, value = option.partition("=")
        if name not in _PARSERS:
            raise KeyFileError(f"{name!r} is not an option of a key: there are {', '.join(_PARSERS)}")
        field = name.replace("-", "_")
        if field in given:
            raise KeyFileError(f"{name} is given twice")
        given[field] = _PARSERS[name](value)
    return replace(defaults or KeyOptions(), **given)


class AuthorizedKeys:
    """The keys that may use this peer, in a file like `authorized_keys` of ssh: one key per line, `#` comments, text
    after the key.

    Options (`KeyOptions`) are written before the key or directly after it. A line with `anyone` instead of a key admits
    all other keys, with the lowest priority.

    The file is read again when it changes (checked at most once per second). If the new text has an error, the old list
    stays in force and a warning is logged, so that an edit cannot open or close the swarm by accident. For the same
    reason an empty file, which an editor may leave for a moment while it writes, counts only if it is still empty at
    the next check.

    path: None: every key is allowed. Raises KeyFileError: the file cannot be read, or a line is wrong; the error has
    the number of the line.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._next_check = clock() + RELOAD_INTERVAL_S
        self._stamp = None if path is None else _file_stamp(path)
        self._empty: tuple[int, int, int] | None = None
        self._listed: dict[bytes | None, KeyOptions] = (
            {ANYONE: KeyOptions()} if path is None else _read_authorized_keys(path)
        )

    def allows(self, curve_raw: bytes) -> bool:
        """Whether the client with this CURVE public key (32 bytes, from the handshake) may connect."""
        return self._options(curve_raw) is not None

    def lists_key(self, curve_raw: bytes) -> bool:
        """Whether the list has a line for this key."""
        return curve_raw in self._current()

    def options_of(self, curve_raw: bytes) -> KeyOptions:
        """The rights of this client. A client whose key was removed has the default rights of keys that are not
        listed."""
        return self._options(curve_raw) or KeyOptions(weight=STRANGER_WEIGHT)

    @property
    def lets_in_strangers(self) -> bool:
        """Whether keys that are not listed may connect."""
        return ANYONE in self._current()

    def _options(self, curve_raw: bytes) -> KeyOptions | None:
        listed = self._current()
        return listed.get(curve_raw) or listed.get(ANYONE)

    def _current(self) -> dict[bytes | None, KeyOptions]:
        if self._path is not None and (now := self._clock()) >= self._next_check:
            self._next_check = now + RELOAD_INTERVAL_S
            self._reload_if_changed(self._path)
        return self._listed

    def _reload_if_changed(self, path: Path) -> None:
        stamp = _file_stamp(path)
        if stamp == self._stamp:
            return
        if stamp is not None and stamp[1] == 0 and stamp != self._empty:
            self._empty = stamp
            return
        self._stamp = stamp
        try:
            self._listed = _read_authorized_keys(path)
        except KeyFileError as error:
            logger.warning("The old list of authorized keys stays in force: %s", error)


def default_key_file() -> Path:
    """`SPLITNET_KEY_FILE`, else `key` in the user's data folder."""
    override = os.environ.get(KEY_FILE_VARIABLE)
    return Path(override) if override else Path(platformdirs.user_data_dir("splitnet")) / "key"


@lru_cache(4096)
def _printable(key: bytes) -> str:
    body = base64.b32encode(key + _checksum(key)).decode("ascii").lower()
    return _PUBLIC_PREFIX + body


def _checksum(raw: bytes) -> bytes:
    return hashlib.sha256(b"splitnet public key" + raw).digest()[:_CHECKSUM_BYTES]


def _create_key_file(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # mkstemp creates the file with mode 0600. link() makes the complete file visible, and fails if it exists already.
    descriptor, temporary = tempfile.mkstemp(prefix=".key-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{_SECRET_PREFIX}{bytes(SigningKey.generate()).hex()}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # there are no hard links, as on Android and FAT
            if not path.exists():
                os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _read_key_file(path: Path) -> SigningKey:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
            raise KeyFileError(f"Others can read the secret key in {path}; run: chmod 600 {path}")
        content = file.read(MAX_KEY_FILE_BYTES)
    try:
        return SigningKey(secret_bytes(content.decode("ascii"), _SECRET_PREFIX))
    except ValueError:  # such as a seed of wrong length; the cause would show the secret
        raise KeyFileError(
            f"{path} does not hold a splitnet key; move the file away, and a new key will be made."
        ) from None


def _read_authorized_keys(path: Path) -> dict[bytes | None, KeyOptions]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"The authorized keys in {path} cannot be read ({error.strerror or error}).") from error
    if len(content) > MAX_KEY_FILE_BYTES:
        raise KeyFileError(f"{path} is longer than {MAX_KEY_FILE_BYTES} bytes; is it a list of keys?")
    listed: dict[bytes | None, KeyOptions] = {}
    for number, line in lines_of(content.decode("utf-8", errors="replace")):
        try:
            key, options = _listed_key(line.split())
        except KeyFileError as error:
            raise KeyFileError(f"{path}, line {number}: {error}") from error
        if listed.setdefault(key, options) != options:
            raise KeyFileError(f"{path}, line {number}: this key is listed before with other options; keep one line.")
    return listed


def without_names(text: str) -> list[str]:
    """The lines of a list of authorized keys, without names and comments."""
    lines = list[str]()
    for words in (line.split() for _, line in lines_of(text)):
        key = 1 if "=" in words[0] else 0
        has_options = len(words) > key + 1 and "=" in words[key + 1]
        lines.append(" ".join(words[: key + 1 + has_options]))
    return lines


def _listed_key(words: list[str]) -> tuple[bytes | None, KeyOptions]:
    """The CURVE key of a line, or `ANYONE`, and its options."""
    texts: list[str] = []
    if "=" in words[0]:
        texts.append(words.pop(0))
    if not words:
        raise KeyFileError("there are options, but no key.")
    if words[1:] and "=" in words[1]:
        texts.append(words[1])
    strangers = words[0] == "anyone"
    key = ANYONE if strangers else PublicKey.parse(words[0]).curve_raw
    defaults = KeyOptions(weight=STRANGER_WEIGHT) if strangers else KeyOptions()
    return key, parse_options(",".join(texts), defaults) if texts else defaults


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


WORK_BITS: Final = 13  # leading zero bits of a digest that proves work: 2**13 attempts on average
MAX_PROOF: Final = (1 << 32) - 1

_MOST_DIGITS = 10  # decimal digits of `MAX_PROOF`
_PREFIX = b"splitnet proof of work\0"


@lru_cache(maxsize=4096)
def has_worked(key: PublicKey, proof: int) -> bool:
    """Whether `proof` is a valid proof of work of this key; 0 never is."""
    return proof > 0 and _is_found(key, proof)


def work(key: PublicKey, stop: threading.Event) -> int:
    """Finds a proof of work of a key, in 3 s of one core on average. Returns 0 if `stop` was set before."""
    for proof in range(1, MAX_PROOF):
        if stop.is_set():
            break
        if _is_found(key, proof):
            return proof
    return 0


def kept_proof(key: PublicKey, file: Path, stop: threading.Event) -> int:
    """The proof of work of a key in `file`; if the file holds none, finds one and writes it. Returns 0 if `stop` was
    set before. Raises OSError: the file cannot be written."""
    try:
        text = file.read_bytes()[:_MOST_DIGITS]
    except FileNotFoundError:
        text = b""
    proof = int(text) if text.isdigit() else 0
    if proof > MAX_PROOF or not has_worked(key, proof):
        proof = work(key, stop)
        if proof:
            file.write_text(str(proof), encoding="utf-8")
    return proof


def _is_found(key: PublicKey, proof: int) -> bool:
    # scrypt releases the GIL, and special hardware computes it hardly faster than a CPU.
    digest = hashlib.scrypt(_PREFIX, salt=key.raw + proof.to_bytes(8, "big"), n=256, r=8, p=1, dklen=4)
    return int.from_bytes(digest, "big") >> (32 - WORK_BITS) == 0
