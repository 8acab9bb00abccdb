"""Models that read images give the same with their text blocks on peers as transformers' whole models."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import CONFIG_MAPPING

from peers.counters import SessionEnd
from peers.running_peer import RunningPeer
from splitnet.blocks.block_inputs import encode_step
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.families import causal_class, check_can_be_cut, image_text_class, text_config_of
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import ModelNotFound, SplitnetError, UnsupportedModel, UnsupportedParameter
from splitnet.hf.image_text import _KeptFeatures
from splitnet.quant.packed_tensor import PackedTensor
from splitnet.security.identity import Identity
from splitnet.session.events import Cause
from splitnet.session.inference import Session
from splitnet.wire.messages import BlockInput
from splitnet.wire.sent_log import PAGE
from tests.image_models import GGUF_IMAGE_MODELS, IMAGE, IMAGE_MODELS, Inputs, vocabulary
from tests.published import Tensors, bfloat16
from tests.swarm.generation import After
from tests.swarm.harness import LocalSwarm, local_swarm, repairs, shared_swarm
from tests.swarm.test_failover import kill_hops
from tests.swarm.test_leaving import peer_at
from tests.unit.gguf_writing import write_gguf, write_mmproj
from tests.unit.quantized_checkpoints import SCHEMES

OPTIONS: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
IDS = torch.tensor([[5, 6, 7, 8, 9]])
UNEVEN = [(0, 1), (1, 4), (4, 6)]


@pytest.mark.default_cases(family=("gemma3", "gemma4-small", "qwen3_5", "qwen3_vl"))
@pytest.mark.parametrize("family", IMAGE_MODELS)
def test_families_that_read_images_give_the_same_as_transformers(
    family: str, node: DhtDirectory, tmp_path: Path
) -> None:
    model = IMAGE_MODELS[family]
    local = model.write(tmp_path / "published")
    with local_swarm(tmp_path / "published", model.spans, node=node, dtype="float32") as swarm:
        remote = swarm.image_model(dtype="float32")
        for images in (0, 1, 3):
            inputs = model.inputs(local, images)
            with torch.no_grad():
                found, expected = (model(**inputs, labels=inputs["input_ids"]) for model in (remote, local))
            torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.loss, expected.loss)
            assert torch.equal(remote.generate(**inputs, **OPTIONS), local.generate(**inputs, **OPTIONS))
        assert torch.equal(continued(remote, inputs), continued(local, inputs))
        kept = {**inputs, "logits_to_keep": torch.tensor([0, 2])}
        with torch.no_grad():
            torch.testing.assert_close(remote(**kept).logits, local(**kept).logits, atol=1e-4, rtol=1e-4)


def continued(model: Any, inputs: Inputs) -> torch.Tensor:
    """A text that begins with an answer about images and continues in the caller's cache, without the images."""
    first = model.generate(**inputs, **OPTIONS, suppress_tokens=[IMAGE], return_dict_in_generate=True)
    more = torch.cat((first.sequences, torch.tensor([[5, 6, 7]]).expand(len(first.sequences), -1)), dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 13), value=1)
    return model.generate(input_ids=more, attention_mask=mask, cache=first.cache, **OPTIONS)


NOT_CAUSAL, SHARED = "are not causal language models", "its blocks share states with each other"
REFUSED = {
    "dots3_note": "blocks of the kind 'indexed_attention'",
    "ernie4_5_vl_moe": NOT_CAUSAL,  # it chooses experts by the type of a token
    "florence2": "it is an encoder-decoder model",
    "gemma3n": SHARED,
    "mistral4": "read no images",  # the text model of Mistral 3
    "mllama": NOT_CAUSAL,  # its blocks attend to images
    "molmo2": NOT_CAUSAL,
    "paligemma": "its positions attend to later positions",
}
"""Families with the default config of transformers, and the reason."""


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_read_images_here_are_refused(family: str) -> None:
    whole = CONFIG_MAPPING[family]()
    with pytest.raises(UnsupportedModel, match=f"of the family .*{REFUSED[family]}"):
        text = text_config_of(whole)
        check_can_be_cut(text)
        causal_class(text)
        image_text_class(whole)


