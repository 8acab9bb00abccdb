"""Small random models that read images, one per family, and inputs as their processors return them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.published import DELTA, MOE, QWEN_VISION, Published

IMAGE, START = 250, 252
_TAIL = [9, 10, 11, 12, 13]

Inputs = dict[str, torch.Tensor]
MakeInputs = Callable[[Any, int, torch.Generator], Inputs]


@dataclass(frozen=True)
class ImageModel:
    """A small model of a family.

    Attributes:
        published: the checkpoint.
        make: makes the inputs of a prompt with some images, from the model's config.
    """

    published: Published
    make: MakeInputs

    def write(self, folder: Path) -> Any:
        """Writes the checkpoint to `folder`, and returns the whole model in transformers."""
        return self.published.write(folder, folder.with_name("plain"))

    def inputs(self, local: Any, images: int, seed: int = 1) -> Inputs:
        """The inputs of a prompt, with an attention mask."""
        found = self.make(local.config, images, torch.Generator().manual_seed(seed))
        return {**found, "attention_mask": torch.ones_like(found["input_ids"])}


def _text(images: list[list[int]], seed: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a prompt in which text stands around the tokens of images, and for each token whether it stands for
    a part of an image."""
    ids: list[int] = []
    for image in images:
        ids += [*torch.randint(3, 200, (3,), generator=seed).tolist(), *image, 7]
    tokens = torch.tensor([ids + _TAIL])
    return tokens, (tokens == IMAGE).long()


def _grids(config: Any, images: int, seed: torch.Generator) -> Inputs:
    """Patches of all images in one list, with the grid of each image; images have two sizes."""
    vision, sizes = config.vision_config, [(4, 6) if index % 2 == 0 else (6, 4) for index in range(images)]
    ids, types = _text([[START, *[IMAGE] * (height * width // 4)] for height, width in sizes], seed)
    if not images:
        return {"input_ids": ids, "mm_token_type_ids": types}
    values = 3 * vision.patch_size**2 * vision.temporal_patch_size
    pixels = torch.randn(sum(height * width for height, width in sizes), values, generator=seed)
    grid = torch.tensor([[1, *size] for size in sizes])
    return {"input_ids": ids, "mm_token_type_ids": types, "pixel_values": pixels, "image_grid_thw": grid}


def _pixels(
    tokens: int = 4, types: str = "", more: Mapping[str, list[int]] | None = None, *, nested: bool = False
) -> MakeInputs:
    """Images of 16 x 16 pixels, each of `tokens` tokens.

    types: name of the argument that marks the tokens of images. more: further arguments, per image. nested: the images
    are those of each text.
    """

    def make(config: Any, images: int, seed: torch.Generator) -> Inputs:
        ids, marks = _text([[IMAGE] * tokens] * images, seed)
        found = {"input_ids": ids, **({types: marks} if types else {})}
        if images:
            pixels = torch.randn(images, 3, 16, 16, generator=seed)
            found["pixel_values"] = pixels[None] if nested else pixels
            found |= {name: torch.tensor([value] * images) for name, value in (more or {}).items()}
        return found

    return make


_QWEN = {**QWEN_VISION, "spatial_merge_size": 2, "temporal_patch_size": 1}
_SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": 251, "vision_start_token_id": START, "vision_end_token_id": 253}
_ROPE: Mapping[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
}
_INTERLEAVED = {"rope_parameters": {**_ROPE["rope_parameters"], "mrope_interleaved": True}}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3}
_LLAVA = {"image_token_id": IMAGE, "image_token_index": IMAGE}


def _model(
    family: str,
    make: MakeInputs,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    top: Mapping[str, Any] | None = None,
) -> ImageModel:
    return ImageModel(Published(family, text, vision, top=top or {"image_token_id": IMAGE}), make)


IMAGE_MODELS: Mapping[str, ImageModel] = {
    "gemma3": _model(
        "gemma3",
        _pixels(types="token_type_ids"),
        {**_WINDOWS, "query_pre_attn_scalar": 16},
        _SIGLIP,
        {"image_token_id": IMAGE, "mm_tokens_per_image": 4, "boi_token_index": START, "eoi_token_index": 253},
    ),
    "idefics3": _model(
        "idefics3",
        _pixels(nested=True),
        {"model_type": "llama"},
        _SIGLIP,
        {"image_token_id": IMAGE, "scale_factor": 2},
    ),
    "internvl": _model(
        "internvl",
        _pixels(),
        {"model_type": "qwen2"},
        {**_SIGLIP, "image_size": [16, 16], "patch_size": [4, 4]},
        {"image_token_id": IMAGE, "downsample_ratio": 0.5, "image_seq_length": 4},
    ),
    "llava": _model(
        "llava",
        _pixels(16),
        {"model_type": "llama"},
        {**_SIGLIP, "model_type": "clip_vision_model", "projection_dim": 32},
        _LLAVA,
    ),
    "mistral3": _model(
        "mistral3",
        _pixels(more={"image_sizes": [16, 16]}),
        {"model_type": "mistral"},
        {**_SIGLIP, "model_type": "pixtral", "head_dim": 16},
        {**_LLAVA, "spatial_merge_size": 2},
    ),
    "qwen2_5_vl": _model(
        "qwen2_5_vl",
        _grids,
        _ROPE,
        {
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "intermediate_size": 32,
            "window_size": 8,
            "fullatt_block_indexes": [1],
            "temporal_patch_size": 1,
        },
        _TOKENS,
    ),
    "qwen2_vl": _model(
        "qwen2_vl",
        _grids,
        _ROPE,
        {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "mlp_ratio": 2,
            "temporal_patch_size": 1,
        },
        _TOKENS,
    ),
    "qwen3_5": _model(
        "qwen3_5",
        _grids,
        {**DELTA, **_INTERLEAVED},
        {name: value for name, value in _QWEN.items() if name != "deepstack_visual_indexes"},
        _TOKENS,
    ),
    "qwen3_vl": _model(
        "qwen3_vl", _grids, _INTERLEAVED, {**_QWEN, "depth": 2, "deepstack_visual_indexes": [0, 1]}, _TOKENS
    ),
    "qwen3_vl_moe": _model("qwen3_vl_moe", _grids, {**_INTERLEAVED, **MOE, "num_experts": 4}, _QWEN, _TOKENS),
    "smolvlm": _model(
        "smolvlm",
        _pixels(nested=True),
        {"model_type": "llama"},
        _SIGLIP,
        {"image_token_id": IMAGE, "scale_factor": 2},
    ),
}
