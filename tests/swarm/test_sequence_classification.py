"""Classifiers on remote blocks: transformers' own class and head, trained with PEFT as on a local model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, DynamicCache

import splitnet
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import UnsupportedModel
from splitnet.security.identity import Identity
from tests.swarm.adapters import CLASSES, FAMILIES, METHODS, gradients, padded, wrapped
from tests.swarm.harness import LocalSwarm, shared_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

LABELS = 3
SPANS = ((0, 3), (3, 6))

of_each_method = pytest.mark.parametrize("method", ["lora", "prompt", "p-tuning-mlp", "prefix"])


@pytest.fixture(scope="module", params=FAMILIES)
def swarm(
    request: pytest.FixtureRequest, node: DhtDirectory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalSwarm]:
    """Two peers of a random causal model; the family is the name of its folder."""
    folder = random_checkpoint(request.param, tmp_path_factory.mktemp("model") / request.param)
    with shared_swarm(folder, SPANS, node=node) as started:
        yield started


@pytest.fixture(scope="module")
def trained(node: DhtDirectory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Peers of a checkpoint that has a head for four labels."""
    causal = random_checkpoint("llama", tmp_path_factory.mktemp("causal"))
    model = AutoModelForSequenceClassification.from_pretrained(causal, num_labels=4, dtype=torch.float32)
    model.config.id2label = dict(enumerate(("north", "east", "south", "west")))
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    with shared_swarm(folder, SPANS, node=node) as started:
        yield started


def batch(seed: int = 0, side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of different lengths with their padding on one side, and a label for each."""
    return {**padded(seed, side), "labels": torch.tensor([0, 2, 1, 1, 2])}


def rows_of(inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of a batch as batches of one, without padding."""
    for ids, mask, label in zip(*inputs.values(), strict=True):
        ids = ids[mask.bool()]
        yield {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "labels": label[None]}


def local_model(folder: Path) -> Any:
    torch.manual_seed(11)
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=LABELS, dtype=torch.float32, attn_implementation="eager"
    )


def remote_model(visit: LocalSwarm) -> Any:
    torch.manual_seed(11)
    return visit.classifier(num_labels=LABELS)


def takes_prefixes(model: Any) -> Any:
    """PEFT passes a prefix as `past_key_values`, which transformers 5.24 calls `cache`, and refuses where it looks."""
    forward = model.forward

    def renamed(past_key_values: Any = None, **kwargs: Any) -> Any:
        return forward(cache=past_key_values, **kwargs)

    model.forward = renamed
    return model


@pytest.mark.default_cases(swarm=("llama",))
def test_a_new_head_equals_that_of_transformers(swarm: LocalSwarm) -> None:
    expected = local_model(swarm.folder)
    with swarm.visit() as visit:
        model = remote_model(visit)
        assert model.config.num_labels == LABELS and model.config.num_hidden_layers == 6
        assert torch.equal(model.score.weight, expected.score.weight)
        assert model.score.bias is None
        for side in ("right", "left"):
            with torch.no_grad():
                found, wanted = model(**batch(side=side)), expected(**batch(side=side))
            assert float((found.logits - wanted.logits).abs().max() / wanted.logits.abs().max()) < 1e-4
            assert float(found.loss) == pytest.approx(float(wanted.loss), rel=1e-5)


@pytest.mark.default_cases(swarm=("llama",), method=("lora", "prompt"))
@of_each_method
def test_gradients_equal_those_of_local_training(method: str, swarm: LocalSwarm) -> None:
    """With padding on either side, for all parameters of the adapter and of the head."""
    family = swarm.folder.name
    base = local_model(swarm.folder)
    local = wrapped(takes_prefixes(base) if method == "prefix" else base, METHODS[method](family, CLASSES))
    with swarm.visit() as visit:
        remote = wrapped(remote_model(visit), METHODS[method](family, CLASSES))
        for side in ("right", "left"):
            inputs = batch(side=side)
            alone = counts_padding(method, side, family)
            expected_loss, expected = gradients(local, *(rows_of(inputs) if alone else [inputs]))
            loss, found = gradients(remote, inputs)
            assert loss == pytest.approx(expected_loss, rel=1e-5), side
            assert found.keys() == expected.keys() and any("score" in name for name in found) and len(found) > 1
            for name, gradient in expected.items():
                assert float((found[name] - gradient).abs().max() / gradient.abs().max()) < 1e-4, (side, name)


