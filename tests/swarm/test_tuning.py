"""What PEFT trains on a local model it trains on remote blocks: the same gradients, by the same calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from splitnet.errors import AdapterError
from splitnet.tuning.methods import begin_prefix
from splitnet.tuning.zeroth_order import estimate_gradients
from tests.swarm.harness import LocalSwarm, local_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2")
TASK = TaskType.CAUSAL_LM


def lora(family: str) -> LoraConfig:
    targets = ["c_attn", "c_fc", "c_proj"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(task_type=TASK, r=4, lora_alpha=12, target_modules=targets, init_lora_weights=False)


METHODS: dict[str, Callable[[str], Any]] = {
    "prompt": lambda family: PromptTuningConfig(task_type=TASK, num_virtual_tokens=5),
    "p-tuning-mlp": lambda family: PromptEncoderConfig(task_type=TASK, num_virtual_tokens=5, encoder_hidden_size=16),
    "p-tuning-lstm": lambda family: PromptEncoderConfig(
        task_type=TASK, num_virtual_tokens=5, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
    "prefix": lambda family: PrefixTuningConfig(task_type=TASK, num_virtual_tokens=5),
    "prefix-mlp": lambda family: PrefixTuningConfig(
        task_type=TASK, num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16
    ),
    "lora": lora,
}


@pytest.fixture(scope="module", params=FAMILIES)
def swarm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Three peers of a random model; the family is the name of its folder."""
    folder = random_checkpoint(request.param, tmp_path_factory.mktemp("model") / request.param)
    with local_swarm(folder, [(0, 2), (2, 4), (4, 6)]) as started:
        yield started


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the right; the loss is on the second half of each."""
    ids = torch.randint(3, 300, (5, 14), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row, length in enumerate((14, 9, 11, 4, 14)):
        mask[row, length:] = 0
        labels[row, length:] = -100
        labels[row, : length // 2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def local_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def wrapped(model: Any, config: Any, seed: int = 3) -> PeftModel:
    torch.manual_seed(seed)
    made = get_peft_model(model, config)
    assert isinstance(made, PeftModel)
    return made.eval()  # peers know no dropout


def gradients(model: PeftModel, inputs: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    found = [parameter.grad for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]
    assert found and all(gradient is not None for gradient in found)
    return float(loss.detach()), torch.cat([gradient.flatten() for gradient in found if gradient is not None])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_local_training(method: str, swarm: LocalSwarm) -> None:
    config = METHODS[method]
    expected_loss, expected = gradients(wrapped(local_model(swarm.folder), config(swarm.folder.name)), batch())
    with swarm.visit() as visit:
        loss, found = gradients(wrapped(visit.model(), config(swarm.folder.name)), batch())
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_gradients_over_compressed_links_point_the_same_way(method: str, swarm: LocalSwarm) -> None:
    config = METHODS[method]
    _, expected = gradients(wrapped(local_model(swarm.folder), config(swarm.folder.name)), batch())
    with swarm.visit() as visit:
        _, found = gradients(wrapped(visit.model(codec="int8"), config(swarm.folder.name)), batch())
    assert float(torch.cosine_similarity(found, expected, dim=0)) > 0.999
    assert not torch.equal(found, expected)


def test_a_prefix_begins_as_a_text(swarm: LocalSwarm) -> None:
    """With the keys and values of a text as its prefix, a model answers as if the text were there."""
    text, rest = batch()["input_ids"][:1, :5], batch()["input_ids"][:1, 5:]
    expected = local_model(swarm.folder)(torch.cat((text, rest), dim=1)).logits[:, 5:]
    with swarm.visit() as visit, torch.no_grad():
        model = visit.model()
        remote = wrapped(model, PrefixTuningConfig(task_type=TASK, num_virtual_tokens=5))
        begin_prefix(remote, model.keys_and_values(text))
        mask = torch.ones_like(rest)
        found = remote(input_ids=rest, attention_mask=mask).logits
        assert torch.allclose(found, expected, atol=2e-4)
        with pytest.raises(AdapterError, match="train a prefix with --projection"):
            begin_prefix(remote, model.keys_and_values(text)[:-1])


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_gives_the_same_on_both_sides(method: str, swarm: LocalSwarm, tmp_path: Path) -> None:
    """Saved from a remote model and loaded on a local one, and the other way round: logits and generated tokens."""
    config = METHODS[method](swarm.folder.name)
    inputs = {name: tensor for name, tensor in batch(1).items() if name != "labels"}
    with swarm.visit() as visit, torch.no_grad():
        wrapped(visit.model(), config, seed=4).save_pretrained(str(tmp_path / "there"))
        wrapped(local_model(swarm.folder), config, seed=5).save_pretrained(str(tmp_path / "here"))
        for name in ("there", "here"):
            local = PeftModel.from_pretrained(local_model(swarm.folder), tmp_path / name).eval()
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


def greedy(model: Any, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Token by token without a cache, so that nothing depends on how PEFT generates."""
    for _ in range(new_tokens):
        logits = model(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=False).logits
        prompt = torch.cat((prompt, logits[:, -1:].argmax(-1)), dim=1)
    return prompt


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
def test_training_by_forward_passes_alone(method: str, swarm: LocalSwarm) -> None:
    """The same steps as on a local model, and peers keep nothing for a way back."""
    config = METHODS[method](swarm.folder.name)

    def train(model: PeftModel) -> torch.Tensor:
        before = trained(model)
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1e-3)
        for seed in range(3):
            estimate_gradients(model.parameters(), lambda seed=seed: model(**batch(seed)).loss, eps=1e-2, seed=seed)
            optimizer.step()
        return trained(model) - before

    expected = train(wrapped(local_model(swarm.folder), config))
    with swarm.visit() as visit:
        model = wrapped(visit.model(), config)
        found = train(model)
        for peer in swarm.peers:
            session = peer.sessions.get(model.get_base_model()._blocks._passes.id)  # pyright: ignore
            assert session is not None and not session.kept
    assert float(expected.norm()) > 0
    assert float((found - expected).norm() / expected.norm()) < 0.02


def trained(model: PeftModel) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in model.parameters() if tensor.requires_grad])
