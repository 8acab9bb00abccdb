"""Options beside a key in a file of keys: `weight=4,kv=8GiB,train=no,tokens-per-minute=6000`, as ssh has them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from splitnet.errors import KeyFileError

_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d{1,15})(|[KMGT]iB)")
_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?")


@dataclass(frozen=True)
class KeyOptions:
    """What the holder of a key may use.

    Attributes:
        weight: of its share where several want the same; above 0.
        kv_bytes: of KV memory at most; None: no bound of its own.
        train: whether it may train.
        tokens_per_minute: at most; None: no bound.
    """

    weight: float = 1.0
    kv_bytes: int | None = None
    train: bool = True
    tokens_per_minute: int | None = None


def is_options(word: str) -> bool:
    """Whether a word beside a key is meant as options."""
    return word.partition("=")[0] in _OPTIONS


def parse_options(text: str) -> KeyOptions:
    """Reads options that are separated by commas.

    Raises:
        KeyFileError: one is unknown, given twice, or has a value that it cannot have.
    """
    given: dict[str, Any] = {}
    for option in text.split(","):
        name, _, value = option.partition("=")
        if name not in _OPTIONS:
            raise KeyFileError(f"{name!r} is no option of a key: use {', '.join(_OPTIONS)}")
        field, read, expected = _OPTIONS[name]
        if field in given:
            raise KeyFileError(f"{name} is given twice: leave one out")
        try:
            given[field] = read(value)
        except (ValueError, KeyError):
            raise KeyFileError(f"{option!r} is no option of a key: write {name}={expected}") from None
    return KeyOptions(**given)


def _weight(value: str) -> float:
    if not _NUMBER.fullmatch(value) or not float(value):
        raise ValueError
    return float(value)


def _size(value: str) -> int:
    match = _SIZE.fullmatch(value)
    if match is None:
        raise ValueError
    return int(match[1]) * _UNITS[match[2]]


def _count(value: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,11}", value):
        raise ValueError
    return int(value)


_OPTIONS = {
    "weight": ("weight", _weight, "4 or another number above 0"),
    "kv": ("kv_bytes", _size, "8GiB, 512MiB or a number of bytes"),
    "train": ("train", {"yes": True, "no": False}.__getitem__, "yes or no"),
    "tokens-per-minute": ("tokens_per_minute", _count, "6000 or another number above 0"),
}