def counts_padding(method: str, side: str, family: str) -> bool:
    """Whether padding changes the result of a row on a local model; on a remote model it never does.

    transformers takes padding on the right of a trained prompt for the last token. On the left, padding separates
    the trained positions from the text.
    """
    if method == "prefix":
        return side == "left" and family != "gpt2"  # The client applies gpt2's position embeddings.
    return method in ("prompt", "p-tuning-mlp")


@pytest.mark.default_cases(swarm=("llama",), method=("lora", "prompt"))
@of_each_method
def test_an_adapter_gives_the_same_logits_locally_and_remotely(method: str, swarm: LocalSwarm, tmp_path: Path) -> None:
    """An adapter saved from a remote model loads on a local one, and vice versa, with its head."""
    config = METHODS[method](swarm.folder.name, CLASSES)
    inputs = list(rows_of(batch(1)))[1]
    with swarm.visit() as visit, torch.no_grad():
        for name, base in (("there", remote_model(visit)), ("here", local_model(swarm.folder))):
            model = wrapped(base, config, seed=4)
            head = next(tensor for key, tensor in model.named_parameters() if "score" in key and tensor.requires_grad)
            head.normal_(0, 0.5)
            if method == "prefix" and name == "here":
                takes_prefixes(base)
            saved = model(**inputs).logits
            model.save_pretrained(str(tmp_path / name))
            local = local_model(swarm.folder)
            local = PeftModel.from_pretrained(takes_prefixes(local) if method == "prefix" else local, tmp_path / name)
            remote = PeftModel.from_pretrained(remote_model(visit), tmp_path / name)
            for loaded in (local, remote):
                assert torch.allclose(loaded.eval()(**inputs).logits, saved, rtol=1e-4, atol=1e-4)


def test_a_head_in_the_checkpoint_is_loaded(trained: LocalSwarm) -> None:
    local = AutoModelForSequenceClassification.from_pretrained(trained.folder, dtype=torch.float32)
    with trained.visit() as visit, torch.no_grad():
        model: Any = visit.classifier()
        assert model.config.id2label == {0: "north", 1: "east", 2: "south", 3: "west"}
        assert torch.equal(model.score.weight, local.score.weight)
        assert torch.allclose(model(**batch()).logits, local(**batch()).logits, rtol=1e-4, atol=1e-5)
        with pytest.raises(UnsupportedModel, match="another number of labels"):
            visit.classifier(num_labels=5)


def test_labels_have_names(trained: LocalSwarm, tmp_path: Path) -> None:
    """With the public class; both mappings of names are consistent, whichever is given."""
    options: dict[str, Any] = {"initial_peers": trained.addresses, "codec": "none", "identity": Identity.generate()}
    load = splitnet.AutoModelForSequenceClassification.from_pretrained
    model = load(trained.folder, label2id={"a": 0, "b": 1, "c": 2, "d": 3}, **options)
    try:
        assert model.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}
        assert model(**batch()).logits.shape == (5, 4)
    finally:
        model.close()
    with pytest.raises(ValueError, match="different labels"):
        load(trained.folder, num_labels=3, id2label={0: "a", 1: "b"}, **options)


def test_padding_must_be_known(trained: LocalSwarm) -> None:
    with trained.visit() as visit:
        model = visit.classifier()
        model.config.pad_token_id = 299
        with pytest.raises(ValueError, match="masked out"):
            model(**batch())
        model.config.pad_token_id = None
        with pytest.raises(ValueError, match="no padding token"):
            model(**batch())
        with pytest.raises(ValueError, match="masked out"):
            model(**{name: tensor[1:2] for name, tensor in batch().items()})


def test_caches_are_refused(trained: LocalSwarm) -> None:
    with trained.visit() as visit, torch.no_grad():
        model = visit.classifier()
        assert model(**batch(), use_cache=True).cache is None
        with pytest.raises(TypeError, match="without a cache"):
            model(**batch(), cache=DynamicCache())
