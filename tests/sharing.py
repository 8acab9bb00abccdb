"""How workers share the tests: each takes a file, or files that share daemons, and the longest come first."""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

WITH_DAEMONS = (
    "tests/e2e/test_commands.py",
    "tests/e2e/test_docs_commands.py",
    "tests/e2e/test_examples.py",
    "tests/e2e/test_leaving.py",
    "tests/e2e/test_metrics.py",
    "tests/e2e/test_real_model.py",
    "tests/e2e/test_serve_command.py",
)
"""They share the three daemons of the demo model, which take long to start."""
LONG = (
    "tests/e2e/test_dashboard.py",
    "tests/e2e/test_tune_command.py",
    "tests/e2e/test_codec_quality.py",
    "tests/swarm/test_speculation.py",
    "tests/swarm/test_failover.py",
    "tests/swarm/test_tuning_trouble.py",
    "tests/unit/test_span_families.py",
    "tests/unit/test_gpu_stand_in.py",
    "tests/unit/test_held_weights.py",
)
"""Others that take about 20 s of CPU time and more. If one of them came last, a worker would wait for the other.

Not those that bound seconds, as tests/swarm/test_moving.py does: they come when the daemons are done.
"""

_PLACE = {file: place for place, file in enumerate((*WITH_DAEMONS, *LONG))}


class FilesTogether(LoadScopeScheduling):
    """Gives a worker that has nothing more to do the next file, or all that share the daemons."""

    def _split_scope(self, nodeid: str) -> str:
        file = _file(nodeid)
        return WITH_DAEMONS[0] if file in WITH_DAEMONS else file


def longest_first(item: pytest.Item) -> int:
    """A key to sort by; the order within a file stays."""
    return _PLACE.get(_file(item.nodeid), len(_PLACE))


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]
