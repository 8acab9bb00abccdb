"""How workers share the tests: each takes one file after the other. One worker runs all files with daemons, and they
run first."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

import pytest
from xdist.scheduler import LoadScopeScheduling


class FilesTogether(LoadScopeScheduling):
    """Gives an idle worker the next file, or all files of a folder `e2e`, which share daemons."""

    def _split_scope(self, nodeid: str) -> str:
        file = PurePosixPath(nodeid.partition("::")[0])
        return str(file.parent if file.parent.name == "e2e" else file)


def longest_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Files with daemons come first, so that no worker waits for another at the end; then files with many tests.

    Tests of whole peers come last: some of them limit times, and the daemons have ended by then.
    """
    counts = Counter(_file(item) for item in items)
    kinds = {_file(item): _kind(item) for item in sorted(items, key=_kind, reverse=True)}
    return sorted(items, key=lambda item: (kinds[_file(item)], -counts[_file(item)], _file(item)))


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def _kind(item: pytest.Item) -> int:
    return 0 if item.get_closest_marker("e2e") else 2 if item.get_closest_marker("swarm") else 1
