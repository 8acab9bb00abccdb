"""Towers in llama.cpp's mmproj files: which file is the model's, what is refused, and the processor of images."""

from __future__ import annotations

import io
import shutil
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from PIL import Image
from transformers import Gemma3ImageProcessorPil, Qwen2VLImageProcessorPil

import splitnet
from splitnet.blocks.vision import VisionTower
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import ModelNotFound, UnsupportedModel
from splitnet.images import process_prompt
from tests.image_models import GGUF_IMAGE_MODELS, IMAGE, START, vocabulary
from tests.unit.gguf_writing import write_gguf, write_mmproj

FAMILIES = list(GGUF_IMAGE_MODELS)
MARKS = {"gemma3": "<start_of_image>", "": "<|vision_start|><|image_pad|><|vision_end|>"}
"""What stands for an image in chat templates."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Any, Path]]:
    """The whole model of each family in transformers, and a folder with its files."""
    found: dict[str, tuple[Any, Path]] = {}
    for family, model in GGUF_IMAGE_MODELS.items():
        folder = tmp_path_factory.mktemp(family)
        found[family] = model.write(folder / "published"), folder
        write_gguf(
            folder / "published",
            folder / "model.gguf",
            tokens=vocabulary(family),
            template=f"ab{MARKS.get(family, MARKS[''])}b",
        )
        write_mmproj(folder / "published", folder / "mmproj.gguf")
    return found


def model_folder(folder: Path, source: Path, tower: Path | None = None) -> Path:
    """A folder with a model and a tower; None: that of the model."""
    folder.mkdir()
    shutil.copy(source / "model.gguf", folder)
    shutil.copy(tower or source / "mmproj.gguf", folder / "mmproj.gguf")
    return folder


@torch.no_grad()
def check_same(family: str, local: Any, folder: Path) -> None:
    """Compares the whole model of a folder, loaded by transformers, with `local`."""
    store = Checkpoint.open(folder).with_towers.store
    with store.load_tensors({name: name for name in store.tensor_names}, torch.float32) as tensors:
        loaded, report = type(local).from_pretrained(
            None, config=store.config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
        )
    assert not any(report.values()), report
    inputs = GGUF_IMAGE_MODELS[family].inputs(local, 2)
    torch.testing.assert_close(loaded.eval()(**inputs).logits, local(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_is_that_of_its_source(family: str, sources: Mapping[str, tuple[Any, Path]], tmp_path: Path) -> None:
    local, source = sources[family]
    folder = model_folder(tmp_path / "it", source)
    check_same(family, local, folder)
    text = Checkpoint.open(folder / "model.gguf")
    alone = Checkpoint.open(source / "model.gguf")
    assert text.with_towers.fingerprint == text.fingerprint == alone.fingerprint
    assert text.store.reads_images and not any("vis" in name for name in text.store.tensor_names)


@pytest.mark.parametrize(("family", "form"), [("qwen2_5_vl", "fused"), ("gemma3", "swapped")])
def test_forms_of_other_converters(
    family: str, form: str, sources: Mapping[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    local, source = sources[family]
    old: dict[str, Any] = {form: True, "has_text_encoder": False, "has_llava_projector": False}
    tower = write_mmproj(source / "published", tmp_path / "old.gguf", **old)
    check_same(family, local, model_folder(tmp_path / "it", source, tower))


def test_a_vocabulary_that_ends_before_the_token_of_images(
    sources: Mapping[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    _, source = sources["gemma3"]
    folder = model_folder(tmp_path / "it", source)
    names = [name.replace("image_soft_token", "unused250") for name in vocabulary("gemma3")]
    names[8] = "<|endoftext|>"  # transformers would add it
    write_gguf(source / "published", folder / "model.gguf", tokens=names)
    store = Checkpoint.open(folder).with_towers.store
    assert store.config.image_token_id == 300 == store.processor().tokenizer.convert_tokens_to_ids("<image_soft_token>")


def picture(width: int, height: int) -> Any:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_is_that_of_the_original(
    family: str, sources: Mapping[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    local, source = sources[family]
    checkpoint = Checkpoint.open(model_folder(tmp_path / "it", source)).with_towers
    normal: dict[str, Any] = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
    if family == "gemma3":
        original: Any = Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, **normal)
    else:
        pixels = {"qwen2_5_vl": (56 * 56, 12_845_056)}.get(family, (65_536, 16_777_216))
        original = Qwen2VLImageProcessorPil(
            min_pixels=pixels[0], max_pixels=pixels[1], patch_size=4, merge_size=2, **normal
        )
    image = picture(272, 264)
    file = io.BytesIO()
    image.save(file, "png")
    prompt = process_prompt(
        checkpoint.store.processor(), checkpoint.tokenizer().chat_template, "", [b64encode(file.getvalue()).decode()]
    )
    chat = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    processor = splitnet.AutoProcessor.from_pretrained(tmp_path / "it")
    said = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(said["pixel_values"], prompt.pixels["pixel_values"])
    assert said["input_ids"][0].tolist().count(IMAGE) == prompt.tokens.count(IMAGE)
    expected = original(images=[image], return_tensors="pt")
    torch.testing.assert_close(prompt.pixels["pixel_values"], expected["pixel_values"])
    count = 4 if family == "gemma3" else int(expected["image_grid_thw"].prod()) // 4
    assert prompt.tokens.count(IMAGE) == count and prompt.tokens.count(START) == 1
    inputs = {name: values for name, values in prompt.pixels.items() if torch.is_tensor(values)}
    with torch.no_grad():
        assert local(input_ids=torch.tensor([prompt.tokens]), **inputs).logits.isfinite().all()


OTHER = "is the projector of another model"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another width": ("gemma3", {"vision__projection_dim": 128}, f"{OTHER}: it makes 128 values .* takes 64 "),
    "no added states": (
        "qwen3_vl",
        {"vision__is_deepstack_layers": None},
        f"{OTHER}.* 64 values and 0 added .* 64 and 2:",
    ),
    "another type": (
        "qwen3_vl",
        {"projector_type": "qwen2vl_merger"},
        "a projector 'qwen2vl_merger', which .* 'qwen3vl'",
    ),
    "an unknown key": ("gemma3", {"vision__new": 1}, r"has clip\.vision\.new, whose meaning"),
    "a tower for sounds": ("gemma3", {"has_audio_encoder": True}, r"clip\.has_audio_encoder"),
    "another activation": ("qwen2_5_vl", {"use_silu": False}, "clip.use_silu is not True"),
    "another epsilon": ("qwen3_vl", {"vision__attention__layer_norm_epsilon": 1e-5}, "epsilon is not 1e-06"),
    "no type": ("gemma3", {"projector_type": None}, "a projector None"),
    "no width": ("gemma3", {"vision__projection_dim": None}, r"lacks the key clip\.vision\.projection_dim"),
    "10^7 blocks": ("qwen3_vl", {"vision__block_count": 10**7}, "at most 4096 are taken"),
    "more blocks than tensors": ("qwen3_vl", {"vision__block_count": 4000}, "has no block 3999"),
    "a large image": ("gemma3", {"vision__image_size": 10**6}, "patches do not fit 16 positions"),
    "large patches": ("qwen3_vl", {"vision__patch_size": 10**6}, "do not have 1000000 rows"),
    "a large merge": ("qwen2_5_vl", {"vision__spatial_merge_size": 10**6}, "does not join 1000000 x 1000000"),
    "many pixels": ("qwen3_vl", {"vision__image_min_pixels": 10**9}, "images of 1000000000 to "),
    "patches of no size": ("gemma3", {"vision__patch_size": 0}, "do not have 0 rows"),
    "large groups": (
        "gemma3",
        {"vision__projector__scale_factor": 10**6},
        "4 patches in a row are not groups of 1000000",
    ),
    "no groups": ("gemma3", {"vision__projector__scale_factor": 0}, "do not describe its tower"),
    "no heads": ("qwen3_vl", {"vision__attention__head_count": 0}, "transformers cannot build"),
    "a wide tower": ("qwen2_5_vl", {"vision__embedding_length": 10**6}, "does not join"),
    "many values inside": ("gemma3", {"vision__feed_forward_length": 2**24}, "the config says that .* numbers"),
    "two colours": ("gemma3", {"vision__image_mean": [0.5, 0.5]}, "none of three colours"),
    "no deviation": ("gemma3", {"vision__image_std": [0.5, 0.0, 0.5]}, "none of three colours"),
    "a text for a number": ("gemma3", {"vision__block_count": "two"}, "do not describe its tower"),
    "a list for a number": ("qwen2_5_vl", {"vision__n_wa_pattern": [2]}, "do not describe its tower"),
    "a list for a type": ("gemma3", {"projector_type": [1]}, "do not describe its tower"),
    "a number of added states": ("qwen3_vl", {"vision__is_deepstack_layers": 2}, "do not describe its tower"),
    "every 0th block": ("qwen2_5_vl", {"vision__n_wa_pattern": 0}, "do not describe its tower"),
}


@pytest.mark.parametrize("harm", REFUSED)
def test_a_tower_that_is_not_the_models_is_refused(
    harm: str, sources: Mapping[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    from splitnet.blocks.client_part import load_image_text_part
    from splitnet.blocks.stand_ins import HandedStates

    family, values, why = REFUSED[harm]
    _, source = sources[family]
    tower = write_mmproj(source / "published", tmp_path / "other.gguf", **values)
    folder = model_folder(tmp_path / "it", source, tower)
    assert Checkpoint.open(folder).config.hidden_size == 64  # the text is usable
    with pytest.raises(UnsupportedModel, match=why):
        found = Checkpoint.open(folder).with_towers
        load_image_text_part(found, torch.nn.Identity(), HandedStates(found.num_blocks))


def test_which_file_is_the_tower(sources: Mapping[str, tuple[Any, Path]], tmp_path: Path) -> None:
    _, source = sources["qwen3_vl"]
    folder = model_folder(tmp_path / "it", source, sources["gemma3"][1] / "mmproj.gguf")
    with pytest.raises(UnsupportedModel, match=r"mmproj\.gguf holds a projector 'gemma3', .* put the mmproj"):
        assert Checkpoint.open(folder).with_towers
    shutil.copy(source / "mmproj.gguf", folder / "Qwen-mmproj-F32.gguf")
    assert Checkpoint.open(folder).with_towers.store.config.model_type == "qwen3_vl", "the one that fits is taken"
    write_mmproj(source / "published", folder / "mmproj-F16.gguf", Type.F16)
    with pytest.raises(UnsupportedModel, match=r"2 projectors that fit model \(Qwen-mmproj-F32\.gguf, mmproj-F"):
        assert Checkpoint.open(folder).with_towers
    for file in folder.glob("*mmproj*"):
        file.unlink()
    assert not Checkpoint.open(folder).store.reads_images
    with pytest.raises(ModelNotFound, match=r"model reads images only with its projector: put .*mmproj\*\.gguf into"):
        assert Checkpoint.open(folder).with_towers
    (folder / "mmproj.gguf").write_bytes(b"GGUF" + bytes(20))
    assert Checkpoint.open(folder).store.tensor_names
    with pytest.raises(UnsupportedModel, match=r"mmproj\.gguf is not a complete GGUF file"):
        assert Checkpoint.open(folder).with_towers


def test_a_vocabulary_without_the_tokens_of_images_is_refused(
    sources: Mapping[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    _, source = sources["qwen3_vl"]
    folder = model_folder(tmp_path / "it", source)
    write_gguf(source / "published", folder / "model.gguf", tokens=vocabulary("gemma3"))
    with pytest.raises(UnsupportedModel, match=r"image_pad"):
        assert Checkpoint.open(folder).with_towers


def test_peers_do_not_read_images_for_gguf_files(sources: Mapping[str, tuple[Any, Path]], tmp_path: Path) -> None:
    """The fingerprint of the model does not cover the file of the tower."""
    _, source = sources["gemma3"]
    opened = Checkpoint.open(model_folder(tmp_path / "it", source))
    for checkpoint in (opened, opened.with_towers):
        with pytest.raises(UnsupportedModel, match="may have another version: leave out --vision"):
            VisionTower(checkpoint, "cpu", None)
