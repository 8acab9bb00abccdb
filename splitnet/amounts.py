"""Amounts of memory as users write them."""

from __future__ import annotations

import re

from splitnet.errors import SplitnetError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

_LEAST_BYTES = 10**6


def parse_bytes(text: str) -> int:
    """Bytes in a text such as `4GiB` or `500M`; of a number alone, which is bytes, a megabyte is the least but none.

    Raises:
        SplitnetError: it is no amount, or so few bytes that another unit must be meant.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise SplitnetError(f"{text!r} is not an amount of memory: write it as 4GiB or 500MB")
    amount = float(match[1]) * _UNITS[match[2]]
    if text.strip() == match[1] and 0 < amount < _LEAST_BYTES:
        meant = f"{match[1]}{'GiB' if amount <= 1024 else 'MiB'}"
        raise SplitnetError(f"{match[1]} is an amount of {match[1]} bytes: did you mean {meant}? Write the unit")
    return int(amount)
