"""Images of users: read as browsers show them, within bounds, and processed beside safe text."""

from __future__ import annotations

import base64
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.images import KEPT_PIXELS, MOST_BYTES, ImageError, image_file, process_prompt, read_images
from tests.images import as_base64, hostile_images, huge_png, of_one_colour
from tests.leftovers import outliving_tests


@pytest.fixture(scope="module", autouse=True)
def _reader() -> None:
    with outliving_tests():
        read_images([of_one_colour()])


def values(data: str) -> np.ndarray:
    return np.asarray(read_images([data])[0])


def test_hostile_images_are_refused_soon() -> None:
    for name, (data, says) in hostile_images().items():
        began = time.monotonic()
        try:
            read_images([of_one_colour(), data])
        except ImageError as error:
            refused = str(error)
        else:
            refused = "not at all"
        assert refused.startswith(f"image 2 cannot be used: {says}"), (name, refused)
        assert time.monotonic() - began < 10, name
    assert values(of_one_colour()).shape == (28, 28, 3), "the reader works on"


def test_large_files_and_many_images_are_refused_unread() -> None:
    with pytest.raises(ImageError, match=f"more than {MOST_BYTES} bytes"):
        read_images(["A" * (MOST_BYTES * 4 // 3 + 8)])
    with pytest.raises(ImageError, match="17 images are too many: send at most 16"):
        read_images(["A"] * 17)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"the image .*none\.png cannot be read \(No such file or directory\)"):
        image_file(tmp_path / "none.png")
    (tmp_path / "large.png").write_bytes(bytes(MOST_BYTES + 1))
    with pytest.raises(ImageError, match=r"large\.png has more than 20000000 bytes: give a smaller one"):
        image_file(tmp_path / "large.png")
    (tmp_path / "red.png").write_bytes(base64.b64decode(of_one_colour()))
    assert image_file(tmp_path / "red.png") == of_one_colour()


def test_images_are_read_as_browsers_show_them() -> None:
    left_red = Image.new("RGB", (40, 20), "blue")
    left_red.paste("red", (0, 0, 20, 20))
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned by 90 degrees
    shown = values(as_base64(left_red, "JPEG", exif=turned, quality=95))
    assert shown.shape == (40, 20, 3) and shown[2, 10, 0] > 200 and shown[-3, 10, 2] > 200
    shown = values(as_base64(left_red, "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff"))
    assert shown.shape == (20, 40, 3), "invalid EXIF data turns nothing"
    cmyk = values(as_base64(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert cmyk[4, 4, 0] > 220 and cmyk[4, 4, 1:].max() < 60
    assert (values(as_base64(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))) == 255).all(), "over white"
    half = values(as_base64(Image.new("LA", (8, 8), (0, 128))))
    assert (half == 127).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert values(as_base64(palette)).tolist()[0][0] == [9, 8, 7]
    assert (values(as_base64(palette, "GIF", transparency=1)) == 255).all()
    grey = Image.fromarray(np.full((8, 8), 0x80FF, np.uint16))
    assert (values(as_base64(grey)) == 0x80).all()
    assert values(as_base64(Image.new("1", (8, 8), 1))).min() == 255
    assert abs(values(as_base64(Image.new("RGB", (8, 8), "red"), "WEBP"))[0, 0].astype(int) - [255, 0, 0]).max() < 5


def test_a_large_image_is_made_smaller() -> None:
    (image,) = read_images([huge_png(7000, 7000)])
    assert 0.99 * KEPT_PIXELS < image.width * image.height <= KEPT_PIXELS
    photo = as_base64(Image.linear_gradient("L").resize((6000, 4000)), "JPEG")
    one, other = read_images([photo, photo])
    assert one.size == other.size and 0.98 * KEPT_PIXELS < 2 * one.width * one.height <= KEPT_PIXELS
    assert abs(one.width / one.height - 1.5) < 0.01
    same = Image.effect_noise((300, 200), 50)
    assert (values(as_base64(same)) == np.asarray(same.convert("RGB"))).all(), "smaller ones stay as they are"


@pytest.fixture
def processor(demo_checkpoint: Path) -> Any:
    tokenizer = copy.deepcopy(Checkpoint.open(demo_checkpoint).tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sides: Any = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}}
    return LlavaProcessor(CLIPImageProcessor(**sides), tokenizer, patch_size=14, num_additional_image_tokens=0)


def test_only_placeholders_of_the_template_stand_for_images(processor: Any) -> None:
    images = [of_one_colour("red"), of_one_colour("blue", (60, 30))]
    plain = process_prompt(processor, "<image>Bees<image> fly", "", images)
    expected = processor(text="<image>Bees<image> fly", images=read_images(images), return_tensors="pt")
    assert plain.tokens == expected["input_ids"][0].tolist() and plain.tokens.count(processor.image_token_id) == 8
    assert torch.equal(plain.pixels["pixel_values"], expected["pixel_values"]) and len(plain.pixels) == 1
    marked = process_prompt(processor, "<image>Bees <i\ue000mage><image> fly", "\ue000", images)
    assert marked.tokens.count(processor.image_token_id) == 8
    assert "<image>" in processor.tokenizer.decode([id for id in marked.tokens if id != processor.image_token_id])
    assert type(processor.tokenizer).__name__ != "_PiecewiseTokenizer", "other threads use the processor, too"
    with pytest.raises(ImageError, match="the model's processor refuses these images"):
        process_prompt(processor, "Bees fly", "", images)


def test_pieces_find_the_token_of_a_character(processor: Any) -> None:
    from splitnet.images import _PiecewiseTokenizer

    encoded = _PiecewiseTokenizer(processor.tokenizer, "\ue000")(["<image>Bees <i\ue000mage><image> fly"])
    at = "<image>Bees <i\ue000mage><image> fly".rindex("<image>")
    found = encoded.char_to_token(0, at)
    assert encoded["input_ids"][0][found] == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert found == encoded["input_ids"][0].index(processor.tokenizer.convert_tokens_to_ids("<image>"), 1)
    assert encoded.char_to_token(0, 999) is None


def test_base64_may_have_line_breaks() -> None:
    lines = base64.encodebytes(base64.b64decode(of_one_colour())).decode()
    assert values(lines).shape == (28, 28, 3)
