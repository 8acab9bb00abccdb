"""Every supported family, with random weights: three spans of unequal size generate what plain transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from scheduler.speculation import Window
from splitnet.client.speculation.experience import Experience
from splitnet.net.directory import Directory
from tests.swarm.harness import local_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "olmo2",
    "gpt_oss",
    "smollm3",
    "gpt2",
    "opt",
    "gpt_neox",
    "bloom",
    "falcon",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_as_transformers_does(
    family: str, node: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Experience, "window", lambda *_: Window(2, 3))
    folder = random_checkpoint(family, tmp_path)
    local: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (2, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ids[1, :4] = 0
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with local_swarm(folder, [(0, 1), (1, 4), (4, 6)], node=node) as swarm:
        remote = swarm.model()
        one = remote.generate(ids[:1], attention_mask=mask[:1], **options)
        padded = remote.generate(ids, attention_mask=mask, **options)
        drafted = remote.generate(ids[:1], attention_mask=mask[:1], speculate="prompt-lookup", **options)
        beams = remote.generate(ids[:1], attention_mask=mask[:1], num_beams=3, **options)
        with torch.no_grad():
            logits = remote(ids[:1]).logits
    assert torch.equal(one, local.generate(ids[:1], attention_mask=mask[:1], **options))
    assert torch.equal(drafted, one)
    assert torch.equal(padded, local.generate(ids, attention_mask=mask, **options))
    assert torch.equal(beams, local.generate(ids[:1], attention_mask=mask[:1], num_beams=3, **options))
    with torch.no_grad():
        expected = local(ids[:1]).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-3)
