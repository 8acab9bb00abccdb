"""Models that read images give the same with their text blocks on peers as transformers' whole models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from splitnet.directory.dht_directory import DhtDirectory
from tests.image_models import IMAGE_MODELS, Inputs
from tests.swarm.generation import After
from tests.swarm.harness import LocalSwarm, local_swarm, repairs, shared_swarm
from tests.swarm.test_failover import kill_hops

OPTIONS: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
UNEVEN = [(0, 1), (1, 4), (4, 6)]


@pytest.mark.default_cases(family=("gemma3", "qwen3_5", "qwen3_vl"))
@pytest.mark.parametrize("family", IMAGE_MODELS)
def test_families_that_read_images_give_the_same_as_transformers(
    family: str, node: DhtDirectory, tmp_path: Path
) -> None:
    model = IMAGE_MODELS[family]
    local = model.write(tmp_path / "published")
    with local_swarm(tmp_path / "published", UNEVEN, node=node, dtype="float32") as swarm:
        remote = swarm.image_model(dtype="float32")
        for images in (0, 1, 3):
            inputs = model.inputs(local, images)
            with torch.no_grad():
                torch.testing.assert_close(remote(**inputs).logits, local(**inputs).logits, atol=1e-4, rtol=1e-4)
            assert torch.equal(remote.generate(**inputs, **OPTIONS), local.generate(**inputs, **OPTIONS))


@pytest.fixture(scope="module", params=["gemma3", "qwen3_vl"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, LocalSwarm]]:
    """A whole model in transformers, and a swarm with two peers for every span."""
    folder = tmp_path_factory.mktemp(request.param) / "published"
    local = IMAGE_MODELS[request.param].write(folder)
    local.family = request.param
    with shared_swarm(folder, UNEVEN * 2, dtype="float32") as swarm:
        yield local, swarm


def inputs_of(local: Any, images: int, seed: int = 1) -> Inputs:
    return IMAGE_MODELS[local.family].inputs(local, images, seed)


@pytest.mark.parametrize("victim", range(len(UNEVEN)))
def test_an_answer_about_images_survives_the_death_of_a_hop(victim: int, both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    inputs = inputs_of(local, 2)
    with swarm.mended() as visit:
        remote = visit.image_model(dtype="float32", prefixes="off")
        with remote.session() as cache:
            got = remote.generate(**inputs, **OPTIONS, streamer=After(4, kill_hops(visit, cache, victim)))
            assert repairs(cache.session)
    assert torch.equal(got, local.generate(**inputs, **OPTIONS))


def test_batches_with_padding_give_the_same(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    one, two = inputs_of(local, 1, seed=1), inputs_of(local, 2, seed=2)
    pad = two["input_ids"].shape[1] - one["input_ids"].shape[1]
    batch: Inputs = {}
    for name, value in one.items():
        if value.shape[0] == 1 and value.ndim == 2 and name != "image_grid_thw":
            value = torch.nn.functional.pad(value, (pad, 0))
        batch[name] = torch.cat((value, two[name]))
    remote = swarm.image_model(dtype="float32")
    assert torch.equal(remote.generate(**batch, **OPTIONS), local.generate(**batch, **OPTIONS))
    beams = {**OPTIONS, "num_beams": 3}
    assert torch.equal(remote.generate(**batch, **beams), local.generate(**batch, **beams))
