"""The vision tower of a model at a peer: the tensors of images that it reads, and the features that it gives.

The tower is the vision encoder and the projector, which the family's `get_image_features` runs.
"""

from __future__ import annotations

import inspect
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from splitnet.blocks.client_part import ImageTextLayout, load_tower
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import ProtocolError, UnsupportedModel
from splitnet.quant.device import to_device, to_host
from splitnet.wire.codecs import EXACT, check_values, codec_by_code, codec_by_name, encode_finite
from splitnet.wire.messages import (
    MAX_IMAGES,
    MAX_PAYLOAD_BYTES,
    ImageFeatures,
    ImageTensor,
    Payload,
    ReadImages,
)

PIXELS: Final = "pixel_values"
"""`[patches, values]` with `GRID`; otherwise `[images, channels, height, width]`, with another first axis if the family
has `MASK`. Encoded by `ReadImages.codec`, each last axis as a position."""
GRID: Final = "image_grid_thw"
"""`[images, 3]`: frames, rows and columns of patches. Each value is an int64."""
MASK: Final = "pixel_attention_mask"
"""`[..., images, height, width]`: whether a pixel belongs to an image. Each value is a byte."""

_TYPES: Final = {GRID: torch.int64, MASK: torch.bool}
PIXEL_CODECS: Final = {codec_by_name(name).code: name for name in (EXACT, "fp16")}
CHANNELS: Final = 3


@dataclass
class Features(ModelOutput):
    """As the output of the family's `get_image_features`: one tensor `[length, hidden]` for each image, or one for all;
    deepstack_features: the same for each block before which features are added."""

    pooler_output: Any = None
    deepstack_features: Any = None


