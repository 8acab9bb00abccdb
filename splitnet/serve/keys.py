"""Who may use the server: the keys of a file, and what each of them may use."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

from splitnet.errors import KeyFileError
from splitnet.net.key_options import KeyOptions, is_options, parse_options
from splitnet.serve.quota import TokenQuota
from splitnet.serve.shares import Client


class ApiKeys:
    """Keys that are accepted, with the options of each; without any, everybody is."""

    def __init__(self, keys: Mapping[str, KeyOptions]) -> None:
        self._clients = [
            (key.encode(), Client(f"key {number}", options.weight, _quota(options)))
            for number, (key, options) in enumerate(keys.items(), start=1)
        ]

    @classmethod
    def read(cls, file: Path | None) -> ApiKeys:
        """The keys of a file, one per line, with their options before or after them; # begins a comment.

        Raises:
            KeyFileError: it cannot be read, holds no key, or a line is wrong.
        """
        if file is None:
            return cls({})
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not a text file"
            raise KeyFileError(
                f"the API keys in {file} cannot be read ({reason}): give a file with one key per line"
            ) from None
        keys: dict[str, KeyOptions] = {}
        for number, line in enumerate(lines, start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                try:
                    key, options = _key_of(line)
                    if key in keys:
                        raise KeyFileError("this key is there already: leave it out")
                except KeyFileError as error:
                    raise KeyFileError(f"{file}, line {number}: {error}") from None
                keys[key] = options
        if not keys:
            raise KeyFileError(f"{file} holds no API key: write one per line, or leave out --api-key-file")
        return cls(keys)

    @property
    def required(self) -> bool:
        return bool(self._clients)

    def __len__(self) -> int:
        return len(self._clients)

    def client_of(self, given: bytes) -> Client | None:
        """Whose key it is; None: nobody's. How long that takes tells nothing about the keys."""
        matching = [client for key, client in self._clients if hmac.compare_digest(given, key)]
        return matching[0] if matching else None


def _key_of(line: str) -> tuple[str, KeyOptions]:
    words = line.split()
    comment = next((index for index, word in enumerate(words) if word.startswith("#")), len(words))
    keys = [word for word in words[:comment] if not is_options(word)]
    options = [word for word in words[:comment] if is_options(word)]
    if len(keys) != 1 or len(options) > 1:
        raise KeyFileError("write one key, its options before or after it without spaces, and a comment after #")
    read = parse_options(options[0]) if options else KeyOptions()
    if read.kv is not None or not read.train:
        raise KeyFileError("kv and train are for authorized_keys of peers: leave them out of a file of API keys")
    return keys[0], read


def _quota(options: KeyOptions) -> TokenQuota | None:
    return TokenQuota(options.tokens_per_minute) if options.tokens_per_minute is not None else None
