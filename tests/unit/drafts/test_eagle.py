"""EAGLE heads compute what the published formats define, and unknown fields and tensors are refused by name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from splitnet.blocks.client_part import ClientPart
from splitnet.blocks.kv_cache import SequenceCache
from splitnet.drafts.drafter import Guess
from splitnet.drafts.eagle import EagleHead
from splitnet.drafts.heads import HeadDrafter
from splitnet.errors import ModelNotFound, SplitnetError
from tests.unit.model_ends import model_ends

HIDDEN, HEADS, KV_HEADS, SIZE, INNER = 32, 4, 2, 8, 48
VOCABULARY, DRAFTED, BLOCKS = 50, 20, 6
EPS = 1e-5
LAYER = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": SIZE,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": EPS,
    "rope_theta": 5000.0,
    "max_position_embeddings": 64,
}
Tensors = dict[str, Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / shape[-1] ** 0.5


def norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS) * weight


EMBEDDINGS = 2 * numbers(VOCABULARY, HIDDEN)
OUTPUT = 3 * numbers(VOCABULARY, HIDDEN, seed=1)
FINAL = 1 + numbers(HIDDEN)


def part(**changed: Any) -> ClientPart:
    given: dict[str, Any] = {
        "embed": lambda ids: EMBEDDINGS[ids],
        "norm": lambda hidden: norm(hidden, FINAL),
        "head": lambda hidden: hidden @ OUTPUT.T,
        "hidden_size": HIDDEN,
        "num_blocks": BLOCKS,
        "vocabulary": VOCABULARY,
    }
    return model_ends(**given | changed)


def layer(index: int = 0, *, joined: bool, input_norm: bool = True, qk_norms: bool = False) -> Tensors:
    own, given = f"layers.{index}.", 2 * HIDDEN if joined else HIDDEN
    attention = {
        "q_proj": numbers(HEADS * SIZE, given),
        "k_proj": numbers(KV_HEADS * SIZE, given, seed=1),
        "v_proj": numbers(KV_HEADS * SIZE, given, seed=2),
        "o_proj": numbers(HIDDEN, HEADS * SIZE, seed=3),
    }
    if qk_norms:
        attention |= {"q_norm": 1 + numbers(SIZE), "k_norm": 1 + numbers(SIZE, seed=1)}
    inner = {
        "gate_proj": numbers(INNER, HIDDEN, seed=4),
        "up_proj": numbers(INNER, HIDDEN, seed=5),
        "down_proj": numbers(HIDDEN, INNER, seed=6),
    }
    norms = ["post_attention_layernorm"] + ["input_layernorm"] * input_norm + ["hidden_norm"] * joined
    return (
        {f"{own}self_attn.{name}.weight": tensor for name, tensor in attention.items()}
        | {f"{own}mlp.{name}.weight": tensor for name, tensor in inner.items()}
        | {f"{own}{name}.weight": 1 + numbers(HIDDEN, seed=place) for place, name in enumerate(norms, 7)}
    )


def targets() -> Tensor:
    return torch.arange(DRAFTED) * 2 + 3


def eagle3(taps: int = 3, **layers: Any) -> Tensors:
    known = torch.zeros(VOCABULARY, dtype=torch.bool)
    known[targets()] = True
    return {
        "fc.weight": numbers(HIDDEN, taps * HIDDEN),
        **layer(joined=True, **layers),
        "norm.weight": 1 + numbers(HIDDEN, seed=3),
        "lm_head.weight": numbers(DRAFTED, HIDDEN, seed=9),
        "d2t": targets() - torch.arange(DRAFTED),
        "t2d": known,
    }


def speculators(**changed: Any) -> dict[str, Any]:
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": dict(LAYER),
        "draft_vocab_size": DRAFTED,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 6],
        **changed,
    }


def specforge(**changed: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLMEagle3"], **LAYER, "draft_vocab_size": DRAFTED, **changed}


def as_midlayer(tensors: Tensors) -> Tensors:
    return {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(config: dict[str, Any], tensors: Tensors) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        return tmp_path

    return written


def rotated(heads: Tensor) -> Tensor:
    """Rotary embedding of heads `[seq, heads, size]` at positions 0, 1, ..."""
    angles = torch.arange(len(heads))[:, None] * 5000.0 ** (-torch.arange(0, SIZE, 2) / SIZE)
    cosines, sines = angles.cos()[:, None], angles.sin()[:, None]
    first, second = heads[..., : SIZE // 2], heads[..., SIZE // 2 :]
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def block(tensors: Tensors, given: Tensor, residual: Tensor, own: str = "layers.0.") -> Tensor:
    """Output of a Llama block for the given attention input and residual, both `[seq, hidden]`."""

    def heads(name: str) -> Tensor:
        made = given @ tensors[f"{own}self_attn.{name}_proj.weight"].T
        if f"{own}self_attn.{name}_proj.bias" in tensors:
            made = made + tensors[f"{own}self_attn.{name}_proj.bias"]
        made = made.view(len(given), -1, SIZE)
        weight = tensors.get(f"{own}self_attn.{name}_norm.weight")
        return made if weight is None else norm(made, weight)

    queries, keys, values = rotated(heads("q")), rotated(heads("k")), heads("v")
    mixed: list[Tensor] = []
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        scores = queries[:, head] @ keys[:, shared].T / SIZE**0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        mixed.append(scores.softmax(-1) @ values[:, shared])
    hidden = residual + torch.cat(mixed, dim=-1) @ tensors[f"{own}self_attn.o_proj.weight"].T
    inner = norm(hidden, tensors[f"{own}post_attention_layernorm.weight"])
    gate, up = (inner @ tensors[f"{own}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return hidden + (functional.silu(gate) * up) @ tensors[f"{own}mlp.down_proj.weight"].T


def outputs3(tensors: Tensors, tokens: Tensor, hidden: Tensor, *, normed_residual: bool = False) -> Tensor:
    """Output of the EAGLE-3 layer for features after `fc`."""
    normed = norm(hidden, tensors["layers.0.hidden_norm.weight"])
    embedded = norm(EMBEDDINGS[tokens], tensors["layers.0.input_layernorm.weight"])
    given = torch.cat((embedded, normed), dim=-1)
    return block(tensors, given, normed if normed_residual else hidden)


def logits3(tensors: Tensors, outputs: Tensor) -> Tensor:
    return norm(outputs, tensors["norm.weight"]) @ tensors["lm_head.weight"].T


TOKENS = torch.tensor([4, 9, 30, 2, 49, 7, 7])


def check(head: EagleHead, outputs: Tensor, logits: Tensor, features: Tensor) -> None:
    """Runs the positions in pieces, the last one alone, with a cropped piece in between."""
    cache = SequenceCache()
    pieces = [head.run(TOKENS[:3], features[:3], cache)]
    head.run(TOKENS[:2], features[:2], cache)
    cache.crop(3)
    assert cache.length == 3
    pieces += [head.run(TOKENS[3:6], features[3:6], cache), head.run(TOKENS[6:], features[6:], cache)]
    found = torch.cat(pieces)
    assert torch.allclose(found, outputs, atol=1e-5)
    assert torch.allclose(head.logits(found), logits, atol=1e-5)


@pytest.mark.parametrize("normed_residual", [False, True])
def test_eagle3_in_the_format_of_speculators(write: Callable[..., Path], normed_residual: bool) -> None:
    tensors, features = eagle3(), numbers(len(TOKENS), 3 * HIDDEN)
    folder = write(speculators(norm_before_residual=normed_residual), tensors)
    head = EagleHead.from_source(folder, part(), trainable=True)
    outputs = outputs3(tensors, TOKENS, features @ tensors["fc.weight"].T, normed_residual=normed_residual)
    check(head, outputs, logits3(tensors, outputs), features)
    assert head.taps == (1, 3, 6)
    assert head.draft_vocabulary is not None and head.draft_vocabulary.equal(targets())


def test_outputs_of_the_head_replace_features(write: Callable[..., Path]) -> None:
    tensors, features = eagle3(), numbers(len(TOKENS), 3 * HIDDEN)
    head = EagleHead.from_source(write(speculators(), tensors), part(), trainable=True)
    begun = features @ tensors["fc.weight"].T
    for place in range(3, len(TOKENS)):
        begun[place] = outputs3(tensors, TOKENS, begun)[place - 1]
    expected = outputs3(tensors, TOKENS, begun)
    cache = SequenceCache()
    found = [*head.run(TOKENS[:3], features[:3], cache)]
    for token in TOKENS[3:]:
        found += [*head.run(token[None], found[-1][None], cache, own=True)]
    assert torch.allclose(torch.stack(found), expected, atol=1e-5)


@pytest.mark.parametrize("flag", ["norm_before_fc", "fc_norm", "norm_output"])
def test_flags_of_speculators_configs_are_followed(write: Callable[..., Path], flag: str) -> None:
    tensors, features = eagle3(), numbers(len(TOKENS), 3 * HIDDEN)
    given, read = features, dict(tensors)
    if flag == "norm_before_fc":
        read["input_norm.weight"] = 1 + numbers(3 * HIDDEN)
        given = norm(features, read["input_norm.weight"])
    if flag == "fc_norm":
        read |= {f"fc_norm.{place}.weight": 1 + numbers(HIDDEN, seed=place) for place in range(3)}
        chunks = features.chunk(3, dim=-1)
        given = torch.cat([norm(one, read[f"fc_norm.{place}.weight"]) for place, one in enumerate(chunks)], dim=-1)
    outputs = outputs3(tensors, TOKENS, given @ tensors["fc.weight"].T)
    logits = logits3(tensors, outputs)
    if flag == "norm_output":
        outputs = norm(outputs, tensors["norm.weight"])
    check(
        EagleHead.from_source(write(speculators(**{flag: True}), read), part(), trainable=True),
        outputs,
        logits,
        features,
    )


def test_eagle3_with_two_layers_query_norms_biases_and_own_embeddings(write: Callable[..., Path]) -> None:
    tensors = eagle3(qk_norms=True) | layer(1, joined=False, qk_norms=True)
    tensors["layers.0.self_attn.q_proj.bias"] = numbers(HEADS * SIZE)
    tensors["embed_tokens.weight"] = EMBEDDINGS.clone()
    config = speculators(transformer_layer_config=LAYER | {"model_type": "qwen3", "num_hidden_layers": 2})
    features = numbers(len(TOKENS), 3 * HIDDEN)
    first = outputs3(tensors, TOKENS, features @ tensors["fc.weight"].T)
    given = norm(first, tensors["layers.1.input_layernorm.weight"])
    outputs = block(tensors, given, first, "layers.1.")
    model = part(embed=lambda ids: torch.full((len(ids), HIDDEN), torch.nan))
    check(
        EagleHead.from_source(write(config, tensors), model, trainable=True),
        outputs,
        logits3(tensors, outputs),
        features,
    )


def test_eagle3_in_the_formats_of_its_authors_and_specforge(write: Callable[..., Path]) -> None:
    tensors, features = eagle3(), numbers(len(TOKENS), 3 * HIDDEN)
    outputs = outputs3(tensors, TOKENS, features @ tensors["fc.weight"].T)
    head = EagleHead.from_source(write(specforge(), as_midlayer(tensors)), part(num_blocks=12), trainable=True)
    check(head, outputs, logits3(tensors, outputs), features)
    assert head.taps == (2, 6, 9)
    given = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 5], "use_aux_hidden_state": True}}
    head = EagleHead.from_source(write(specforge(**given), as_midlayer(tensors)), part(), trainable=True)
    assert head.taps == (1, 3, 6)  # As in SGLang, this list names the layers whose outputs are taken.


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_eagle_1_and_eagle_2(write: Callable[..., Path], layers: int, bias: bool) -> None:
    tensors: Tensors = {"fc.weight": numbers(HIDDEN, 2 * HIDDEN), "embed_tokens.weight": EMBEDDINGS.clone()}
    if bias:
        tensors["fc.bias"] = numbers(HIDDEN)
    for index in range(layers):
        tensors |= layer(index, joined=False, input_norm=index > 0)
    config = {**LAYER, "architectures": ["LlamaForCausalLM"], "bias": bias, "num_hidden_layers": layers}
    features = numbers(len(TOKENS), HIDDEN)
    given = torch.cat((EMBEDDINGS[TOKENS], norm(features, FINAL)), dim=-1)
    hidden = given @ tensors["fc.weight"].T + tensors.get("fc.bias", torch.zeros(HIDDEN))
    outputs = block(tensors, hidden, hidden)
    if layers > 1:
        outputs = block(tensors, norm(outputs, tensors["layers.1.input_layernorm.weight"]), outputs, "layers.1.")
    head = EagleHead.from_source(write(config, tensors), part(), trainable=True)
    check(head, outputs, outputs @ OUTPUT.T, features)
    assert head.taps == (BLOCKS,) and head.draft_vocabulary is None
    cache = SequenceCache()
    first = head.run(TOKENS[:1], features[:1], cache)
    given = torch.cat((EMBEDDINGS[TOKENS[:2]], torch.cat((norm(features[:1], FINAL), outputs[:1]))), dim=-1)
    hidden = given @ tensors["fc.weight"].T + tensors.get("fc.bias", torch.zeros(HIDDEN))
    expected = block(tensors, hidden, hidden)
    if layers > 1:
        expected = block(tensors, norm(expected, tensors["layers.1.input_layernorm.weight"]), expected, "layers.1.")
    assert torch.allclose(head.run(TOKENS[1:2], first, cache, own=True), expected[1:], atol=1e-5)
    with pytest.raises(SplitnetError, match="format of speculators"):
        head.save(Path("nowhere"), None, [])


def test_weights_in_16_bits_give_the_same_drafts(write: Callable[..., Path]) -> None:
    tensors = {name: one.bfloat16() if one.is_floating_point() else one for name, one in eagle3().items()}
    features = numbers(len(TOKENS), 3 * HIDDEN)
    folder = write(speculators(), tensors)
    wide, narrow = (EagleHead.from_source(folder, part(), trainable=trainable) for trainable in (True, False))
    caches = SequenceCache(), SequenceCache()
    expected, found = (head.run(TOKENS, features, cache) for head, cache in zip((wide, narrow), caches, strict=True))
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(narrow.logits(found), wide.logits(expected), atol=1e-3)
    assert all(parameter.requires_grad for parameter in wide.parameters())
    assert not any(parameter.requires_grad for parameter in narrow.parameters())


def test_long_prompts_run_in_pieces(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, features = eagle3(), numbers(len(TOKENS), 3 * HIDDEN)
    head = EagleHead.from_source(write(speculators(), tensors), part(), trainable=True)
    drafted: list[tuple[Tensor, list[Guess]]] = []
    for piece in (len(TOKENS), 2):
        monkeypatch.setattr("splitnet.drafts.heads.PIECE", piece)
        drafter = HeadDrafter(head)
        drafter.begin_text([1, *TOKENS.tolist()], features)
        guesses = [*itertools.islice(drafter.draft_tokens([]), 3)]
        drafted.append((drafter._outputs[0], guesses))
    (expected, first), (found, second) = drafted
    assert torch.allclose(expected, head.run(TOKENS, features, SequenceCache())[-1], atol=1e-5)
    assert torch.allclose(found, expected, atol=1e-5) and first == second


def test_a_saved_head_can_be_opened_again(write: Callable[..., Path], tmp_path: Path) -> None:
    tensors = {name: one.bfloat16() if one.is_floating_point() else one for name, one in eagle3().items()}
    head = EagleHead.from_source(write(speculators(norm_output=True), tensors), part(), trainable=True)
    head.save(tmp_path / "saved", "someone/model", ["LlamaForCausalLM"])
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": "someone/model",
        "architectures": ["LlamaForCausalLM"],
    }
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(saved[name].equal(tensor) for name, tensor in tensors.items())
    again = EagleHead.from_source(tmp_path / "saved", part(), trainable=True)
    assert again.shape.norm_output and again.taps == head.taps
    features = numbers(len(TOKENS), 3 * HIDDEN)
    expected = head.run(TOKENS, features, SequenceCache())
    assert again.run(TOKENS, features, SequenceCache()).equal(expected)


def changed(config: dict[str, Any], **layer_values: Any) -> dict[str, Any]:
    return config | {"transformer_layer_config": config["transformer_layer_config"] | layer_values}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (speculators(speculators_model_type="dflash"), "'dflash'"),
        (speculators(transformer_layer_config=[1]), "transformer_layer_config"),
        (speculators(eagle_aux_hidden_state_layer_ids=[1, 3, 7]), "eagle_aux_hidden_state_layer_ids"),
        (speculators(eagle_aux_hidden_state_layer_ids=[1, 1, 2]), "eagle_aux_hidden_state_layer_ids"),
        (speculators(eagle_aux_hidden_state_layer_ids=list(range(99))), "eagle_aux_hidden_state_layer_ids"),
        (speculators(eagle_aux_hidden_state_layer_ids=5), "config"),
        (speculators(eagle_aux_hidden_state_layer_ids=["1"]), "eagle_aux_hidden_state_layer_ids"),
        (speculators(eagle_aux_hidden_state_layer_ids=[1, 3]), "fc.weight"),
        (speculators(draft_vocab_size=VOCABULARY + 1), "draft_vocab_size"),
        (speculators(draft_vocab_size=DRAFTED - 1), "d2t"),
        (speculators(norm_before_fc=True), "input_norm.weight"),
        (changed(speculators(), hidden_size=16), "hidden_size"),
        (changed(speculators(), hidden_size=10**12), "hidden_size"),
        (changed(speculators(), hidden_size=True), "hidden_size"),
        (changed(speculators(), intermediate_size=INNER + 1), "mlp"),
        (changed(speculators(), intermediate_size="48"), "intermediate_size"),
        (changed(speculators(), num_hidden_layers=2), "layers.1"),
        (changed(speculators(), num_hidden_layers=10**9), "num_hidden_layers"),
        (changed(speculators(), num_hidden_layers=9), "num_hidden_layers"),
        (changed(speculators(), num_key_value_heads=3), "num_key_value_heads"),
        (changed(speculators(), num_attention_heads=2**19), "num_attention_heads"),
        (changed(speculators(), vocab_size=VOCABULARY - 1), "vocab_size"),
        (changed(speculators(), hidden_act="sharp"), "hidden_act"),
        (changed(speculators(), model_type="mamba"), "'mamba'"),
        (changed(speculators(), rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type"),
        (changed(speculators(), rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial"),
        (changed(speculators(), rope_scaling="much"), "rotary"),
        (changed(speculators(), rope_theta="x"), r"config of .*rope_theta.*'x'"),
        (changed(speculators(), rope_parameters={"rope_theta": None}), r"config of .*'rope_theta': None"),
        (changed(speculators(), rope_theta=[]), r"config of .*'rope_theta': \[\]"),
        (changed(speculators(), rope_parameters={"type": "linear", "factor": "x"}), r"config of .*'factor': 'x'"),
        (
            changed(speculators(), rope_parameters={"type": "yarn", "factor": 2.0, "attention_factor": {}}),
            r"config of .*'attention_factor': \{\}",
        ),
        (changed(speculators(), rms_norm_eps="small"), "config"),
        (changed(speculators(), layer_types=["sliding_attention"]), "sliding_attention"),
        (changed(speculators(), quantization_config={"bits": 4}), "quantization_config"),
    ],
)
def test_unsupported_config_fields_are_refused_by_name(
    write: Callable[..., Path], config: dict[str, Any], field: str
) -> None:
    with pytest.raises(SplitnetError, match=field):
        EagleHead.from_source(write(config, eagle3()), part())


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({"d2t": None, "t2d": None}, "d2t"),
        ({"d2t": torch.zeros(DRAFTED - 1, dtype=torch.long)}, "d2t"),
        ({"d2t": torch.full((DRAFTED,), VOCABULARY)}, "d2t"),
        ({"d2t": -torch.arange(DRAFTED)}, "d2t"),
        ({"d2t": torch.zeros(DRAFTED)}, "d2t"),
        ({"norm.weight": None}, "norm.weight"),
        ({"lm_head.weight": None}, "lm_head.weight"),
        ({"fc.weight": torch.zeros(HIDDEN, 3 * HIDDEN, dtype=torch.int8)}, "fc.weight"),
        ({"fc.bias": torch.zeros(HIDDEN + 1)}, "fc.bias"),
        ({"gates.weight": torch.zeros(3)}, "gates.weight"),
        ({"layers.0.self_attn.x_proj.bias": torch.zeros(3)}, "x_proj"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    write: Callable[..., Path], tensors: dict[str, Tensor | None], name: str
) -> None:
    given = {key: tensor for key, tensor in (eagle3() | tensors).items() if tensor is not None}
    with pytest.raises(SplitnetError, match=name):
        EagleHead.from_source(write(speculators(), given), part())


def test_a_file_that_is_cut_off_is_refused(write: Callable[..., Path]) -> None:
    folder = write(speculators(), eagle3())
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(SplitnetError, match="damaged"):
        EagleHead.from_source(folder, part())


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(speculators()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelNotFound, match="no safetensors"):
        EagleHead.from_source(tmp_path, part())
