"""Images that are read by the vision towers of peers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from splitnet.directory.dht_directory import DhtDirectory
from splitnet.hf.image_text import RemoteImageTextToText
from tests.image_models import IMAGE_MODELS
from tests.swarm.harness import LocalSwarm, local_swarm

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
FAMILIES = ["gemma3", "qwen3_vl", "llava", "qwen2_5_vl", "idefics3", "smolvlm"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def both(family: str, node: DhtDirectory, tmp_path: Path) -> Iterator[tuple[Any, LocalSwarm]]:
    local = IMAGE_MODELS[family].write(tmp_path / "published")
    with local_swarm(tmp_path / "published", [(0, 3)], node=node, dtype="float32") as swarm:
        swarm.add(3, 6, dtype="float32", vision=True)
        yield local, swarm


def _tower_bytes(model: RemoteImageTextToText) -> int:
    return sum(
        one.nbytes for name, one in model.named_parameters() if "language_model" not in name and "head" not in name
    )


@pytest.mark.default_cases(family=("gemma3", "qwen3_vl"))
def test_features_of_a_peer_give_the_tokens_of_the_local_tower(family: str, both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    here, away = (swarm.image_model(dtype="float32", vision=vision) for vision in ("local", "peer"))
    assert _tower_bytes(here) > 0 and _tower_bytes(away) == 0
    for images in (1, 3):
        inputs = IMAGE_MODELS[family].inputs(local, images)
        expected = local.generate(**inputs, **OPTIONS)
        assert torch.equal(away.generate(**inputs, **OPTIONS), expected)
        with torch.no_grad():
            torch.testing.assert_close(away(**inputs).logits, here(**inputs).logits)
            for codec in ("bf16", "int8"):
                coded = swarm.image_model("none", dtype="float32", vision="peer")
                for module in coded.modules():
                    kept = vars(module).get("get_image_features")
                    if kept is not None:
                        kept._compute._codec = codec
                        kept._compute._pixel_codec = "fp16"
                want, found = (each(**inputs).logits.log_softmax(-1) for each in (local, coded))
                kl = (want.exp() * (want - found)).sum(-1).mean().item()
                print(family, images, codec, f"{kl:.2g}")
