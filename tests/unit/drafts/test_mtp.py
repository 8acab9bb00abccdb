"""MTP layers compute the published formulas, and their tensors are read only on request."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from splitnet.blocks.backbone import load_whole
from splitnet.blocks.client_part import ClientPart, client_part_of, load_client_part
from splitnet.blocks.kv_cache import SequenceCache
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.safetensors import SafetensorsStore
from splitnet.checkpoint.transfer.weight_pieces import make_folder
from splitnet.drafts.heads import CombinedDrafter, HeadDrafter
from splitnet.drafts.mtp import LAYERS, MtpHead, mtp_bytes, mtp_head
from splitnet.drafts.prompt_lookup import PromptLookup
from splitnet.drafts.speculator import Speculator
from splitnet.errors import ModelNotFound, UnsupportedModel
from tests.unit.gguf_writing import write_gguf
from tests.unit.model_ends import model_ends
from tests.unit.mtp_checkpoints import PUBLISHED, mtp_checkpoint, states_of
from tests.unit.quantized_checkpoints import quantized_pair, tensors_of, write_checkpoint
from tests.unit.random_models import random_checkpoint

OF_TRANSFORMERS = (
    *("deepseek_v3", "glm4_moe", "glm4_moe_lite", "mellum", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = torch.randint(3, 300, (24,), generator=torch.Generator().manual_seed(5))


def ends_of_checkpoint(checkpoint: Checkpoint) -> ClientPart:
    ends = client_part_of(load_client_part(checkpoint, nn.Identity()))
    assert ends.compute_everything
    return ends


def head_of(folder: Path, weights: str | None = None) -> MtpHead:
    checkpoint = Checkpoint.open(folder)
    head = mtp_head(checkpoint, ends_of_checkpoint(checkpoint), weights)
    assert head is not None
    return head


def published(folder: Path) -> tuple[Any, MtpModel]:
    """A whole model of transformers, and its MTP layer."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    config = model.config
    if not hasattr(config, "num_mtp_layers"):
        config.num_mtp_layers, config.mtp_layer_types = 1, ["full_attention"]
    config.mtp_mlp_layer_types = ["sparse"]
    # By default, transformers ignores MTP layers only at the layer numbers of published checkpoints.
    model._keys_to_ignore_on_load_unexpected = [r"^mtp\.", r"model\.layers\.3\."]
    return model, MtpModel.from_pretrained(model).eval()


