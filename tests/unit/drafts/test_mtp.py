"""MTP layers compute what they were published to compute, and are read only where they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from splitnet.blocks.client_part import Ends, ends_of, load_client_part
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.drafts.mtp import MtpHead, mtp_bytes, mtp_head
from tests.unit.mtp_checkpoints import PUBLISHED, mtp_checkpoint

OF_TRANSFORMERS = ("deepseek_v3", "glm4_moe", "mellum", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = torch.randint(3, 300, (24,), generator=torch.Generator().manual_seed(5))


def ends_of_checkpoint(checkpoint: Checkpoint) -> Ends:
    ends = ends_of(load_client_part(checkpoint, nn.Identity()))
    assert ends is not None
    return ends


def head_of(folder: Path, weights: str | None = None) -> MtpHead:
    checkpoint = Checkpoint.open(folder)
    head = mtp_head(checkpoint, ends_of_checkpoint(checkpoint), weights)
    assert head is not None
    return head


@torch.no_grad()
def states_of(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the last block of a whole model gives, `[seq, hidden]`, before the final norm and behind it."""
    seen: list[Tensor] = []
    backbone = model.get_decoder()
    norm = getattr(backbone, "norm", None) or backbone.norm_f
    hook = norm.register_forward_hook(lambda module, given, output: seen.extend((given[0][0], output[0])))
    model(input_ids=tokens[None], use_cache=False)
    hook.remove()
    return seen[0], seen[1]


def published(folder: Path) -> tuple[Any, MtpModel]:
    """A whole model in transformers, and its MTP layer there."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    config = model.config
    if not hasattr(config, "num_mtp_layers"):
        config.num_mtp_layers, config.mtp_layer_types = 1, ["full_attention"]
    # transformers knows the numbers of the layers of published checkpoints alone.
    model._keys_to_ignore_on_load_unexpected = [r"^mtp\.", r"model\.layers\.3\."]
    return model, MtpModel.from_pretrained(model).eval()


@pytest.mark.parametrize("family", OF_TRANSFORMERS)
def test_as_in_transformers(family: str, tmp_path: Path) -> None:
    folder, _ = mtp_checkpoint(family, tmp_path)
    model, mtp = published(folder)
    head = head_of(folder)
    assert head.taps == (3,) and head.draft_vocabulary is None
    before, behind = states_of(model, TOKENS[:-1])
    assert not torch.allclose(before, behind)
    cache, expected_cache = head.new_cache(), MtpCache(config=model.config.get_mtp_config())
    with torch.no_grad():
        positions = torch.arange(1, 24)[None]
        expected = mtp.forward_layer(0, behind[None], positions, expected_cache, input_ids=TOKENS[None, 1:])[0]
        expected_logits = mtp._project_to_logits(expected)
    # In pieces, some of which are forgotten again.
    got = [head.run(TOKENS[1:10], before[:9], cache), head.run(TOKENS[10:14], before[9:13], cache)]
    cache.crop(9)
    got[1:] = [head.run(TOKENS[10:11], before[9:10], cache), head.run(TOKENS[11:], before[10:], cache)]
    torch.testing.assert_close(torch.cat(got), expected, **CLOSE)
    torch.testing.assert_close(head.logits(torch.cat(got)), expected_logits, **CLOSE)
    # Drafts: the layer goes on from its own outputs.
    token, state, length = int(expected_logits[-1].argmax()), expected[-1:], 23
    mine = got[-1][-1:]
    for index in range(4):
        mine = head.run(torch.tensor([token]), mine, cache, own=True)
        with torch.no_grad():
            position = torch.tensor([[length + 1 + index]])
            given = torch.tensor([[token]])
            state = mtp.forward_layer(0, state[None], position, expected_cache, input_ids=given)[0]
            logits = mtp._project_to_logits(state)
        torch.testing.assert_close(mine, state, **CLOSE)
        torch.testing.assert_close(head.logits(mine), logits, **CLOSE)
        token = int(logits[0].argmax())
        assert int(head.logits(mine)[0].argmax()) == token


def _mask(count: int, window: int | None) -> Tensor:
    distance = torch.arange(count)[:, None] - torch.arange(count)[None]
    seen = (distance >= 0) & (distance < (window or count))
    return torch.zeros(count, count).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


@torch.no_grad()
def described(family: str, folder: Path, longer: Path, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """States before the final norm, and what the layer gives for `tokens[1:]`, in plain torch: as vLLM describes it,
    but for the zeros that it puts in the place of the first embedding."""
    from tests.unit.quantized_checkpoints import tensors_of

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    whole: Any = AutoModelForCausalLM.from_pretrained(longer).eval()
    before, behind = states_of(model, tokens[:-1])
    around, _, names = PUBLISHED[family]
    tensors = tensors_of(folder)
    eps = getattr(model.config, "rms_norm_eps", None) or model.config.layer_norm_epsilon
    weights = [tensors[around.format(name, n=3) + ".weight"] for name in names]

    def norm(hidden: Tensor, weight: Tensor) -> Tensor:
        return weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)

    embedded = norm(model.get_input_embeddings()(tokens[1:]), weights[0])
    hidden = norm(before if family == "qwen2" else behind, weights[1])
    both = (hidden, embedded) if family == "qwen2" else (embedded, hidden)
    state = (torch.cat(both, dim=-1) @ weights[2].T)[None]
    backbone = whole.get_decoder()
    for layer in backbone.layers[3:]:
        count = state.shape[1]
        positions = torch.arange(count)[None]
        options: dict[str, Any] = {"position_ids": positions}
        window = whole.config.sliding_window if family == "mimo_v2_flash" else None
        options["attention_mask"] = _mask(count, window)
        if family == "mimo_v2_flash":
            options["position_embeddings"] = backbone.rotary_emb(state, positions, "sliding_attention")
        elif family != "nemotron_h":
            options["position_embeddings"] = backbone.rotary_emb(state, positions)
        output = layer(state, **options)
        state = output[0] if isinstance(output, tuple) else output
    final = weights[3] if len(weights) > 3 else model.get_decoder().norm.weight
    return before, norm(state[0], final)


@pytest.mark.parametrize("family", ["ernie4_5_moe", "mimo_v2_flash", "nemotron_h", "qwen2", "glm4_moe_lite"])
def test_as_described(family: str, tmp_path: Path) -> None:
    folder, longer = mtp_checkpoint(family, tmp_path)
    before, expected = described(family, folder, longer, TOKENS)
    head = head_of(folder)
    cache = head.new_cache()
    got = torch.cat([head.run(TOKENS[1:10], before[:9], cache), head.run(TOKENS[10:], before[9:], cache)])
    torch.testing.assert_close(got, expected, **CLOSE)
