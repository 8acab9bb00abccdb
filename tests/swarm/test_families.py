"""Every supported family, with random weights: a swarm of three unequal spans generates the tokens of plain
transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peers import engine
from scheduler.speculation import Window
from splitnet.checkpoint.families import FAMILIES as FACTS
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import UnsupportedParameter
from splitnet.session.inference import Session
from tests.swarm.generation import After, force_window
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


@pytest.mark.default_cases(family=("gemma2", "gpt2"))
@pytest.mark.parametrize("family", FAMILIES)
def test_families_generate_the_same_tokens_as_transformers(
    family: str, node: DhtDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_window(monkeypatch, Window(2, 3))
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
        if family in FACTS and FACTS[family].states:
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
    """Returns a function that ends the second hop of a cache's session."""

    def kill() -> None:
        doomed = cache.session.hops[1].endpoint
        next(peer for peer in swarm.peers if peer.endpoint == doomed).close()

    return kill


def embedding_gradient(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The gradient of the language-modelling loss with respect to the input embeddings."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
    assert embedded.grad is not None
    return embedded.grad


@pytest.mark.default_cases(family=("jamba",))
@pytest.mark.parametrize("family", ["qwen3_next", "jamba"])
def test_a_conversation_may_be_rewound_far(
    family: str, node: DhtDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PASS_POSITIONS", 5)  # The positions that run again need several passes.
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


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, "factor": 4.0}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
PHI = {"rope_parameters": LONG, "original_max_position_embeddings": 32, "sliding_window": None}
GROWING = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("phi3", PHI),
        ("llama", {"rope_parameters": LONG}),
        ("llama", {"rope_parameters": GROWING, "max_position_embeddings": 32}),
    ],
    ids=["computed anew", "long", "growing"],
)
def test_texts_beyond_the_length_at_which_rotary_embeddings_change(
    family: str, config: dict[str, Any], node: DhtDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of up to and beyond this length: in chunks, in batches, with drafts, and with a lost hop."""
    force_window(monkeypatch, Window(2, 3))
    monkeypatch.setattr(Session, "step_positions", lambda *_: 16)
    folder = random_checkpoint(family, tmp_path, **config)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :19], mask[2, :1] = 0, 0

    def local() -> Any:  # A new model each time, because a model remembers the longest text that it has seen.
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def plain(ids: torch.Tensor, mask: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        return local().generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options, **more)

    with local_swarm(folder, [(0, 2), (2, 4), (4, 6), (2, 4)], node=node) as swarm:
        remote = swarm.model()
        with torch.no_grad():
            logits = remote(ids, attention_mask=mask).logits[mask.bool()]
            torch.testing.assert_close(
                logits, local()(ids, attention_mask=mask).logits[mask.bool()], atol=2e-5, rtol=1e-3
            )
            cache, pieces = remote.new_cache(), list[torch.Tensor]()
            with remote.pieces_of(40):
                for piece in ids[:1].split(22, dim=1):
                    pieces.append(remote(piece, cache=cache, use_cache=True).logits)
            torch.testing.assert_close(torch.cat(pieces, dim=1), local()(ids[:1]).logits, atol=2e-5, rtol=1e-3)
            assert remote.fitting(cache, 20) == 0
            assert remote.fitting(cache, 41) == (0 if config.get("rope_parameters") == GROWING else 40)
        assert torch.equal(remote.generate(ids, attention_mask=mask, **options), plain(ids, mask))
        assert torch.equal(remote.generate(ids[:1], num_beams=3, **options), plain(ids[:1], num_beams=3))
        over = remote.generate(ids[:1], speculate="prompt-lookup", **options)
        assert torch.equal(over, plain(ids[:1]))
        across = plain(ids[:1, :26])
        if family == "phi3":
            with pytest.raises(UnsupportedParameter, match=r"a text of 33 tokens.*speculate"):
                remote.generate(ids[:1, :26], speculate="prompt-lookup", **options)
        else:
            assert torch.equal(remote.generate(ids[:1, :26], speculate="prompt-lookup", **options), across)
        with remote.session() as cache:
            first = remote.generate(ids[:1, :17], **options)
            assert torch.equal(first, plain(ids[:1, :17]))
            assert torch.equal(remote.generate(first, **options), plain(first))
            remote.generate(ids[:1, :26], prompt_lookup_num_tokens=4, **options)
            assert torch.equal(remote.generate(across[:, :32], **options), plain(across[:, :32]))
            mixed = swarm.model(local_blocks="0:1")
            assert torch.equal(mixed.generate(ids[:1, :26], **options), across)
            kill = After(9, kill_hop(swarm, cache))
            killed = remote.generate(ids[:1, :26], streamer=kill, speculate="off", **options)
            assert torch.equal(killed, across)
            assert cache.session is not None and len(repairs(cache.session)) == 1
