"""The loss computed in parts: the loss and gradients equal those over all logits, which never exist at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig
from transformers.loss.loss_utils import ForCausalLMLoss

from splitnet.blocks.client_part import load_client_part
from splitnet.blocks.head import IGNORED, QuantizedHead, loss_in_parts
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.rope_lengths import RopeLengths
from splitnet.errors import UnsupportedParameter
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.hf.remote_blocks import RemoteBlocks
from splitnet.hf.remote_model import made_remote
from splitnet.quant.choose import choose_weights
from tests.unit.random_models import random_checkpoint

BATCH, POSITIONS, HIDDEN, VOCABULARY = 3, 14, 32, 320
ROW_BYTES = VOCABULARY * torch.float32.itemsize

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},  # its backbone is within another module
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "mixtral": {},
    "bloom": {},
    "phi": {},  # its head has a bias
}


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation makes meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if torch.is_tensor(one)}
        made = [one.untyped_storage() for one in tree_leaves(found) if torch.is_tensor(one)]
        self.nbytes = max([self.nbytes, *(one.nbytes() for one in made if one.data_ptr() not in given)])
        return found


def inputs(labels: str = "some") -> tuple[torch.Tensor, torch.Tensor]:
    """Random hidden states and labels."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(BATCH, POSITIONS, HIDDEN, generator=generator, requires_grad=True)
    chosen = torch.randint(0, VOCABULARY, (BATCH, POSITIONS), generator=generator)
    if labels == "some":
        chosen[0, :6] = IGNORED  # a prompt
        chosen[1, 9:] = IGNORED  # padding
        chosen[2] = IGNORED
        chosen[2, 4] = 7
    return hidden, chosen


def head(seed: int = 2) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(HIDDEN, VOCABULARY)


