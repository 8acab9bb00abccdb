"""Drafts of any drafter never change a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from scheduler.speculation import Window
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.drafts.draft_stats import DraftStats
from splitnet.drafts.drafter import Guess
from splitnet.drafts.eagle import EagleHead, Shape
from splitnet.drafts.mtp import MtpHead
from splitnet.drafts.speculator import Drafts
from splitnet.errors import SplitnetError
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.session.inference import Session
from splitnet.tools.bench.backends import Clock
from tests.swarm.generation import After, Collector, force_window
from tests.swarm.harness import LocalSwarm, dht_node, local_swarm, repairs
from tests.unit.model_ends import model_ends
from tests.unit.mtp_checkpoints import mtp_checkpoint, states_of
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

WINDOWS = (Window(3, 1), Window(2, 3), Window(15, 2))


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with local_swarm(folder, [(0, 1), (1, 4), (4, 6)], node=node) as started:
        yield started


@pytest.fixture(scope="module", params=[None, "0:2,5:6"], ids=["remote", "partly local"])
def remote(swarm: LocalSwarm, request: pytest.FixtureRequest) -> Iterator[RemoteCausalLM]:
    with swarm.visit() as visit:
        yield visit.model(local_blocks=request.param)


@pytest.fixture(params=WINDOWS, ids=str)
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Window:
    """Sends this window, whether it pays or not."""
    force_window(monkeypatch, request.param)
    return request.param


def repeating(length: int = 6) -> torch.Tensor:
    return torch.randint(3, 300, (1, length), generator=torch.Generator().manual_seed(1)).repeat(1, 3)


def options(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **more}


def drafter_of(kind: str, folder: Path, tmp_path: Path) -> Any:
    """A drafter that is always right, or mostly wrong, or None."""
    if kind == "prompt-lookup":
        return kind
    if kind == "same model":
        return AutoModelForCausalLM.from_pretrained(folder)
    if kind.startswith("head"):
        return f"eagle={random_head(folder, tmp_path, (1, 3, 5) if kind == 'head of three depths' else (6,))}"
    return AutoModelForCausalLM.from_pretrained(random_checkpoint("llama", tmp_path, blocks=2, seed=9))


def random_head(folder: Path, target: Path, taps: tuple[int, ...]) -> Path:
    """An EAGLE head for the model in `folder`."""
    config = AutoConfig.from_pretrained(folder)
    hidden, vocabulary, blocks = config.hidden_size, config.vocab_size, config.num_hidden_layers
    layer = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
    )
    torch.manual_seed(3)
    sizes = {"hidden_size": hidden, "num_blocks": blocks, "vocabulary": vocabulary}
    part = model_ends(nn.Embedding(vocabulary, hidden), None, None, **sizes)
    EagleHead(Shape(layer, taps, 50), part, torch.arange(20, 70)).save(target, None, ["LlamaForCausalLM"])
    return target


@pytest.mark.default_cases(
    window=(Window(2, 3),), remote=(None,), sample=(False,), kind=("prompt-lookup", "head of three depths")
)
@pytest.mark.default_cases(window=(Window(2, 3),), remote=(None,), sample=(True,), kind=("other model",))
@pytest.mark.default_cases(window=(Window(15, 2),), remote=("0:2,5:6",), sample=(False,), kind=("same model",))
@pytest.mark.parametrize("kind", ["prompt-lookup", "same model", "other model", "head", "head of three depths"])
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_drafts_do_not_change_the_text(
    local: Any, remote: RemoteCausalLM, window: Window, kind: str, sample: bool, folder: Path, tmp_path: Path
) -> None:
    chosen = options(do_sample=sample, temperature=0.7 if sample else None, repetition_penalty=1.1)
    drafter = drafter_of(kind, folder, tmp_path)
    torch.manual_seed(5)
    expected = local.generate(repeating(), **chosen)
    torch.manual_seed(5)
    got = remote.generate(repeating(), speculate=drafter, **chosen)
    assert torch.equal(got, expected)


@pytest.mark.default_cases(window=(Window(2, 3),), remote=(None,), kind=("head",))
@pytest.mark.parametrize("kind", ["prompt-lookup", "other model", "head", "head of three depths"])
def test_drafts_with_embeddings_in_place_of_a_prompt(
    local: Any, remote: RemoteCausalLM, window: Window, kind: str, folder: Path, tmp_path: Path
) -> None:
    """Embeddings have no tokens, so a head drafts from the generated tokens on."""
    embeddings = local.get_input_embeddings()(repeating()).detach()
    drafter, drafted = drafter_of(kind, folder, tmp_path), remote.speculator.counts.drafted
    for also in ({}, {"input_ids": repeating()}):
        expected = local.generate(inputs_embeds=embeddings, **options(), **also)
        assert torch.equal(remote.generate(inputs_embeds=embeddings, **options(), **also, speculate=drafter), expected)
    assert remote.speculator.counts.drafted > drafted


@pytest.mark.default_cases(window=(Window(2, 3),), remote=(None,))
def test_right_drafts_save_round_trips(remote: RemoteCausalLM, folder: Path, window: Window) -> None:
    with remote.session() as cache:
        remote.generate(repeating(), speculate=AutoModelForCausalLM.from_pretrained(folder), **options())
        assert cache.session is not None
        sessions = getattr(cache.session, "sessions", [cache.session])
        steps = sessions[0].traffic.steps
    # The prompt, then 39 tokens: all drafts of a window are right, and the model adds one where no draft follows.
    assert steps <= 2 + 39 / window.length


@pytest.mark.default_cases(window=(Window(2, 3),), remote=(None,))
def test_a_text_ends_at_the_right_token_within_a_window(
    local: Any, remote: RemoteCausalLM, folder: Path, window: Window
) -> None:
    """In the middle of a window: at a stop token, and at the maximal length."""
    plain = local.generate(repeating(), **options())
    stop = int(plain[0, 18 + 10])
    drafter = AutoModelForCausalLM.from_pretrained(folder)
    for chosen in (options(eos_token_id=stop), options(max_new_tokens=7)):
        expected = local.generate(repeating(), **chosen)
        assert torch.equal(remote.generate(repeating(), speculate=drafter, **chosen), expected)


@pytest.mark.default_cases(window=(Window(2, 3),), remote=(None,))
def test_a_conversation_continues_after_drafts(
    local: Any, remote: RemoteCausalLM, folder: Path, window: Window
) -> None:
    drafter = AutoModelForCausalLM.from_pretrained(folder)
    with remote.session():
        first = remote.generate(repeating(), speculate=drafter, **options())
        longer = torch.cat((first, repeating(4)), dim=1)
        second = remote.generate(longer, speculate="prompt-lookup", **options())
        third = remote.generate(longer, **options())
    expected = local.generate(longer, **options())
    assert torch.equal(second, expected)
    assert torch.equal(third, expected)


@pytest.mark.default_cases(window=(Window(2, 3),), remote=(None,))
def test_tokens_are_streamed_one_by_one(remote: RemoteCausalLM, window: Window) -> None:
    streamer = Collector()
    got = remote.generate(repeating(), speculate="prompt-lookup", streamer=streamer, **options())
    assert streamer.tokens == [*got[0].tolist(), -1]


def test_a_hop_lost_with_windows_in_flight_is_replaced(
    node: DhtDirectory, own_folder: Path, own_local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_window(monkeypatch, Window(2, 4))
    with local_swarm(own_folder, [(0, 3), (3, 6), (3, 6)], node=node) as twins:
        model = twins.model()

        def kill() -> None:
            assert cache.session is not None
            used = cache.session.hops[1].endpoint
            next(peer for peer in twins.peers if peer.endpoint == used).close()

        with model.session() as cache:
            drafter = AutoModelForCausalLM.from_pretrained(own_folder)
            got = model.generate(repeating(), speculate=drafter, streamer=After(11, kill), **options())
            assert cache.session is not None
            assert len(repairs(cache.session)) == 1
    assert torch.equal(got, own_local.generate(repeating(), **options()))


class FollowingHead:
    """Drafts from features as a head does; knows the text, and makes every fifth token wrong.

    Records the features that it receives, by the number of tokens before their own position.
    """

    priors = (0.5,)
    taps = (1, 3, 6)

    def __init__(self, true: list[int]) -> None:
        self.features: dict[int, torch.Tensor] = {}
        self._true = true
        self._length = 0

    def begin_text(self, tokens: Sequence[int], features: torch.Tensor | None = None) -> None:
        self._length = len(tokens)

    def observe_token(self, token: int, features: torch.Tensor | None = None) -> None:
        assert features is not None and token == self._true[self._length]
        self.features[self._length - 1] = features
        self._length += 1

    def draft_tokens(self, pending: Sequence[int]) -> Iterator[Guess]:
        for place in range(self._length + len(pending), len(self._true)):
            yield Guess(self._true[place] if place % 5 else 3, 0)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.full)])
def test_hops_lost_repeatedly_with_windows_in_flight_are_replaced(
    folder: Path, local: Any, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    """A new peer replaces each lost hop. The tokens and hidden states equal those of transformers."""
    force_window(monkeypatch, Window(2, 4))
    chosen = options(max_new_tokens=6 * kills + 6)
    expected = local.generate(repeating(), **chosen)
    drafter = FollowingHead(expected[0].tolist())
    experience = DraftStats(drafter.priors)
    with dht_node() as node, local_swarm(folder, [(0, 3), (3, 6), (3, 6)], node=node) as swarm:
        model = swarm.model()
        monkeypatch.setattr(model.speculator, "drafts_by", lambda _: Drafts(drafter, experience))
        under_way: list[int] = []

        def kill(count: int) -> None:
            if count % 6 or count > 6 * kills:
                return
            assert isinstance(cache.session, Session)
            under_way.append(cache.session.state.in_flight_count)
            used = cache.session.hops[-1].endpoint
            next(peer for peer in swarm.peers if peer.endpoint == used).close()
            swarm.add(3, 6)

        with model.session() as cache:
            got = model.generate(repeating(), streamer=Clock(kill), **chosen)
            assert cache.session is not None
            assert len(repairs(cache.session)) == kills
    assert torch.equal(got, expected)
    # On a quick machine, some windows have already arrived.
    assert kills < 20 or sum(count > 0 for count in under_way) >= 5, under_way
    assert [*drafter.features] == [*range(17, got.shape[1] - 1)]
    states = local(got, output_hidden_states=True).hidden_states
    for position, features in drafter.features.items():
        for tap, state in zip(drafter.taps[:-1], features.chunk(len(drafter.taps)), strict=False):
            torch.testing.assert_close(state, states[tap][0, position], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"num_beams": 2}, "one sequence"),
        ({"num_return_sequences": 2, "do_sample": True}, "one sequence"),
        ({"use_cache": False}, "cache"),
        ({"attention_mask": torch.tensor([[0] + [1] * 17])}, "padding"),
        ({"speculate": "tea leaves"}, "tea leaves"),
    ],
)
def test_parameters_that_conflict_with_drafts_are_refused(
    remote: RemoteCausalLM, more: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(SplitnetError, match=complaint):
        remote.generate(repeating(), **options(**{"speculate": "prompt-lookup", **more}))


@pytest.mark.default_cases(family=("deepseek_v3",))
@pytest.mark.parametrize("family", ["deepseek_v3", "mellum", "nemotron_h", "qwen3_5_text", "qwen3_next"])
def test_drafts_by_the_mtp_layer_of_a_checkpoint(
    family: str, node: DhtDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = mtp_checkpoint(family, tmp_path)
    local: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    run = MtpHead.run

    def seen(self: Any, tokens: torch.Tensor, features: torch.Tensor, cache: Any, *, own: bool = False) -> torch.Tensor:
        if not own:
            given.append((tokens, features))
        return run(self, tokens, features, cache, own=own)

    monkeypatch.setattr(MtpHead, "run", seen)
    force_window(monkeypatch, Window(2, 3))
    with local_swarm(folder, [(0, 1), (1, 3)], node=node) as swarm:
        remote = swarm.model()
        for chosen in (options(), options(do_sample=True, temperature=0.7)):
            given.clear()
            torch.manual_seed(5)
            expected = remote.generate(repeating(), speculate="off", **chosen)
            torch.manual_seed(5)
            got = remote.generate(repeating(), speculate="mtp", **chosen)
            assert torch.equal(got, expected)
            tokens, features = (torch.cat(some) for some in zip(*given, strict=True))
            assert len(tokens) > 18 + 20 and torch.equal(tokens, got[0, 1 : len(tokens) + 1])
            before, _ = states_of(local, got[0])
            torch.testing.assert_close(features, before[: len(features)], rtol=1e-2, atol=1e-2)
        assert remote.speculator.counts.drafted > 0
        assert isinstance(remote.speculator._head("auto"), MtpHead)
        remote.speculator._heads.clear()
        monkeypatch.setattr("splitnet.drafts.speculator.MTP_SHARE", 0.0)
        assert remote.speculator._head("auto") is None
        monkeypatch.setattr("splitnet.drafts.speculator.mtp_head", lambda checkpoint, ends: None)
        with pytest.raises(SplitnetError, match="has no layer for multi-token prediction"):
            remote.generate(repeating(), speculate="mtp", **options())
