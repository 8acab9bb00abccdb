"""PEFT trains the same on remote blocks as on a local model: the same gradients, by the same calls."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, LoHaConfig, LoraConfig, MultitaskPromptTuningConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import AdapterError
from splitnet.hf.peft_adapters import PROMPTS
from splitnet.tools.tune.methods import TrainingSettings, begin_prefix
from splitnet.tools.tune.run import IGNORED, Encoded, TuningRun, estimate_gradients
from tests.swarm.adapters import CAUSAL, FAMILIES, METHODS, batch, flat, gradients, lora, padded, wrapped
from tests.swarm.harness import LocalSwarm, shared_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

OFTEN = ("lora", "prompt", "prefix-mlp", "p-tuning-lstm")
"""Methods of the default tier."""

Config = Callable[[str], Any]
Trained = tuple[float, dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model; the family is the name of its folder."""
    return random_checkpoint(request.param, tmp_path_factory.mktemp("model") / request.param)


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with shared_swarm(folder, [(0, 2), (2, 4), (4, 6)], node=node) as started:
        yield started


@pytest.fixture(scope="module")
def local_model(folder: Path) -> Callable[[], Any]:
    """Makes the same model in one piece."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return lambda: copy.deepcopy(loaded)


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    """The config of a method by its name."""

    def config_of(method: str) -> Any:
        if folder.name == "gpt2" and method in ("loha", "lokr"):
            pytest.skip("PEFT has none for the layers of GPT-2")
        return METHODS[method](folder.name, CAUSAL)

    return config_of


@pytest.fixture(scope="module")
def train_locally(local_model: Callable[[], Any], config: Config) -> Callable[[str], Trained]:
    """Loss and gradients on a local model by the name of the method, computed once."""
    return cache(lambda method: gradients(wrapped(local_model(), config(method)), batch()))


@pytest.mark.default_cases(folder=("llama",), method=OFTEN)
@pytest.mark.default_cases(folder=("gpt2",), method=("lora",))
@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_those_of_local_training(
    method: str, swarm: LocalSwarm, config: Config, train_locally: Callable[[str], Trained]
) -> None:
    expected_loss, expected = train_locally(method)
    with swarm.visit() as visit:
        model = wrapped(visit.model(), config(method))
        loss, found = gradients(model, batch())
    assert found.keys() == {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert found.keys() == expected.keys()
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert float((flat(found) - flat(expected)).abs().max() / flat(expected).abs().max()) < 1e-4


@pytest.mark.default_cases(folder=("llama",))
def test_hops_without_a_part_of_the_adapter_take_part_in_training(
    swarm: LocalSwarm, local_model: Callable[[], Any], folder: Path
) -> None:
    """And later hops: each has a part of one of two adapters, which are used in turn."""

    def train(model: Any) -> torch.Tensor:
        adapted = wrapped(model, lora_on(folder.name, [3]))
        torch.manual_seed(4)
        adapted.add_adapter("other", lora_on(folder.name, [0, 5]))
        found = [gradients(adapted, batch())[1]]
        adapted.set_adapter("other")
        found.append(gradients(adapted, batch())[1])
        return torch.cat([flat(each) for each in found])

    expected = train(local_model())
    with swarm.visit() as visit:
        found = train(visit.model())
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def lora_on(family: str, layers: list[int]) -> LoraConfig:
    config = lora(family)
    config.layers_to_transform = layers
    return config


@pytest.mark.default_cases(folder=("llama",), method=("lora",))
@pytest.mark.default_cases(folder=("gemma3_text",), method=("prefix",))
@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
def test_gradients_are_the_same_where_few_logits_are_kept(
    method: str, swarm: LocalSwarm, config: Config, train_locally: Callable[[str], Trained]
) -> None:
    expected_loss, expected = train_locally(method)
    with swarm.visit() as visit:
        model = wrapped(visit.model(), config(method))
        loss, found = gradients(model, {**batch(), "logits_to_keep": 1})  # type: ignore[dict-item]
        logits = model(**batch(), logits_to_keep=1).logits
    assert logits.shape[:2] == (5, 1)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    assert float((flat(found) - flat(expected)).abs().max() / flat(expected).abs().max()) < 1e-4


@pytest.mark.default_cases(folder=("llama",), method=("lora", "prompt"))
@pytest.mark.parametrize("method", METHODS)
def test_gradients_over_compressed_links_point_the_same_way(
    method: str, swarm: LocalSwarm, config: Config, train_locally: Callable[[str], Trained]
) -> None:
    _, expected = train_locally(method)
    with swarm.visit() as visit:
        _, found = gradients(wrapped(visit.model(codec="int8"), config(method)), batch())
    assert float(torch.cosine_similarity(flat(found), flat(expected), dim=0)) > 0.999
    assert not torch.equal(flat(found), flat(expected))


@pytest.mark.default_cases(folder=("gemma3_text",))
def test_a_prefix_made_of_a_text_acts_like_the_text(
    swarm: LocalSwarm, local_model: Callable[[], Any], config: Config
) -> None:
    """With the keys and values of a text as its prefix, a model answers as if the text were there."""
    text, rest = batch()["input_ids"][:1, :5], batch()["input_ids"][:1, 5:]
    expected = local_model()(torch.cat((text, rest), dim=1)).logits[:, 5:]
    with swarm.visit() as visit, torch.no_grad():
        model = visit.model()
        remote = wrapped(model, config("prefix"))
        begin_prefix(remote, model.keys_and_values(text))
        mask = torch.ones_like(rest)
        found = remote(input_ids=rest, attention_mask=mask).logits
        assert torch.allclose(found, expected, atol=2e-4)
        with pytest.raises(AdapterError, match="train a prefix with --projection"):
            begin_prefix(remote, model.keys_and_values(text)[:-1])


@pytest.mark.default_cases(folder=("llama",), method=OFTEN)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_gives_the_same_output_locally_and_remotely(
    method: str, swarm: LocalSwarm, local_model: Callable[[], Any], config: Config, tmp_path: Path
) -> None:
    """An adapter saved from a remote model loads on a local one, and vice versa: logits and generated tokens."""
    inputs = padded(1)
    with swarm.visit() as visit, torch.no_grad():
        wrapped(visit.model(), config(method), seed=4).save_pretrained(str(tmp_path / "there"))
        wrapped(local_model(), config(method), seed=5).save_pretrained(str(tmp_path / "here"))
        for name in ("there", "here"):
            local = PeftModel.from_pretrained(local_model(), tmp_path / name).eval()
            remote = PeftModel.from_pretrained(visit.model(), tmp_path / name).eval()
            where = inputs["attention_mask"].bool()
            expected = local(**inputs, use_cache=False).logits
            found = remote(**inputs, use_cache=False).logits
            virtual = expected.shape[1] - where.shape[1]
            assert torch.allclose(found[:, virtual:][where], expected[:, virtual:][where], atol=2e-4)
            prompt = inputs["input_ids"][:1, :9]
            tokens = remote.generate(
                input_ids=prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            assert torch.equal(tokens, greedy(local, prompt, 8))


def greedy(model: Any, prompt: torch.Tensor, new_tokens: int, **more: Any) -> torch.Tensor:
    """Token by token without a cache, so that nothing depends on how PEFT generates."""
    for _ in range(new_tokens):
        logits = model(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **more).logits
        prompt = torch.cat((prompt, logits[:, -1:].argmax(-1)), dim=1)
    return prompt


@pytest.mark.default_cases(folder=("llama",), method=("lora",))
@pytest.mark.default_cases(folder=("gemma3_text",), method=("prefix",))
@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
def test_zeroth_order_training_takes_the_same_steps_as_locally(
    method: str, swarm: LocalSwarm, local_model: Callable[[], Any], config: Config
) -> None:
    """The same steps as on a local model, and peers keep nothing for backward passes."""

    def train(model: PeftModel) -> torch.Tensor:
        before = trained(model)
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1e-3)
        for seed in range(3):
            estimate_gradients(model.parameters(), lambda seed=seed: model(**batch(seed)).loss, eps=1e-2, seed=seed)
            optimizer.step()
        return trained(model) - before

    expected = train(wrapped(local_model(), config(method)))
    with swarm.visit() as visit:
        model = wrapped(visit.model(), config(method))
        found = train(model)
        blocks: Any = model.get_base_model()._blocks
        (passes,) = blocks.passes.values()
        for peer in swarm.peers:
            session = peer.service.sessions.get(passes.id)
            assert session is not None and not session.training_state.kept
    assert float(expected.norm()) > 0
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.default_cases(method=("prompt", "lora"), room=(2**26,))
@pytest.mark.default_cases(method=("p-tuning-lstm",), room=(1,))
@pytest.mark.parametrize("room", [2**26, 1], ids=["one call", "a call for each"])
@pytest.mark.parametrize("method", ["prompt", "p-tuning-lstm", "lora"])
@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_prompts_of_many_directions_run_in_one_batch(
    method: str, room: int, swarm: LocalSwarm, local_model: Callable[[], Any], config: Config, monkeypatch: Any
) -> None:
    """With the steps that they have one by one, on a local model."""
    monkeypatch.setattr("splitnet.tools.tune.run.PACKED", room)
    rows = [Encoded(list(range(5, end)), [IGNORED] * 3 + list(range(8, end))) for end in (11, 15, 20)]
    settings = TrainingSettings(steps=2, learning_rate=1e-2, batch_size=3, zeroth_order=True, directions=4)

    def steps(model: PeftModel) -> tuple[list[float], torch.Tensor]:
        run = TuningRun(model, rows, settings, pad=0)
        losses = [run.take_step().loss]
        return losses, torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    expected_losses, expected = steps(wrapped(local_model(), config(method)))
    with swarm.visit() as visit:
        model = wrapped(visit.model(), config(method))
        losses, found = steps(model)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert float(expected.norm()) > 0
    assert float((found - expected).norm() / expected.norm()) < 0.05


def trained(model: PeftModel) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in model.parameters() if tensor.requires_grad])


on_one_family = pytest.mark.parametrize("folder", ["llama"], indirect=True)


def lora_with(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": CAUSAL, "r": 4, "target_modules": ["q_proj", "v_proj"], **fields})


@on_one_family
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"target_parameters": ["lm_head.weight"]}, "target_parameters"),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens=\[5, 6\]"),
        ({"init_lora_weights": "pissa"}, "PiSSA"),
        ({"init_lora_weights": "olora"}, "OLoRA"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"modules_to_save": ["o_proj"]}, "0.self_attn.o_proj is a ModulesToSaveWrapper"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"modules_to_save": ["mlp"]}, "modules_to_save"),
    ],
)
def test_unsupported_adapter_fields_are_refused_when_a_model_is_wrapped(
    fields: dict[str, Any], named: str, swarm: LocalSwarm
) -> None:
    with swarm.visit() as visit, pytest.raises(AdapterError, match=named):
        get_peft_model(visit.model(), lora_with(**fields))


@pytest.mark.full
@on_one_family
def test_other_methods_of_peft_are_refused_when_a_model_is_wrapped(swarm: LocalSwarm) -> None:
    applied = {*PROMPTS, "LORA", "ADALORA", "IA3", "VERA", "LOHA", "LOKR"}
    refused = {kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind not in applied}
    needs = {
        "XLORA": {"hidden_size": 64, "adapters": {}},
        "C3A": {"block_size": 8},
        "VBLORA": {"vector_length": 16, "num_vectors": 16},
        "BOFT": {"boft_block_size": 8},
        "OFT": {"oft_block_size": 8},
        "FOURIERFT": {"n_frequency": 10},
    }
    own_targets = {"ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2}, "XLORA": {}}
    with swarm.visit() as visit:
        for kind in refused:
            made = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
            targets = own_targets.get(kind, {"target_modules": ["q_proj"]})
            try:
                config = made(task_type=CAUSAL, **targets, **needs.get(kind, {}))
            except ImportError:  # The package of this method is not installed.
                continue
            # GLORA requires the exact class of torch, and says so.
            with pytest.raises(ValueError if kind == "GLORA" else AdapterError, match=r"peers|plain torch\.nn\.Linear"):
                get_peft_model(visit.model(), config)


@on_one_family
@pytest.mark.parametrize("method", ["ia3", "vera", "lora"])
def test_an_adapter_that_is_switched_within_a_text_is_refused(method: str, swarm: LocalSwarm, config: Config) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with swarm.visit() as visit, torch.no_grad():
        model = wrapped(visit.model(), config(method))
        model.add_adapter("other", config(method))
        base: Any = model.get_base_model()
        cache = base.new_cache()
        model(input_ids=ids, cache=cache)
        model(input_ids=ids[:, :1], cache=cache)
        model.set_adapter("other")
        with pytest.raises(AdapterError, match="another adapter"):
            model(input_ids=ids[:, :1], cache=cache)
        cache.close()


@on_one_family
def test_adalora_may_prune_a_whole_layer(swarm: LocalSwarm, local_model: Callable[[], Any], config: Config) -> None:
    inputs = padded()

    def pruned(model: Any) -> torch.Tensor:
        adapted = wrapped(model, config("adalora"))
        layer: Any = adapted.get_submodule("base_model.model.model.layers.3.self_attn.k_proj")
        for factors, dim in ((layer.lora_A, 0), (layer.lora_E, 0), (layer.lora_B, 1)):
            factors["default"] = torch.nn.Parameter(factors["default"].detach().narrow(dim, 0, 0))
        return adapted(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()].detach()

    with swarm.visit() as visit:
        assert torch.allclose(pruned(visit.model()), pruned(local_model()), atol=2e-4)


@on_one_family
def test_too_large_ranks_are_refused_when_a_model_is_wrapped(swarm: LocalSwarm) -> None:
    with swarm.visit() as visit, pytest.raises(AdapterError, match="has the rank 1,600, and peers take at most 1,024"):
        get_peft_model(visit.model(), LoHaConfig(task_type=CAUSAL, r=40, target_modules=["q_proj"]))


@on_one_family
def test_changes_after_wrapping_are_applied_or_refused(
    swarm: LocalSwarm, local_model: Callable[[], Any], folder: Path
) -> None:
    inputs = padded(2)
    where = inputs["attention_mask"].bool()

    def two(model: Any) -> Any:
        adapted = wrapped(model, lora(folder.name))
        torch.manual_seed(5)
        adapted.add_adapter("other", lora_with(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
        return adapted.eval()

    def both(model: Any) -> Any:
        model.base_model.set_adapter(["default", "other"])
        return logits(model)

    def scaled(model: Any) -> Any:
        with rescale_adapter_scale(model, 0.3):
            return logits(model)

    def disabled(model: Any) -> Any:
        with model.disable_adapter():
            return logits(model)

    def added_up(model: Any) -> Any:
        model.add_weighted_adapter(["default", "other"], [0.5, 0.7], "sum", combination_type="cat")
        model.set_adapter("sum")
        return logits(model)

    def unloaded(model: Any) -> Any:
        return logits(model.unload())

    def logits(model: Any) -> Any:
        return model(**inputs, use_cache=False).logits[where].detach()

    with swarm.visit() as visit:
        for change in (both, scaled, disabled, added_up, unloaded):
            assert torch.allclose(change(two(visit.model())), change(two(local_model())), atol=2e-4), change.__name__
        remote = two(visit.model())
        for merge in ("merge_adapter", "merge_and_unload"):
            with pytest.raises(AdapterError, match="merging"):
                getattr(remote, merge)()
        assert torch.allclose(logits(remote), logits(two(local_model())), atol=2e-4)
        remote.add_adapter("third", lora_with(lora_bias=True))
        with pytest.raises(AdapterError, match="'third' has lora_bias=True"):
            logits(remote)
        remote.delete_adapter("third")
        logits(remote)
        layer = remote.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
        with pytest.raises(AdapterError, match="LoRA's two matrices"):
            layer.lora_A["default"].register_forward_hook(lambda *_: None)
            logits(remote)
        for refused in (two(visit.model()), functools.partial(two(visit.model()).generate, max_new_tokens=2)):
            with pytest.raises(AdapterError, match="adapter_names"):
                refused(**inputs, adapter_names=["default", "other", "__base__", "other", "default"])


@pytest.mark.default_cases(loads=(False,), method=("lora", "multitask"))
@pytest.mark.default_cases(loads=(True,), method=("prefix", "cartridge"))
@on_one_family
@pytest.mark.parametrize("method", ["prefix", "lora", "multitask", "cartridge"])
@pytest.mark.parametrize("loads", [False, True])
def test_adapters_load_and_run_in_inference_mode(
    method: str, loads: bool, swarm: LocalSwarm, local_model: Callable[[], Any], config: Config, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"task_ids": torch.tensor([1])} if method == "multitask" else {}
    made = {
        "multitask": lambda: MultitaskPromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=5, num_tasks=2),
        "cartridge": lambda: CartridgeConfig(task_type=CAUSAL, num_virtual_tokens=5),
    }.get(method, lambda: config(method))()
    wrapped(local_model(), made).save_pretrained(str(tmp_path))
    prompt = padded(3)["input_ids"][:1, :9]
    local = PeftModel.from_pretrained(local_model(), tmp_path).eval()
    with swarm.visit() as visit:
        with torch.inference_mode(loads):
            remote = PeftModel.from_pretrained(visit.model(), tmp_path).eval()
        with torch.inference_mode():
            tokens = remote.generate(
                input_ids=prompt, **more, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            assert torch.equal(tokens, greedy(local, prompt, 8, **more))
            if method == "lora":
                base: Any = remote.get_base_model()
                cache: Any = base.new_cache()
                remote(prompt, cache=cache)
                # torch does not count changes in this mode.
                remote.get_parameter("base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight").mul_(2)
                with pytest.raises(AdapterError, match="another adapter"):
                    remote(prompt[:, :1], cache=cache)
                cache.close()


@on_one_family
def test_an_adapter_names_its_model_without_a_path_of_the_cache(
    swarm: LocalSwarm, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(model: Any) -> str:
        wrapped(model, lora()).save_pretrained(str(tmp_path), save_embedding_layers=False)
        return json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]

    with swarm.visit() as visit:
        assert named(visit.model()) == str(folder)
        monkeypatch.setenv("SPLITNET_CACHE", str(folder.parent))
        assert named(visit.model()) == folder.name
