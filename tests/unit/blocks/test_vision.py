"""Messages of strangers to the vision tower of a peer."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitnet.blocks.vision import GRID, MASK, PIXELS, VisionTower, pack_images, unpack_features
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import CodecError, ProtocolError
from splitnet.wire.messages import MAX_IMAGES, MAX_PAYLOAD_BYTES, ImageTensor, ReadImages
from tests.image_models import IMAGE_MODELS


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VisionTower]:
    found: dict[str, VisionTower] = {}
    for family in ("qwen3_vl", "idefics3", "llava"):
        folder: Path = tmp_path_factory.mktemp(family) / "published"
        IMAGE_MODELS[family].write(folder)
        found[family] = VisionTower(Checkpoint.open(folder), "cpu", "float32")
    return found


def message(tower: VisionTower, **tensors: torch.Tensor) -> ReadImages:
    described, payload = pack_images(tensors, "none")
    return ReadImages(bytes(16), 0, 1, tower._model, 0, 0, described, payload)


def grid(*sizes: int, patches: int = 24, images: tuple[int, ...] = (1, 3)) -> dict[str, torch.Tensor]:
    return {PIXELS: torch.randn(patches, 48), GRID: torch.tensor(sizes).reshape(images)}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (grid(1, 4, 4), "do not fit their pixels"),
        (grid(1, 8, 6), "do not fit their pixels"),
        (grid(2, 4, 6), "do not fit their pixels"),
        (grid(1, 0, 6), "empty"),
        (grid(1, -4, -6), "empty"),
        (grid(1, 3, 8), "cuts merged patches"),
        (grid(1, 1 << 40, 1 << 40), "too large"),
        (grid(1 << 62, 2, 2), "too large"),
        (grid(-(1 << 63), 4, 6), "empty"),
        (grid(4, 6, images=(1, 2)), "three numbers"),
        (grid(1, 4, 6, images=(3,)), "three numbers"),
        (grid(*(1, 2, 2) * 65, patches=260, images=(65, 3)), "at most 64 images"),
        ({PIXELS: torch.randn(24, 47), GRID: torch.tensor([[1, 4, 6]])}, "do not fit"),
        ({PIXELS: torch.randn(24, 48)}, "have the tensors"),
        ({PIXELS: torch.randn(24, 48), MASK: torch.ones(24, 48)}, "have the tensors"),
    ],
)
def test_hostile_grids_are_refused(towers: dict[str, VisionTower], given: Any, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        towers["qwen3_vl"].check(message(towers["qwen3_vl"], **given))


@pytest.mark.parametrize(
    ("family", "given", "says"),
    [
        ("llava", {PIXELS: torch.randn(1, 3, 17, 16)}, "16 x 16 pixels"),
        ("llava", {PIXELS: torch.randn(1, 4, 16, 16)}, "16 x 16 pixels"),
        ("llava", {PIXELS: torch.randn(MAX_IMAGES + 1, 3, 16, 16)}, f"at most {MAX_IMAGES} images"),
        ("llava", {PIXELS: torch.randn(3, 16, 16)}, "16 x 16 pixels"),
        ("llava", {PIXELS: torch.randn(1, 1, 3, 16, 16)}, "16 x 16 pixels"),
        ("llava", {PIXELS: torch.randn(0, 3, 16, 16)}, "empty"),
        ("llava", grid(1, 4, 6), "have the tensors"),
        ("idefics3", {PIXELS: torch.randn(1, 2, 3, 16, 16), MASK: torch.ones(1, 1, 16, 16)}, "does not fit"),
        ("idefics3", {PIXELS: torch.randn(1, 2, 3, 16, 16), MASK: torch.ones(1, 2, 32, 16)}, "does not fit"),
    ],
)
def test_hostile_pixels_are_refused(towers: dict[str, VisionTower], family: str, given: Any, says: str) -> None:
    with pytest.raises(ProtocolError, match=re.escape(says)):
        towers[family].check(message(towers[family], **given))


def test_sizes_are_checked_before_values_are_read(towers: dict[str, VisionTower]) -> None:
    tower = towers["qwen3_vl"]
    good = message(tower, **grid(1, 4, 6))
    assert tower.check(good) == 6
    huge = (ImageTensor(PIXELS, (MAX_PAYLOAD_BYTES,) * 5), good.tensors[1])
    many = message(tower, **grid(1, 2, 2 * 9000, patches=36_000))
    wrong = [
        replace(good, payload=good.payload[:-1]),
        replace(good, payload=b""),
        replace(good, tensors=huge),
        replace(good, tensors=(good.tensors[0], good.tensors[0])),
        replace(good, tensors=(good.tensors[0], good.tensors[1], good.tensors[1])),
        replace(good, codec=6),
        replace(good, features_codec=200),
        many,  # 9,000 features on 3 levels
    ]
    tower._hidden, before = 1024, tower._hidden
    for each in wrong:
        with pytest.raises((ProtocolError, CodecError)):
            tower.check(each)
    tower._hidden = before


@given(values=st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-1, 9), min_size=3, max_size=6))
def test_a_grid_is_refused_or_read(towers: dict[str, VisionTower], values: list[int]) -> None:
    tower, size = towers["qwen3_vl"], len(values) // 3 * 3
    asked = message(tower, **grid(*values[:size], patches=8, images=(size // 3, 3)))
    try:
        count = tower.check(asked)
    except ProtocolError:
        return
    assert sum(tower.read(asked).lengths) == count == 2


@given(
    family=st.sampled_from(["qwen3_vl", "idefics3", "llava"]),
    tensors=st.lists(
        st.builds(
            ImageTensor,
            st.sampled_from([PIXELS, GRID, MASK, "other"]),
            st.lists(st.integers(0, 4) | st.sampled_from([16, 48, MAX_PAYLOAD_BYTES]), min_size=1, max_size=5).map(
                tuple
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    codecs=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    spare=st.sampled_from([0, 0, 0, 1]),
)
def test_any_message_is_refused_or_has_its_bytes(
    towers: dict[str, VisionTower],
    family: str,
    tensors: list[ImageTensor],
    codecs: tuple[int, int],
    spare: int,
) -> None:
    tower, sizes = towers[family], {PIXELS: 4 if codecs[0] == 0 else 2, GRID: 8}
    size = sum(math.prod(shape) * sizes.get(name, 1) for name, shape in tensors) + spare
    payload = bytes(size if size < 1 << 20 else 0)
    asked = ReadImages(bytes(16), 0, 1, tower._model, *codecs, tuple(tensors), payload)
    try:
        count = tower.check(asked)
    except (ProtocolError, CodecError):
        return
    assert count > 0 and not spare and 0 < size < 1 << 20


@given(values=st.lists(st.booleans(), min_size=256, max_size=256))
def test_a_mask_leaves_the_tower_usable(towers: dict[str, VisionTower], values: list[bool]) -> None:
    tower, pixels = towers["idefics3"], torch.ones(1, 1, 3, 16, 16)
    asked = message(tower, **{PIXELS: pixels, MASK: torch.tensor(values).reshape(1, 1, 16, 16)})
    assert tower.check(asked) == 4
    with suppress(RuntimeError, IndexError, CodecError):  # the engine answers these with a failure
        tower.read(asked)
    good = message(tower, **{PIXELS: pixels})
    assert tower.read(good).lengths == (4,)


def test_features_travel_in_the_form_of_the_model(towers: dict[str, VisionTower]) -> None:
    tower = towers["qwen3_vl"]
    answer = tower.read(message(tower, **grid(1, 4, 6)))
    levels = unpack_features(answer, "none", 64, 3)
    assert [[tuple(image.shape) for image in level] for level in levels] == [[(6, 64)]] * 3
    for wrong in (
        replace(answer, levels=2),
        replace(answer, codec=2),
        replace(answer, lengths=(5,)),
        replace(answer, lengths=(0,), payload=b""),
        replace(answer, payload=b"\xff" * len(answer.payload)),
    ):
        with pytest.raises((ProtocolError, CodecError)):
            unpack_features(wrong, "none", 64, 3)