@pytest.mark.parametrize("family", OF_TRANSFORMERS)
def test_mtp_layers_compute_the_same_as_in_transformers(family: str, tmp_path: Path) -> None:
    folder, _ = mtp_checkpoint(family, tmp_path)
    model, mtp = published(folder)
    head = head_of(folder)
    assert head.taps == (3,) and head.draft_vocabulary is None
    before, behind = states_of(model, TOKENS[:-1])
    assert not torch.allclose(before, behind)
    cache, expected_cache = SequenceCache(), MtpCache(config=model.config.get_mtp_config())
    with torch.no_grad():
        positions = torch.arange(1, 24)[None]
        expected = mtp.forward_layer(0, behind[None], positions, expected_cache, input_ids=TOKENS[None, 1:])[0]
        expected_logits = mtp._project_to_logits(expected)
    # The positions run in chunks; one chunk is cropped and run again.
    got = [head.run(TOKENS[1:10], before[:9], cache), head.run(TOKENS[10:14], before[9:13], cache)]
    cache.crop(9)
    got[1:] = [head.run(TOKENS[10:11], before[9:10], cache), head.run(TOKENS[11:], before[10:], cache)]
    torch.testing.assert_close(torch.cat(got), expected, **CLOSE)
    torch.testing.assert_close(head.logits(torch.cat(got)), expected_logits, **CLOSE)
    # Drafts: the layer continues from its own outputs.
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
    """States before the final norm, and the output of the layer for `tokens[1:]`, in plain torch. Follows vLLM's
    description, except that vLLM puts zeros in place of the first embedding."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=Checkpoint.open(folder).config).eval()
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


DESCRIBED = ("deepseek_v32", "ernie4_5_moe", "glm_moe_dsa", "mimo_v2_flash", "nemotron_h", "qwen2")


@pytest.mark.default_cases(family=("deepseek_v32", "nemotron_h"))
@pytest.mark.parametrize("family", DESCRIBED)
def test_mtp_layers_compute_the_same_as_vllms_description(family: str, tmp_path: Path) -> None:
    folder, longer = mtp_checkpoint(family, tmp_path)
    before, expected = described(family, folder, longer, TOKENS)
    head = head_of(folder)
    cache = SequenceCache()
    got = torch.cat([head.run(TOKENS[1:10], before[:9], cache), head.run(TOKENS[10:], before[9:], cache)])
    torch.testing.assert_close(got, expected, **CLOSE)


def outputs_of(head: MtpHead, states: Tensor) -> Tensor:
    """The outputs of the layer for some tokens, followed by the output for one draft."""
    cache = SequenceCache()
    outputs = head.run(TOKENS[1 : len(states) + 1], states, cache)
    return torch.cat([outputs, head.run(TOKENS[:1], outputs[-1:], cache, own=True)])


STATES = torch.randn(12, 64, generator=torch.Generator().manual_seed(7))


@pytest.mark.default_cases(family=("glm4_moe",))
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "qwen3_5_moe_text"])
def test_mtp_layers_are_read_from_gguf_files(family: str, tmp_path: Path) -> None:
    folder, longer = mtp_checkpoint(family, tmp_path, behind=True)
    config = json.loads((longer / "config.json").read_text())
    to_convert = write_checkpoint(tmp_path / "to_convert", longer, tensors_of(folder), config)
    expected = outputs_of(head_of(mtp_checkpoint(family, tmp_path / "published")[0]), STATES)
    for stored, close in ((Type.F32, 1e-5), (Type.Q8_0, 0.1)):
        path = write_gguf(to_convert, tmp_path / f"{stored.name}.gguf", stored, nextn_predict_layers=1)
        checkpoint = Checkpoint.open(path)
        assert checkpoint.num_blocks == 3 and len(checkpoint.block_tensors) == 3
        assert not checkpoint.next_token_names & {*checkpoint.client_part_names_of}
        got = outputs_of(head_of(path), STATES)
        assert float((got - expected).norm() / expected.norm()) < close
        load_whole(checkpoint, torch.float32)
    # Unknown tensors are not an error while nobody requests the MTP layer.
    path = write_gguf(to_convert, tmp_path / "odd.gguf", nextn_predict_layers=1)
    data = path.read_bytes()
    assert data.count(b"blk.3.nextn.hnorm.weight") == 1
    path.write_bytes(data.replace(b"blk.3.nextn.hnorm.weight", b"blk.3.nextn.xnorm.weight"))
    checkpoint = Checkpoint.open(path)
    assert Span.load(checkpoint, 0, 3).end == 3
    with pytest.raises(UnsupportedModel, match="some of their tensors are missing"):
        mtp_head(checkpoint, ends_of_checkpoint(checkpoint))


@pytest.mark.default_cases(scheme=("awq",))
@pytest.mark.parametrize("scheme", ["fp8", "awq", "int4-group"])
def test_mtp_layers_are_read_from_quantized_checkpoints(scheme: str, tmp_path: Path) -> None:
    folder, _ = mtp_checkpoint("glm4_moe", tmp_path, num_local_experts=32)
    quantized, plain = quantized_pair(folder, tmp_path, scheme)
    expected = outputs_of(head_of(plain), STATES)
    got = outputs_of(head_of(quantized), STATES)
    assert float((got - expected).norm() / expected.norm()) < 0.05
    assert mtp_bytes(Checkpoint.open(quantized)) < 0.6 * mtp_bytes(Checkpoint.open(plain))


@pytest.mark.parametrize("weights", [None, "int8", "int4", "bfloat16"])
def test_the_predicted_bytes_of_an_mtp_layer_are_right(weights: str | None, tmp_path: Path) -> None:
    folder, _ = mtp_checkpoint("qwen3_next", tmp_path)
    head = head_of(folder, weights)
    parts = sum(one.nbytes for one in (*head._parts.parameters(), *head._parts.buffers()))
    told = mtp_bytes(Checkpoint.open(folder), torch.float32, weights)
    assert abs(told - head._span.weight_bytes - parts) < 0.1 * told
    outputs_of(head, STATES)


def test_mtp_tensors_are_read_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    load_tensors = SafetensorsStore.load_tensors

    def watched(self: Any, names: Any, *args: Any) -> Any:
        read.update(names.values())
        return load_tensors(self, names, *args)

    monkeypatch.setattr(SafetensorsStore, "load_tensors", watched)
    for family in ("deepseek_v3", "qwen3_5_text"):
        checkpoint = Checkpoint.open(mtp_checkpoint(family, tmp_path / family)[0])
        Span.load(checkpoint, 0, 3)
        ends = ends_of_checkpoint(checkpoint)
        assert not read & checkpoint.next_token_names
        read.clear()
        assert mtp_head(checkpoint, ends) is not None
        assert read == checkpoint.next_token_names
        read.clear()


def test_an_mtp_layer_is_read_from_a_multimodal_checkpoint(tmp_path: Path) -> None:
    folder, _ = mtp_checkpoint("qwen3_5_text", tmp_path)
    expected = outputs_of(head_of(folder), STATES)
    text = json.loads((folder / "config.json").read_text())
    tensors = {re.sub(r"^model\.", "model.language_model.", name): one for name, one in tensors_of(folder).items()}
    tensors["model.visual.pos_embed.weight"] = torch.ones(4, 4)
    config = {"model_type": "qwen3_5", "text_config": text, "vision_config": {"model_type": "qwen3_5"}}
    whole = write_checkpoint(tmp_path / "whole", folder, tensors, config)
    torch.testing.assert_close(outputs_of(head_of(whole), STATES), expected)


def test_copies_of_embeddings_and_head_and_further_mtp_layers_are_ignored(tmp_path: Path) -> None:
    folder, _ = mtp_checkpoint("glm4_moe", tmp_path)
    tensors = tensors_of(folder)
    more = {f"model.layers.3.{name}.weight": torch.ones(2, 2) for name in ("embed_tokens", "shared_head.head")}
    more["model.layers.4.eh_proj.weight"] = torch.ones(2, 2)
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 2}
    other = write_checkpoint(tmp_path / "other", folder, tensors | more, config)
    torch.testing.assert_close(outputs_of(head_of(other), STATES), outputs_of(head_of(folder), STATES))


def test_missing_and_unusable_mtp_tensors_are_refused_by_name(tmp_path: Path) -> None:
    folder, _ = mtp_checkpoint("qwen3_next", tmp_path)
    tensors, config = tensors_of(folder), json.loads((folder / "config.json").read_text())

    def refused(name: str, tensors: dict[str, Tensor], match: str) -> None:
        checkpoint = Checkpoint.open(write_checkpoint(tmp_path / name, folder, tensors, config))
        ends = ends_of_checkpoint(checkpoint)
        for ask in (lambda: mtp_head(checkpoint, ends), lambda: mtp_bytes(checkpoint)):
            with pytest.raises(UnsupportedModel, match=match):
                ask()

    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    refused("no_norm", {name: one for name, one in tensors.items() if name != "mtp.norm.weight"}, "are missing")
    refused("no_block", {name: one for name, one in tensors.items() if "mtp.layers" not in name}, "are missing")
    refused("shape", tensors | {"mtp.fc.weight": torch.ones(64, 64)}, r"mtp.fc.weight is \[64, 64\]")
    refused("more", tensors | {"mtp.gate.weight": torch.ones(64)}, "mtp.gate.weight")
    block = tensors | {"mtp.layers.0.mlp.extra.weight": torch.ones(64)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "block", folder, block, config))
    with pytest.raises(UnsupportedModel, match=r"mtp.layers.0.mlp.extra.weight"):
        mtp_head(checkpoint, ends_of_checkpoint(checkpoint))
    large = tensors | {"mtp.layers.0.self_attn.q_proj.weight": torch.ones(3 << 20, 4)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "large", folder, large, config))
    with pytest.raises(ModelNotFound, match="block 3 of large takes"):
        mtp_bytes(checkpoint)
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "none", folder, without, config))
    assert mtp_head(checkpoint, ends_of_checkpoint(checkpoint)) is None and mtp_bytes(checkpoint) == 0
    with pytest.raises(UnsupportedModel, match="changes embeddings or logits"):
        mtp_head(Checkpoint.open(folder), model_ends(None, None, None, hidden_size=64, num_blocks=3, vocabulary=300))


def test_mtp_layers_of_an_unknown_family_are_refused(tmp_path: Path) -> None:
    source = random_checkpoint("llama", tmp_path / "llama", blocks=2)
    config = json.loads((source / "config.json").read_text())
    folder = write_checkpoint(tmp_path / "more", source, tensors_of(source) | {"mtp.fc.weight": torch.ones(4)}, config)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(UnsupportedModel, match=r"more has layers for multi-token prediction .* not known"):
        mtp_head(checkpoint, ends_of_checkpoint(checkpoint))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next"])
def test_a_drafter_makes_the_same_drafts_as_the_layer(family: str, tmp_path: Path) -> None:
    """Drafts that were dropped earlier do not change later drafts."""
    head = head_of(mtp_checkpoint(family, tmp_path)[0])
    text, states = TOKENS.tolist(), torch.randn(23, 64, generator=torch.Generator().manual_seed(3))
    drafter = HeadDrafter(head)
    drafter.begin_text(text[:10], states[:9])
    for length in range(10, 24):
        if length > 10:
            drafter.observe_token(text[length - 1], states[length - 2])
        drafted = [guess.token for guess in itertools.islice(drafter.draft_tokens(()), 3)]
        again = [guess.token for guess in itertools.islice(drafter.draft_tokens(drafted[:1]), 2)]
        cache = SequenceCache()
        output = head.run(torch.tensor(text[1:length]), states[: length - 1], cache)[-1:]
        expected: list[int] = []
        for _ in range(3):
            expected.append(int(head.logits(output)[0].argmax()))
            output = head.run(torch.tensor(expected[-1:]), output, cache, own=True)
        assert drafted == expected and again == expected[1:]


@pytest.mark.default_cases(coded=(True,))
@pytest.mark.parametrize("coded", [False, True])
def test_only_weight_pieces_of_the_mtp_layer_are_fetched(
    coded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITNET_CACHE", str(tmp_path / "cache"))
    folder, _ = mtp_checkpoint("glm4_moe", tmp_path, num_local_experts=32)
    whole = Checkpoint.open(quantized_pair(folder, tmp_path, "awq")[0] if coded else folder)
    assert whole.store.are_here(whole.store.tensor_names)
    checkpoint = Checkpoint.open(make_folder(whole.manifest(), [], lambda path: None))
    weights, further, ends = checkpoint.store.folder, checkpoint.next_token_names, ends_of_checkpoint(whole)
    assert weights is not None and further == whole.next_token_names
    assert not checkpoint.store.are_here(further)
    with pytest.raises(ModelNotFound, match="pieces of the weights"):
        mtp_head(checkpoint, ends)

    def fetch(pieces: Mapping[bytes, int]) -> None:
        for piece in pieces:
            weights.write_piece(piece, whole.held_pieces().read_piece(piece) or b"")

    weights.fetch = fetch
    head, expected = mtp_head(checkpoint, ends), mtp_head(whole, ends)
    assert head is not None and expected is not None and checkpoint.store.are_here(further)
    assert not checkpoint.store.are_here([checkpoint.block_tensors[0][0].name])
    torch.testing.assert_close(outputs_of(head, STATES), outputs_of(expected, STATES))


@pytest.mark.parametrize("kind", ["plain", "awq", "gguf"])
def test_auto_uses_an_mtp_layer_that_is_present_and_small(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, longer = mtp_checkpoint("glm4_moe", tmp_path, num_local_experts=32)
    if kind == "awq":
        folder, _ = quantized_pair(folder, tmp_path, "awq")
    elif kind == "gguf":
        config = json.loads((longer / "config.json").read_text())
        to_convert = write_checkpoint(tmp_path / "to_convert", longer, tensors_of(folder), config)
        folder = write_gguf(to_convert, tmp_path / "model.gguf", nextn_predict_layers=1)
    checkpoint = Checkpoint.open(folder)
    ends = ends_of_checkpoint(checkpoint)
    model = SimpleNamespace(ends=ends, dtype=torch.float32, device=torch.device("cpu"))
    drafts = Speculator(model, checkpoint).drafts_by("auto")
    assert isinstance(drafts.drafter, CombinedDrafter) and drafts.drafter.taps == (3,) and not drafts.required
    least = 4 * mtp_bytes(checkpoint, torch.float32)
    monkeypatch.setattr("splitnet.drafts.speculator.free_memory", lambda device: least - 1)
    assert isinstance(Speculator(model, checkpoint).drafts_by("auto").drafter, PromptLookup)
    speculator = Speculator(model, checkpoint)
    assert isinstance(speculator.drafts_by("mtp").drafter, CombinedDrafter)
    assert isinstance(speculator.drafts_by("auto").drafter, CombinedDrafter)  # The layer is already in memory.


def test_the_documents_name_the_families() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "speculation.md").read_text(encoding="utf-8")
    names = {"mimo" if family == "qwen2" else family for family in LAYERS}
    assert names == {*re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.+?) \|", page.partition("## MTP")[2], re.M)))}
