"""Training of draft heads: unrolled like drafting, on the model's own continuations, and resumed after a stop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from splitnet.blocks.backbone import load_whole
from splitnet.blocks.client_part import ClientPart
from splitnet.blocks.kv_cache import SequenceCache
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.drafts.eagle import EagleHead
from splitnet.tools.tune.draft_head import (
    DEPTH,
    HELD_OUT,
    PACK,
    HeadRun,
    Pack,
    begin_as_last_block,
    client_part,
    divergence,
    evaluate,
    frequent,
    new_head,
    packs_of,
    unembedding_of,
    unrolled,
)
from splitnet.tools.tune.folder import TuningFolder
from splitnet.tools.tune.methods import TrainingSettings
from splitnet.tools.tune.run import IGNORED, Encoded
from splitnet.tools.tune.states import States
from tests.unit.model_ends import model_ends
from tests.unit.random_models import random_checkpoint

HIDDEN, VOCABULARY = 32, 40
CPU = torch.device("cpu")
CONFIG = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
"""The config of the model."""


def part() -> ClientPart:
    generator = torch.Generator().manual_seed(0)
    embeddings, output = (torch.randn(VOCABULARY, HIDDEN, generator=generator) for _ in range(2))
    return model_ends(
        embed=lambda ids: embeddings[ids],
        norm=lambda hidden: hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5),
        head=lambda hidden: hidden @ output.T,
        hidden_size=HIDDEN,
        num_blocks=6,
        vocabulary=VOCABULARY,
    )


MODEL = part()


def following(token: int) -> int:
    return (3 * token + 1) % 20


def row(first: int, length: int) -> Encoded:
    """A text in which each token determines the next one; its first two tokens are a prompt."""
    ids = [first]
    while len(ids) < length:
        ids.append(following(ids[-1]))
    return Encoded(ids, [IGNORED, IGNORED, *ids[2:]])


def states_of(row: Encoded) -> Tensor:
    """Hidden states from which the model's head predicts the next token."""
    directions = MODEL.head(torch.eye(HIDDEN)).T  # [vocabulary, hidden]
    nexts = torch.tensor([following(token) for token in row.ids])
    return torch.nn.functional.normalize(directions[nexts], dim=-1) * 5 + 0.01 * torch.arange(len(nexts))[:, None]


