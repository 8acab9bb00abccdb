"""transformers' Trainer on models with remote blocks: the same losses and parameters as on a local model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from splitnet.directory.dht_directory import DhtDirectory
from tests.swarm.harness import LocalSwarm, shared_swarm

pytestmark = pytest.mark.swarm

Example = dict[str, Any]


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with shared_swarm(folder, [(0, 3), (3, 6)], node=node) as started:
        yield started


def examples(count: int, seed: int) -> list[Example]:
    """Sequences of different lengths, and for each a label that it determines."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 15, (count,), generator=generator).tolist()
    rows = [torch.randint(3, 300, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "label": int(row[-1]) % 3} for row in rows]


def padded(rows: list[Example]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def for_next_token(rows: list[Example]) -> dict[str, torch.Tensor]:
    inputs = padded(rows)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def for_class(rows: list[Example]) -> dict[str, torch.Tensor]:
    return {**padded(rows), "labels": torch.tensor([row["label"] for row in rows])}


def with_lora(model: PreTrainedModel, task: TaskType) -> PeftModel:
    torch.manual_seed(3)
    targets = ["q_proj", "v_proj"]
    config = LoraConfig(task_type=task, r=4, lora_alpha=12, target_modules=targets, init_lora_weights=False)
    made = get_peft_model(model, config)
    assert isinstance(made, PeftModel)
    return made


def trainer(model: Any, collate: Any, folder: Path, **options: Any) -> Trainer:
    chosen: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    }
    arguments = TrainingArguments(str(folder), **(chosen | options))
    return Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=examples(24, 0),  # pyright: ignore[reportArgumentType]
        eval_dataset=examples(5, 1),  # pyright: ignore[reportArgumentType]
    )


def losses(trained: Trainer) -> list[float]:
    """The losses of all steps, and the final loss on held-out data."""
    steps = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    return [*steps, trained.evaluate()["eval_loss"]]


def with_one_logit(rows: list[Example]) -> dict[str, Any]:
    return {**for_next_token(rows), "logits_to_keep": 1}


@pytest.mark.default_cases(smoothing=(0.1,))
@pytest.mark.parametrize(
    ("smoothing", "collate"), [(0.0, for_next_token), (0.1, for_next_token), (0.0, with_one_logit)]
)
def test_a_causal_model_trains_like_a_local_one(
    smoothing: float, collate: Any, swarm: LocalSwarm, folder: Path, tmp_path: Path
) -> None:
    def train(model: PreTrainedModel, name: str) -> tuple[list[float], PeftModel]:
        tuned = with_lora(model, TaskType.CAUSAL_LM)
        collated = collate if name == "there" else for_next_token
        training = trainer(tuned, collated, tmp_path / name, label_smoothing_factor=smoothing)
        training.train()
        return losses(training), tuned

    expected, local = train(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), "here")
    with swarm.visit() as visit:
        found, remote = train(visit.model(), "there")
    assert len(expected) == 4 and expected[0] - expected[2] > 0.01
    assert found == pytest.approx(expected, rel=1e-4)
    pairs = zip(parameters(remote).items(), parameters(local).items(), strict=True)
    for (name, tensor), (same_name, wanted) in pairs:
        assert name == same_name
        # Compared as a whole: where a gradient is almost zero, Adam takes a full step in the direction of its rounding
        # error.
        assert float((tensor - wanted).norm()) < 1e-3 * float(wanted.norm())


def parameters(model: PeftModel) -> dict[str, torch.Tensor]:
    named = sorted(model.named_parameters())
    return {name: tensor.detach() for name, tensor in named if tensor.requires_grad}


@pytest.mark.full
def test_a_classifier_trains_like_a_local_one(swarm: LocalSwarm, folder: Path, tmp_path: Path) -> None:
    def train(model: PreTrainedModel, name: str) -> tuple[list[float], torch.Tensor]:
        training = trainer(with_lora(model, TaskType.SEQ_CLS), for_class, tmp_path / name)
        training.train()
        return losses(training), torch.as_tensor(training.predict(examples(6, 2)).predictions)  # pyright: ignore

    torch.manual_seed(1)
    local = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32)
    expected, predicted = train(local, "here")
    with swarm.visit() as visit:
        torch.manual_seed(1)
        found, remotely = train(visit.classifier(num_labels=3), "there")
    assert expected[0] - expected[2] > 0.01
    assert found == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(remotely, predicted, rtol=1e-3, atol=1e-3)


@pytest.mark.full
def test_training_resumes_from_a_checkpoint(swarm: LocalSwarm, folder: Path, tmp_path: Path) -> None:
    """After the second step, the saved state continues to the same third step, and loads on a local model."""

    def training(visit: LocalSwarm) -> Trainer:
        tuned = with_lora(visit.model(), TaskType.CAUSAL_LM)
        return trainer(tuned, for_next_token, tmp_path, save_strategy="steps", save_steps=1)

    with swarm.visit() as visit:
        first = training(visit)
        first.train()
        again = training(visit)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert losses(again) == pytest.approx(losses(first), rel=1e-5)
        inputs = for_next_token(examples(1, 3))
        with torch.no_grad():
            local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            loaded = PeftModel.from_pretrained(local, tmp_path / "checkpoint-3").eval()
            assert torch.allclose(loaded(**inputs).logits, again.model(**inputs).logits, atol=2e-4)  # pyright: ignore
