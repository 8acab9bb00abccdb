"""What of the directory has changed for somebody who knows some of it, in few bytes.

Who asks says in some bytes of each record what it holds: whose, from when, and what it says. So whoever is asked need
not remember what it has told, and anybody can be asked next. What finds no room in an answer comes with the next one.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import zip_longest
from operator import itemgetter
from typing import Final

from splitnet.net.fields import packb
from splitnet.net.messages import ENTRY_BYTES
from splitnet.net.records import KEY_PREFIX_BYTES, PeerRecord

_ENTRY = struct.Struct(f">{KEY_PREFIX_BYTES}s3sI4B")
"""A key, what the record says that is exact, when it was issued, and four measured amounts in steps."""
assert _ENTRY.size == ENTRY_BYTES

RECORD_OVERHEAD: Final = 3
"""Bytes that a record takes in an answer besides its own."""

STEPS_PER_DOUBLING: Final = 4
MATERIAL_STEPS: Final = 2
"""A measured amount has changed if it differs by so many steps: by 30 to 50 percent, or if it is small by little."""
OUTDATED_S: Final = 300.0
"""Coordinates and links are not compared: a record that is older than the latest by so much is told again."""

_TICKS_PER_S, _TICKS = 16, 1 << 32
"""Of when a record was issued; they begin anew after eight years."""
_EXACT = 256
"""Weighs more than any number of steps."""


def entry_of(record: PeerRecord) -> bytes:
    """What is said of a record that is held."""
    amounts = zip((record.block_ms[0], record.queue_ms, record.batch, record.kv_free_positions), _UNITS, strict=True)
    return _ENTRY.pack(
        record.key.raw[:KEY_PREFIX_BYTES],
        _digest(record),
        int(record.issued_at * _TICKS_PER_S) % _TICKS,
        *(_steps(amount, unit) for amount, unit in amounts),
    )


class Told:
    """The records that a peer knows, as it tells them. Thread-safe.

    Args:
        records: the latest of each peer, of those that have left, too.
    """

    def __init__(self, records: Sequence[PeerRecord]) -> None:
        self._by_key: defaultdict[bytes, list[tuple[bytes, PeerRecord]]] = defaultdict(list)
        for record in records:
            entry = entry_of(record)
            self._by_key[entry[:KEY_PREFIX_BYTES]].append((entry, record))
        present = [record for record in records if not record.has_left]
        # Anybody can make keys: those that have cost work come first, so that a flood does not hide them.
        self._newest = sorted(present, key=lambda record: (not record.is_proven, -record.placed_at))

    def changes(self, known: Sequence[bytes], since: float, most: int) -> tuple[bytes, list[PeerRecord]]:
        """What to tell somebody.

        Args:
            known: what is said of the records that it holds, those first that it needs most.
            since: of all others it is told of those that are where they are since then, Unix time in seconds.
            most: bytes of records.

        Returns:
            A bit for each that is known: whether it is still there, the lowest bit of a byte first. And records that
            are new or say something else, one of the ones and one of the others in turns as far as there is room.
        """
        bits = 0
        changed: list[tuple[int, PeerRecord]] = []
        for at, entry in enumerate(known):
            for latest, record in self._by_key.get(entry[:KEY_PREFIX_BYTES], ()):
                if not record.has_left:
                    bits |= 1 << at
                if weight := _weight(entry, latest):
                    changed.append((weight, record))
        changed.sort(key=itemgetter(0), reverse=True)
        room = most
        told: list[PeerRecord] = []
        for record in _in_turns([record for _, record in changed], self._unlisted(known, since)):
            size = len(record.signed) + RECORD_OVERHEAD
            if size > room:
                break
            told.append(record)
            room -= size
        return bits.to_bytes((len(known) + 7) // 8, "little"), told

    def _unlisted(self, known: Sequence[bytes], since: float) -> Iterator[PeerRecord]:
        listed = {entry[:KEY_PREFIX_BYTES] for entry in known}
        return (
            record
            for record in self._newest
            if record.placed_at >= since and record.key.raw[:KEY_PREFIX_BYTES] not in listed
        )


def still_there(present: bytes, count: int) -> list[bool]:
    """For each of so many entries whether it is still there."""
    bits = int.from_bytes(present, "little")
    return [bool(bits >> at & 1) for at in range(count)]


def _in_turns(ones: Sequence[PeerRecord], others: Iterator[PeerRecord]) -> Iterator[PeerRecord]:
    for pair in zip_longest(ones, others):
        yield from filter(None, pair)


def _digest(record: PeerRecord) -> bytes:
    exact = [
        *(record.model_name, record.address, record.start, record.end, record.num_blocks, record.protocol),
        *(record.codecs, record.device, record.dtype, record.max_blocks, record.moving_to, record.serves),
        *(record.version, record.state_bytes, record.relays, record.relay_port),
    ]
    return blake2b(packb(exact), digest_size=3).digest()


_UNITS: Final = (0.1, 5.0, 0.5, 16.0)
"""Of ms per block, ms of waiting, positions in a pass, free positions: below these a step is about a quarter of it."""


def _steps(amount: float, unit: float) -> int:
    return min(round(STEPS_PER_DOUBLING * math.log2(1 + amount / unit)), 255)


def _weight(held: bytes, latest: bytes) -> int:
    """How much it matters to whoever holds the one that there is the other; 0: not at all."""
    _, exact, issued, *amounts = _ENTRY.unpack(held)
    _, latest_exact, latest_issued, *latest_amounts = _ENTRY.unpack(latest)
    later = (latest_issued - issued) % _TICKS
    if later > _TICKS // 2:  # it is earlier
        return 0
    if exact != latest_exact:
        return _EXACT
    most = max(abs(one - other) for one, other in zip(amounts, latest_amounts, strict=True))
    return most if most >= MATERIAL_STEPS else int(later >= OUTDATED_S * _TICKS_PER_S)
