"""Vision towers with their projectors: the `mmproj` file of llama.cpp, which lies beside the GGUF file of a model.

Source of the names, changes and defaults: `conversion/` and `tools/mtmd/clip.cpp` in llama.cpp's repository.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AddedToken, PreTrainedConfig
from transformers.models.auto import image_processing_auto, processing_auto

from splitnet.checkpoint.families import check_values
from splitnet.checkpoint.gguf.architectures import Change, GgufArchitecture, Values, joined, names_of
from splitnet.checkpoint.gguf.config import Metadata
from splitnet.checkpoint.gguf.file import GgufFile
from splitnet.checkpoint.quant.format import MALFORMED
from splitnet.checkpoint.store import projector_files
from splitnet.errors import ModelNotFound, UnsupportedModel
from splitnet.images import KEPT_PIXELS


@dataclass(frozen=True)
class TowerFamily:
    """The towers of one type of projectors.

    Attributes:
        layout: names and changes of tensors; `fields` are keys without the prefix `clip.vision.`, of the vision config.
        text: the part of names before the modules of the text model in transformers' checkpoints.
        vision: values of the vision config. pixels: of the config of the image processor.
        fixed: keys without the prefix `clip.` that may have this value only, which transformers' class computes with.
        tokens: field of the whole config -> token that stands for images.
        settle: sets further values of the whole config, the vision config and that of the image processor.
    """

    layout: Callable[[GgufFile], GgufArchitecture]
    text: str
    vision: Mapping[str, Any]
    pixels: Mapping[str, Any]
    fixed: Mapping[str, Any]
    tokens: Mapping[str, str]
    settle: Callable[[Values, Values, Values, Metadata], None]


@dataclass(frozen=True)
class Tower:
    """The tower of one model. pixels: values of the config of its image processor."""

    file: GgufFile
    row: TowerFamily
    layout: GgufArchitecture
    blocks: int
    whole_config: PreTrainedConfig
    pixels: Mapping[str, Any]

    @classmethod
    def beside(cls, model: GgufFile, text: PreTrainedConfig) -> Tower:
        """The tower in the folder of a model with this config. Raises ModelNotFound: the folder has none;
        UnsupportedModel: it is of another model, or several fit."""
        found, refusals, folder = list[Tower](), list[UnsupportedModel](), model.path.parent
        for path in projector_files(folder):
            try:
                found.append(cls._read(GgufFile(path), model, text))
            except UnsupportedModel as error:
                refusals.append(error)
            except (StrictDataclassError, *MALFORMED) as error:
                why = f"{path} and the vocabulary of {model.name} do not describe its tower: download them again"
                refusals.append(UnsupportedModel(f"{why} ({' '.join(str(error).split())})"))
        if len(found) > 1:
            names = ", ".join(each.file.path.name for each in found)
            raise UnsupportedModel(
                f"{folder} holds {len(found)} projectors that fit {model.name} ({names}): leave one of them there"
            )
        if not found:
            why = f"{model.name} reads images only with its projector: put the model's mmproj*.gguf into {folder}"
            raise refusals[0] if refusals else ModelNotFound(why)
        return found[0]

    @classmethod
    def _read(cls, file: GgufFile, model: GgufFile, text: PreTrainedConfig) -> Tower:
        metadata, own = Metadata(file), f"put the mmproj*.gguf of {model.name} there in its place"
        kind = metadata.get("projector_type")
        row = TOWERS.get((kind, model.architecture))
        if row is None:
            raise UnsupportedModel(
                f"{file.path} holds a projector {kind!r}, which splitnet does not know for models of the architecture "
                f"{model.architecture!r}: {own}, or take the model's safetensors"
            )
        made = metadata["vision.projection_dim"], len(_deepstack(metadata))
        taken = text.hidden_size, model.of_architecture.get("n_deepstack_layers", 0)
        if made != taken:
            raise UnsupportedModel(
                f"{file.path} is the projector of another model: it makes {made[0]} values and {made[1]} added states, "
                f"and {model.name} takes {taken[0]} and {taken[1]}: {own}"
            )
        layout, blocks = row.layout(file), metadata["vision.block_count"]
        vision, pixels = dict(row.vision), dict(row.pixels)
        vision |= {name: metadata[f"vision.{key}"] for key, name in layout.fields.items() if name}
        check_values({"layers": blocks}, file.path)
        _check(f"v.blk.{blocks - 1}.ln1.weight" in file.tensors, f"it has no block {blocks - 1}")
        for key, value in row.fixed.items():
            _check(metadata.get(key, value) == value, f"clip.{key} is not {value}, which alone is known")
        patch = vision["patch_size"]
        _check(patch == file.tensors["v.patch_embd.weight"].shape[-1], f"its patches do not have {patch} rows")
        pixels |= {name: metadata[f"vision.{name}"] for name in ("image_mean", "image_std")}
        colours = len(pixels["image_mean"]), len(pixels["image_std"]), min(pixels["image_std"]) > 0
        _check(colours == (3, 3, True), "the mean or the deviation of pixels is none of three colours")
        ids = model.token_ids(row.tokens.values())
        ids.setdefault(_GEMMA_IMAGE, text.vocab_size)  # some files end before this token, which has no embedding
        whole = {"text_config": text, "vision_config": vision}
        whole |= {field: ids[token] for field, token in row.tokens.items()}
        row.settle(whole, vision, pixels, metadata)
        metadata.used |= {f"vision.{key}" for key in layout.fields}
        metadata.check_all_used()
        return cls(file, row, layout, blocks, CONFIG_MAPPING[layout.model_type](**whole), pixels)

    def processor(self, tokenizer: Any) -> Any:
        """transformers' processor of texts and images, with the tokenizer of the model."""
        for field, token in self.row.tokens.items():
            known, name = getattr(self.whole_config, field), field[: field.rindex("_")]
            if known >= len(tokenizer):
                tokenizer.add_tokens([AddedToken(token, special=True)])
            if tokenizer.convert_tokens_to_ids(token) != known:
                raise UnsupportedModel(f"the tokenizer gives {token} another number than {known}: take another file")
            setattr(tokenizer, name, token)
            setattr(tokenizer, f"{name}_id", known)
        family, count = self.layout.model_type, getattr(self.whole_config, "mm_tokens_per_image", None)
        kinds: Any = image_processing_auto, processing_auto
        # The variant for Pillow needs no torchvision.
        images = getattr(transformers, kinds[0].IMAGE_PROCESSOR_MAPPING_NAMES[family]["pil"])(**self.pixels)
        kind: Any = getattr(transformers, kinds[1].PROCESSOR_MAPPING_NAMES[family])

        def init(self: Any, image_processor: Any, tokenizer: Any, **options: Any) -> None:
            kind.__init__(self, image_processor, tokenizer, **options)

        # transformers reads from the signature that this class takes no videos.
        made = type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})
        options = {"image_seq_length": count} if count else {}
        return made(images, tokenizer, chat_template=tokenizer.chat_template, **options)


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _frames(config: Any, *kernels: torch.Tensor) -> torch.Tensor:
    """`[outputs, channels, rows, columns]` of each of two frames -> `[outputs, channels, frames, rows, columns]`."""
    return torch.stack(kernels, dim=2)