def check_family(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModel: the tower needs tensors that `ReadImages` does not carry, or is in a file that the
    fingerprint of the model does not cover."""
    if checkpoint.source.endswith(".gguf"):
        raise UnsupportedModel(
            f"the tower of {checkpoint.name} is in a file of its own, of which peers may have another version: leave "
            "out --vision, or give local"
        )
    layout = ImageTextLayout.of(checkpoint)
    holder = layout.holder
    method = getattr(holder, "get_image_features", None)
    needed = {name for name, one in inspect.signature(method).parameters.items() if _is_needed(one)} if method else {""}
    if not needed <= {PIXELS, *_TYPES}:
        family = layout.config.model_type
        raise UnsupportedModel(f"peers do not read images of the family {family!r}: leave out --vision, or give local")


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def pack_images(given: Mapping[str, Tensor], codec: str) -> tuple[tuple[ImageTensor, ...], bytes]:
    """The tensors of `ReadImages` and its payload. codec: of the pixels."""
    tensors = tuple(ImageTensor(name, tuple(values.shape)) for name, values in given.items())
    pixels = given[PIXELS].float()
    data = {name: values.cpu().to(_TYPES[name]).numpy().tobytes() for name, values in given.items() if name in _TYPES}
    data[PIXELS] = encode_finite(codec_by_name(codec), pixels.reshape(-1, pixels.shape[-1]))
    return tensors, b"".join(data[name] for name in given)


def split_images(given: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each image, or of all images if the family reads the images of a text together."""
    pixels, grids = given[PIXELS], given.get(GRID)
    if grids is None and pixels.ndim != 4:
        yield dict(given)
        return
    sizes = grids.prod(-1).tolist() if grids is not None else [1] * len(pixels)
    for index, own in enumerate(pixels.split(sizes)):
        yield {PIXELS: own} if grids is None else {PIXELS: own, GRID: grids[index : index + 1]}


def unpack_features(answer: ImageFeatures, codec: str, hidden: int, levels: int) -> list[list[Tensor]]:
    """By level, the features of each image, `[length, hidden]`. Raises ProtocolError, CodecError: the model needs
    another form."""
    rows = sum(answer.lengths) * levels
    if answer.codec != codec_by_name(codec).code or answer.levels != levels or not rows:
        raise ProtocolError("the features of an image have another form than the model needs")
    check_values(answer.codec, answer.payload, rows, hidden)
    decoded = codec_by_code(answer.codec).decode(answer.payload, rows, hidden)
    return [list(level.split(list(answer.lengths))) for level in decoded.chunk(levels)]


class VisionTower:
    """Computes features of images that strangers send. Not thread-safe, except for `check`.

    Raises UnsupportedModel: the family's tower cannot run at a peer.

    on_layer: called before each layer, so that steps of other clients run between two layers.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype | str | None) -> None:
        check_family(checkpoint)
        self._holder: Any = load_tower(checkpoint, dtype=dtype, device=device)
        self._device = torch.device(device)
        self._model = checkpoint.fingerprint
        self.on_layer: Callable[[], None] = lambda: None
        for module in self._holder.modules():
            for layer in module if isinstance(module, nn.ModuleList) else ():
                layer.register_forward_pre_hook(lambda *_: self.on_layer())
        names = inspect.signature(self._holder.get_image_features).parameters.keys() & {GRID, MASK}
        vision = self._holder.config.vision_config
        self._names = {PIXELS, *names}
        self._merge: int = getattr(vision, "spatial_merge_size", 1) if GRID in names else 1
        self._patch: int = CHANNELS * getattr(vision, "temporal_patch_size", 1) * _side(vision.patch_size) ** 2
        self._size = 0 if GRID in names else _side(getattr(vision, "image_size", 0))
        self._try_out()

    def _try_out(self) -> None:
        """Reads the smallest image, which tells the form of features."""
        merge, size = self._merge, self._size
        if GRID in self._names:
            given = {PIXELS: torch.ones(merge**2, self._patch), GRID: torch.tensor([[1, merge, merge]])}
        else:
            given = {PIXELS: torch.ones(*(1,) * (2 if MASK in self._names else 1), CHANNELS, size, size)}
        try:
            levels, _ = self._compute(given)
            if GRID in given and [len(each) for each in levels[0]] != [1]:
                raise ValueError("the family adds features to those of patches")
        except Exception as error:
            family = self._holder.config.model_type
            raise UnsupportedModel(f"peers do not read images of the family {family!r}: leave out --vision") from error
        self._levels, self._hidden = len(levels), levels[0][0].shape[-1]
        self._of_image = sum(map(len, levels[0]))

    def check(self, message: ReadImages) -> int:
        """The number of features in the answer. Looks at shapes and grids alone.

        Raises ProtocolError, CodecError: the tower does not read such tensors, or the answer would be too large.
        """
        shapes = dict(message.tensors)
        pixels = shapes.get(PIXELS, ())
        if message.model != self._model:
            raise ProtocolError("this peer reads images for another model")
        if not {PIXELS, GRID} & self._names <= shapes.keys() <= self._names or len(shapes) != len(message.tensors):
            raise ProtocolError(f"images of this model have the tensors {', '.join(sorted(self._names))}")
        if message.codec not in PIXEL_CODECS:
            raise ProtocolError(f"pixels are encoded as {' or '.join(PIXEL_CODECS.values())}")
        if not all(map(math.prod, shapes.values())) or sum(_nbytes(message).values()) != len(message.payload):
            raise ProtocolError("the tensors of the images are empty, or have other sizes than they say")
        count = (
            self._in_grids(message, pixels, shapes[GRID]) if GRID in self._names else self._in_pixels(shapes, pixels)
        )
        size = count * self._levels * codec_by_code(message.features_codec).bytes_per_position(self._hidden)
        if size > MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"{count} features are too many for one answer: give a smaller image")
        return count

    def _in_grids(self, message: ReadImages, pixels: tuple[int, ...], grids: tuple[int, ...]) -> int:
        if len(grids) != 2 or grids[0] > MAX_IMAGES or grids[1] != 3:
            raise ProtocolError(f"at most {MAX_IMAGES} images have a grid of three numbers each")
        patches = 0
        for image in struct.iter_unpack("<3q", _parts(message)[GRID]):
            if not all(0 < side <= pixels[0] for side in image) or any(side % self._merge for side in image[1:]):
                raise ProtocolError("the grid of an image is empty, too large, or cuts merged patches")
            patches += math.prod(image)
        if pixels != (patches, self._patch):
            raise ProtocolError("the grids of the images do not fit their pixels")
        return patches // self._merge**2

    def _in_pixels(self, shapes: Mapping[str, tuple[int, ...]], pixels: tuple[int, ...]) -> int:
        *images, channels, height, width = pixels if len(pixels) == (5 if MASK in self._names else 4) else (0,) * 4
        area, whole = height * width, self._size**2
        if channels != CHANNELS or max(height, width) > self._size or math.prod(images) > MAX_IMAGES:
            raise ProtocolError(f"at most {MAX_IMAGES} images have at most {self._size} x {self._size} pixels")
        if shapes.get(MASK, (*images, height, width)) != (*images, height, width):
            raise ProtocolError("the mask of the images does not fit their pixels")
        return math.prod(images) * -(-area * self._of_image // whole)

    def read(self, message: ReadImages) -> ImageFeatures:
        """Computes the features of images. Call `check` first. Raises CodecError, NotFinite: the values are not
        finite."""
        shape = dict(message.tensors)[PIXELS]
        check_values(message.codec, _parts(message)[PIXELS], math.prod(shape[:-1]), shape[-1])
        levels, stacked = self._compute(_values(message))
        lengths = tuple(len(image) for image in levels[0])
        if any(tuple(map(len, level)) != lengths for level in levels):
            raise UnsupportedModel("the features of the images differ in their numbers")
        codec = codec_by_code(message.features_codec)
        payload = encode_finite(codec, to_host(torch.cat([image for level in levels for image in level])))
        ids = message.session, message.epoch, message.number
        return ImageFeatures(*ids, codec.code, lengths, len(levels), stacked, payload)

    @torch.inference_mode()
    def _compute(self, given: Mapping[str, Tensor]) -> tuple[list[list[Tensor]], bool]:
        """By level, the features of each image; and whether the family gives one tensor for all."""
        moved = {name: to_device(values, self._device, values.dtype) for name, values in given.items()}
        found = self._holder.get_image_features(**moved, return_dict=True)
        levels = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
        return [list(level) for level in levels], isinstance(found.pooler_output, Tensor)


def _side(size: Any) -> int:
    return size if isinstance(size, int) else min(size)


def _nbytes(message: ReadImages) -> dict[str, int]:
    pixels = codec_by_code(message.codec)
    return {
        name: math.prod(shape) * _TYPES[name].itemsize
        if name in _TYPES
        else math.prod(shape[:-1]) * pixels.bytes_per_position(shape[-1])
        for name, shape in message.tensors
    }


def _parts(message: ReadImages) -> dict[str, Payload]:
    view, at, found = memoryview(message.payload), 0, dict[str, Payload]()
    for name, size in _nbytes(message).items():
        found[name], at = view[at : at + size], at + size
    return found


def _values(message: ReadImages) -> dict[str, Tensor]:
    """The tensors of a message whose sizes are checked."""
    found: dict[str, Tensor] = {}
    for (name, shape), data in zip(message.tensors, _parts(message).values(), strict=True):
        if name == GRID:
            values = torch.frombuffer(bytearray(data), dtype=torch.int64)
        elif name == MASK:
            values = torch.frombuffer(bytearray(data), dtype=torch.uint8) != 0
        else:
            values = codec_by_code(message.codec).decode(data, math.prod(shape[:-1]), shape[-1])
        found[name] = values.reshape(shape)
    return found
