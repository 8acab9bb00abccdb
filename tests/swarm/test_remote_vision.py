"""Images that are read by the vision towers of peers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peers.engine import Engine
from peers.training_service import Training
from splitnet.blocks.vision import VisionTower
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import CoverageError, SplitnetError, UnsupportedModel, UnsupportedParameter
from splitnet.hf.causal_lm import attached
from splitnet.hf.remote_vision import PeerFeatures
from splitnet.security.identity import Identity
from splitnet.session.options import READING_IMAGES, ConnectionOptions
from splitnet.wire.messages import ImageFeatures, ReadImages
from tests.image_models import IMAGE_MODELS
from tests.swarm.harness import LocalSwarm, local_swarm, wait_until

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
FAMILIES = ["gemma3", "qwen3_vl", "llava", "qwen2_5_vl", "idefics3", "smolvlm"]


@pytest.fixture
def both(request: pytest.FixtureRequest, node: DhtDirectory, tmp_path: Path) -> Iterator[tuple[Any, LocalSwarm]]:
    """The whole model, and a swarm in which only the last peer reads images."""
    local = IMAGE_MODELS[request.param].write(tmp_path / "published")
    with local_swarm(tmp_path / "published", [(0, 6)], node=node, dtype="float32") as swarm:
        swarm.add(3, 6, dtype="float32", vision=True)
        yield local, swarm


def _inputs(local: Any, images: int = 1) -> dict[str, torch.Tensor]:
    return IMAGE_MODELS[local.config.model_type].inputs(local, images)


def _remote_features(model: Any) -> PeerFeatures:
    """The method that asks peers."""
    return next(
        vars(each)["get_image_features"] for each in model.modules() if "get_image_features" in vars(each)
    )._compute


def _tower_bytes(model: Any) -> int:
    parts = ("vision", "visual", "projector", "connector")
    return sum(one.nbytes for name, one in model.named_parameters() if any(part in name for part in parts))


@pytest.mark.default_cases(both=("gemma3", "qwen3_vl"))
@pytest.mark.parametrize("both", FAMILIES, indirect=True)
def test_features_of_a_peer_give_the_tokens_of_the_local_tower(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    here, away = (swarm.image_model(dtype="float32", vision=vision) for vision in ("local", "peer"))
    assert _tower_bytes(here) > 0 and _tower_bytes(away) == 0
    for images in (1, 3):
        inputs = _inputs(local, images)
        assert torch.equal(away.generate(**inputs, **OPTIONS), local.generate(**inputs, **OPTIONS))


@pytest.mark.default_cases(both=("qwen3_vl",))
@pytest.mark.parametrize(("codec", "most"), [("bf16", 1e-5), ("int8", 1e-4)])
@pytest.mark.parametrize("both", FAMILIES, indirect=True)
def test_coded_features_hardly_change_the_answer(both: tuple[Any, LocalSwarm], codec: str, most: float) -> None:
    local, swarm = both
    remote, inputs = swarm.image_model(dtype="float32", vision="peer"), _inputs(local, 3)
    features = _remote_features(remote)
    with torch.no_grad():
        exact = remote(**inputs).logits.log_softmax(-1)
        features._codec, features._pixel_codec = codec, "fp16"
        inputs["pixel_values"] = inputs["pixel_values"].clone() + 0.0
        for each in remote.modules():
            if "get_image_features" in vars(each):
                vars(each)["get_image_features"]._kept.clear()
        found = remote(**inputs).logits.log_softmax(-1)
    loss = float((exact.exp() * (exact - found)).sum(-1).mean())
    print(f"{local.config.model_type} {codec}: KL {loss:.2g}")
    assert not torch.equal(exact, found) and loss < most


@pytest.mark.parametrize("both", ["qwen3_vl"], indirect=True)
def test_another_peer_reads_when_one_dies_in_the_middle(
    both: tuple[Any, LocalSwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    local, swarm = both
    swarm.add(3, 6, dtype="float32", vision=True)
    read, dead = VisionTower.read, list[Any]()

    def die_first(tower: VisionTower, message: ReadImages) -> ImageFeatures:
        if not dead:
            dead.append(next(peer for peer in swarm.peers if peer._tower is tower))
            dead[0].transport.close()
        return read(tower, message)

    monkeypatch.setattr(VisionTower, "read", die_first)
    inputs = _inputs(local, 3)
    remote = swarm.image_model(dtype="float32", vision="peer")
    assert torch.equal(remote.generate(**inputs, **OPTIONS), local.generate(**inputs, **OPTIONS))
    assert len(dead) == 1


@pytest.mark.parametrize("both", ["llava"], indirect=True)
def test_a_swarm_without_a_tower_is_named(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    remote = swarm.image_model(dtype="float32", vision="peer")
    swarm.peers[1].drain(0.0)
    swarm.peers[1].close()
    with pytest.raises(CoverageError, match=r"no peer of this swarm reads images .*--vision local"):
        remote.generate(**_inputs(local), **OPTIONS)
    text = torch.tensor([[5, 6, 7]])
    assert torch.equal(remote.generate(input_ids=text, **OPTIONS), local.generate(input_ids=text, **OPTIONS))


@pytest.mark.parametrize("both", ["llava"], indirect=True)
def test_a_peer_refuses_what_its_tower_does_not_read(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    remote = swarm.image_model(dtype="float32", vision="peer")
    features, other = _remote_features(remote), swarm.peers[0].endpoint
    asked: list[ReadImages] = []
    ask = features._ask

    def keep(endpoint: Any, message: ReadImages) -> ImageFeatures:
        asked.append(message)
        return ask(endpoint, message)

    features._ask = keep
    remote.generate(**_inputs(local), **OPTIONS)
    with pytest.raises(SplitnetError, match="must give --vision"):
        ask(other, asked[0])
    with pytest.raises(SplitnetError, match="another model"):
        ask(swarm.peers[1].endpoint, replace(asked[0], model="ab" * 32))
    nan = b"\xff" * len(asked[0].payload)
    with pytest.raises(SplitnetError, match="finite"):
        ask(swarm.peers[1].endpoint, replace(asked[0], payload=nan))
    assert ask(swarm.peers[1].endpoint, asked[0]).lengths == (16,)
    with pytest.raises(UnsupportedParameter, match="vision `local`"):
        features(pixel_values=_inputs(local)["pixel_values"], vision_feature_layer=0)


def test_features_spend_the_tokens_of_a_key(node: DhtDirectory, tmp_path: Path) -> None:
    local, client = IMAGE_MODELS["llava"].write(tmp_path / "published"), Identity.generate()
    keys = tmp_path / "authorized_keys"
    keys.write_text(f"tokens-per-minute=20 {client.public.text}\nanyone\n")
    with local_swarm(
        tmp_path / "published", [(0, 6)], node=node, dtype="float32", vision=True, authorized_keys=keys
    ) as swarm:
        features = _remote_features(swarm.image_model(identity=client, dtype="float32", vision="peer"))
        given = IMAGE_MODELS["llava"].inputs(local, 2)["pixel_values"]
        features(given)  # two images of 16 features each
        with pytest.raises(CoverageError, match="20 tokens per minute"):
            features(given)


@pytest.mark.parametrize("both", ["qwen3_vl"], indirect=True)
@pytest.mark.parametrize(
    "change",
    [
        lambda answer: replace(answer, levels=1, payload=answer.payload[: len(answer.payload) // 3]),
        lambda answer: replace(answer, lengths=(1 << 20,)),
        lambda answer: replace(answer, payload=b"\xff" * len(answer.payload)),
    ],
)
def test_an_answer_of_another_form_is_refused(
    both: tuple[Any, LocalSwarm], change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, swarm = both
    read = VisionTower.read
    monkeypatch.setattr(VisionTower, "read", lambda tower, message: change(read(tower, message)))
    remote = swarm.image_model(dtype="float32", vision="peer")
    with pytest.raises(CoverageError, match="no peer of this swarm reads images"):
        remote.generate(**_inputs(local), **OPTIONS)


@pytest.mark.parametrize("both", ["llava"], indirect=True)
def test_auto_loads_the_tower_unless_memory_is_short(
    both: tuple[Any, LocalSwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, swarm = both
    assert _tower_bytes(swarm.image_model(dtype="float32")) > 0
    monkeypatch.setattr("splitnet.hf.remote_vision.free_memory", lambda device: 1000)
    assert _tower_bytes(swarm.image_model(dtype="float32")) == 0
    swarm.peers[1].drain(0.0)
    swarm.peers[1].close()
    with swarm.newcomer() as later:
        assert _tower_bytes(later.image_model(dtype="float32")) > 0


def test_a_family_with_further_tensors_is_refused(node: DhtDirectory, tmp_path: Path) -> None:
    IMAGE_MODELS["llava_next"].write(tmp_path / "published")
    with local_swarm(tmp_path / "published", [(0, 6)], node=node, dtype="float32") as swarm:
        with pytest.raises(UnsupportedModel, match="do not read images of the family 'llava_next'"):
            swarm.add(0, 6, dtype="float32", vision=True)
        with pytest.raises(UnsupportedModel, match="do not read images of the family 'llava_next'"):
            swarm.image_model(vision="peer")
        options = ConnectionOptions.of({"vision": "peer"}, READING_IMAGES)
        with pytest.raises(SplitnetError, match="reads texts here"):
            attached(Checkpoint.open(swarm.folder), swarm.client, options)


@pytest.mark.parametrize("both", ["llava"], indirect=True)
def test_a_peer_that_has_lost_the_answer_is_left(both: tuple[Any, LocalSwarm], monkeypatch: pytest.MonkeyPatch) -> None:
    local, swarm = both
    swarm.add(3, 6, dtype="float32", vision=True)
    send, lost = Training.images_read, list[ImageFeatures]()

    def lose_first(training: Training, work: Any, features: ImageFeatures) -> None:
        if lost:
            return send(training, work, features)
        lost.append(features)
        return training._release_pass(work)

    monkeypatch.setattr(Training, "images_read", lose_first)
    monkeypatch.setattr("splitnet.hf.remote_vision.LOOK_S", 0.2)
    inputs, remote = _inputs(local), swarm.image_model(dtype="float32", vision="peer")
    assert torch.equal(remote.generate(**inputs, **OPTIONS), local.generate(**inputs, **OPTIONS))
    assert lost


def test_steps_of_others_run_between_layers_of_a_tower(
    node: DhtDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = IMAGE_MODELS["llava"].write(tmp_path / "published")
    text, layers, ran = torch.tensor([[5, 6, 7]]), list[int](), list[int]()
    reading, end_piece, run_steps = threading.Event(), Engine._end_piece, Engine._run_steps

    def wait_for_step(engine: Engine) -> None:
        if not layers:
            reading.set()
            wait_until(lambda: engine._queue.has_work)
        engine._piece_began -= 1.0  # as if the layer had taken this long
        end_piece(engine)
        layers.append(len(ran))

    with local_swarm(tmp_path / "published", [(0, 6)], node=node, dtype="float32", vision=True) as swarm:
        remote = swarm.image_model(identity=Identity.generate(), dtype="float32", vision="peer")
        other = swarm.model(dtype="float32")
        monkeypatch.setattr(Engine, "_end_piece", wait_for_step)
        monkeypatch.setattr(
            Engine, "_run_steps", lambda engine, chosen: (ran.append(len(chosen)), run_steps(engine, chosen))
        )
        with ThreadPoolExecutor() as pool:
            features = pool.submit(_remote_features(remote), IMAGE_MODELS["llava"].inputs(local, 1)["pixel_values"])
            assert reading.wait(30)
            assert torch.equal(other.generate(text, **OPTIONS), local.generate(text, **OPTIONS))
            assert len(features.result().pooler_output) == 1
    assert len(layers) > 1 and layers[0] > 0  # before the second layer
