"""The attack behind docs/security.md reads a text from activations, also through the usual codec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from benchmarks import privacy
from benchmarks.privacy import Attacker, FirstBlocks
from splitnet.wire.codecs import CODECS, DEFAULT_INT8

pytestmark = pytest.mark.e2e

CUT = 3
TEXT = "The tide comes in twice a day."


@pytest.fixture(scope="module")
def attacker(small: Path, tokenizer: Any) -> Attacker:
    """An attacker with few texts: the training of the probe only decides which candidates are tried first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(privacy, "PROBE_SEQUENCES", 2)
        return Attacker(str(small), tokenizer)


@torch.no_grad()
def test_candidates_equal_the_activations_of_the_model(attacker: Attacker, small: Path, tokenizer: Any) -> None:
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    exact = attacker.activations(attacker.embeddings[ids], [CUT])[CUT]
    first, cache = FirstBlocks(str(small), CUT), DynamicCache()
    for position, token in enumerate(ids.tolist()):
        others = torch.tensor([5, token, 7])
        torch.testing.assert_close(first.candidates(others, position, cache)[1], exact[position], rtol=1e-4, atol=1e-4)
        first.extend(token, position, cache)


@pytest.mark.full
@torch.no_grad()
def test_the_search_reads_every_token(attacker: Attacker, tokenizer: Any) -> None:
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    seen = attacker.activations(attacker.embeddings[ids], [CUT])[CUT]
    seen = CODECS[DEFAULT_INT8].decode(CODECS[DEFAULT_INT8].encode(seen), *seen.shape)
    found = attacker.search(seen, CUT, attacker.fit([CUT])[CUT], ids.tolist())
    assert found.recovered == 1
    assert len(found.tried) == len(ids) - 1
