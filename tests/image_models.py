"""Small random models that read images, one per family, and inputs as their processors return them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.published import DELTA, LATENT, MOE, QWEN_VISION, VOCAB, Published, Tensors

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
        spans: the blocks of each peer.
    """

    published: Published
    make: MakeInputs
    spans: Sequence[tuple[int, int]] = ((0, 1), (1, 4), (4, 6))

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


def _grids(
    types: str = "mm_token_type_ids", *, as_images: bool = False, merges: bool = False, columns: int = 0, ends: int = 0
) -> MakeInputs:
    """Patches of all images in one list, with the grid of each image; images have two sizes.

    types: name of the argument that marks the tokens of images. as_images: a patch has its channels, rows and columns
    as axes. merges: each image has the number of patches that are merged into one. columns, ends: further tokens of
    each row, and of each image.
    """

    def make(config: Any, images: int, seed: torch.Generator) -> Inputs:
        vision, sizes = config.vision_config, [(4, 6) if index % 2 == 0 else (6, 4) for index in range(images)]
        ids, marks = _text(
            [[START, *[IMAGE] * (height // 2 * (width // 2 + columns) + ends)] for height, width in sizes], seed
        )
        found = {"input_ids": ids, **({types: marks} if types else {})}
        if images:
            shape = [getattr(vision, "temporal_patch_size", 1), 3, vision.patch_size, vision.patch_size]
            pixels = torch.randn(sum(height * width for height, width in sizes), *shape, generator=seed)
            found["pixel_values"] = pixels.flatten(1, 2) if as_images else pixels.flatten(1)
            found["image_grid_thw"] = torch.tensor([[1, *size] for size in sizes])
            found |= {"image_merge_sizes": torch.tensor([2] * images)} if merges else {}
        return found

    return make


def _pixels(
    tokens: int = 4,
    types: str = "",
    more: Mapping[str, list[Any]] | None = None,
    *,
    shape: Sequence[int] = (3, 16, 16),
    nested: bool = False,
) -> MakeInputs:
    """Images of 16 x 16 pixels, each of `tokens` tokens.

    types: name of the argument that marks the tokens of images. more: further arguments, per image. shape: of the
    values of an image. nested: the images are those of each text.
    """

    def make(config: Any, images: int, seed: torch.Generator) -> Inputs:
        ids, marks = _text([[IMAGE] * tokens] * images, seed)
        found = {"input_ids": ids, **({types: marks} if types else {})}
        if images:
            pixels = torch.randn(images, *shape, generator=seed)
            found["pixel_values"] = pixels[None] if nested else pixels
            found |= {name: torch.tensor([value] * images) for name, value in (more or {}).items()}
        return found

    return make


_QWEN = {**QWEN_VISION, "spatial_merge_size": 2, "temporal_patch_size": 1}
_QWEN_PLAIN = {name: value for name, value in _QWEN.items() if name != "deepstack_visual_indexes"}
_QWEN_WINDOWS = {
    **_QWEN_PLAIN,
    "depth": 2,
    "window_size": 8,
    "fullatt_block_indexes": [1],
}
del _QWEN_WINDOWS["num_position_embeddings"]
_SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_SIGLIP = {**_SMALL, "image_size": 16, "patch_size": 4}
_CLIP = {**_SIGLIP, "model_type": "clip_vision_model", "projection_dim": 32}
_PIXTRAL = {**_SIGLIP, "model_type": "pixtral", "head_dim": 16}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": 251, "vision_start_token_id": START, "vision_end_token_id": 253}
_ROPE: Mapping[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
}
_INTERLEAVED = {"rope_parameters": {**_ROPE["rope_parameters"], "mrope_interleaved": True}}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3}
_LLAVA = {"image_token_id": IMAGE, "image_token_index": IMAGE}
_ANYRES = {**_LLAVA, "image_grid_pinpoints": [[16, 32], [32, 16]]}
_PIECES = _pixels(14, more={"image_sizes": [16, 32]}, shape=(3, 3, 16, 16))
_SIZES = _pixels(more={"image_sizes": [16, 16]})
_GEMMA4 = {
    "sliding_window": 3,  # shorter than an image
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "use_bidirectional_attention": "vision",
}
_GEMMA4_PIXELS = _pixels(
    types="mm_token_type_ids",
    more={"image_position_ids": [[x, y] for y in range(4) for x in range(4)]},
    shape=(16, 48),
)
_GEMMA4_VISION = {
    **_SMALL,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 8,
    "pooling_kernel_size": 2,
}
_GEMMA4_SMALL = {
    **_GEMMA4,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 2,
    "attention_k_eq_v": False,
}
"""As E2B and E4B: the last blocks read keys and values of blocks 2 and 3."""


def _with_unused(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """As in published files: the last blocks have keys and values that no block reads."""
    unused = {
        name.replace(f"layers.{block - 2}.", f"layers.{block}."): tensor.clone()
        for block in (4, 5)
        for name, tensor in tensors.items()
        if f"language_model.layers.{block - 2}.self_attn.k_" in name
        or f"language_model.layers.{block - 2}.self_attn.v_" in name
    }
    assert unused
    return tensors | unused, tensors


_GLM = {**_QWEN_PLAIN, "depth": 2, "image_size": 16}
del _GLM["num_position_embeddings"]
_GLM_TOKENS = {
    "image_token_id": IMAGE,
    "image_start_token_id": START,
    "image_end_token_id": 253,
    "video_token_id": 251,
    "video_start_token_id": 254,
    "video_end_token_id": 255,
}
_HALF = {
    "rope_parameters": {**_ROPE["rope_parameters"], "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
}


def _model(
    family: str,
    make: MakeInputs,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    top: Mapping[str, Any] | None = None,
) -> ImageModel:
    return ImageModel(Published(family, text, vision, top=top or {"image_token_id": IMAGE}), make)


IMAGE_MODELS: Mapping[str, ImageModel] = {
    "aria": _model(
        "aria",
        _pixels(),
        {"moe_num_experts": 4},
        _SIGLIP,
        {**_LLAVA, "projector_patch_to_query_dict": {16: 4}, "max_value_projector_patch_to_query_dict": 4},
    ),
    "aya_vision": _model("aya_vision", _pixels(), {"model_type": "cohere2", **_WINDOWS}, _SIGLIP, _LLAVA),
    "cohere2_vision": _model(
        "cohere2_vision",
        _pixels(),
        {"model_type": "cohere2", **_WINDOWS},
        _SIGLIP,
        {"image_token_id": IMAGE, "alignment_intermediate_size": 64},
    ),
    "deepseek_vl": _model("deepseek_vl", _pixels(16), {"model_type": "llama"}, _SIGLIP),
    "exaone4_5": _model(
        "exaone4_5",
        _grids(""),
        {"model_type": "exaone4", **_WINDOWS},
        {**_QWEN_WINDOWS, "num_key_value_heads": 1},
        _TOKENS,
    ),
    "gemma3": _model(
        "gemma3",
        _pixels(types="token_type_ids"),
        {**_WINDOWS, "query_pre_attn_scalar": 16},
        _SIGLIP,
        {"image_token_id": IMAGE, "mm_tokens_per_image": 4, "boi_token_index": START, "eoi_token_index": 253},
    ),
    "gemma4": _model(
        "gemma4",
        _GEMMA4_PIXELS,
        _GEMMA4,
        _GEMMA4_VISION,
        _TOKENS,
    ),
    "gemma4-small": ImageModel(
        Published("gemma4", _GEMMA4_SMALL, _GEMMA4_VISION, store=_with_unused, top=_TOKENS),
        _GEMMA4_PIXELS,
        spans=[(0, 1), (1, 2), (2, 6)],
    ),
    "gemma4_unified": _model(
        "gemma4_unified",
        _pixels(
            types="mm_token_type_ids",
            more={"image_position_ids": [[0, 0], [1, 0], [0, 1], [1, 1]]},
            shape=(4, 192),
        ),
        {**_GEMMA4, "hidden_size_per_layer_input": None},
        {
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 64,
            "mm_posemb_size": 4,
            "output_proj_dims": 64,
        },
        _TOKENS,
    ),
    "glm46v": _model("glm46v", _grids(), _HALF, _GLM, _GLM_TOKENS),
    "glm4v": _model("glm4v", _grids(), _ROPE, _GLM, _GLM_TOKENS),
    "glm4v_moe": _model(
        "glm4v_moe",
        _grids(),
        {**_HALF, **MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        _GLM,
        _GLM_TOKENS,
    ),
    "glm_ocr": _model("glm_ocr", _grids(), _HALF, _GLM, _GLM_TOKENS),
    "got_ocr2": _model(
        "got_ocr2",
        _pixels(1),
        {"model_type": "qwen2"},
        {**_SIGLIP, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 32, "output_channels": 16},
        _LLAVA,
    ),
    "granite4_vision": _model(
        "granite4_vision",
        _PIECES,
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
        {**_CLIP, "hidden_size": 64},
        {
            **_ANYRES,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 0], [-2, 3]],
            "spatial_target_layers": [1, 2, 4, 5],
        },
    ),
    "hunyuan_vl": _model(
        "hunyuan_vl",
        _grids(columns=1, ends=2),
        {"rope_parameters": {**_ROPE["rope_parameters"], "mrope_section": [2, 2, 2, 2]}},
        {**_SIGLIP, "out_hidden_size": 64, "text_hidden_size": 64},
        {"image_token_id": IMAGE, "im_start_id": START, "im_end_id": 253, "im_newline_id": 254},
    ),
    "idefics2": _model(
        "idefics2",
        _pixels(nested=True),
        {"model_type": "mistral"},
        _SIGLIP,
        {
            "image_token_id": IMAGE,
            "perceiver_config": {
                "hidden_size": 64,
                "resampler_n_latents": 4,
                "resampler_depth": 2,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
                "num_key_value_heads": 1,
            },
        },
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
    "janus": _model(
        "janus",
        _pixels(16),
        {"model_type": "llama"},
        {**_SIGLIP, "projection_dim": 64, "num_image_tokens": 16, "mlp_ratio": 1.0},
    ),
    "kimi_k25": _model(
        "kimi_k25",
        _grids("", as_images=True),
        {**MOE, **LATENT, "n_group": 1, "model_type": "deepseek_v3"},
        {**_SMALL, "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8},
        {**_TOKENS, "projection_hidden_size": 32},
    ),
    "lfm2_vl": _model(
        "lfm2_vl",
        _pixels(more={"spatial_shapes": [4, 4], "pixel_attention_mask": [1] * 16}, shape=(16, 48)),
        {
            "layer_types": ["conv", "conv", "full_attention"] * 2,
            "full_attn_idxs": [2, 5],
            "block_auto_adjust_ff_dim": False,
        },
        {**_SIGLIP, "num_patches": 16},
        {"image_token_id": IMAGE, "projector_hidden_size": 32},
    ),
    "lighton_ocr": _model(
        "lighton_ocr", _SIZES, {"model_type": "qwen3"}, _PIXTRAL, {"image_token_id": IMAGE, "spatial_merge_size": 2}
    ),
    "llava": _model("llava", _pixels(16), {"model_type": "llama"}, _CLIP, _LLAVA),
    "llava_next": _model("llava_next", _PIECES, {"model_type": "llama"}, {**_CLIP, "patch_size": 8}, _ANYRES),
    "llava_onevision": _model(
        "llava_onevision", _PIECES, {"model_type": "qwen2"}, {**_SIGLIP, "patch_size": 8}, _ANYRES
    ),
    "mistral3": _model("mistral3", _SIZES, {"model_type": "mistral"}, _PIXTRAL, {**_LLAVA, "spatial_merge_size": 2}),
    "mistral3-mistral4": _model(
        "mistral3",
        _SIZES,
        {**MOE, **LATENT, "n_group": 1, "first_k_dense_replace": 0, "model_type": "mistral4"},
        _PIXTRAL,
        {**_LLAVA, "spatial_merge_size": 2},
    ),
    "ovis2": _model(
        "ovis2",
        _pixels(16),
        {"model_type": "qwen2"},
        {**_SIGLIP, "vocab_size": 50},
        {
            "image_token_id": IMAGE,
            "visual_indicator_token_ids": [201, 202, 203, 204, 205],
            "hidden_size": 64,
            "vocab_size": VOCAB,
        },
    ),
    "paddleocr_vl": _model("paddleocr_vl", _grids(as_images=True), _ROPE, _SIGLIP, _TOKENS),
    "qwen2_5_vl": _model("qwen2_5_vl", _grids(), _ROPE, _QWEN_WINDOWS, _TOKENS),
    "qwen2_vl": _model(
        "qwen2_vl",
        _grids(),
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
    "qwen3_5": _model("qwen3_5", _grids(), {**DELTA, **_INTERLEAVED}, _QWEN_PLAIN, _TOKENS),
    "qwen3_5_moe": _model(
        "qwen3_5_moe",
        _grids(),
        {**DELTA, **_INTERLEAVED, **MOE, "num_experts": 4, "shared_expert_intermediate_size": 64},
        _QWEN_PLAIN,
        _TOKENS,
    ),
    "qwen3_vl": _model(
        "qwen3_vl", _grids(), _INTERLEAVED, {**_QWEN, "depth": 2, "deepstack_visual_indexes": [0, 1]}, _TOKENS
    ),
    "qwen3_vl_moe": _model("qwen3_vl_moe", _grids(), {**_INTERLEAVED, **MOE, "num_experts": 4}, _QWEN, _TOKENS),
    "smolvlm": _model(
        "smolvlm",
        _pixels(nested=True),
        {"model_type": "llama"},
        _SIGLIP,
        {"image_token_id": IMAGE, "scale_factor": 2},
    ),
    "step3p7": _model(
        "step3p7",
        _pixels(1),
        {
            **MOE,
            "n_routed_experts": 4,
            "num_local_experts": 4,
            "share_expert_dim": 64,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"] * 2,
            "mlp_layer_types": ["dense"] + ["sparse"] * 5,
        },
        _SIGLIP,
    ),
    "video_llama_3": _model("video_llama_3", _grids("", merges=True), {"model_type": "qwen2"}, _SIGLIP, _TOKENS),
    "vipllava": _model(
        "vipllava", _pixels(16), {"model_type": "llama"}, _CLIP, {**_LLAVA, "vision_feature_layer": [-1, -2]}
    ),
}


GGUF_IMAGE_MODELS: Mapping[str, ImageModel] = {
    "gemma3": _model(
        "gemma3",
        _pixels(types="token_type_ids"),
        {
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
        {**_SIGLIP, "intermediate_size": 64, "vision_use_head": False},
        {"image_token_id": IMAGE, "mm_tokens_per_image": 4, "boi_token_index": START, "eoi_token_index": 253},
    ),
    "qwen2_5_vl": _model("qwen2_5_vl", _grids(), _ROPE, {**_QWEN_WINDOWS, "temporal_patch_size": 2}, _TOKENS),
    "qwen3_vl": _model(
        "qwen3_vl",
        _grids(),
        _INTERLEAVED,
        {**_QWEN, "depth": 3, "deepstack_visual_indexes": [0, 2], "temporal_patch_size": 2},
        _TOKENS,
    ),
    "qwen3_5": _model(
        "qwen3_5", _grids(), {**DELTA, **_INTERLEAVED}, {**_QWEN_PLAIN, "temporal_patch_size": 2}, _TOKENS
    ),
}
"""Families whose towers are read from files of llama.cpp, with the values that these files can hold."""

_NAMES = {
    "gemma3": {IMAGE: "<image_soft_token>", START: "<start_of_image>", 253: "<end_of_image>"},
    "": {IMAGE: "<|image_pad|>", 251: "<|video_pad|>", START: "<|vision_start|>", 253: "<|vision_end|>"},
}


def vocabulary(family: str) -> list[str]:
    """A vocabulary of letters with the tokens that stand for images in a family."""
    names = {1: "<s>", 2: "</s>", 3: "a", 4: "b", 5: "ab", 6: "\u0120", 7: "\u010a"} | _NAMES.get(family, _NAMES[""])
    return [names.get(number, f"<unused{number}>" if number < 3 else chr(0x4E00 + number)) for number in range(VOCAB)]
