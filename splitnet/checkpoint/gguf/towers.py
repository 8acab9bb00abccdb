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
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

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
        layout: names and changes of tensors; `fields` are keys without the prefix `vision.`, of the vision config.
        text: the part of names before the modules of the text model in transformers' checkpoints.
        vision: values of the vision config.
        pixels: keys and values of the image processor's config.
        fixed: keys without the prefix `clip.` that may have this value only, which transformers' class computes with.
        tokens: field of the whole config -> token that stands for images.
        settle: sets values of the whole config and of the image processor from the metadata and the vision config.
    """

    layout: GgufArchitecture | Callable[[GgufFile], GgufArchitecture]
    text: str
    vision: Mapping[str, Any]
    pixels: Mapping[str, Any]
    fixed: Mapping[str, Any]
    tokens: Mapping[str, str]
    settle: Callable[[Values, Values, Values, Metadata], None]


@dataclass(frozen=True)
class Tower:
    """The tower of one model. pixels: settings of its image processor. options: further ones of its processor."""

    file: GgufFile
    row: TowerFamily
    layout: GgufArchitecture
    blocks: int
    whole_config: PreTrainedConfig
    pixels: Mapping[str, Any]

    @classmethod
    def beside(cls, model: GgufFile, text: PreTrainedConfig) -> Tower:
        """The tower in the folder of a model. Raises ModelNotFound: the folder has none; UnsupportedModel: it is of
        another model, or several fit."""
        found, refusals = list[Tower](), list[UnsupportedModel]()
        folder = model.path.parent
        for path in projector_files(folder):
            try:
                found.append(cls._read(GgufFile(path), model, text))
            except UnsupportedModel as error:
                refusals.append(error)
        if len(found) > 1:
            raise UnsupportedModel(
                f"{folder} holds {len(found)} projectors that fit {model.name} "
                f"({', '.join(each.file.path.name for each in found)}): leave one of them beside the model"
            )
        if not found and refusals:
            raise refusals[0]
        if not found:
            raise ModelNotFound(
                f"{model.name} reads images only with its projector: put the model's mmproj*.gguf into {folder}"
            )
        return found[0]

    @classmethod
    def _read(cls, file: GgufFile, model: GgufFile, text: PreTrainedConfig) -> Tower:
        metadata, own = Metadata(file), f"put the mmproj*.gguf of {model.name} beside it"
        kind = metadata.get("projector_type") or metadata.get("vision.projector_type")
        row = TOWERS.get((kind, model.architecture))
        if row is None:
            raise UnsupportedModel(
                f"{file.path} holds a projector {kind!r}, which splitnet does not know for models of the architecture "
                f"{model.architecture!r}: {own}, or take the model's safetensors"
            )
        width, added = metadata["vision.projection_dim"], sum(metadata.get("vision.is_deepstack_layers", []))
        expected = text.hidden_size, model.of_architecture.get("n_deepstack_layers", 0)
        if (width, added) != expected:
            raise UnsupportedModel(
                f"{file.path} is the projector of another model: it makes {width} values in {1 + added} states of an "
                f"image, and {model.name} takes {expected[0]} in {1 + expected[1]}: {own}"
            )
        try:
            return cls._made(file, row, metadata, model, text)
        except (StrictDataclassError, *MALFORMED) as error:
            raise UnsupportedModel(
                f"the metadata of {file.path} do not describe a tower of the type {kind!r}: download it again "
                f"({' '.join(str(error).split())})"
            ) from error

    @classmethod
    def _made(
        cls, file: GgufFile, row: TowerFamily, metadata: Metadata, model: GgufFile, text: PreTrainedConfig
    ) -> Tower:
        layout = row.layout(file) if callable(row.layout) else row.layout
        vision = dict(row.vision)
        for key, name in layout.fields.items():
            if (value := metadata.get(f"vision.{key}")) is not None and name:
                vision[name] = value
        check_values(vision | {"layers": metadata["vision.block_count"]}, file.path)
        for key, value in row.fixed.items():
            if metadata.get(key, value) != value:
                raise ValueError(f"clip.{key} is {metadata[key]}, and only {value} is known")
        if vision["patch_size"] != file.tensors["v.patch_embd.weight"].shape[-1]:
            raise ValueError(f"patches have {vision['patch_size']} rows, and the tensors other ones")
        pixels = {name: metadata[f"vision.{name}"] for name in ("image_mean", "image_std")} | row.pixels
        if any(len(pixels[name]) != 3 for name in ("image_mean", "image_std")) or min(pixels["image_std"]) <= 0:
            raise ValueError("the mean or the deviation of pixels is none of three colours")
        ids = model.token_ids(row.tokens.values())
        ids.setdefault(_GEMMA_IMAGE, text.vocab_size)  # some files end before this token; it has no embedding
        whole: Values = {"text_config": text, "vision_config": vision}
        whole |= {field: ids[token] for field, token in row.tokens.items()}
        row.settle(whole, vision, pixels, metadata)
        metadata.check_all_used()
        config = CONFIG_MAPPING[layout.model_type](**whole)
        return cls(file, row, layout, metadata["vision.block_count"], config, pixels)

    def processor(self, tokenizer: Any) -> Any:
        """transformers' processor of texts and images, with the tokenizer of the model."""
        for field, token in self.row.tokens.items():
            known, name = getattr(self.whole_config, field), field.rpartition("_")[0]
            if tokenizer.convert_tokens_to_ids(token) != known:
                tokenizer.add_tokens([AddedToken(token, special=True)])
            if tokenizer.convert_tokens_to_ids(token) != known:
                raise UnsupportedModel(f"the vocabulary of the model gives {token} another number than {known}")
            setattr(tokenizer, name, token)
            setattr(tokenizer, f"{name}_id", known)
        family = self.layout.model_type
        # The variant for Pillow needs no torchvision.
        images = getattr(transformers, IMAGE_PROCESSOR_MAPPING_NAMES[family]["pil"])(**self.pixels)
        kind: Any = getattr(transformers, PROCESSOR_MAPPING_NAMES[family])

        def init(self: Any, image_processor: Any, tokenizer: Any, **options: Any) -> None:
            kind.__init__(self, image_processor, tokenizer, **options)

        # transformers reads from the signature that this class takes no videos.
        made = type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})
        count = getattr(self.whole_config, "mm_tokens_per_image", None)
        return made(images, tokenizer, **({} if count is None else {"image_seq_length": count}))


