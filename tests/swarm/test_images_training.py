"""Training on images gives the same losses and gradients with text blocks on peers as in transformers' whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

from splitnet.blocks.block_inputs import encode_step
from splitnet.errors import SplitnetError, UnsupportedParameter
from splitnet.wire.messages import BlockInput
from tests.image_models import IMAGE_MODELS, Inputs
from tests.swarm.harness import LocalSwarm, shared_swarm

SPANS = [(0, 1), (1, 4), (4, 6)]


@pytest.fixture(scope="module", params=["gemma3", "qwen3_vl", "llava"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, LocalSwarm]]:
    """A whole model in transformers, and a swarm with two peers for every span."""
    folder = tmp_path_factory.mktemp(request.param) / "published"
    local = IMAGE_MODELS[request.param].write(folder)
    local.family = request.param
    with shared_swarm(folder, SPANS * 2, dtype="float32") as swarm:
        yield local, swarm


def batch_of(local: Any) -> Inputs:
    """Three prompts with one, two and three images, padded on the right, and labels."""
    model = IMAGE_MODELS[local.family]
    rows = [model.inputs(local, images, seed=images) for images in (1, 2, 3)]
    longest = max(row["input_ids"].shape[1] for row in rows)
    batch: Inputs = {}
    for name in rows[0]:
        by_token = name == "input_ids" or name.endswith(("mask", "token_type_ids"))
        padded = [
            torch.nn.functional.pad(row[name], (0, longest - row[name].shape[1])) if by_token else row[name]
            for row in rows
        ]
        batch[name] = torch.cat(padded)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def gradients(model: Any, batch: Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradient of each trained parameter."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    trained = {name: one.grad for name, one in model.named_parameters() if one.requires_grad and one.grad is not None}
    return loss.detach(), trained


def check_same(local: Any, remote: Any, batch: Inputs) -> None:
    (expected_loss, expected), (loss, found) = (gradients(model, batch) for model in (local, remote))
    torch.testing.assert_close(loss, expected_loss)
    assert found and found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any()
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)


def with_lora(model: Any) -> Any:
    """LoRA in some linear layers of the text model, the same in every model."""
    torch.manual_seed(0)
    layers = r".*language_model\.layers\.\d+\..*(q_proj|down_proj)"
    wrapped = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=layers))
    noise = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=noise) / 10)
    return wrapped


def fresh(local: Any) -> Any:
    """The whole model of transformers, without adapters, as it is when it is loaded."""
    again = type(local).from_pretrained(local.name_or_path, dtype=torch.float32, attn_implementation="sdpa")
    return again.eval()


def test_adapters_get_the_same_gradients(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    whole, remote = with_lora(fresh(local)), with_lora(swarm.image_model(dtype="float32"))
    whole.train()
    remote.train()
    check_same(whole, remote, batch_of(local))


@pytest.mark.parametrize("local_blocks", [None, "1:3"])
def test_embeddings_get_the_same_gradients(local_blocks: str | None, both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    whole, remote = fresh(local), swarm.image_model(dtype="float32", local_blocks=local_blocks)
    for model in (whole, remote):
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
    check_same(whole, remote, batch_of(local))


def test_prompts_before_images_train_or_are_refused(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    batch = batch_of(local)

    def with_prompt(model: Any) -> Any:
        torch.manual_seed(0)
        config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3, prompt_tuning_init="RANDOM")
        return get_peft_model(model, config)

    remote = with_prompt(swarm.image_model(dtype="float32"))
    if local.family == "qwen3_vl":  # the whole model would give the tokens of images the positions of text
        with pytest.raises(UnsupportedParameter, match="train LoRA"):
            remote(**batch)
    else:
        check_same(with_prompt(fresh(local)), remote, batch)
        assert torch.equal(*[each.get_input_embeddings().weight for each in (remote, local)])


def test_prefixes_before_images_train_or_are_refused(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    batch = batch_of(local)

    def with_prefix(model: Any) -> Any:
        torch.manual_seed(0)
        return get_peft_model(model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))

    remote = with_prefix(swarm.image_model(dtype="float32"))
    if local.family == "qwen3_vl":
        with pytest.raises(UnsupportedParameter, match="train LoRA"):
            remote(**batch)
    else:
        check_same(with_prefix(fresh(local)), remote, batch)


def test_a_trained_tower_gets_its_gradients_or_is_refused(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    whole, remote = fresh(local), swarm.image_model(dtype="float32")
    assert not any(one.requires_grad for name, one in remote.named_parameters() if "vision" in name or "visual" in name)
    for model in (whole, remote):
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("projector" in name or "merger" in name)
    if local.family == "qwen3_vl":
        with pytest.raises(UnsupportedParameter, match="freeze the tower"):
            remote(**batch_of(local))
    else:
        check_same(whole, remote, batch_of(local))


@pytest.mark.parametrize("victim", range(len(SPANS)))
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_gradients_survive_the_death_of_a_hop(direction: str, victim: int, both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    batch = batch_of(local)
    expected_loss, expected = gradients(with_lora(fresh(local)), batch)
    with swarm.mended() as visit:
        remote = with_lora(visit.image_model(dtype="float32"))
        gradients(remote, batch)  # opens the route
        blocks = remote.get_base_model()._blocks
        (passes,) = blocks.passes.values()
        remote.zero_grad()
        if direction == "forward":
            next(peer for peer in visit.peers if peer.endpoint == passes.hops[victim].endpoint).close()
            loss = remote(**batch).loss
        else:
            loss = remote(**batch).loss
            next(peer for peer in visit.peers if peer.endpoint == passes.hops[victim].endpoint).close()
        loss.backward()
        assert passes.recoveries
    torch.testing.assert_close(loss.detach(), expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(remote.named_parameters())[name].grad, gradient, atol=1e-5, rtol=1e-3)


def _unknown(given: BlockInput) -> BlockInput:
    return given._replace(name="unknown")


def _outside(given: BlockInput) -> BlockInput:
    return given._replace(start=given.start + 1000)


def _other_row(given: BlockInput) -> BlockInput:
    return given._replace(row=1000)


def _too_wide(given: BlockInput) -> BlockInput:
    return given._replace(size=given.size + 8, length=1)


@pytest.mark.parametrize("change", [_unknown, _outside, _other_row, _too_wide])
def test_peers_refuse_wrong_block_inputs_of_passes_and_go_on(
    change: Callable[[BlockInput], BlockInput], both: tuple[Any, LocalSwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    local, swarm = both
    if local.family == "llava":
        pytest.skip("its blocks read hidden states alone")
    batch = batch_of(local)

    def encode(*args: Any) -> tuple[bytes, tuple[BlockInput, ...]]:
        payload, described = encode_step(*args)
        return payload, tuple(map(change, described))

    with monkeypatch.context() as patch, swarm.newcomer() as visit:
        patch.setattr("splitnet.session.training.encode_step", encode)
        with pytest.raises(SplitnetError):
            visit.image_model(dtype="float32")(**batch)
    check_same(with_lora(fresh(local)), with_lora(swarm.image_model(dtype="float32")), batch)
