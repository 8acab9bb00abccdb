"""Rows of a session: one definition of what a fork does, for KV caches and for logs of sent activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from splitnet.errors import ProtocolError
from splitnet.net.messages import Fork

Row = TypeVar("Row")


def fork_rows(rows: Mapping[int, Row], forks: Sequence[Fork], copy: Callable[[Row], Row]) -> dict[int, Row]:
    """The rows after `forks`; rows that no fork names are dropped, and go on as their last fork instead of a copy.

    Row ids are never used twice by a client, so a row that exists already was forked by an earlier copy of the same
    step: applying the forks again changes nothing.

    Raises:
        ProtocolError: a fork names a source that does not exist.
    """
    forked: dict[int, Row] = {}
    named = {fork.row for fork in forks}
    last = {fork.source: fork.row for fork in forks if fork.row not in rows and fork.source not in named}
    for fork in forks:
        if fork.row in rows:
            forked[fork.row] = rows[fork.row]
        elif fork.source in rows:
            source = rows[fork.source]
            forked[fork.row] = source if last.get(fork.source) == fork.row else copy(source)
        else:
            raise ProtocolError(f"row {fork.row} cannot continue from row {fork.source}, which does not exist")
    return forked
