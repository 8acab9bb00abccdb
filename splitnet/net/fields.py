"""What the fields of messages may hold: a check returns the value to use, or raises `ProtocolError`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from splitnet.errors import ProtocolError

Check = Callable[[Any], Any]


def uint(limit: int) -> Check:
    """An integer in `0..limit`."""

    def check(value: Any) -> int:
        if type(value) is not int or not 0 <= value <= limit:
            raise ProtocolError(f"expected an integer in 0..{limit}")
        return value

    return check


def blob(*lengths: int) -> Check:
    """Bytes of one of these lengths."""

    def check(value: Any) -> bytes:
        if type(value) is not bytes or len(value) not in lengths:
            raise ProtocolError(f"expected {' or '.join(map(str, lengths))} bytes")
        return value

    return check


def text(limit: int) -> Check:
    """Text of at most `limit` characters."""

    def check(value: Any) -> str:
        if type(value) is not str or len(value) > limit:
            raise ProtocolError(f"expected text of at most {limit} characters")
        return value

    return check


def flag(value: Any) -> bool:
    """A boolean."""
    if type(value) is not bool:
        raise ProtocolError("expected a boolean")
    return value


def milliseconds(value: Any) -> float:
    """A finite number that is not negative."""
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ProtocolError("expected a non-negative number of milliseconds")
    return float(value)


def records(kind: Callable[..., Any], limits: Sequence[int], *, most: int) -> Check:
    """At most `most` records of integers, each within its limit, as a tuple of `kind`."""
    width = len(limits)

    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(cast("list[Any]", value)) > most:
            raise ProtocolError(f"expected a list of at most {most} records")
        records: list[Any] = []
        for record in cast("list[Any]", value):
            if type(record) is not list or len(cast("list[Any]", record)) != width:
                raise ProtocolError(f"expected records of {width} integers")
            for number, limit in zip(cast("list[Any]", record), limits, strict=True):
                if type(number) is not int or not 0 <= number <= limit:
                    raise ProtocolError(f"expected an integer in 0..{limit}")
            records.append(kind(*cast("list[int]", record)))
        return tuple(records)

    return check


def optional(check: Check) -> Check:
    """None, or what `check` accepts."""
    return lambda value: None if value is None else check(value)


def numbers(limit: int, *, most: int) -> Check:
    """At most `most` integers in `0..limit`, as a tuple."""
    check_one = uint(limit)

    def check(value: Any) -> tuple[int, ...]:
        if type(value) is not list or len(cast("list[Any]", value)) > most:
            raise ProtocolError(f"expected a list of at most {most} integers")
        return tuple(check_one(number) for number in cast("list[Any]", value))

    return check
