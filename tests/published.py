"""Small random checkpoints with the family, names and tensor layout of published models.

Each checkpoint is written twice: in the published format, and as float32 with the same numbers.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

Tensors = dict[str, torch.Tensor]

BLOCKS = 6
VOCAB = 300
_TEXT: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: Mapping[str, Any] = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
LATENT: Mapping[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": None,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
"""A config with multi-head latent attention and experts, as in DeepSeek-V3."""
DELTA: Mapping[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
}
"""A config with gated delta nets besides attention, as in Qwen3-Next."""
QWEN_VISION: Mapping[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


@dataclass(frozen=True)
class Published:
    """A checkpoint in its published format.

    Attributes:
        family: the `model_type` of its config.
        text: values of the config of the text model; None removes a usual value.
        vision: values of the config of the vision tower, if the text model is part of a multimodal one.
        store: converts the tensors to the published format.
        quantization: the config's `quantization_config`.
        stored_as: the `model_type` in the file, if transformers uses another name.
        text_only: the text model is published alone, though transformers has it only in a multimodal model.
        rename: pattern -> replacement, for names of tensors that transformers writes in another form than published.
        top: values of the config of the multimodal model.
    """

    family: str
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] | None = None
    store: Callable[[Tensors], tuple[Tensors, Tensors]] | None = None
    quantization: Mapping[str, Any] | None = None
    stored_as: str | None = None
    text_only: bool = False
    rename: Mapping[str, str] = field(default_factory=dict)
    top: Mapping[str, Any] = field(default_factory=dict)

    def write(self, published: Path, plain: Path, *, seed: int = 0) -> PreTrainedModel:
        """Writes both checkpoints, and returns the model of the second, in float32."""
        model = self._model(seed)
        model.save_pretrained(plain)
        tensors = {self._renamed(name): value for name, value in load_file(plain / "model.safetensors").items()}
        stored, numbers = (tensors, tensors) if self.store is None else self.store(tensors)
        save_file(numbers, plain / "model.safetensors", {"format": "pt"})
        published.mkdir()
        if self.text_only:
            stored = {name: tensor for name, tensor in stored.items() if "vi" not in name.split(".")[0]}
        save_file(stored, published / "model.safetensors", {"format": "pt"})
        config = json.loads((plain / "config.json").read_text())
        if self.text_only:
            config = config["text_config"] | {"model_type": self.stored_as}
        if self.quantization is not None:
            config["quantization_config"] = self.quantization
        if self.stored_as is not None:
            config["model_type"] = self.stored_as
        (published / "config.json").write_text(json.dumps(config))
        (published / "generation_config.json").write_text((plain / "generation_config.json").read_text())
        kind: Any = AutoModelForCausalLM if self.vision is None else AutoModelForImageTextToText
        return kind.from_pretrained(plain, dtype=torch.float32).eval()

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.rename.items():
            name = re.sub(pattern, replacement, name)
        return name

    @torch.no_grad()
    def _model(self, seed: int) -> PreTrainedModel:
        # A copy, because transformers changes the values of a config in place.
        text = copy.deepcopy({name: value for name, value in {**_TEXT, **self.text}.items() if value is not None})
        if self.vision is None:
            config, kind = AutoConfig.for_model(self.family, **text), AutoModelForCausalLM
        else:
            parts = {"text_config": text} | ({"vision_config": dict(self.vision)} if self.vision else {})
            family: Any = CONFIG_MAPPING[self.family]
            config = family(**parts, tie_word_embeddings=bool(text.get("tie_word_embeddings")), **self.top)
            kind = AutoModelForImageTextToText
        torch.manual_seed(seed)
        model: Any = kind.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(0, 0.5)
            elif parameter.ndim >= 2:
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model


def bfloat16(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Stores all tensors in bfloat16, except for router biases, which stay in float32."""
    stored = {name: tensor if "bias" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    return stored, {name: tensor.float() for name, tensor in stored.items()}


def fp8_blocks(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Stores linear layers of blocks in float8 with a scale for each 128 x 128 weights, as DeepSeek-V3 does."""

    def store(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        outputs, inputs = weight.shape
        scales = torch.empty(-(-outputs // 128), -(-inputs // 128))
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                block = weight[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
                scales[row, column] = block.abs().max() / 448
        spread = scales.repeat_interleave(128, 0)[:outputs].repeat_interleave(128, 1)[:, :inputs]
        codes = (weight / spread).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scales}, codes.float() * spread

    return _some(tensors, _LINEAR, store)


def int4_groups(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Stores experts in four bits with a bfloat16 scale for each 32 inputs, packed as by compressed-tensors
    (Kimi-K2)."""

    def store(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        outputs, inputs = weight.shape
        groups = weight.view(outputs, inputs // 32, 32)
        scales = (groups.abs().amax(-1) / 7).bfloat16()
        codes = (groups / scales.float()[..., None]).round().clamp(-8, 7)
        numbers = (codes * scales.float()[..., None]).view(outputs, inputs)
        nibbles = (codes.view(outputs, inputs // 8, 8).long() + 8) << torch.arange(0, 32, 4)
        packed = nibbles.sum(-1)
        packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
        parts = {"weight_packed": packed, "weight_scale": scales, "weight_shape": torch.tensor([outputs, inputs])}
        return parts, numbers

    return _some(tensors, re.compile(r"\.experts\.\d+\..*\.weight$"), store)


def mxfp4_experts(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Stores stacked experts as four-bit floats with a power of two as the scale for each 32 inputs, as gpt-oss
    does."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    stored: Tensors = {}
    numbers: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name], numbers[name] = tensor.bfloat16(), tensor.bfloat16().float()
            continue
        weight = tensor.transpose(1, 2).contiguous()  # [experts, outputs, inputs]
        groups = weight.view(*weight.shape[:2], -1, 32)
        exponents = groups.abs().amax(-1).log2().floor() - 2
        scaled = groups / torch.exp2(exponents)[..., None]
        codes = (scaled[..., None] - values).abs().argmin(-1)
        numbers[name] = (
            (values[codes] * torch.exp2(exponents)[..., None]).view(weight.shape).transpose(1, 2).contiguous()
        )
        stored[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        stored[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    return stored, numbers


_LINEAR = re.compile(r"layers\.\d+\..*(_proj|w[123]|kv_a_proj_with_mqa|q_a_proj|q_b_proj|kv_b_proj|wq_b|\.wk)\.weight$")


def _some(
    tensors: Tensors,
    which: re.Pattern[str],
    store: Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]],
) -> tuple[Tensors, Tensors]:
    """Stores the tensors that match `which` with `store`, and the others in bfloat16."""
    stored, numbers = bfloat16({name: tensor for name, tensor in tensors.items() if not which.search(name)})
    for name, tensor in tensors.items():
        if which.search(name):
            parts, numbers[name] = store(tensor)
            stored |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
    return stored, numbers


FP8_CONFIG: Mapping[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
INT4_CONFIG: Mapping[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": None,
            "output_activations": None,
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
}
MXFP4_CONFIG: Mapping[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
