"""Fields of messages and records: checks of their values, and their order in a msgpack array, which is the order of the
dataclass.

A check takes a value from the wire, and returns the value to use or raises `ProtocolError`.

Later versions append fields, each with a default. A reader ignores fields after the last known field, and uses
the default of a missing field. A writer omits trailing appended fields that hold their defaults.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgpack  # pyright: ignore[reportMissingTypeStubs]

from splitnet.errors import ProtocolError
from splitnet.logs import printable

Check = Callable[[Any], Any]

# msgpack has no type annotations.
packb = cast("Callable[[list[Any]], bytes]", msgpack.packb)  # pyright: ignore[reportUnknownMemberType]
_unpackb = cast("Callable[..., Any]", msgpack.unpackb)  # pyright: ignore[reportUnknownMemberType]
_Unpacker = cast("Callable[..., Any]", msgpack.Unpacker)  # pyright: ignore[reportUnknownMemberType]


def unpack_array(data: bytes | memoryview, *, most_items: int, most_text: int, most_bytes: int) -> list[Any]:
    """Unpacks an untrusted msgpack array.

    The bounds apply to every array (items), text (UTF-8 bytes) and byte string (bytes) within it. They are checked
    before memory is allocated. Raises ProtocolError: the data is not a msgpack array, or breaks a bound.
    """
    bounds = {"max_array_len": most_items, "max_str_len": most_text, "max_bin_len": most_bytes}
    try:
        values: list[Any] = _unpackb(data, max_map_len=0, max_ext_len=0, **bounds)
    except Exception as error:  # msgpack documents no common base class of its errors
        raise ProtocolError(f"not valid msgpack: {error}") from None
    if type(values) is not list:
        raise ProtocolError("not a msgpack array")
    return values


class ValueReader:
    """Reads untrusted msgpack value by value, and arrays only where the caller expects one. An empty array takes one
    byte on the wire and 64 bytes in memory, so unexpected nested lists must not be built."""

    def __init__(self, data: bytes | memoryview, *, most_text: int, most_bytes: int) -> None:
        bounds = {"max_array_len": 0, "max_map_len": 0, "max_ext_len": 0}
        size = max(len(data), 1)
        self._unpacker = _Unpacker(max_buffer_size=size, max_str_len=most_text, max_bin_len=most_bytes, **bounds)
        self._unpacker.feed(data)
        self._end = len(data)

    def array(self, most: int) -> int:
        """Reads the header of an array, and returns its length. Raises ProtocolError: the next value is not an array,
        or has more than `most` values."""
        count: int = self._unpack("read_array_header")
        if count > most:
            raise ProtocolError(f"expected an array of at most {most} values")
        return count

    def value(self) -> Any:
        """The next value: a scalar, text, bytes or an empty array. Raises ProtocolError: there is no value left, or
        the value breaks a bound."""
        return self._unpack("unpack")

    def check_end(self) -> None:
        """Raises ProtocolError: values are left."""
        if self._unpacker.tell() != self._end:
            raise ProtocolError("more values than expected")

    def _unpack(self, how: str) -> Any:
        try:
            return getattr(self._unpacker, how)()
        except Exception as error:  # see `unpack_array`
            raise ProtocolError(f"unexpected msgpack: {error}") from None


def wire_field(check: Check, write: Check | None = None, **options: Any) -> Any:
    """A dataclass field that is on the wire and always written. write: converts the value to the form that `check`
    takes; None: no conversion."""
    return dataclasses.field(metadata={"check": check, "write": write}, **options)


def appended_field(check: Check, default: Any, write: Check | None = None) -> Any:
    """A dataclass field that is on the wire after all `wire_field` fields; its default is omitted at the end."""
    return dataclasses.field(default=default, metadata={"check": check, "write": write, "appended": True})


class MessageLayout:
    """The fields of a dataclass that are on the wire (made by `wire_field` and `appended_field`), in order."""

    def __init__(self, kind: type[Any]) -> None:
        fields = [field for field in dataclasses.fields(kind) if "check" in field.metadata]
        self.names = [field.name for field in fields]
        self._kind = kind.__name__
        self._checks: list[tuple[str, Check]] = [(field.name, field.metadata["check"]) for field in fields]
        self._required = sum(field.default is dataclasses.MISSING for field in fields)
        self._defaults = [field.default for field in fields]
        self._always_written = sum("appended" not in field.metadata for field in fields)
        self._writes = [(at, write) for at, field in enumerate(fields) if (write := field.metadata["write"])]

    def write_fields(self, message: Any) -> list[Any]:
        """The values to send, without trailing appended fields that hold their defaults."""
        values = [getattr(message, name) for name in self.names]
        while len(values) > self._always_written and values[-1] == self._defaults[len(values) - 1]:
            values.pop()
        for at, write in self._writes:
            if at < len(values):
                values[at] = write(values[at])
        return values

    def read_fields(self, values: Sequence[Any]) -> dict[str, Any]:
        """The fields in `values`, by name; all other fields have defaults. Raises ProtocolError: a field is missing or
        invalid; the error names it."""
        if len(values) < self._required:
            raise ProtocolError(f"{self._kind} lacks the field {self.names[len(values)]}")
        fields: dict[str, Any] = {}
        for (name, check), value in zip(self._checks, values, strict=False):
            try:
                fields[name] = check(value)
            except ProtocolError as error:
                raise ProtocolError(f"{self._kind}.{name}: {error}") from None
        return fields


def uint(limit: int) -> Check:
    """An integer in `0..limit`."""

    def check(value: Any) -> int:
        if type(value) is not int or not 0 <= value <= limit:
            raise ProtocolError(f"expected an integer in 0..{limit}")
        return value

    return check


def number(low: float, high: float) -> Check:
    """A number in `low..high`, as a float."""

    def check(value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ProtocolError(f"expected a number in {low:g}..{high:g}")
        return float(value)

    return check


milliseconds = number(0, sys.float_info.max)  # any finite number that is not negative


def blob(*lengths: int) -> Check:
    """Bytes whose length is in `lengths`."""

    def check(value: Any) -> bytes:
        if type(value) is not bytes or len(value) not in lengths:
            raise ProtocolError(f"expected {' or '.join(map(str, lengths))} bytes")
        return value

    return check


def joined(length: int, *, least: int = 0, most: int) -> Check:
    """`least` to `most` concatenated byte strings of `length` bytes each, as a tuple."""

    def check(value: Any) -> tuple[bytes, ...]:
        if type(value) is not bytes or len(value) % length or not least <= len(value) // length <= most:
            raise ProtocolError(f"expected {least} to {most} times {length} bytes")
        return tuple(value[at : at + length] for at in range(0, len(value), length))

    return check


def text(limit: int) -> Check:
    """Text of at most `limit` characters, made safe for logs and terminals by `printable`."""

    def check(value: Any) -> str:
        if type(value) is not str or len(value) > limit:
            raise ProtocolError(f"expected text of at most {limit} characters")
        return printable(value)[:limit]  # escapes may lengthen the text, and the next receiver checks the limit, too

    return check


def matching(pattern: re.Pattern[str]) -> Check:
    """Text that `pattern` matches completely."""

    def check(value: Any) -> str:
        if type(value) is not str or not pattern.fullmatch(value):
            raise ProtocolError(f"expected text that matches {pattern.pattern}")
        return value

    return check


def flag(value: Any) -> bool:
    """A boolean."""
    if type(value) is not bool:
        raise ProtocolError("expected a boolean")
    return value


def records(kind: Callable[..., Any], limits: Sequence[int], *, most: int) -> Check:
    """At most `most` records of integers, each within its limit, as a tuple of `kind`."""
    width = len(limits)

    def check(value: Any) -> tuple[Any, ...]:
        rows: list[Any] = value
        if type(value) is not list or len(rows) > most:
            raise ProtocolError(f"expected a list of at most {most} records")
        for row in rows:
            numbers: list[Any] = row
            if type(row) is not list or len(numbers) != width:
                raise ProtocolError(f"expected records of {width} integers")
            for number, limit in zip(numbers, limits, strict=True):
                if type(number) is not int or not 0 <= number <= limit:
                    raise ProtocolError(f"expected an integer in 0..{limit}")
        return tuple([kind(*row) for row in rows])

    return check


def optional(check: Check) -> Check:
    """None, or a value that `check` accepts."""
    return lambda value: None if value is None else check(value)


def several(check_one: Check, *, least: int = 0, most: int) -> Check:
    """`least` to `most` values that `check_one` accepts, as a tuple."""

    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not least <= len(cast("Sequence[Any]", value)) <= most:
            raise ProtocolError(f"expected a list of {least} to {most} values")
        return tuple(check_one(item) for item in cast("Sequence[Any]", value))

    return check


def row(kind: Callable[..., Any], *checks: Check) -> Check:
    """A list with one value for each of `checks`, as a `kind`."""

    def check(value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(cast("Sequence[Any]", value)) != len(checks):
            raise ProtocolError(f"expected a list of {len(checks)} values")
        return kind(*(check_one(item) for check_one, item in zip(checks, cast("Sequence[Any]", value), strict=True)))

    return check
