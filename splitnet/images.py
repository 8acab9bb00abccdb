"""Images of users: read in a bounded process, and processed together with the text of a prompt.

An image is kept as base64, as requests contain it, until its prompt is made.
"""

from __future__ import annotations

import copy
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitnet.bounded import BoundedProcess
from splitnet.errors import SplitnetError

MOST_IMAGES = 16  # Maximum number of images of a prompt
MOST_BYTES = 20_000_000  # Maximum size of the file of an image
DATA_URL = re.compile(r"data:image/(?:png|jpe?g|webp|gif);base64,", re.IGNORECASE)
KEPT_PIXELS = 12_000_000  # Maximum number of pixels of all images of a prompt; larger images are made smaller


class ImageError(SplitnetError):
    """An image cannot be read, or a model cannot take it."""


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, and what a model needs besides: the pixels of images, by the name of its argument."""

    tokens: list[int]
    pixels: Mapping[str, Any] = field(default_factory=dict)


def image_file(file: Path) -> str:
    """The image of a file. Raises ImageError: the file cannot be read, or is too large."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise ImageError(f"the image {file} cannot be read ({error.strerror}): give the file of an image") from None
    if len(data) > MOST_BYTES:
        raise ImageError(f"the image {file} has more than {MOST_BYTES} bytes: give a smaller one")
    return b64encode(data).decode()


def read_images(images: Sequence[str]) -> list[Any]:
    """The images as Pillow's images in RGB. Raises ImageError, which names the first image that cannot be read."""
    from PIL import Image

    if len(images) > MOST_IMAGES:
        raise ImageError(f"{len(images)} images are too many: send at most {MOST_IMAGES}")
    read: list[Any] = []
    for number, data in enumerate(images, start=1):
        answer: Any = None
        error: str | None = f"it has more than {MOST_BYTES} bytes"
        if len(data) * 3 // 4 <= MOST_BYTES:
            answer, error = _process.ask({"most": KEPT_PIXELS // len(images)}, data.encode(errors="replace"))
        if error is not None:
            raise ImageError(f"image {number} cannot be used: {error}: send another one")
        width, height, values = answer
        read.append(Image.frombytes("RGB", (width, height), values))
    return read


def image(data: str) -> dict[str, Any]:
    """The part of an image, given as base64."""
    return {"type": "image", "data": data}


def images_of(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of images, in the order of the messages."""
    contents = (one["content"] for one in messages if isinstance(one["content"], list))
    return [part for content in contents for part in content if part["type"] == "image"]


def without_images(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages for chat templates, in which parts stand for images."""
    return [{**one, "content": _bare(one["content"])} for one in messages]


def _bare(content: Any) -> Any:
    return (
        [part if part["type"] == "text" else {"type": part["type"]} for part in content]
        if isinstance(content, list)
        else content
    )


def process_prompt(processor: Any, text: str, mark: str, images: Sequence[str]) -> Prompt:
    """The prompt that a processor of transformers makes of a rendered chat and its images.

    mark: separates the pieces of the text that are tokenized one by one, so that names of special tokens in messages
    stay text, and stand for no image; empty: the text is one piece. Raises ImageError.
    """
    read = read_images(images)
    piecewise = copy.copy(processor)
    piecewise.tokenizer = _PiecewiseTokenizer(processor.tokenizer, mark)
    try:
        inputs = dict(piecewise(text=[text], images=read or None, return_tensors="pt"))
    except (ValueError, TypeError, IndexError) as error:
        raise ImageError(f"the model's processor refuses these images ({error}): send others") from None
    tokens = inputs.pop("input_ids")[0].tolist()
    inputs.pop("attention_mask", None)
    if images and not inputs:
        raise ImageError("the model's processor makes nothing of these images: send text alone")
    return Prompt(tokens, inputs)


class _PiecewiseTokenizer:
    """A tokenizer that reads the pieces of a text between marks one by one."""

    def __init__(self, tokenizer: Any, mark: str) -> None:
        self._tokenizer = tokenizer
        self._mark = mark

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: Sequence[str], **_options: Any) -> _Encoded:
        return _Encoded([self._encode(text) for text in texts])

    def _encode(self, text: str) -> list[tuple[str, Any]]:
        pieces = text.split(self._mark) if self._mark else [text]
        return [(piece, self._tokenizer(piece, add_special_tokens=False)) for piece in pieces]


class _Encoded(dict[str, Any]):
    """What a tokenizer returns, made of the pieces of each text with their encodings."""

    def __init__(self, texts: list[list[tuple[str, Any]]]) -> None:
        ids = [[id for _, encoded in pieces for id in encoded.input_ids] for pieces in texts]
        super().__init__(input_ids=ids, attention_mask=[[1] * len(row) for row in ids])
        self._texts = texts

    def char_to_token(self, text: int, at: int) -> int | None:
        """The token with a character, which is counted with marks; Idefics3 looks for its images so."""
        tokens = 0
        for piece, encoded in self._texts[text]:
            if at < len(piece):
                found = encoded.char_to_token(at)
                return None if found is None else tokens + found
            at, tokens = at - len(piece) - 1, tokens + len(encoded.input_ids)
        return None


_process = BoundedProcess("image")
start_reader = _process.start_process  # starts the process in advance, which takes a second
