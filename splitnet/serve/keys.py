"""Who may use the server: the keys of a file."""

from __future__ import annotations

import hmac
from pathlib import Path

from splitnet.errors import KeyFileError


class ApiKeys:
    """Keys that are accepted; without any, everybody is."""

    def __init__(self, keys: list[str]) -> None:
        self._keys = [key.encode() for key in keys]

    @classmethod
    def read(cls, file: Path | None) -> ApiKeys:
        """The keys of a file, one per line; lines that begin with # are comments.

        Raises:
            KeyFileError: it cannot be read or holds no key.
        """
        if file is None:
            return cls([])
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not a text file"
            raise KeyFileError(
                f"the API keys in {file} cannot be read ({reason}): give a file with one key per line"
            ) from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise KeyFileError(f"{file} holds no API key: write one per line, or leave out --api-key-file")
        return cls(keys)

    @property
    def required(self) -> bool:
        return bool(self._keys)

    def accept(self, given: bytes) -> bool:
        """Whether a key is one of them; how long that takes tells nothing about them."""
        return sum(hmac.compare_digest(given, key) for key in self._keys) > 0
