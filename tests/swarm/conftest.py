"""Fixtures of most swarm tests: a small random llama, the same model in transformers for comparison, and peers that a
test may end."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitnet.directory.dht_directory import DhtDirectory
from tests.swarm.harness import SPANS, LocalSwarm, dht_node, local_swarm
from tests.unit.random_models import random_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def local(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def node() -> Iterator[DhtDirectory]:
    """A DHT node for all swarms of a module; swarms of the same model at this node find each other's peers."""
    with dht_node() as directory:
        yield directory


@pytest.fixture
def own_folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A checkpoint with weights that no other test has, so that its peers do not find other tests' peers at the DHT
    node."""
    return random_checkpoint("llama", tmp_path / "own", seed=zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def own_local(own_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(own_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pairs(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    """Two peers for every span."""
    with local_swarm(folder, SPANS * 2, node=node) as swarm:
        yield swarm


@pytest.fixture
def twins(pairs: LocalSwarm) -> Iterator[LocalSwarm]:
    """Two peers for every span; the test may end peers. Its client does not know the peers yet."""
    with pairs.mended() as swarm:
        yield swarm