@pytest.fixture(scope="module", params=["gemma3", "gemma4-small", "qwen3_vl"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, LocalSwarm]]:
    """A whole model in transformers, and a swarm with two peers for every span."""
    folder = tmp_path_factory.mktemp(request.param) / "published"
    local = IMAGE_MODELS[request.param].write(folder)
    local.family = request.param
    with shared_swarm(folder, [*IMAGE_MODELS[request.param].spans] * 2, dtype="float32") as swarm:
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
            assert cache.session is not None and repairs(cache.session)
    assert torch.equal(got, local.generate(**inputs, **OPTIONS))


def test_a_peer_that_leaves_hands_over_a_session_with_images(
    both: tuple[Any, LocalSwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitnet.session.driver.Routes.better_route", lambda *_: None)
    local, swarm = both
    inputs, leavers, draining = inputs_of(local, 2), list[RunningPeer](), list[Future[None]]()
    with swarm.mended() as visit, ThreadPoolExecutor(1) as threads:

        def leave() -> None:
            leavers.append(peer_at(visit, cache, 1))
            draining.append(threads.submit(leavers[0].drain, 30.0))
            while not leavers[0].service.leaving:
                time.sleep(0.01)

        remote = visit.image_model(dtype="float32", prefixes="off")
        with remote.session() as cache:
            got = remote.generate(**inputs, **OPTIONS, streamer=After(4, leave))
            draining[0].result()
            assert cache.session is not None
            assert Cause.LEAVING in [recovery.cause for recovery in cache.session.recoveries]
        assert leavers[0].counters.ended[SessionEnd.HANDED_OVER] == 1
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
    assert torch.equal(continued(remote, batch), continued(local, batch))
    beams = {**OPTIONS, "num_beams": 3}
    assert torch.equal(remote.generate(**batch, **beams), local.generate(**batch, **beams))


def hit_of(remote: Any, inputs: Inputs, expected: torch.Tensor) -> int:
    """How many first positions of a prompt hops had stored, for an answer that must be the expected one."""
    with remote.session() as cache:
        assert torch.equal(remote.generate(**inputs, **OPTIONS), expected)
        return cache.session.prefix_hit


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "qwen3_5"])
def test_stored_prefixes_know_images(family: str, node: DhtDirectory, tmp_path: Path) -> None:
    local: Any = IMAGE_MODELS[family].write(tmp_path / "published")
    local.family = family
    with local_swarm(tmp_path / "published", UNEVEN, node=node, dtype="float32") as swarm:
        check_prefixes(local, swarm)


