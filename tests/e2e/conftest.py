"""What all end-to-end tests share: three daemons of the demo model, and the same model in plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.e2e.daemons import Daemon, daemons
from tests.e2e.small_model import small_model

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


@pytest.fixture(scope="session")
def small(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with the tokenizer of the demo model."""
    return small_model(tmp_path_factory.mktemp("small"), demo_checkpoint, seed=0)


@pytest.fixture(scope="session")
def tokenizer(demo_checkpoint: Path) -> Any:
    """Its tokenizer."""
    return AutoTokenizer.from_pretrained(demo_checkpoint, padding_side="left")


@pytest.fixture(scope="session")
def local(demo_checkpoint: Path) -> PreTrainedModel:
    """The demo model in plain transformers."""
    return AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32).eval()