def may_have_tower(model: GgufFile) -> bool:
    """Whether a model is of an architecture with towers, and a file of one is beside it."""
    return any(model.architecture == each for _, each in TOWERS) and bool(projector_files(model.path.parent))


def _frames(config: Any, *kernels: torch.Tensor) -> torch.Tensor:
    """`[outputs, channels, rows, columns]` of each of two frames -> `[outputs, channels, frames, rows, columns]`."""
    return torch.stack(kernels, dim=2)


def _gemma_layout(file: GgufFile) -> GgufArchitecture:
    down = file.tensors["v.blk.0.ffn_down.weight"]
    # The first converters gave the two layers each other's name.
    swapped = down.shape[0] != file.tensors["v.blk.0.ln1.weight"].shape[0]
    fc = "ffn_down=mlp.fc1 ffn_up=mlp.fc2" if swapped else "ffn_up=mlp.fc1 ffn_down=mlp.fc2"
    return replace(_SIGLIP, tensors=_SIGLIP.tensors | names_of(fc))


def _gemma(whole: Values, vision: Values, pixels: Values, metadata: Metadata) -> None:
    side = vision["image_size"] // vision["patch_size"]
    if side**2 != metadata.file.tensors["v.position_embd.weight"].shape[0]:
        raise ValueError(f"{side} patches in each row of an image do not fit the number of positions")
    whole["mm_tokens_per_image"] = (side // metadata.get("vision.projector.scale_factor", 4)) ** 2
    pixels["size"] = dict.fromkeys(("height", "width"), vision["image_size"])


def _qwen(whole: Values, vision: Values, pixels: Values, metadata: Metadata) -> None:
    tensors = metadata.file.tensors
    vision["intermediate_size"] = tensors["v.blk.0.ffn_up.weight"].shape[0]
    vision["out_hidden_size"] = metadata["vision.projection_dim"]
    merge = vision["spatial_merge_size"]
    if tensors["mm.0.weight"].shape[1] != merge**2 * vision["hidden_size"]:
        raise ValueError(f"the projector does not join {merge} x {merge} patches")
    pixels |= {"patch_size": vision["patch_size"], "merge_size": merge, "size": dict(pixels["size"])}
    for key, name in (("min", "shortest_edge"), ("max", "longest_edge")):
        pixels["size"][name] = metadata.get(f"vision.image_{key}_pixels", pixels["size"][name])
    if not 0 < pixels["size"]["shortest_edge"] <= min(KEPT_PIXELS, pixels["size"]["longest_edge"]):
        raise ValueError(f"images of at least {pixels['size']['shortest_edge']} pixels are too large, or too small")


def _qwen_2_5(whole: Values, vision: Values, pixels: Values, metadata: Metadata) -> None:
    _qwen(whole, vision, pixels, metadata)
    every, count = metadata["vision.n_wa_pattern"], metadata["vision.block_count"]
    vision["fullatt_block_indexes"] = list(range(every - 1, count, every))


def _qwen_3(whole: Values, vision: Values, pixels: Values, metadata: Metadata) -> None:
    _qwen(whole, vision, pixels, metadata)
    vision["num_position_embeddings"] = metadata.file.tensors["v.position_embd.weight"].shape[0]
    if layers := _deepstack(metadata.file):
        vision["deepstack_visual_indexes"] = layers


def _deepstack(file: GgufFile) -> list[int]:
    return [layer for layer, adds in enumerate(file.of_architecture.get("vision.is_deepstack_layers", [])) if adds]


def _qwen_3_layout(file: GgufFile) -> GgufArchitecture:
    lists = {
        f"v.deepstack.{layer}.{name}": f"model.visual.deepstack_merger_list.{index}.{module}"
        for index, layer in enumerate(_deepstack(file))
        for name, module in names_of("norm=norm fc1=linear_fc1 fc2=linear_fc2").items()
    }
    return replace(_QWEN_3, outside=_QWEN_3.outside | lists)


_FIELDS = (
    "image_size= patch_size=patch_size embedding_length=hidden_size feed_forward_length= "
    "block_count=depth attention.head_count=num_heads spatial_merge_size=spatial_merge_size projection_dim= "
)
_SIGLIP = GgufArchitecture(
    "gemma3",
    names_of(
        "image_size=image_size patch_size=patch_size embedding_length=hidden_size "
        "feed_forward_length=intermediate_size block_count=num_hidden_layers "
        "attention.head_count=num_attention_heads attention.layer_norm_epsilon=layer_norm_eps"
    ),
    names_of(
        "ln1=layer_norm1 ln2=layer_norm2 attn_q=self_attn.q_proj attn_k=self_attn.k_proj attn_v=self_attn.v_proj "
        "attn_out=self_attn.out_proj"
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
_QWEN_2_5 = GgufArchitecture(
    "qwen2_5_vl",
    names_of(_FIELDS + "window_size=window_size"),
    names_of(
        "ln1=norm1 ln2=norm2 attn_qkv=attn.qkv attn_out=attn.proj ffn_gate=mlp.gate_proj ffn_up=mlp.up_proj "
        "ffn_down=mlp.down_proj"
    ),
    tuple(
        Change(f"attn.qkv.{kind}", f"attn_q.{kind} attn_k.{kind} attn_v.{kind}", joined) for kind in ("weight", "bias")
    ),
    outside=names_of("v.post_ln=visual.merger.ln_q mm.0=visual.merger.mlp.0 mm.2=visual.merger.mlp.2"),
    outside_changes=(
        Change("visual.patch_embed.proj.weight", "v.patch_embd.weight v.patch_embd.weight.1", _frames, False),
    ),
    container="visual.blocks",
)
_QWEN_3 = GgufArchitecture(
    "qwen3_vl",
    names_of(_FIELDS),
    names_of("ln1=norm1 ln2=norm2 attn_qkv=attn.qkv attn_out=attn.proj ffn_up=mlp.linear_fc1 ffn_down=mlp.linear_fc2"),
    outside=names_of(
        "v.patch_embd=model.visual.patch_embed.proj v.position_embd=model.visual.pos_embed "
        "v.post_ln=model.visual.merger.norm mm.0=model.visual.merger.linear_fc1 mm.2=model.visual.merger.linear_fc2"
    ),
    outside_changes=(
        Change("model.visual.patch_embed.proj.weight", "v.patch_embd.weight v.patch_embd.weight.1", _frames, False),
    ),
    container="model.visual.blocks",
)

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
_QWEN_3_FAMILY = TowerFamily(
    _qwen_3_layout,
    "model.language_model",
    {"spatial_merge_size": 2},
    {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}},  # as published with all models of the family
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
        _QWEN_2_5,
        "model",
        {"spatial_merge_size": 2},
        {"size": {"shortest_edge": 3_136, "longest_edge": 12_845_056}},
        _COMMON | _QWEN_EPSILON | {"use_silu": True},
        _QWEN_TOKENS,
        _qwen_2_5,
    ),
    ("qwen3vl_merger", "qwen3vl"): _QWEN_3_FAMILY,
    ("qwen3vl_merger", "qwen35"): replace(
        _QWEN_3_FAMILY, layout=lambda file: replace(_qwen_3_layout(file), model_type="qwen3_5")
    ),
}
"""By the type of the projector, and llama.cpp's name of the model's architecture."""
