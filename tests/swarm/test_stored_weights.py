"""Peers and clients that hold weights in the quantized format of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM

from splitnet.blocks.backbone import QuantizedEmbedding
from splitnet.blocks.head import QuantizedHead
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.quant.packed_tensor import PackedTensor
from tests.swarm.harness import LocalSwarm, shared_swarm
from tests.unit.gguf_writing import write_gguf
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    source = random_checkpoint("llama", folder / "source", blocks=4, hidden=64)
    return write_gguf(source, folder / "model.gguf", GGMLQuantizationType.Q4_0)


@pytest.fixture(scope="module")
def swarm(file: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with shared_swarm(file, [(0, 1), (1, 4)], node=node) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def exact(file: Path) -> Any:
    """Plain transformers with the numbers that the file represents."""
    checkpoint = Checkpoint.open(file)
    with checkpoint.store.load_tensors(
        {name: name for name in checkpoint.store.tensor_names}, torch.float32
    ) as tensors:
        read = {name: tensor[...] for name, tensor in tensors.items()}
    numbers = {
        name: tensor.to_floats() if isinstance(tensor, PackedTensor) else tensor for name, tensor in read.items()
    }
    model_class: Any = type(AutoModelForCausalLM.from_config(checkpoint.config))
    model = model_class.from_pretrained(None, config=checkpoint.config, state_dict=numbers, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def test_stored_weights_compute_the_same_as_their_numbers(swarm: LocalSwarm, exact: Any) -> None:
    assert {peer.record().dtype for peer in swarm.peers} == {"stored/float32"}
    ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    with swarm.visit() as visitor:
        model: Any = visitor.model()
        assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
        assert isinstance(model.get_output_embeddings(), QuantizedHead)
        with torch.no_grad():
            found, expected = model(ids).logits, exact(ids).logits
        assert float((found - expected).norm() / expected.norm()) < 2e-3  # Kernels round activations to 16 bits.
        generated, wanted = (
            each.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False) for each in (model, exact)
        )
        assert torch.equal(generated, wanted)


def test_gradients_pass_through_stored_weights(swarm: LocalSwarm, exact: Any) -> None:
    ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(6))
    found: list[torch.Tensor] = []
    with swarm.visit() as visitor:
        for model in (visitor.model(gradient_codec="none"), exact):
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
            assert embedded.grad is not None
            found.append(embedded.grad)
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 5e-3
