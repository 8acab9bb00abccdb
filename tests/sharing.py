"""How two workers share the tests: a file, or files that share daemons, goes to one; the longest go first."""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

DAEMONS = "files that share the daemons of the demo model"
LONGEST: dict[str, str] = {
    # file: what goes to one worker
    "tests/e2e/test_commands.py": DAEMONS,
    "tests/e2e/test_serve_command.py": DAEMONS,
    "tests/e2e/test_examples.py": DAEMONS,
    "tests/e2e/test_docs_commands.py": DAEMONS,
    "tests/e2e/test_real_model.py": DAEMONS,
    "tests/e2e/test_leaving.py": DAEMONS,
    "tests/e2e/test_metrics.py": DAEMONS,
}
"""From long to short; then come the others, so that the two workers end together."""

_PLACE = {file: place for place, file in enumerate(LONGEST)}


class FilesTogether(LoadScopeScheduling):
    """Gives each worker the next file, or all of the next files that share something, once it has nothing to do."""

    def _split_scope(self, nodeid: str) -> str:
        file = _file(nodeid)
        return LONGEST.get(file, file)


def from_long_to_short(item: pytest.Item) -> int:
    """A key to sort by, which keeps the order within a file."""
    return _PLACE.get(_file(item.nodeid), len(_PLACE))


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]
