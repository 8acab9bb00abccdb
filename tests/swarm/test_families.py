"""Every supported family, with random weights: three spans of unequal size generate what plain transformers does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peers import engine
from scheduler.speculation import Window
from splitnet.client.speculation.experience import Experience
from splitnet.model.families import STATES
from splitnet.net.directory import Directory
from tests.swarm.generation import After
from tests.swarm.harness import LocalSwarm, local_swarm, repairs
from tests.unit.random_models import HYBRIDS, SPARSE, random_checkpoint

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
    *(HYBRIDS | SPARSE),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_as_transformers_does(
    family: str, node: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Experience, "window", lambda *_: Window(2, 3))
    folder = random_checkpoint(family, tmp_path, **(HYBRIDS | SPARSE).get(family, {}))
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
        gradient = embedding_gradient(remote, ids[:1])
        if family in STATES:
            local_part = swarm.model(local_blocks="1:3")
            mixed = local_part.generate(ids[:1], attention_mask=mask[:1], speculate="prompt-lookup", **options)
            assert torch.equal(mixed, one)
        if family in HYBRIDS | SPARSE:
            swarm.add(1, 4)
            with remote.session() as cache:
                repaired = remote.generate(
                    ids[:1], attention_mask=mask[:1], streamer=After(6, kill_hop(swarm, cache)), **options
                )
                assert cache.session is not None and len(repairs(cache.session)) == 1
            assert torch.equal(repaired, one)
    torch.testing.assert_close(gradient, embedding_gradient(local, ids[:1]), atol=1e-4, rtol=1e-3)
    assert torch.equal(one, local.generate(ids[:1], attention_mask=mask[:1], **options))
    assert torch.equal(drafted, one)
    assert torch.equal(padded, local.generate(ids, attention_mask=mask, **options))
    assert torch.equal(beams, local.generate(ids[:1], attention_mask=mask[:1], num_beams=3, **options))
    with torch.no_grad():
        expected = local(ids[:1]).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-3)


def kill_hop(swarm: LocalSwarm, cache: Any) -> Callable[[], None]:
    """Ends the second hop of the session of a cache."""

    def kill() -> None:
        doomed = cache.session.hops[1].endpoint
        next(peer for peer in swarm.peers if peer.endpoint == doomed).close()

    return kill


def embedding_gradient(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """That of a loss by the embeddings of its input."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
    assert embedded.grad is not None
    return embedded.grad


@pytest.mark.parametrize("family", ["qwen3_next", "jamba"])
def test_a_conversation_goes_back_far(
    family: str, node: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PASS_POSITIONS", 5)  # what is to run once more takes several passes
    folder = random_checkpoint(family, tmp_path, **HYBRIDS[family])
    local: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 300, (1, 30), generator=torch.Generator().manual_seed(1))
    other = torch.cat((ids[:, :23], ids[:, :4]), 1)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with local_swarm(folder, [(0, 2), (2, 6)], node=node) as swarm:
        remote = swarm.model()
        with remote.session() as cache:
            first = remote.generate(ids, **options)
            again = remote.generate(other, **options)
            assert cache.session is not None
            assert not cache.session.recoveries
            assert cache.session.traffic.positions < 30 + 9 + 27 + 9, "the common beginning was kept"
    assert torch.equal(first, local.generate(ids, **options))
    assert torch.equal(again, local.generate(other, **options))
