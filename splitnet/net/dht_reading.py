"""What the nodes of the DHT answer about some keys: all that hold them are asked, and what they say is put together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from splitnet.errors import NotAuthorized, ProtocolError
from splitnet.net.dht_node import import_hivemind
from splitnet.net.dht_places import RECORDS_PER_KEY
from splitnet.net.records import PeerRecord, stored_record

SEARCH_S: Final = 5.0
"""Nodes that are silent cannot keep a search from ending; whoever has answered until then counts."""
MOST_PER_KEY: Final = 4 * RECORDS_PER_KEY
"""What is read under one key. A node of an earlier version, or one that lies, may hold any number."""


@dataclass(frozen=True)
class Reading:
    """What came of asking.

    Attributes:
        records: by key, those found there with the subkeys that they stand under, of each the latest.
        vouched: one of the nodes that are always asked has answered in full.
    """

    records: Mapping[str, Sequence[tuple[str, PeerRecord]]]
    vouched: bool

    @property
    def is_empty(self) -> bool:
        return not any(self.records.values())


_heard: ContextVar[list[tuple[Any, Mapping[Any, Any]]] | None] = ContextVar("_heard", default=None)
"""Of one reading: nodes that have answered, and what they hold under each key that they were asked for."""


def overhear(protocol: Any) -> None:
    """Has `read` learn what each node answers, but for records that are not valid.

    hivemind would drop all of an answer for one that is not: so one that is valid by the clock of one node, and not by
    that of another, could hide all others.
    """
    call_find = protocol.call_find
    is_valid = protocol._validate_record
    protocol._validate_dictionary = partial(_leave_valid, is_valid, protocol.serializer.dumps)

    async def heard_call_find(peer: Any, keys: Collection[Any]) -> Any:
        answer = await call_find(peer, keys)
        heard = _heard.get()
        if heard is not None and answer is not None:
            heard.append((peer, {key: found.value if found else {} for key, (found, _) in answer.items()}))
        return answer

    protocol.call_find = heard_call_find


async def read(node: Any, keys: Sequence[str], always: Collection[Any]) -> Reading:
    """Reads what stands under some keys.

    Args:
        node: hivemind's, with a protocol that is overheard.
        always: nodes to ask wherever the keys belong, as those that are nearest may all be of one mind; the blacklist
            of nodes that were silent lately holds for them, too.
    """
    ids = {key: import_hivemind().dht_id(key) for key in keys}
    heard: list[tuple[Any, Mapping[Any, Any]]] = []
    _heard.set(heard)
    with suppress(TimeoutError):
        await asyncio.wait_for(node.find_nearest_nodes(list(ids.values())), SEARCH_S)
    told = {(peer, key) for peer, held in heard for key in held}
    # One key in a message, so that none becomes too long.
    missing = [(peer, key) for peer in always for key in ids.values() if (peer, key) not in told]
    await asyncio.gather(*(node._call_find_with_blacklist(peer, [key]) for peer, key in missing))
    told = {(peer, key) for peer, held in heard for key in held}
    own = {key: held.value for key in ids.values() if (held := node.protocol.storage.get(key))}
    sources = [own, *(held for _, held in heard)]
    return Reading(
        {key: _together([held[key_id] for held in sources if key_id in held]) for key, key_id in ids.items()},
        not always or any(all((peer, key) in told for key in ids.values()) for peer in always),
    )


def _leave_valid(is_valid: Callable[..., bool], packed: Callable[[Any], bytes], key: bytes, dictionary: Any) -> bool:
    with dictionary.freeze():
        for index, (subkey, entry) in enumerate(list(dictionary.items())):
            if index >= MOST_PER_KEY or not is_valid(key, packed(subkey), entry.value, entry.expiration_time):
                del dictionary[subkey]
    return True


def _together(answers: Sequence[Any]) -> list[tuple[str, PeerRecord]]:
    """Of each subkey the latest record; of too many, those that have cost work, and that most nodes know."""
    latest: dict[str, PeerRecord] = {}
    known = Counter[str]()
    for answer in answers:
        for subkey, entry in answer.items() if hasattr(answer, "items") else ():
            with suppress(ProtocolError, NotAuthorized, TypeError):
                record = stored_record(entry.value)
                known[subkey] += 1
                if subkey not in latest or record.issued_at > latest[subkey].issued_at:
                    latest[subkey] = record
    records = list(latest.items())
    if len(records) > MOST_PER_KEY:
        records.sort(key=lambda item: (item[1].is_proven, known[item[0]]), reverse=True)
    return records[:MOST_PER_KEY]