def check_prefixes(local: Any, swarm: LocalSwarm) -> None:
    inputs = inputs_of(local, 9, seed=5)
    length = inputs["input_ids"].shape[1]
    remote = swarm.image_model(dtype="float32")
    expected = local.generate(**inputs, **OPTIONS)
    assert hit_of(remote, inputs, expected) == 0
    known = hit_of(remote, inputs, expected)
    assert known == (0 if local.family == "qwen3_5" else (length - 1) // PAGE * PAGE)
    # Only the last values of one image differ, behind tokens that are the same.
    for image, most in ((-1, known), (0, 0)):
        other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
        other["pixel_values"][image] += 1.0
        found = hit_of(remote, other, local.generate(**other, **OPTIONS))
        assert found <= most


def test_a_chat_with_images_continues(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    remote = swarm.image_model(dtype="float32")
    first, second = inputs_of(local, 1), inputs_of(local, 3)
    # The second prompt begins with the first one and its answer: texts around images are drawn from the same seed.
    with remote.session():
        for inputs in (first, second, inputs_of(local, 0, seed=3), second):
            assert torch.equal(remote.generate(**inputs, **OPTIONS), local.generate(**inputs, **OPTIONS))


def test_a_cache_that_is_cropped_before_its_image_has_the_positions_of_text(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    inputs, remote = inputs_of(local, 1), swarm.image_model(dtype="float32")
    cache = remote.generate(**inputs, **OPTIONS, return_dict_in_generate=True).cache
    before = int((inputs["input_ids"][0] == IMAGE).nonzero().min()) - 1
    cache.crop(before - cache.get_seq_length())
    with pytest.raises(UnsupportedParameter, match="without the image"):
        remote.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], cache=cache, **OPTIONS)
    text = torch.cat((inputs["input_ids"][:, :before], torch.tensor([[5, 6, 7]])), dim=1)
    given = {"input_ids": text, "attention_mask": torch.ones_like(text), **OPTIONS}
    assert torch.equal(remote.generate(**given, cache=cache), local.generate(**given))


@torch.no_grad()
def test_calls_have_the_positions_of_their_caches(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    remote, inputs = swarm.image_model(dtype="float32"), inputs_of(local, 2)
    image, text = remote.new_cache(), remote.new_cache()
    answer = local.generate(**inputs, **OPTIONS)[:, inputs["input_ids"].shape[1] :]
    tokens = [remote(**inputs, cache=image).logits[:, -1:].argmax(-1)]
    remote(IDS, cache=text)
    found = remote(IDS[:, :1], cache=text).logits
    torch.testing.assert_close(found, local(torch.cat((IDS, IDS[:, :1]), dim=1)).logits[:, -1:], atol=1e-4, rtol=1e-4)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    # Families count all positions of a mask; `past_key_values` is the former name of `cache`.
    for more in ({"past_key_values": image}, {"cache": image, "attention_mask": mask}, {"cache": image}):
        tokens.append(remote(tokens[-1], **more).logits.argmax(-1))
    assert torch.equal(torch.cat(tokens, dim=1), answer[:, :4])


def test_negative_positions_are_refused_by_the_client(both: tuple[Any, LocalSwarm]) -> None:
    remote = both[1].image_model(dtype="float32")
    with pytest.raises(UnsupportedParameter, match="position_ids"):
        remote(IDS, position_ids=torch.arange(-2, 3).expand(3, 1, -1), use_cache=True)


@pytest.mark.parametrize("local_blocks", ["0:1", "2:5", "0:6"])
def test_local_blocks_read_images(local_blocks: str, both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    if local.family == "gemma4-small" and local_blocks == "2:5":
        with pytest.raises(UnsupportedModel, match="use 2:6 or more, or blocks up to 2"):
            swarm.image_model(dtype="float32", local_blocks=local_blocks)
        return
    remote = swarm.image_model(dtype="float32", local_blocks=local_blocks)
    inputs = inputs_of(local, 3)
    assert torch.equal(remote.generate(**inputs, **OPTIONS), local.generate(**inputs, **OPTIONS))


def test_long_prompts_are_cut_between_images(both: tuple[Any, LocalSwarm], monkeypatch: pytest.MonkeyPatch) -> None:
    local, swarm = both
    monkeypatch.setattr(Session, "step_positions", lambda self, positions, prediction=None: 5)
    remote = swarm.image_model(dtype="float32", prefixes="off")
    inputs = inputs_of(local, 6)
    with torch.no_grad():
        torch.testing.assert_close(
            remote(**inputs, use_cache=True).logits, local(**inputs).logits, atol=1e-4, rtol=1e-4
        )


def test_pieces_of_prompts_may_not_end_within_groups(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    remote, inputs = swarm.image_model(dtype="float32"), inputs_of(local, 2)
    image = int((inputs["input_ids"][0] == IMAGE).nonzero().min())
    given = {**inputs, **OPTIONS, "prefill_chunk_size": image + 2}
    if local.family == "qwen3_vl":
        assert torch.equal(remote.generate(**given), local.generate(**given))
    else:
        with pytest.raises(UnsupportedModel, match="leave out prefill_chunk_size"):
            remote.generate(**given)


@pytest.mark.parametrize(("codec", "most"), [("bf16", 1e-4), ("int8", 1e-2)])
def test_codecs_carry_images(codec: str, most: float, both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    remote, inputs = swarm.image_model(codec, dtype="float32"), inputs_of(local, 3)
    with torch.no_grad():
        found, expected = (model(**inputs).logits.log_softmax(-1) for model in (remote, local))
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert divergence < most


@pytest.mark.full
@pytest.mark.parametrize("family", IMAGE_MODELS)
def test_codecs_carry_an_image_as_they_carry_text(family: str, node: DhtDirectory, tmp_path: Path) -> None:
    local, spans = IMAGE_MODELS[family].write(tmp_path / "published"), IMAGE_MODELS[family].spans
    with local_swarm(tmp_path / "published", spans, node=node, dtype="float32") as swarm, torch.no_grad():

        def divergence(codec: str, images: int) -> float:
            remote, inputs = swarm.image_model(codec, dtype="float32"), IMAGE_MODELS[family].inputs(local, images)
            found, expected = (model(**inputs).logits.log_softmax(-1) for model in (remote, local))
            return float((expected.exp() * (expected - found)).sum(-1).median())

        for codec, most in (("bf16", 1e-4), ("int8", 1e-2)):
            # Rounding changes which experts a position has, also in texts; later positions attend to it.
            most = 1e-2 if any("experts" in name for name, _ in local.named_parameters()) else most
            assert divergence(codec, 1) < max(most, 2 * divergence(codec, 0)), codec


TOWERS = {"qwen3_vl": "model.visual", "llava": "model.vision_tower"}


@pytest.mark.default_cases(scheme=("fp8",))
@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("scheme", ["fp8", "awq", "int4-group", "float-quantized"])
def test_quantized_text_blocks_beside_a_tower_in_floats(
    family: str, scheme: str, node: DhtDirectory, tmp_path: Path
) -> None:
    def store(tensors: Tensors) -> tuple[Tensors, Tensors]:
        stored, plain = bfloat16(tensors)
        for name, value in tensors.items():
            if re.search(r"language_model\..*layers\.\d+\..*_proj\.weight$", name):
                del stored[name]
                parts, numbers = SCHEMES[scheme].write(name, value)
                plain[name] = numbers.contiguous()
                stored |= {part: tensor.contiguous() for part, tensor in parts.items()}
        return stored, plain

    kept = [TOWERS[family], "lm_head", "model.multi_modal_projector"]
    if scheme in ("fp8", "awq"):
        more = {"modules_to_not_convert": kept}
    else:
        more = {"ignore": [f"re:.*{TOWERS[family].split('.')[1]}.*", *kept[1:]]}
    quantization = {**SCHEMES[scheme].settings, **more}
    model = IMAGE_MODELS[family]
    model = replace(model, published=replace(model.published, store=store, quantization=quantization))
    local = model.write(tmp_path / "published")
    inputs = model.inputs(local, 2)
    with local_swarm(tmp_path / "published", UNEVEN, node=node, dtype="float32") as swarm:
        assert {peer.record().dtype for peer in swarm.peers} == {"stored/float32"}
        remote = swarm.image_model(dtype="float32")
        with torch.no_grad():
            found, expected = remote(**inputs).logits, local(**inputs).logits
        assert (found - expected).norm() / expected.norm() < 2e-3  # kernels round activations to 16 bits
        assert torch.equal(remote.generate(**inputs, **OPTIONS), local.generate(**inputs, **OPTIONS))


def test_features_of_images_are_kept_between_turns(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    remote, calls = swarm.image_model(dtype="float32"), []
    tower = next(module for name, module in remote.named_modules() if name.endswith(("visual", "vision_tower")))
    tower.register_forward_hook(lambda *_: calls.append(1))
    first, second = inputs_of(local, 2), inputs_of(local, 2, seed=2)
    for inputs, count in ((first, 1), (first, 1), (second, 2), (first, 2)):
        assert torch.equal(remote.generate(**inputs, **OPTIONS), local.generate(**inputs, **OPTIONS))
        assert len(calls) == count


def _unknown(given: BlockInput) -> BlockInput:
    return given._replace(name="unknown")


def _outside(given: BlockInput) -> BlockInput:
    return given._replace(start=given.start + 1000)


def _too_wide(given: BlockInput) -> BlockInput:
    return given._replace(size=given.size + 8, length=1)


@pytest.mark.parametrize("change", [_unknown, _outside, _too_wide])
def test_peers_refuse_wrong_block_inputs_and_go_on(
    change: Callable[[BlockInput], BlockInput], both: tuple[Any, LocalSwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    local, swarm = both
    inputs = inputs_of(local, 2)

    def encode(*args: Any) -> tuple[bytes, tuple[BlockInput, ...]]:
        payload, described = encode_step(*args)
        return payload, tuple(map(change, described))

    with monkeypatch.context() as patch, swarm.newcomer() as visit:
        patch.setattr("splitnet.session.inference.encode_step", encode)
        with pytest.raises(SplitnetError):
            visit.image_model(dtype="float32", prefixes="off").generate(**inputs, **OPTIONS)
    remote = swarm.image_model(dtype="float32")
    assert torch.equal(remote.generate(**inputs, **OPTIONS), local.generate(**inputs, **OPTIONS))


@pytest.mark.full
@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_links_through_the_client_carry_images(family: str, node: DhtDirectory, tmp_path: Path) -> None:
    model, client = IMAGE_MODELS[family], Identity.generate()
    local = model.write(tmp_path / "published")
    keys = tmp_path / "authorized_keys"
    keys.write_text(client.public.text + "\n")
    with local_swarm(tmp_path / "published", [(0, 1)], node=node, dtype="float32") as swarm:
        # These peers accept the client and no other peer, so that the client relays to them, and replays its own log.
        swarm.add(1, 6, authorized_keys=keys, dtype="float32")
        swarm.add(1, 6, authorized_keys=keys, dtype="float32")
        remote = swarm.image_model(dtype="float32", prefixes="off", identity=client)
        inputs = model.inputs(local, 2)
        with remote.session() as cache:
            got = remote.generate(**inputs, **OPTIONS, streamer=After(4, kill_hops(swarm, cache, 1)))
            assert cache.session is not None and cache.session.hops[0].relayed and repairs(cache.session)
        assert torch.equal(got, local.generate(**inputs, **OPTIONS))


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_keys_and_values_in_codes_serve_images(family: str, node: DhtDirectory, tmp_path: Path) -> None:
    model = IMAGE_MODELS[family]
    local = model.write(tmp_path / "published")
    inputs = model.inputs(local, 9)
    with local_swarm(tmp_path / "published", UNEVEN, node=node, dtype="float32", kv="int8") as swarm:
        remote = swarm.image_model(dtype="float32")
        with torch.no_grad():
            found, expected = (each(**inputs).logits.log_softmax(-1) for each in (remote, local))
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-3


def test_an_image_that_is_missing_is_refused(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    remote, inputs = swarm.image_model(dtype="float32"), inputs_of(local, 1)
    del inputs["pixel_values"]  # sizes and positions of the image are left
    with pytest.raises(UnsupportedParameter, match="without the image"), remote.session():
        remote.generate(**inputs, **OPTIONS)


def test_a_prompt_may_end_with_an_image(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    given = inputs_of(local, 2)
    length = given["input_ids"].shape[1]
    end = int((given["input_ids"][0] == IMAGE).nonzero().max()) + 1
    cut = {
        name: values[:, :end] if name != "pixel_values" and values.shape[1:] == (length,) else values
        for name, values in given.items()
    }
    remote = swarm.image_model(dtype="float32")
    assert torch.equal(remote.generate(**cut, **OPTIONS), local.generate(**cut, **OPTIONS))


def test_features_are_computed_again_after_weights_have_changed(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    remote, given = swarm.image_model(dtype="float32"), inputs_of(local, 1)
    with torch.no_grad():
        before = remote(**given).logits
        towers = [each for name, each in remote.named_parameters() if "vis" in name or "projector" in name]
        for parameter in towers:
            parameter.mul_(1.5)
        assert not torch.allclose(before, remote(**given).logits, atol=1e-4)


def test_features_are_kept_by_the_names_of_arguments_and_the_buffers_of_towers() -> None:
    tower: Any = torch.nn.Module()
    tower.register_buffer("scale", torch.ones(1))
    kept = _KeptFeatures(lambda **given: next(iter(given)) + str(float(tower.scale)), tower, 4)
    given = torch.ones(1, 2)
    assert kept(pixel_values=given) == kept(pixel_values=given) == "pixel_values1.0"
    assert kept(pixel_values_videos=given) == "pixel_values_videos1.0"
    tower.scale.mul_(2)
    assert kept(pixel_values=given) == "pixel_values2.0"
    tower.scale = torch.full((1,), 3.0)
    assert kept(pixel_values=given) == "pixel_values3.0"


def gguf_files(family: str, folder: Path, stored: Type = Type.F32, tower: Type = Type.F32) -> tuple[Any, Path]:
    """The whole model in transformers, and the folder of its GGUF file and its tower."""
    (folder / "gguf").mkdir()
    local = GGUF_IMAGE_MODELS[family].write(folder / "published")
    write_gguf(folder / "published", folder / "gguf" / "model.gguf", stored, tokens=vocabulary(family))
    write_mmproj(folder / "published", folder / "gguf" / "mmproj-model.gguf", tower)
    return local, folder / "gguf"


@pytest.mark.parametrize("family", GGUF_IMAGE_MODELS)
def test_a_gguf_file_with_its_mmproj_gives_the_same_as_transformers(
    family: str, node: DhtDirectory, tmp_path: Path
) -> None:
    local, folder = gguf_files(family, tmp_path)
    tower = folder / "mmproj-model.gguf"
    aside = tower.rename(tmp_path / tower.name)  # peers need no tower
    with local_swarm(folder, UNEVEN, node=node, dtype="float32") as swarm:
        with pytest.raises(ModelNotFound, match=r"put the model's mmproj\*\.gguf into"):
            swarm.image_model(dtype="float32")
        aside.rename(tower)
        remote = swarm.image_model(dtype="float32")
        for images in (0, 1, 2):
            inputs = GGUF_IMAGE_MODELS[family].inputs(local, images)
            with torch.no_grad():
                torch.testing.assert_close(remote(**inputs).logits, local(**inputs).logits, atol=1e-4, rtol=1e-4)
            assert torch.equal(remote.generate(**inputs, **OPTIONS), local.generate(**inputs, **OPTIONS))


@pytest.mark.default_cases(family=("qwen3_vl",))
@pytest.mark.parametrize("family", GGUF_IMAGE_MODELS)
def test_codes_beside_an_mmproj_in_float16(family: str, node: DhtDirectory, tmp_path: Path) -> None:
    local, folder = gguf_files(family, tmp_path, Type.Q8_0, Type.F16)
    # The numbers of both files, in the names of transformers.
    store = Checkpoint.open(folder).with_towers.store
    with store.load_tensors({name: name for name in store.tensor_names}, torch.float32) as tensors:
        numbers = {
            name: each.to_floats() if isinstance(each := tensor[...], PackedTensor) else each.float()
            for name, tensor in tensors.items()
        }
    local, report = type(local).from_pretrained(
        None, config=local.config, state_dict=numbers, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    inputs = GGUF_IMAGE_MODELS[family].inputs(local.eval(), 2)
    with local_swarm(folder, UNEVEN, node=node, dtype="float32") as swarm:
        assert {peer.record().dtype for peer in swarm.peers} == {"stored/float32"}
        remote = swarm.image_model(dtype="float32")
        with torch.no_grad():
            found, expected = remote(**inputs).logits, local(**inputs).logits
    # Kernels round activations to 16 bits: 9e-5, and 2e-3 where recurrent states add up the errors (7e-4 in a text).
    assert (found - expected).norm() / expected.norm() < (1e-2 if family == "qwen3_5" else 5e-4)


def test_an_mmproj_beside_a_vocabulary_without_a_token_of_images(node: DhtDirectory, tmp_path: Path) -> None:
    local, folder = gguf_files("gemma3", tmp_path)
    names = ["<unused250>" if name == "<image_soft_token>" else name for name in vocabulary("gemma3")]
    write_gguf(tmp_path / "published", folder / "model.gguf", tokens=names)
    inputs = GGUF_IMAGE_MODELS["gemma3"].inputs(local, 2)
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = local.config.image_token_index = len(names)
    with local_swarm(folder, UNEVEN, node=node, dtype="float32") as swarm:
        remote = swarm.image_model(dtype="float32")
        assert torch.equal(remote.generate(**inputs, **OPTIONS), local.generate(**inputs, **OPTIONS))
