"""Daemons that all end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.daemons import Daemon, daemons

SPANS = [(0, 7), (7, 19), (19, 30)]


@pytest.fixture(scope="session")
def trio(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """Three daemons that serve the demo model, one span each."""
    with daemons(tmp_path_factory.mktemp("trio"), demo_checkpoint, SPANS, "--kv-memory", "256MiB") as running:
        yield running


@pytest.fixture(scope="session")
def address(trio: list[Daemon]) -> str:
    """Where to join the swarm of the three daemons."""
    return trio[0].address()
