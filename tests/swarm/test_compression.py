"""Compression of a model by the peers of a swarm."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.transfer.fetching import PeerQuestions
from splitnet.compress.blocks import compress_blocks
from splitnet.compress.checkpoint_folder import compress_checkpoint
from splitnet.compress.over_peers import compress_over_peers
from splitnet.compress.rounding import Compression, sequence_lengths
from tests.swarm.harness import LocalSwarm, local_swarm
from tests.unit.random_models import random_checkpoint

IDS = torch.randint(0, 300, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
HOW = Compression(4, 32, sequence_lengths(len(IDS), 96))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("model") / "floats", blocks=6)


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def _options(tmp_path: Path, *keys: str) -> dict[str, Any]:
    clients = tmp_path / "clients"
    clients.write_text("\n".join(keys), encoding="utf-8")
    return {"compress_for": clients, "compress_folder": tmp_path / "jobs"}


def _compress(swarm: LocalSwarm, model: Path, folder: Path, progress: Callable[[int], None] = lambda _: None) -> None:
    checkpoint = Checkpoint.open(model)
    with PeerQuestions(swarm.client.identity) as asking:
        find = partial(swarm.client.peers, fresh=True)
        run = partial(compress_over_peers, checkpoint, asking, find, how=HOW, progress=progress)
        compress_checkpoint(checkpoint, IDS, folder, HOW, run)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of the files that one process writes."""
    folder, checkpoint = tmp_path_factory.mktemp("alone"), Checkpoint.open(model)
    compress_checkpoint(checkpoint, IDS, folder, HOW, partial(compress_blocks, checkpoint, 0, 6, how=HOW))
    return _digests(folder)


def test_three_peers_write_the_bytes_of_one_process(model: Path, alone: dict[str, str], tmp_path: Path) -> None:
    told: list[int] = []
    with local_swarm(model, [(0, 2), (2, 4), (4, 6)], **_options(tmp_path, "anyone")) as swarm:
        _compress(swarm, model, tmp_path / "few", told.append)
    assert told == [0, 1, 2, 2, 3, 4, 4, 5, 6]
    assert _digests(tmp_path / "few") == alone
    opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "few")
    with local_swarm(tmp_path / "few", [(0, 3), (3, 6)], dtype="float32") as swarm, torch.inference_mode():
        ids = torch.tensor([IDS[:40]])
        torch.testing.assert_close(swarm.model()(ids).logits, opened(ids).logits, rtol=1e-3, atol=1e-3)
