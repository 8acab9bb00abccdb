"""A side network: it reads hidden states of several depths, and adds its output to the last hidden state.

No gradient passes through the blocks, so the network is trained on states that are computed once. See ladder
side-tuning (Sung et al., arXiv:2206.06522) and parallel adapters on cached activations (Ouyang et al., PAC,
arXiv:2408.10746).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel
from transformers.cache_utils import DynamicCache

from splitnet.errors import AdapterError
from splitnet.wire.messages import MAX_TAPS

KIND = "SIDE"  # the `peft_type` of side networks
HEAD_SIZE = 32
LARGEST = 4096  # largest width of a side network
MOST_LAYERS = 32
ROPE_THETA = 10000.0
Arrangement = tuple[tuple[int, ...], tuple[int, ...]]  # see `RemoteLayer.arrangement`


class SideNetwork(nn.Module):
    """Layers of a narrow Llama between two linear layers. The last layer is initially zero, so the model is unchanged.

    taps: boundaries whose hidden states are the input, each a number of blocks; the output of the final norm follows.
    """

    def __init__(self, hidden_size: int, taps: Sequence[int], width: int, layers: int) -> None:
        super().__init__()
        self.hidden_size, self.taps, self.width = hidden_size, tuple(taps), width
        heads = max(1, width // HEAD_SIZE)
        config = LlamaConfig(
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=1 << 20,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        )
        self.read = nn.Linear((len(taps) + 1) * hidden_size, width, bias=False)
        self.layers = LlamaModel(config)
        self.layers.set_submodule("embed_tokens", nn.Identity())
        self.write = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.write.weight)

    @classmethod
    def beside(cls, hidden_size: int, blocks: int, width: int | None = None, layers: int = 2) -> SideNetwork:
        """A new side network, which reads after a quarter, a half and three quarters of the blocks.

        width: None: a quarter of the hidden size. Raises AdapterError: the width is impossible.
        """
        step = 2 * HEAD_SIZE
        chosen = width or max(step, hidden_size // 4 // step * step)
        if chosen % HEAD_SIZE or not 0 < chosen <= LARGEST:
            raise AdapterError(f"a side network is {HEAD_SIZE} to {LARGEST:,} wide, in steps of {HEAD_SIZE}: --width")
        taps = sorted({blocks * part // 4 for part in (1, 2, 3)} - {0, blocks})
        return cls(hidden_size, taps, chosen, layers)

    def forward(self, states: Tensor, mask: Tensor | None = None, cache: DynamicCache | None = None) -> Tensor:
        """The addition to the output of the final norm, `[batch, seq, hidden]`.

        states: `[batch, seq, (taps + 1) * hidden]`. mask: `[batch, columns]` of past and new columns, 0 is padding.
        cache: of the side network's layers; the positions are appended.
        """
        parts = states.to(self.read.weight).unflatten(-1, (-1, self.hidden_size))
        inputs = self.read(functional.rms_norm(parts, (self.hidden_size,)).flatten(-2))
        outputs = self.layers(inputs_embeds=inputs, attention_mask=mask, cache=cache, use_cache=cache is not None)
        return self.write(outputs.last_hidden_state).to(states.dtype)

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.layers.config)

    def save(self, config: Path, weights: Path, base: str | None) -> None:
        """Writes the network. base: hub id or path of the model for which the network was trained."""
        values = {"peft_type": KIND, "base_model_name_or_path": base, "hidden_size": self.hidden_size}
        values |= {"taps": self.taps, "width": self.width, "layers": self.layers.config.num_hidden_layers}
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, weights)

    @classmethod
    def load(cls, values: Mapping[str, Any], weights: Path, hidden_size: int, blocks: int) -> SideNetwork:
        """Reads a network for a model with `hidden_size` and `blocks`. Raises AdapterError: it does not fit."""
        taps = values.get("taps")
        if not isinstance(taps, list) or len(taps) > MAX_TAPS or len({*taps}) < len(taps):
            raise AdapterError(f"its taps are {str(taps)[:80]}, where a list of different numbers is expected")
        sizes = [("hidden_size", hidden_size, hidden_size), ("width", HEAD_SIZE, LARGEST), ("layers", 1, MOST_LAYERS)]
        checked = [(name, values.get(name), least, most) for name, least, most in sizes]
        for name, value, least, most in [*checked, *(("tap", tap, 1, blocks - 1) for tap in taps)]:
            if type(value) is not int or not least <= value <= most:
                raise AdapterError(f"its {name} is {value!r}, where {least} to {most} fits this model")
        if values["width"] % HEAD_SIZE:
            raise AdapterError(f"its width is {values['width']}, which is not a multiple of {HEAD_SIZE}")
        size = hidden_size, taps, values["width"], values["layers"]
        with torch.device("meta"):
            wanted = {name: tuple(tensor.shape) for name, tensor in cls(*size).state_dict().items()}
        with safe_open(weights, framework="pt") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if there != wanted:
            raise AdapterError("its tensors do not fit its config")
        network = cls(*size)
        network.load_state_dict(load_file(weights))
        return network.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class SideCache:
    """Keys and values of a side network for the positions of a `RemoteCache`. arrangement: see
    `RemoteLayer.arrangement`."""

    network: SideNetwork
    layers: DynamicCache
    arrangement: Arrangement

    def of_layers(self, columns: int) -> DynamicCache:
        """The layers' cache, cropped to the first columns."""
        if (more := self.layers.get_seq_length() - columns) > 0:
            self.layers.crop(-more)
        return self.layers

    def selected(self, rows: Sequence[int], arrangement: Arrangement) -> SideCache:
        """The cache after a selection of rows; arrangement: after the selection."""
        self.layers.batch_select_indices(torch.tensor(rows, device=self.network.write.weight.device))
        return SideCache(self.network, self.layers, arrangement)
