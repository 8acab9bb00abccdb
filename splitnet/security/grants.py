"""What the owner of a peer grants a key: the options of a line of `authorized_keys`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from splitnet.errors import KeyFileError, SplitnetError
from splitnet.limits import parse_bytes


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """What a key gets.

    Attributes:
        weight: in proportion to it keys share the device and the KV memory when several want them.
        kv: bytes of KV memory that its sessions may reserve; None: any.
        train: whether it may train: gradients, and passes kept for them.
        tokens_per_minute: positions that the peer computes for it in a minute; None: any.
    """

    weight: float = 1.0
    kv: int | None = None
    train: bool = True
    tokens_per_minute: int | None = None


STRANGER_WEIGHT: Final = 0.01
"""Of a key that is not listed where others are, unless its line says another."""


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


_PARSERS: dict[str, Callable[[str], Any]] = {
    "weight": _weight,
    "kv": _kv,
    "train": _train,
    "tokens-per-minute": _tokens,
}


def is_options(word: str) -> bool:
    """Whether a word beside a key is meant as options."""
    return word.partition("=")[0] in _PARSERS


def parse_options(text: str, defaults: KeyOptions | None = None) -> KeyOptions:
    """The options in a text such as `weight=4,kv=8GiB,train=no`.

    Raises:
        KeyFileError: there is no such option, it is given twice, or its value is none.
    """
    given: dict[str, Any] = {}
    for option in text.split(","):
        name, _, value = option.partition("=")
        if name not in _PARSERS:
            raise KeyFileError(f"{name!r} is no option of a key: there are {', '.join(_PARSERS)}")
        field = name.replace("-", "_")
        if field in given:
            raise KeyFileError(f"{name} is given twice")
        given[field] = _PARSERS[name](value)
    return replace(defaults or KeyOptions(), **given)
