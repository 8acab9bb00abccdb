"""Peers and clients on a GPU and on the CPU in one swarm give the tokens of the CPU alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM

from splitnet.tools.tune.run import Encoded, collate
from tests.swarm.harness import LocalSwarm, local_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def local(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def swarm(folder: Path, device: str) -> Iterator[LocalSwarm]:
    with local_swarm(folder, []) as started:
        for (start, end), where in {(0, 2): "cpu", (2, 4): device, (4, 6): "cpu"}.items():
            started.add(start, end, device=where)
        started.join()
        yield started


@pytest.fixture(params=["the CPU", "the device", "the device, with local blocks"])
def remote(swarm: LocalSwarm, device: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    blocks = "1:3" if request.param.endswith("blocks") else None
    with swarm.visit() as visit:
        where = "cpu" if request.param == "the CPU" else device
        model = visit.model(device=where, local_blocks=blocks)
        assert model.device == torch.device(where)
        yield model


def tokens(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.default_cases(remote=("the device", "the device, with local blocks"))
def test_greedy_generation(local: Any, remote: Any) -> None:
    found = remote.generate(tokens(7), **GREEDY)
    assert torch.equal(found.cpu(), local.generate(tokens(7), **GREEDY))


@pytest.mark.default_cases(remote=("the device, with local blocks",))
def test_a_padded_batch_and_beams(local: Any, remote: Any) -> None:
    ids = tokens(9, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    for more in ({}, {"num_beams": 3}):
        found = remote.generate(**inputs, **GREEDY, **more)
        assert torch.equal(found.cpu(), local.generate(**inputs, **GREEDY, **more))


@pytest.mark.default_cases(remote=("the device, with local blocks",))
def test_drafts_and_a_session(local: Any, remote: Any) -> None:
    ids = tokens(6).repeat(1, 3)
    with remote.session():
        for _ in range(2):
            found = remote.generate(ids, speculate="prompt-lookup", **GREEDY)
            assert torch.equal(found.cpu(), local.generate(ids, **GREEDY))


@pytest.mark.default_cases(remote=("the device, with local blocks",))
def test_logits_equal_those_of_the_cpu(local: Any, remote: Any) -> None:
    with torch.no_grad():
        found = remote(tokens(8).to(remote.device)).logits
        expected = local(tokens(8)).logits
    assert (found.cpu() - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.default_cases(remote=("the device",), method=("lora",))
@pytest.mark.default_cases(remote=("the device, with local blocks",), method=("prefix",))
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_gradients_equal_those_of_the_cpu(local: Any, remote: Any, folder: Path, method: str) -> None:
    if remote.device.type != "cpu":
        pytest.skip("torch has one thread for gradients on a device, which would wait for a peer in this process")
    task = TaskType.CAUSAL_LM
    config = {
        "lora": LoraConfig(task_type=task, r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        "prompt": PromptTuningConfig(task_type=task, num_virtual_tokens=3),
        "prefix": PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    }[method]
    rows = [Encoded([5, 6, 7, 8], [-100, 6, 7, 8]), Encoded([9, 4], [-100, 4])]
    found: list[dict[str, torch.Tensor]] = []
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for model in (plain, remote):
        torch.manual_seed(0)
        adapted = get_peft_model(model, config)
        adapted(**collate(rows, 0, device=model.device)).loss.backward()
        gradients = {name: value.grad for name, value in adapted.named_parameters() if value.requires_grad}
        found.append({name: gradient.cpu() for name, gradient in gradients.items() if gradient is not None})
    assert found[0] and found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert (found[1][name] - expected).norm() <= 0.01 * expected.norm() + 1e-7