@pytest.fixture
def states(tmp_path: Path) -> States:
    folder = TuningFolder(tmp_path / "work")
    folder.claim({})
    states = States(folder)
    for file in range(4):
        rows = [row((file + place) % 20, 12 + place) for place in range(HELD_OUT // 2)]
        states.add_texts(rows, [states_of(one) for one in rows])
    return states


def a_head(count: int = 20) -> EagleHead:
    torch.manual_seed(0)
    ids = torch.arange(count)
    return new_head(MODEL, CONFIG, ids, unembedding_of(MODEL, ids, CPU))


def a_run(states: States, head: EagleHead | None = None, **changed: Any) -> HeadRun:
    settings = TrainingSettings(**{"steps": 60, "learning_rate": 1e-2, "batch_size": 1, "seed": 3, **changed})
    packs, _ = packs_of(states)
    return HeadRun(head or a_head(), packs, settings, unembedding_of(MODEL, torch.arange(20), CPU), halves=False)


def test_texts_and_states_are_read_as_written(states: States) -> None:
    learned, held_out = packs_of(states)
    assert states.texts == 2 * HELD_OUT
    assert len({int(text) for pack in held_out for text in pack.texts}) == 2
    assert not {int(text) for pack in held_out for text in pack.texts} & {int(t) for p in learned for t in p.texts}
    assert sum(len(pack.ids) for pack in learned + held_out) == sum(4 * (12 + place) for place in range(HELD_OUT // 2))
    assert max(len(pack.ids) for pack in learned) <= PACK
    for pack in learned + held_out:
        read = pack.read()
        assert len(read) == len(pack.ids) == len(pack.texts) == len(pack.learned)
        begins = torch.ones(len(pack.ids), dtype=torch.bool)
        begins[1:] = pack.texts[1:] != pack.texts[:-1]
        nexts = torch.tensor([following(int(token)) for token in pack.ids])
        assert bool((begins[1:] | (pack.ids[1:] == nexts[:-1])).all())
        assert MODEL.head(read).argmax(-1).equal(nexts)


def test_states_beyond_the_range_of_float16_are_kept(tmp_path: Path) -> None:
    folder = TuningFolder(tmp_path)
    folder.claim({})
    states = States(folder)
    rows = [row(0, 8) for _ in range(HELD_OUT)]
    states.add_texts(rows, [torch.full((8, HIDDEN), 1e6) for _ in rows])
    assert bool((packs_of(states)[0][0].read() > 9e5).all())


def test_damaged_files_of_states_are_dropped(states: States, tmp_path: Path) -> None:
    folder, path = TuningFolder(states.files[0].parent), states.files[-1]
    assert len(States(folder).files) == len(states.files)
    written = bytearray(path.read_bytes())
    written[-1] ^= 1
    path.write_bytes(written)
    assert States(folder).files == states.files[:-1]


def test_frequent_tokens_are_counted_in_the_stored_texts(states: States) -> None:
    assert frequent(states, 20, VOCABULARY).equal(torch.arange(20))
    assert frequent(states, VOCABULARY, VOCABULARY).equal(torch.arange(VOCABULARY))
    assert len(frequent(states, 7, VOCABULARY)) == 7


def test_the_rows_of_the_models_head_are_read_in_any_format() -> None:
    ids = torch.tensor([3, 9, 30])
    found = unembedding_of(MODEL, ids, CPU)
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(hidden @ found.T, MODEL.head(hidden)[:, ids], atol=1e-5)


def test_an_unrolled_head_computes_the_same_as_drafting() -> None:
    head = a_head()
    generator = torch.Generator().manual_seed(1)
    for parameter in head.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    ids = torch.randint(0, 20, (30,), generator=generator)
    texts = torch.tensor([0] * 13 + [1] * 17)
    hidden = torch.randn(30, HIDDEN, generator=generator)
    pack = Pack(ids, texts, torch.ones(30, dtype=torch.bool), lambda: hidden)
    found: dict[tuple[int, int], Tensor] = {}
    with torch.no_grad():
        for depth, (outputs, places) in enumerate(unrolled(head, pack, hidden, torch.ones(30, dtype=torch.bool))):
            found |= {(depth, int(place)): one for place, one in zip(places, outputs, strict=True)}
        for begin, end in ((0, 13), (13, 30)):
            for at in range(begin, end - 2):
                cache = SequenceCache()
                # Positions in the cache count from the beginning of the text, those in the pack from the beginning of
                # the pack.
                output = head.run(ids[begin + 1 : at + 2], hidden[begin : at + 1], cache)[-1:]
                for depth in range(DEPTH if at + DEPTH + 1 < end else 1):
                    if depth:
                        output = head.run(ids[at + depth + 1 :][:1], output, cache, own=True)
                    assert torch.allclose(found.pop((depth, at + depth + 1)), output[0], atol=1e-4)
    assert not found


def test_the_layer_of_a_new_head_is_the_last_block_of_the_model(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(random_checkpoint("llama", tmp_path, blocks=2, vocab=20))
    part, ids = client_part(checkpoint, "cpu"), torch.arange(20)
    head = new_head(part, checkpoint.config, ids, unembedding_of(part, ids, CPU))
    begin_as_last_block(head, checkpoint)
    block = load_whole(checkpoint, torch.float32).model.layers[1].state_dict()
    layer = head.layers[0].state_dict()
    taken = ("self_attn.o_proj.weight", "mlp.down_proj.weight", "post_attention_layernorm.weight")
    assert all(torch.equal(layer[name], block[name]) for name in taken)
    assert torch.equal(layer["self_attn.k_proj.weight"][:, part.hidden_size :], block["self_attn.k_proj.weight"])
    assert torch.equal(layer["hidden_norm.weight"], block["input_layernorm.weight"])
    assert not torch.equal(layer["self_attn.k_proj.weight"][:, : part.hidden_size], block["self_attn.k_proj.weight"])


def test_the_divergence_equals_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, expected = (torch.randn(rows, 30, generator=generator, requires_grad=True) for rows in (150, 200))
    places = torch.randperm(200, generator=generator)[:150]
    wanted = expected.detach()[places].log_softmax(-1)
    weights = torch.rand(150, generator=generator)
    each = functional.kl_div(logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(dim=-1)
    kl = each @ weights
    found = divergence(logits, expected.detach(), places, weights)
    assert torch.allclose(found, kl, atol=1e-5)
    gradient, expected_gradient = (torch.autograd.grad(3 * one, logits)[0] for one in (found, kl))
    assert torch.allclose(gradient, expected_gradient, atol=1e-6)


def test_only_tokens_of_the_model_are_learned() -> None:
    head, learned = a_head(), torch.zeros(30, dtype=torch.bool)
    learned[20:] = True
    pack = Pack(torch.arange(30) % 20, torch.zeros(30, dtype=torch.long), learned, lambda: torch.zeros(30, HIDDEN))
    followed = torch.zeros(30, dtype=torch.bool)
    ((_, places),) = unrolled(head, pack, pack.read(), followed)
    assert places.tolist() == list(range(19, 29))


def test_training_lowers_the_loss_and_raises_the_acceptance(states: States) -> None:
    head = a_head()
    run = a_run(states, head)
    _, held_out = packs_of(states)
    unembedding = unembedding_of(MODEL, torch.arange(20), CPU)
    before = evaluate(head, held_out, unembedding)
    losses = [run.take_step().loss for _ in range(60)]
    after = evaluate(head, held_out, unembedding)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert after.loss < before.loss
    assert after.acceptance[0] > max(0.8, before.acceptance[0])
    assert after.per_trip > 3 > before.per_trip
    assert len(after.acceptance) == DEPTH


def test_the_evaluated_acceptance_equals_that_of_drafting(states: States) -> None:
    head = a_head()
    run = a_run(states, head)
    for _ in range(40):
        run.take_step()
    head.requires_grad_(False)
    _, held_out = packs_of(states)
    quality = evaluate(head, held_out, unembedding_of(MODEL, torch.arange(20), CPU))
    reached, right = [0] * DEPTH, [0] * DEPTH
    for pack in held_out:
        hidden = pack.read()
        for text in pack.texts.unique():
            at = (pack.texts == text).nonzero()[:, 0]
            ids, own = pack.ids[at], hidden[at]
            for begin in range(1, len(ids) - 2):
                cache = SequenceCache()
                output = head.run(ids[1 : begin + 2], own[: begin + 1], cache)[-1:]
                if begin < 1:
                    continue
                for depth in range(DEPTH if begin + DEPTH + 1 < len(ids) else 1):
                    reached[depth] += 1
                    drafted = int(head.logits(output)[0].argmax())
                    if drafted != following(int(ids[begin + depth + 1])):
                        break
                    right[depth] += 1
                    output = head.run(torch.tensor([drafted]), output, cache, own=True)
    expected = [one / max(1, of) for one, of in zip(right, reached, strict=True)]
    assert quality.acceptance[0] == pytest.approx(expected[0], abs=0.1)
    assert quality.acceptance[1] == pytest.approx(expected[1], abs=0.1)


def test_a_seed_gives_the_same_head(states: States) -> None:
    heads = [a_head(), a_head(), a_head()]
    for head, seed in zip(heads, (3, 3, 4), strict=True):
        run = a_run(states, head, seed=seed)
        for _ in range(3):
            run.take_step()
    first, second, other = (torch.cat([one.flatten() for one in head.parameters()]) for head in heads)
    assert first.equal(second) and not first.equal(other)


def test_a_resumed_run_has_the_same_losses(states: States) -> None:
    whole, parted = a_run(states), a_run(states)
    expected = [whole.take_step().loss for _ in range(6)]
    found = [parted.take_step().loss for _ in range(3)]
    resumed = a_run(states)
    resumed.restore(*parted.saved_state())
    found += [resumed.take_step().loss for _ in range(3)]
    assert found == expected


def test_training_works_in_16_bits(states: States) -> None:
    run = a_run(states)
    run.halves = True
    losses = [run.take_step().loss for _ in range(4)]
    assert losses[-1] < losses[0]
