"""When drafting pays, where drafts come from, and what is learned of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from scheduler.speculation import IN_FLIGHT, LENGTHS, NO_DRAFTS, WORTHWHILE, Pace, Window, best_window, tokens_per_ms
from splitnet.errors import SplitnetError
from splitnet.hf.decoding import Experience
from splitnet.hf.drafts import DraftModel, PromptLookup
from splitnet.swarm.plan import Prediction
from tests.unit.random_models import HYBRIDS, random_config


def pace(link_ms: float = 80.0, pass_ms: float = 20.0, position_ms: float = 1.0, draft_ms: float = 0.0) -> Pace:
    """Of a chain of four hops."""
    return Pace(
        latency_ms=lambda positions: link_ms + pass_ms + position_ms * positions,
        slowest_hop_ms=lambda positions: (pass_ms + position_ms * positions) / 4,
        draft_ms=draft_ms,
    )


paces = st.builds(pace, st.floats(0, 500), st.floats(1, 200), st.floats(0, 50), st.floats(0, 50))
acceptances = st.floats(0, 1)


class TestBestWindow:
    def test_none_where_drafts_are_always_wrong(self) -> None:
        assert best_window(0.0, pace()) == NO_DRAFTS

    def test_none_where_every_position_costs_as_much_as_the_first(self) -> None:
        assert best_window(0.5, pace(link_ms=0, pass_ms=0.001, position_ms=50)) == NO_DRAFTS

    def test_long_windows_where_drafts_are_right_and_links_are_long(self) -> None:
        window = best_window(0.95, pace(link_ms=400))
        assert window.length >= 8 and window.in_flight > 1

    def test_a_model_that_drafts_slowly_is_asked_for_less(self) -> None:
        free, slow = best_window(0.8, pace()), best_window(0.8, pace(draft_ms=40))
        assert slow.length < free.length

    @given(acceptances, paces)
    def test_it_promises_more_than_a_token_at_a_time(self, acceptance: float, given_pace: Pace) -> None:
        window = best_window(acceptance, given_pace)
        if window != NO_DRAFTS:
            assert tokens_per_ms(window, acceptance, given_pace) > WORTHWHILE / given_pace.latency_ms(1)

    @given(paces, st.sampled_from(LENGTHS), st.sampled_from(IN_FLIGHT))
    def test_better_drafts_are_never_slower(self, given_pace: Pace, length: int, in_flight: int) -> None:
        speeds = [tokens_per_ms(Window(length, in_flight), tenths / 10, given_pace) for tenths in range(11)]
        assert all(late >= early * (1 - 1e-9) for early, late in itertools.pairwise(speeds))

    @given(paces, acceptances, st.sampled_from(LENGTHS))
    def test_one_window_gives_what_leviathan_says(self, given_pace: Pace, acceptance: float, length: int) -> None:
        """The expected number of tokens of section 3.1, over the time of the window."""
        accepted = min(acceptance, 0.98)
        expected = sum(accepted**count for count in range(length + 1))
        took_ms = given_pace.latency_ms(length + 1) + length * given_pace.draft_ms
        assert tokens_per_ms(Window(length, 1), acceptance, given_pace) == pytest.approx(expected / took_ms)


class TestPromptLookup:
    def drafter(self, tokens: list[int]) -> PromptLookup:
        drafter = PromptLookup()
        drafter.begin(tokens)
        return drafter

    def test_what_followed_the_last_time(self) -> None:
        drafter = self.drafter([1, 2, 3, 4, 5, 6, 1, 2, 3])
        assert drafter.draft([], 3).tokens == [4, 5, 6]

    def test_the_latest_place_of_the_longest_ngram(self) -> None:
        drafter = self.drafter([7, 8, 1, 9, 8, 2, 8, 3, 7, 8])
        assert drafter.draft([], 1).tokens == [1]

    def test_it_goes_on_behind_what_was_drafted(self) -> None:
        drafter = self.drafter([1, 2, 3, 4, 5, 6, 1, 2, 3])
        assert drafter.draft([4, 5], 2).tokens == [6, 1]

    def test_a_repeating_end_repeats(self) -> None:
        assert self.drafter([5, 6, 5, 6, 5]).draft([], 5).tokens == [6, 5, 6, 5, 6]

    def test_a_name_that_has_changed_twice_is_drafted_with_its_new_name(self) -> None:
        old, new = 50, 60
        original = [1, 2, 3, old, 4, 5, 6, 7, old, 8, 9, 10, 11, old, 12, 13]
        begun = [1, 2, 3, new, 4, 5, 6, 7, new, 8, 9, 10]
        assert self.drafter([*original, 99, *begun]).draft([], 4).tokens == [11, new, 12, 13]

    def test_a_place_is_followed_past_a_change(self) -> None:
        original = [1, 2, 3, 4, 5, 6, 7, 8, 9]
        assert self.drafter([*original, 99, 1, 2, 3, 4, 77]).draft([], 3).tokens == [6, 7, 8]

    def test_a_name_that_changes_back_is_let_go(self) -> None:
        old, new = 50, 60
        original = [1, 2, 3, old, 4, 5, 6, 7, old, 8, 9, 10, 11, old, 12, 13, 14, 15, old, 16]
        begun = [1, 2, 3, new, 4, 5, 6, 7, new, 8, 9, 10, 11, old, 12, 13, 14]
        assert self.drafter([*original, 99, *begun]).draft([], 2).tokens == [15, old]

    def test_what_changed_once_keeps_its_name(self) -> None:
        original = [1, 2, 3, 50, 4, 5, 6, 7, 50, 8]
        assert self.drafter([*original, 99, 1, 2, 3, 60, 4, 5, 6]).draft([], 2).tokens == [7, 50]

    def test_nothing_to_go_by(self) -> None:
        assert self.drafter([1, 2, 3]).draft([], 4).tokens == []
        assert self.drafter([]).draft([], 4).tokens == []

    def test_a_longer_match_is_another_kind(self) -> None:
        text = list(range(100, 112))
        short = self.drafter([*text, 1, 2, 111]).draft([], 1)
        long = self.drafter([*text, 1, 2, *text]).draft([], 1)
        assert long.kind > short.kind
        assert PromptLookup.priors[long.kind] > PromptLookup.priors[short.kind]

    @given(st.lists(st.integers(0, 5), max_size=60), st.lists(st.integers(0, 5), max_size=20), st.integers(1, 20))
    def test_whatever_the_text_drafts_are_tokens_of_it(self, text: list[int], pending: list[int], count: int) -> None:
        draft = self.drafter(text).draft(pending, count)
        assert len(draft.tokens) in (0, count)
        assert set(draft.tokens) <= {*text, *pending}
        assert 0 <= draft.kind < len(PromptLookup.priors)


class _Counting(torch.nn.Module):
    """After token n comes n + 1; the cache is what was given so far."""

    class config:
        vocab_size = 50
        model_type = "counting"

        @staticmethod
        def get_text_config() -> type[_Counting.config]:
            return _Counting.config

    device = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self.given: list[int] = []

    def forward(self, input_ids: torch.Tensor, **_: object) -> object:
        self.given += input_ids[0].tolist()
        logits = torch.nn.functional.one_hot((input_ids + 1) % 50, 50).float()
        return type("Output", (), {"logits": logits[:, -1:]})


class TestDraftModel:
    def test_it_continues_the_text_and_what_was_drafted(self) -> None:
        drafter = DraftModel(_Counting(), 50)
        drafter.begin([3, 4])
        assert drafter.draft([], 3).tokens == [5, 6, 7]
        assert drafter.draft([5, 6, 7], 2).tokens == [8, 9]

    def test_it_computes_only_what_is_new(self) -> None:
        model = _Counting()
        drafter = DraftModel(model, 50)
        drafter.begin([3, 4])
        drafter.draft([], 3)  # has seen 3 4 5 6
        drafter.observe(5)
        drafter.observe(20)
        model.given.clear()
        assert drafter.draft([], 1).tokens == [21]
        assert model.given == [20]

    def test_other_tokens_are_refused(self) -> None:
        with pytest.raises(SplitnetError, match="50 tokens, the model 60"):
            DraftModel(_Counting(), 60)

    @pytest.mark.parametrize("family", ["qwen3_next", "jamba"])
    def test_states_are_rewound(self, family: str) -> None:
        config = random_config(family, blocks=6, hidden=64, vocab=300, **HYBRIDS[family])
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).eval()
        text = torch.randint(3, 300, (20,)).tolist()
        drafter = DraftModel(model, 300)
        drafter.begin(text)
        for token in (None, 7, 8, 9):
            if token is not None:
                text.append(token)
                drafter.observe(token)
            expected = model.generate(
                torch.tensor([text]), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            assert drafter.draft([], 5).tokens == expected[0, len(text) :].tolist()

    def test_states_that_cannot_be_rewound_are_refused(self) -> None:
        model: Any = _Counting()
        model._is_stateful = True
        with pytest.raises(SplitnetError, match="'counting' keep states"):
            DraftModel(model, 50)


class TestExperience:
    @staticmethod
    def prediction(positions: int) -> Prediction:
        return Prediction(latency_ms=80.0 + positions, slowest_hop_ms=5.0)

    def test_nothing_is_drafted_before_a_plain_step_was_seen(self) -> None:
        experience = Experience([0.9])
        assert experience.window(0, 0.0, self.prediction) == NO_DRAFTS
        experience.took(1, 100.0, 2.0, self.prediction)
        assert experience.window(0, 0.0, self.prediction) != NO_DRAFTS

    def test_acceptance_is_learned_by_kind(self) -> None:
        experience = Experience([0.5, 0.5])
        for _ in range(100):
            experience.compared(0, True)
            experience.compared(1, False)
        assert experience.acceptance(0) > 0.95 and experience.acceptance(1) < 0.05
        experience.took(1, 100.0, 2.0, self.prediction)
        assert experience.window(0, 0.0, self.prediction).length > 0
        assert experience.window(1, 0.0, self.prediction) == NO_DRAFTS

    def test_long_windows_that_take_longer_than_foretold_are_given_up(self) -> None:
        experience = Experience([0.7])
        experience.took(1, 100.0, 2.0, self.prediction)
        length = experience.window(0, 0.0, self.prediction).length
        for _ in range(50):
            for positions in range(2, 17):
                experience.took(positions, 100.0 * positions, 2.0, self.prediction)
        assert length > 1 and experience.window(0, 0.0, self.prediction).length <= 1

    def test_a_client_that_is_slow_itself_sends_fewer_windows(self) -> None:
        quick, slow = Experience([0.95]), Experience([0.95])
        quick.took(1, 400.0, 2.0, lambda positions: Prediction(400.0, 2.0))
        slow.took(1, 400.0, 200.0, lambda positions: Prediction(400.0, 2.0))
        many = quick.window(0, 0.0, lambda positions: Prediction(400.0, 2.0))
        few = slow.window(0, 0.0, lambda positions: Prediction(400.0, 2.0))
        assert many.in_flight > few.in_flight
