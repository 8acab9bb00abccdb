"""Formats in which peers may hold keys and values; records, options and blocks use the same names."""

from __future__ import annotations

from typing import Final, Literal

KVForms = Literal["float16", "int8", "int8-int4", "int4"]
KV_BITS: Final = {"auto": (32, 32), "float16": (16, 16), "int8": (8, 8), "int8-int4": (8, 4), "int4": (4, 4)}
"""Bits of keys and of values; auto: the type in which blocks compute, with 32 or 16 bits."""
