"""Checkpoints with random weights in the shape of published models: as fast as these, without a download."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model; `tied`: head and embedding are one matrix."""

    hidden: int
    middle: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False


SHAPES = {
    "0.5b": Shape(896, 4864, 24, 14, 2, 151936, tied=True),
    "1.1b": Shape(2048, 5632, 22, 32, 4, 32000),
}
"""Qwen2.5 0.5B and TinyLlama 1.1B."""


@contextmanager
def random_model(shape: Shape, blocks: int | None = None) -> Iterator[Path]:
    """A checkpoint in bfloat16, with `blocks` blocks if given; all of its blocks have the same random weights."""
    hidden, middle = shape.hidden, shape.middle
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=blocks or shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        dtype=torch.bfloat16,
    )
    config.architectures = ["LlamaForCausalLM"]
    kv = hidden // shape.heads * shape.kv_heads
    block = {
        f"{path}.weight": _random(outputs, inputs)
        for path, (outputs, inputs) in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (middle, hidden),
            "mlp.up_proj": (middle, hidden),
            "mlp.down_proj": (hidden, middle),
        }.items()
    }
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    block |= {f"{norm}.weight": ones.clone() for norm in ("input_layernorm", "post_attention_layernorm")}
    ends = {"model.embed_tokens.weight": _random(shape.vocabulary, hidden), "model.norm.weight": ones}
    if not shape.tied:
        ends["lm_head.weight"] = _random(shape.vocabulary, hidden)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weight_map: dict[str, str] = {}
        shards = {f"block-{index}": (f"model.layers.{index}.", block) for index in range(config.num_hidden_layers)}
        for shard, (prefix, tensors) in {**shards, "ends": ("", ends)}.items():
            named = {f"{prefix}{path}": tensor for path, tensor in tensors.items()}
            save_file(named, folder / f"{shard}.safetensors", metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(named, f"{shard}.safetensors"))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        config.save_pretrained(folder)
        yield folder


def _random(outputs: int, inputs: int) -> torch.Tensor:
    return (torch.randn(outputs, inputs) * inputs**-0.5).bfloat16()