def found(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """A loss, weighted as one of several losses, and its gradients."""
    return [loss.detach(), *torch.autograd.grad(loss * 3, leaves)]


@pytest.mark.parametrize("rows", [1, 5, 8, 1000])
@pytest.mark.parametrize("labels", ["some", "all"])
@pytest.mark.parametrize("items", [None, 5, torch.tensor(7)])
def test_loss_and_gradients_are_those_over_all_logits(rows: int, labels: str, items: Any) -> None:
    """The gradients of the head are compared, too, where it is trained."""
    hidden, chosen = inputs(labels)
    layer = head()
    leaves = [hidden, layer.weight, layer.bias]
    whole = ForCausalLMLoss(layer(hidden), chosen, VOCABULARY, num_items_in_batch=items)
    parts = loss_in_parts(
        hidden, chosen, layer, VOCABULARY, trained=leaves[1:], items=items, part_bytes=rows * ROW_BYTES
    )
    for one, other in zip(found(parts, *leaves), found(whole, *leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_unused_parameters_get_no_gradient() -> None:
    hidden, chosen = inputs()
    other = torch.ones(3, requires_grad=True)
    loss = loss_in_parts(hidden, chosen, head().requires_grad_(False), VOCABULARY, trained=[other])
    by_hidden, by_other = torch.autograd.grad(loss, [hidden, other], allow_unused=True)
    assert by_hidden is not None and by_other is None


def test_the_loss_without_gradients() -> None:
    hidden, chosen = inputs()
    layer = head()
    expected = ForCausalLMLoss(layer(hidden), chosen, VOCABULARY)
    with torch.no_grad():
        loss = loss_in_parts(hidden, chosen, layer, VOCABULARY, trained=[layer.weight], part_bytes=3 * ROW_BYTES)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())


def test_without_labels_the_loss_is_nan() -> None:
    hidden, chosen = inputs()
    layer = head()
    chosen.fill_(IGNORED)
    assert bool(ForCausalLMLoss(layer(hidden), chosen, VOCABULARY).isnan())
    assert bool(loss_in_parts(hidden, chosen, layer, VOCABULARY).isnan())


def test_labels_of_another_shape_are_refused() -> None:
    hidden, chosen = inputs()
    with pytest.raises(ValueError, match="labels"):
        loss_in_parts(hidden, chosen[:, 1:], head(), VOCABULARY)


def test_gradients_of_half_precision_do_not_vanish_in_a_large_batch() -> None:
    """Gradients are divided by the number of labels last, so that none underflows in float16 before."""
    hidden, chosen = inputs("all")
    layer = head().to(torch.float16)
    halves = hidden.detach().half().requires_grad_()
    loss = loss_in_parts(halves, chosen, layer, VOCABULARY, items=2**16)
    (by_halves,) = torch.autograd.grad(loss * 2**16, [halves])
    (expected,) = torch.autograd.grad(ForCausalLMLoss(head()(hidden), chosen, VOCABULARY, torch.tensor(1)), [hidden])
    torch.testing.assert_close(by_halves.float(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8", "int4"])
def test_a_head_in_another_form(kind: str) -> None:
    """The head's weight never exists in floats as a whole."""
    hidden, chosen = inputs()
    sizes = VOCABULARY * 64, 512
    hidden = torch.randn(BATCH, POSITIONS, sizes[1], generator=torch.Generator().manual_seed(3), requires_grad=True)
    form = choose_weights(kind, torch.float32, torch.float32, torch.device("cpu")).form_for(*sizes)
    assert form is not None
    held = QuantizedHead(sizes[1], sizes[0], form, transposed=False, bias=False, dtype=torch.float32)
    held.weight = nn.Parameter(torch.randn(*sizes, generator=torch.Generator().manual_seed(4)) / 20)
    (expected,) = torch.autograd.grad(ForCausalLMLoss(held(hidden), chosen, sizes[0]), [hidden])
    with Largest() as largest:
        loss = loss_in_parts(hidden, chosen, held, sizes[0], part_bytes=10 * sizes[0] * 4)
        (by_hidden,) = torch.autograd.grad(loss, [hidden])
    # Kernels for few rows and for many rows round differently.
    assert float((by_hidden - expected).norm() / expected.norm()) < 0.02
    assert largest.nbytes <= sizes[0] * sizes[1]  # a quarter of the weight's bytes in floats


def test_no_tensor_is_larger_than_the_logits_of_a_part() -> None:
    hidden, chosen = inputs("all")
    layer = head().requires_grad_(False)
    with Largest() as largest:
        loss_in_parts(hidden, chosen, layer, VOCABULARY, part_bytes=6 * ROW_BYTES).backward()
    assert largest.nbytes <= 6 * ROW_BYTES
    with Largest() as whole:
        ForCausalLMLoss(layer(hidden), chosen, VOCABULARY).backward()
    assert whole.nbytes == BATCH * POSITIONS * ROW_BYTES


def model_without_blocks(folder: Path) -> RemoteCausalLM:
    """Embeddings, norm and head of a checkpoint."""

    def none(blocks: Any) -> Any:
        raise AssertionError(blocks)

    blocks = RemoteBlocks([], none, None, RopeLengths(LlamaConfig()))
    client_part = load_client_part(Checkpoint.open(folder), blocks)
    model = made_remote(client_part, RemoteCausalLM, str(folder))
    model.open_sessions_with(none)
    model.connect_blocks(blocks, None)  # type: ignore[arg-type]
    return model


def ids() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 280, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, IGNORED)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_the_same_loss_and_the_logits_that_are_kept(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_checkpoint(family, tmp_path, blocks=2, **FAMILIES[family])
    model: Any = model_without_blocks(tmp_path)
    model.requires_grad_(True)
    whole = model(**ids())
    whole.loss.backward()
    expected = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    model.zero_grad()
    monkeypatch.setattr("splitnet.blocks.head.PART_BYTES", 5 * 300 * 4)
    parts = model(**ids(), logits_to_keep=2)
    parts.loss.backward()
    got = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.logits, whole.logits[:, -2:])
    assert got.keys() == expected.keys() and len(got) > 1
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_which_logits_are_kept(tmp_path: Path) -> None:
    model: Any = model_without_blocks(random_checkpoint("llama", tmp_path / "llama", blocks=2))
    whole = model(**ids())
    some = model(**ids(), logits_to_keep=torch.tensor([-3, 0]))
    torch.testing.assert_close(some.logits, whole.logits[:, [-3, 0]])
    assert list(some) == list(whole)
    loss, logits = model(**ids(), logits_to_keep=1, return_dict=False)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-5, atol=1e-5)
    assert logits.shape == (2, 1, 300)
    divided = model(**ids(), num_items_in_batch=torch.tensor(4), logits_to_keep=1).loss
    torch.testing.assert_close(divided, model(**ids(), num_items_in_batch=torch.tensor(4)).loss, rtol=1e-5, atol=1e-5)


def test_another_loss_is_refused(tmp_path: Path) -> None:
    model: Any = model_without_blocks(random_checkpoint("llama", tmp_path / "llama", blocks=2))
    model.loss_function = lambda logits, labels, **_: logits.mean()
    with pytest.raises(UnsupportedParameter, match="logits_to_keep"):
        model(**ids(), logits_to_keep=1)
    assert model(**ids()).logits.shape == (2, 11, 300)
