"""Splitnet's decoding loop recognises model families whose own code acts between two calls of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin

from splitnet.blocks.client_part import load_client_part
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.families import RopeLengths
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.hf.decoding import FamilyLoop
from splitnet.hf.remote_blocks import RemoteBlocks
from splitnet.hf.remote_model import made_remote
from tests.unit.random_models import HYBRIDS, random_checkpoint

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40, "factor": 4.0}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "short_mscale": 1.0, "long_mscale": 1.5}
PHI = {"rope_parameters": LONG, "original_max_position_embeddings": 40}


def remote_without_peers(folder: Path) -> RemoteCausalLM:
    def none(*_: Any) -> Any:
        raise AssertionError

    checkpoint = Checkpoint.open(folder)
    blocks = RemoteBlocks([], none, None, RopeLengths(checkpoint.config))
    model = made_remote(load_client_part(checkpoint, blocks), RemoteCausalLM, str(folder))
    model.open_sessions_with(none)
    return model


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        ("llama", {}, []),
        *((family, HYBRIDS[family], []) for family in ("bamba", "falcon_h1", "falcon_mamba", "mamba", "mamba2")),
        ("nemotron_h", HYBRIDS["nemotron_h"], []),
        ("phi3", PHI, [41]),
        ("phi3", {"original_max_position_embeddings": 2048, "max_position_embeddings": 2048}, []),
        ("phimoe", PHI, [41]),
    ],
)
def test_the_loop_knows_the_lengths_at_which_a_family_acts_itself(
    family: str, config: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    model = remote_without_peers(random_checkpoint(family, tmp_path, **config))
    loop = FamilyLoop(model, model.transformers_class)
    assert loop._lengths == expected
    assert bool(loop.differs(30, 60)) == bool(expected)
    assert not loop.differs(30, 40) and not loop.differs(41, 90)
    assert model.can_draft(30, 30) == (not expected) and model.can_draft(30, 10)


@pytest.mark.parametrize("name", ["prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_sample"])
def test_overridden_methods_of_generation_are_not_skipped(name: str, tmp_path: Path) -> None:
    """The method belongs to the family's class, or a caller sets it on the model."""
    model = remote_without_peers(random_checkpoint("llama", tmp_path, blocks=1))

    def other(self: Any, *args: Any, **given: Any) -> Any:
        found = getattr(GenerationMixin, name)(self, *args, **given)
        return {**found, "token_type_ids": torch.zeros(1, 1)} if name.startswith("prepare") else found

    family = type("Other", (model.transformers_class,), {name: other})
    assert FamilyLoop(model, family).differs(5, 9)
    assert not FamilyLoop(model, model.transformers_class).differs(5, 9)
    setattr(model, name, other.__get__(model))
    assert FamilyLoop(model, model.transformers_class).differs(5, 9)