def _deepstack(metadata: Metadata) -> list[int]:
    """The blocks whose output is added to states of the text model."""
    return [block for block, adds in enumerate(metadata.get("vision.is_deepstack_layers", ())) if adds]


def _gemma(whole: Values, vision: Values, pixels: Values, metadata: Metadata) -> None:
    side = vision["image_size"] // vision["patch_size"]
    positions = metadata.file.tensors["v.position_embd.weight"].shape[0]
    _check(side**2 == positions, f"{side} x {side} patches do not fit {positions} positions")
    scale = metadata.get("vision.projector.scale_factor", 4)
    _check(side % scale == 0, f"{side} patches in a row are not groups of {scale}")
    whole["mm_tokens_per_image"] = (side // scale) ** 2
    pixels["size"] = dict.fromkeys(("height", "width"), vision["image_size"])


def _qwen(whole: Values, vision: Values, pixels: Values, metadata: Metadata) -> None:
    tensors, merge = metadata.file.tensors, metadata.get("vision.spatial_merge_size", 2)
    vision |= {"out_hidden_size": metadata["vision.projection_dim"], "spatial_merge_size": merge}
    vision["intermediate_size"] = tensors["v.blk.0.ffn_up.weight"].shape[0]
    joined_patches = tensors["mm.0.weight"].shape[1] == merge**2 * vision["hidden_size"]
    _check(joined_patches, f"the projector does not join {merge} x {merge} patches")
    least, most = (metadata.get(f"vision.image_{end}_pixels", pixels.pop(end)) for end in ("min", "max"))
    _check(0 < least <= min(most, KEPT_PIXELS), f"images of {least} to {most} pixels are too large, or none")
    pixels |= {"patch_size": vision["patch_size"], "merge_size": merge, "min_pixels": least, "max_pixels": most}


def _qwen_2_5(whole: Values, vision: Values, pixels: Values, metadata: Metadata) -> None:
    _qwen(whole, vision, pixels, metadata)
    every, vision["window_size"] = metadata["vision.n_wa_pattern"], metadata.get("vision.window_size", 112)
    vision["fullatt_block_indexes"] = list(range(every - 1, vision["depth"], every))


def _qwen_3(whole: Values, vision: Values, pixels: Values, metadata: Metadata) -> None:
    _qwen(whole, vision, pixels, metadata)
    vision["num_position_embeddings"] = metadata.file.tensors["v.position_embd.weight"].shape[0]
    vision["deepstack_visual_indexes"] = _deepstack(metadata)


def _gemma_layout(file: GgufFile) -> GgufArchitecture:
    hidden = file.tensors["v.blk.0.ln1.weight"].shape[0]
    # The first converters gave the two layers each other's name.
    swapped = file.tensors["v.blk.0.ffn_down.weight"].shape[0] != hidden
    names = "ffn_down=mlp.fc1 ffn_up=mlp.fc2" if swapped else "ffn_up=mlp.fc1 ffn_down=mlp.fc2"
    return GgufArchitecture(
        "gemma3",
        names_of(
            "image_size=image_size patch_size=patch_size embedding_length=hidden_size block_count=num_hidden_layers "
            "feed_forward_length=intermediate_size attention.head_count=num_attention_heads "
            "attention.layer_norm_epsilon=layer_norm_eps"
        ),
        names_of(
            "ln1=layer_norm1 ln2=layer_norm2 attn_q=self_attn.q_proj attn_k=self_attn.k_proj attn_v=self_attn.v_proj "
            f"attn_out=self_attn.out_proj {names}"
        ),
        outside=names_of(
            "v.patch_embd=vision_tower.vision_model.embeddings.patch_embedding "
            "v.position_embd=vision_tower.vision_model.embeddings.position_embedding "
            "v.post_ln=vision_tower.vision_model.post_layernorm "
            "mm.input_projection.weight=multi_modal_projector.mm_input_projection_weight "
            "mm.soft_emb_norm=multi_modal_projector.mm_soft_emb_norm"
        ),
        container="vision_tower.vision_model.encoder.layers",
        raised_norms=True,
    )


def _qwen_layout(model_type: str, visual: str, tensors: str, outside: str) -> Callable[[GgufFile], GgufArchitecture]:
    """visual: the name of the tower in transformers. outside: names within it."""
    patches = Change(f"{visual}.patch_embed.proj.weight", "v.patch_embd.weight v.patch_embd.weight.1", _frames, False)
    attention = (Change(f"attn.qkv.{end}", f"attn_q.{end} attn_k.{end} attn_v.{end}", joined) for end in _ENDS)
    row = GgufArchitecture(
        model_type,
        names_of(
            "patch_size=patch_size embedding_length=hidden_size block_count=depth attention.head_count=num_heads "
            "image_size= feed_forward_length="
        ),
        names_of("ln1=norm1 ln2=norm2 attn_qkv=attn.qkv attn_out=attn.proj " + tensors),
        tuple(attention),
        outside={name: f"{visual}.{module}" for name, module in names_of(outside).items()},
        outside_changes=(patches,),
        container=f"{visual}.blocks",
    )

    def layout(file: GgufFile) -> GgufArchitecture:
        lists = {
            f"v.deepstack.{block}.{name}": f"{visual}.deepstack_merger_list.{index}.{module}"
            for index, block in enumerate(_deepstack(Metadata(file)))
            for name, module in names_of("norm=norm fc1=linear_fc1 fc2=linear_fc2").items()
        }
        return replace(row, outside=row.outside | lists)

    return layout


_ENDS = ("weight", "bias")
_GEMMA_IMAGE = "<image_soft_token>"
# Old converters write that there is no tower for texts, and no projector of another kind.
_COMMON = {"has_vision_encoder": True, "has_text_encoder": False, "has_llava_projector": False}
_QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_QWEN_EPSILON = {"vision.attention.layer_norm_epsilon": 1e-6}


def _qwen_3_family(model_type: str) -> TowerFamily:
    return TowerFamily(
        _qwen_layout(
            model_type,
            "model.visual",
            "ffn_up=mlp.linear_fc1 ffn_down=mlp.linear_fc2",
            "v.patch_embd=patch_embed.proj v.position_embd=pos_embed v.post_ln=merger.norm mm.0=merger.linear_fc1 "
            "mm.2=merger.linear_fc2",
        ),
        "model.language_model",
        {},
        {"min": 65_536, "max": 16_777_216},  # as published with all models of the family
        _COMMON | _QWEN_EPSILON | {"use_gelu": True},
        _QWEN_TOKENS,
        _qwen_3,
    )


TOWERS: Mapping[tuple[Any, str], TowerFamily] = {
    ("gemma3", "gemma3"): TowerFamily(
        _gemma_layout,
        "language_model.model",
        {"model_type": "siglip_vision_model", "vision_use_head": False},
        {},
        _COMMON | {"use_gelu": True},
        {"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>", "image_token_index": _GEMMA_IMAGE},
        _gemma,
    ),
    ("qwen2.5vl_merger", "qwen2vl"): TowerFamily(
        _qwen_layout(
            "qwen2_5_vl",
            "visual",
            "ffn_gate=mlp.gate_proj ffn_up=mlp.up_proj ffn_down=mlp.down_proj",
            "v.post_ln=merger.ln_q mm.0=merger.mlp.0 mm.2=merger.mlp.2",
        ),
        "model",
        {},
        {"min": 3_136, "max": 12_845_056},
        _COMMON | _QWEN_EPSILON | {"use_silu": True},
        _QWEN_TOKENS,
        _qwen_2_5,
    ),
    ("qwen3vl_merger", "qwen3vl"): _qwen_3_family("qwen3_vl"),
    ("qwen3vl_merger", "qwen35"): _qwen_3_family("qwen3_5"),
}
"""By the type of the projector, and llama.cpp's name of the model's architecture."""
WITH_TOWERS = frozenset(architecture for _, architecture in TOWERS)
