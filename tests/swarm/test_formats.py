"""Every stored format, with random weights: three unequal spans compute the same as transformers with its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM

from scheduler.speculation import Window
from splitnet.blocks.backbone import load_whole
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from tests.swarm.generation import After, force_window
from tests.swarm.harness import local_swarm, repairs
from tests.swarm.test_families import embedding_gradient, kill_hop
from tests.unit.gguf_writing import write_gguf
from tests.unit.quantized_checkpoints import quantized_pair
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

IN_SAFETENSORS = {
    "fp8": "llama",
    "fbgemm_fp8": "llama",
    "mxfp4": "gpt_oss",
    "int4-group": "qwen3_moe",
    "int-quantized": "llama",
    "float-quantized": "llama",
    "nvfp4": "llama",
    "gptq": "llama",
    "awq": "llama",
    "nf4": "llama",
}
"""Scheme -> family."""
IN_GGUF = (Type.Q8_0, Type.Q5_1, Type.Q4_0, Type.Q4_1)


@pytest.mark.default_cases(scheme=("fp8", "gptq", "Q4_0"))
@pytest.mark.parametrize("scheme", [*IN_SAFETENSORS, *(kind.name for kind in IN_GGUF)])
def test_stored_formats_generate_the_same_tokens_as_transformers(
    scheme: str, node: DhtDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_window(monkeypatch, Window(2, 3))
    source = random_checkpoint(IN_SAFETENSORS.get(scheme, "llama"), tmp_path / "source", hidden=64)
    if scheme in IN_SAFETENSORS:
        stored, plain = quantized_pair(source, tmp_path, scheme)
        local: Any = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    else:
        stored = write_gguf(source, tmp_path / "model.gguf", Type[scheme])
        local = load_whole(Checkpoint.open(stored), torch.float32)
    ids = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = ids[1, :4] = 0
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    one = {"attention_mask": mask[:1], **options}
    with local_swarm(stored, [(0, 1), (1, 4), (4, 6)], node=node, dtype="float32") as swarm:
        assert {peer.record().dtype for peer in swarm.peers} == {"stored/float32"}
        remote = swarm.model(dtype="float32", gradient_codec="none")
        found = {
            "greedy": remote.generate(ids[:1], **one),
            "padded": remote.generate(ids, attention_mask=mask, **options),
            "drafts": remote.generate(ids[:1], speculate="prompt-lookup", **one),
            "beams": remote.generate(ids[:1], num_beams=3, **one),
        }
        gradient = embedding_gradient(remote, ids[:1])
        swarm.add(1, 4, dtype="float32")
        with remote.session() as cache:
            found["repaired"] = remote.generate(ids[:1], streamer=After(6, kill_hop(swarm, cache)), **one)
            assert cache.session is not None and len(repairs(cache.session)) == 1
    greedy = local.generate(ids[:1], **one)
    expected = {
        "greedy": greedy,
        "padded": local.generate(ids, attention_mask=mask, **options),
        "drafts": greedy,
        "beams": local.generate(ids[:1], num_beams=3, **one),
        "repaired": greedy,
    }
    assert {name: tokens.tolist() for name, tokens in found.items()} == {
        name: tokens.tolist() for name, tokens in expected.items()
    }
    wanted = embedding_gradient(local, ids[:1])
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-2
