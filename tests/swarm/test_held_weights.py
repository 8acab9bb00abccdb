"""Peers that hold their weights in fewer bits than the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peers.peer_options import SpanWish
from splitnet.blocks.span import block_bytes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from tests.swarm.harness import LocalSwarm, shared_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("llama"), blocks=4, hidden=320)


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with shared_swarm(folder, [(0, 2)], weights="float16", node=node) as swarm:
        room = 2 * block_bytes(Checkpoint.open(folder), None, "int8") + 1
        swarm.add(0, 0, wish=SpanWish(memory=room), weights="int8")
        yield swarm


@pytest.fixture(scope="module")
def rounded(folder: Path) -> Any:
    """The model that the swarm computes: its weights are rounded like those of the peers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for path, parameter in model.named_parameters():
        name, block = path.split(".")[-2], path.split(".")[2] if "layers" in path else ""
        if name in LINEAR and block in ("0", "1"):
            parameter.data = parameter.data.half().float()
        elif name in LINEAR:
            scales = (parameter.data.abs().amax(1, keepdim=True) / 127).bfloat16().float()
            parameter.data = (parameter.data / scales).round().clamp(-127, 127) * scales
    return model


def test_peers_with_other_weight_formats_serve_tokens_and_publish_the_format(swarm: LocalSwarm, rounded: Any) -> None:
    assert [(peer.span.start, peer.span.end, peer.record().dtype) for peer in swarm.peers] == [
        (0, 2, "float16/float32"),
        (2, 4, "int8/float32"),
    ]
    assert all(peer.span.dtype == torch.float32 for peer in swarm.peers)
    ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(5))
    with swarm.visit() as visitor:
        model = visitor.model()
        with torch.no_grad():
            found, expected = model(ids).logits, rounded(ids).logits
        assert float((found - expected).norm() / expected.norm()) < 0.02  # Kernels for int8 compute in bfloat16.
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert generated.shape[1] > ids.shape[1]


def test_gradients_pass_through_peers_with_other_weight_formats(swarm: LocalSwarm, rounded: Any) -> None:
    ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(6))
    found: list[torch.Tensor] = []
    with swarm.visit() as visitor:
        for model in (visitor.model(gradient_codec="none"), rounded):
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
            assert embedded.grad is not None
            found.append(embedded.grad)
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.05
