"""When drafts pay, how drafters make them, and how their acceptance and cost are learned."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from scheduler.speculation import (
    IN_FLIGHT,
    LENGTHS,
    MOST_ACCEPTED,
    NO_DRAFTS,
    WORTHWHILE,
    DraftGuess,
    Pace,
    Window,
    best_length,
    best_window,
    tokens_per_ms,
)
from splitnet.blocks.kv_cache import SequenceCache
from splitnet.drafts.draft_model import DraftModel
from splitnet.drafts.draft_stats import Drafted, DraftStats
from splitnet.drafts.drafter import Drafter, Guess
from splitnet.drafts.heads import CombinedDrafter, HeadDrafter
from splitnet.drafts.prompt_lookup import PromptLookup
from splitnet.errors import SplitnetError
from splitnet.swarm.plan import Prediction
from tests.unit.random_models import HYBRIDS, random_config


def pace(link_ms: float = 80.0, pass_ms: float = 20.0, position_ms: float = 1.0, draft_ms: float = 0.0) -> Pace:
    """Times of a chain of four hops."""
    return Pace(
        latency_ms=lambda positions: link_ms + pass_ms + position_ms * positions,
        slowest_hop_ms=lambda positions: (pass_ms + position_ms * positions) / 4,
        first_draft_ms=draft_ms,
        draft_ms=draft_ms,
    )


def alike(acceptance: float) -> DraftGuess:
    return DraftGuess(acceptance, acceptance)


paces = st.builds(pace, st.floats(0, 500), st.floats(1, 200), st.floats(0, 50), st.floats(0, 50))
acceptances = st.floats(0, 1)


class TestBestWindow:
    def test_no_drafts_where_drafts_are_always_wrong(self) -> None:
        assert best_window(alike(0.0), pace()) == NO_DRAFTS

    def test_no_drafts_where_every_position_costs_as_much_as_the_first(self) -> None:
        assert best_window(alike(0.5), pace(link_ms=0, pass_ms=0.001, position_ms=50)) == NO_DRAFTS

    def test_windows_are_long_where_acceptance_and_latency_are_high(self) -> None:
        window = best_window(alike(0.95), pace(link_ms=400))
        assert window.length >= 8 and window.in_flight > 1

    def test_windows_are_shorter_with_a_slow_draft_model(self) -> None:
        free, slow = best_window(alike(0.8), pace()), best_window(alike(0.8), pace(draft_ms=40))
        assert slow.length < free.length

    @given(acceptances, paces)
    def test_a_window_is_predicted_to_be_faster_than_plain_steps(self, acceptance: float, given_pace: Pace) -> None:
        window = best_window(alike(acceptance), given_pace)
        if window != NO_DRAFTS:
            assert tokens_per_ms(window, alike(acceptance), given_pace) > WORTHWHILE / given_pace.latency_ms(1)

    @given(paces, st.sampled_from(LENGTHS))
    def test_better_drafts_are_never_slower(self, given_pace: Pace, length: int) -> None:
        """Holds for a single window and for the best window. Several windows of one token may be slower than one window
        alone."""

        def promised(acceptance: float) -> tuple[float, float]:
            every = [Window(*each) for each in itertools.product(LENGTHS, IN_FLIGHT)]
            speeds = {window: tokens_per_ms(window, alike(acceptance), given_pace) for window in every}
            return speeds[Window(length, 1)], max(speeds.values())

        speeds = [promised(tenths / 10) for tenths in range(11)]
        for early, late in itertools.pairwise(speeds):
            assert all(after >= before * (1 - 1e-9) for before, after in zip(early, late, strict=True))

    @given(paces, acceptances, st.sampled_from(LENGTHS))
    def test_the_speed_of_one_window_is_that_of_leviathan(
        self, given_pace: Pace, acceptance: float, length: int
    ) -> None:
        """The expected number of tokens (Leviathan et al., section 3.1), divided by the time of the window."""
        accepted = min(acceptance, 0.98)
        expected = sum(accepted**count for count in range(length + 1))
        took_ms = given_pace.latency_ms(length + 1) + length * given_pace.draft_ms
        assert tokens_per_ms(Window(length, 1), alike(acceptance), given_pace) == pytest.approx(expected / took_ms)


class TestBestLength:
    """The best length of one window, from the acceptance of each guess."""

    def test_a_window_ends_before_unsure_guesses(self) -> None:
        sure, unsure = DraftGuess(0.95, 0.8), DraftGuess(0.02, 0.02)
        assert best_length(iter([sure, sure, sure, unsure, unsure, sure]), pace()) == 3

    def test_unsure_guesses_are_not_sent(self) -> None:
        assert best_length(iter([DraftGuess(0.03, 0.9)]), pace(position_ms=10)) == 0

    def test_drafting_stops_where_guesses_no_longer_pay(self) -> None:
        asked: list[int] = []

        def guesses() -> Iterator[DraftGuess]:
            for place in itertools.count():
                asked.append(place)
                yield DraftGuess(0.6, 0.6)

        length = best_length(guesses(), pace(draft_ms=5))
        assert length == len(asked) < LENGTHS[-1]

    @given(st.lists(st.tuples(acceptances, acceptances), max_size=20), paces)
    def test_a_window_is_predicted_to_be_faster_than_plain_steps(
        self, shares: list[tuple[float, float]], given_pace: Pace
    ) -> None:
        length = best_length((DraftGuess(*each) for each in shares), given_pace)
        rights = itertools.accumulate((min(own, MOST_ACCEPTED) for own, _ in shares[:length]), lambda a, b: a * b)
        expected, most = 1 + sum(rights), WORTHWHILE / (given_pace.latency_ms(1) + given_pace.first_draft_ms)
        if length:
            assert expected / (given_pace.latency_ms(length + 1) + given_pace.drafting_ms(length)) > most

    @given(st.floats(0.05, 0.95), paces)
    def test_for_equal_guesses_no_other_length_is_faster(self, acceptance: float, given_pace: Pace) -> None:
        length = best_length(itertools.repeat(DraftGuess(acceptance, acceptance)), given_pace)
        plain = 1 / (given_pace.latency_ms(1) + given_pace.first_draft_ms)
        speeds = {n: tokens_per_ms(Window(n, 1), alike(acceptance), given_pace) for n in range(1, LENGTHS[-1] + 1)}
        best = speeds[length] if length else plain * WORTHWHILE
        assert best >= max(speeds.values()) * (1 - 1e-9)


def drafted(drafter: Drafter, pending: list[int], count: int) -> list[int]:
    return [guess.token for guess in itertools.islice(drafter.draft_tokens(pending), count)]


class TestPromptLookup:
    def drafter(self, tokens: list[int]) -> PromptLookup:
        drafter = PromptLookup()
        drafter.begin_text(tokens)
        return drafter

    def test_drafts_continue_the_last_equal_ngram(self) -> None:
        drafter = self.drafter([1, 2, 3, 4, 5, 6, 1, 2, 3])
        assert drafted(drafter, [], 3) == [4, 5, 6]

    def test_the_longest_ngram_is_preferred_then_the_latest(self) -> None:
        drafter = self.drafter([7, 8, 1, 9, 8, 2, 8, 3, 7, 8])
        assert drafted(drafter, [], 1) == [1]

    def test_drafts_continue_behind_pending_drafts(self) -> None:
        drafter = self.drafter([1, 2, 3, 4, 5, 6, 1, 2, 3])
        assert drafted(drafter, [4, 5], 2) == [6, 1]

    def test_a_periodic_end_of_the_text_is_continued(self) -> None:
        assert drafted(self.drafter([5, 6, 5, 6, 5]), [], 5) == [6, 5, 6, 5, 6]

    def test_a_name_that_has_changed_twice_is_drafted_with_its_new_name(self) -> None:
        old, new = 50, 60
        original = [1, 2, 3, old, 4, 5, 6, 7, old, 8, 9, 10, 11, old, 12, 13]
        begun = [1, 2, 3, new, 4, 5, 6, 7, new, 8, 9, 10]
        assert drafted(self.drafter([*original, 99, *begun]), [], 4) == [11, new, 12, 13]

    def test_a_copied_passage_is_followed_past_a_changed_token(self) -> None:
        original = [1, 2, 3, 4, 5, 6, 7, 8, 9]
        assert drafted(self.drafter([*original, 99, 1, 2, 3, 4, 77]), [], 3) == [6, 7, 8]

    def test_a_name_that_changes_back_is_drafted_unchanged(self) -> None:
        old, new = 50, 60
        original = [1, 2, 3, old, 4, 5, 6, 7, old, 8, 9, 10, 11, old, 12, 13, 14, 15, old, 16]
        begun = [1, 2, 3, new, 4, 5, 6, 7, new, 8, 9, 10, 11, old, 12, 13, 14]
        assert drafted(self.drafter([*original, 99, *begun]), [], 2) == [15, old]

    def test_a_name_that_has_changed_once_is_drafted_unchanged(self) -> None:
        original = [1, 2, 3, 50, 4, 5, 6, 7, 50, 8]
        assert drafted(self.drafter([*original, 99, 1, 2, 3, 60, 4, 5, 6]), [], 2) == [7, 50]

    def test_a_text_without_repetition_gets_no_drafts(self) -> None:
        assert drafted(self.drafter([1, 2, 3]), [], 4) == []
        assert drafted(self.drafter([]), [], 4) == []

    def test_a_longer_match_is_a_kind_of_higher_acceptance(self) -> None:
        text = list(range(100, 112))
        short = next(self.drafter([*text, 1, 2, 111]).draft_tokens([]))
        long = next(self.drafter([*text, 1, 2, *text]).draft_tokens([]))
        assert long.kind > short.kind
        assert PromptLookup.priors[long.kind] > PromptLookup.priors[short.kind]

    @given(st.lists(st.integers(0, 5), max_size=60), st.lists(st.integers(0, 5), max_size=20), st.integers(1, 20))
    def test_drafts_are_tokens_of_the_text(self, text: list[int], pending: list[int], count: int) -> None:
        guesses = list(itertools.islice(self.drafter(text).draft_tokens(pending), count))
        assert len(guesses) in (0, count)
        assert {guess.token for guess in guesses} <= {*text, *pending}
        assert len({guess.kind for guess in guesses}) <= 1
        assert all(0 <= guess.kind < len(PromptLookup.priors) for guess in guesses)


class _Counting(torch.nn.Module):
    """Predicts token n + 1 after token n, and records its input tokens in `given`."""

    class config:
        vocab_size = 50
        model_type = "counting"
        num_attention_heads = 1

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
    def test_a_draft_model_continues_the_text_and_pending_drafts(self) -> None:
        drafter = DraftModel(_Counting(), 50)
        drafter.begin_text([3, 4])
        assert drafted(drafter, [], 3) == [5, 6, 7]
        assert drafted(drafter, [5, 6, 7], 2) == [8, 9]

    def test_a_draft_model_computes_only_new_tokens(self) -> None:
        model = _Counting()
        drafter = DraftModel(model, 50)
        drafter.begin_text([3, 4])
        drafted(drafter, [], 3)  # The model has run 3 4 5 6 and predicts 7.
        drafter.observe_token(5)
        drafter.observe_token(20)
        model.given.clear()
        assert drafted(drafter, [], 1) == [21]
        assert model.given == [20]

    def test_a_draft_model_of_another_vocabulary_is_refused(self) -> None:
        with pytest.raises(SplitnetError, match="50 tokens, the model 60"):
            DraftModel(_Counting(), 60)

    @pytest.mark.parametrize("family", ["qwen3_next", "jamba", "gpt2", "gemma3_text"])
    def test_caches_of_the_draft_model_are_rewound(self, family: str) -> None:
        config = random_config(family, blocks=6, hidden=64, vocab=300, **HYBRIDS.get(family, {}))
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).eval()
        text = torch.randint(3, 300, (20,)).tolist()
        drafter = DraftModel(model, 300)
        drafter.begin_text(text)
        for token in (None, 7, 8, 9):
            if token is not None:
                text.append(token)
                drafter.observe_token(token)
            expected = model.generate(
                torch.tensor([text]), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            assert drafted(drafter, [], 5) == expected[0, len(text) :].tolist()

    @pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma", "deepseek_v4"])
    def test_a_draft_model_with_states_that_cannot_be_rewound_is_refused(self, family: str) -> None:
        model: Any = _Counting()
        model.config = CONFIG_MAPPING[family]()
        with pytest.raises(SplitnetError, match=f"'{family}' cannot draft"):
            DraftModel(model, model.config.vocab_size)


class CountingHead:
    """A head whose features and outputs are the last token plus one. caches: the positions that it has run."""

    taps = (6,)
    draft_vocabulary: torch.Tensor | None = None

    def __init__(self) -> None:
        self._ran: dict[SequenceCache, list[tuple[int, float, bool]]] = {}

    @property
    def caches(self) -> list[list[tuple[int, float, bool]]]:
        return [ran[: cache.length] for cache, ran in self._ran.items()]

    def run(
        self, tokens: torch.Tensor, features: torch.Tensor, cache: SequenceCache, *, own: bool = False
    ) -> torch.Tensor:
        ran = self._ran.setdefault(cache, [])
        given = zip(tokens.tolist(), features.tolist(), strict=True)
        ran[cache.length :] = [(token, value, own) for token, (value,) in given]
        cache.advance(len(tokens))
        return tokens[:, None] + 1.0

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return 20.0 * torch.nn.functional.one_hot(hidden[:, 0].long(), 50)


class TestHeadDrafter:
    """Positions whose features have arrived run with them; the others run with the head's own output."""

    def begun(self) -> tuple[CountingHead, HeadDrafter]:
        head = CountingHead()
        drafter = HeadDrafter(head)
        drafter.begin_text([3, 4, 5], torch.tensor([[0.5]]))  # The feature of the second position; the first has none.
        drafter.observe_token(6, torch.tensor([1.5]))
        return head, drafter

    def test_a_head_continues_from_its_own_outputs(self) -> None:
        head, drafter = self.begun()
        assert drafted(drafter, [], 3) == [7, 8, 9]
        assert head.caches[-1] == [(5, 0.5, False), (6, 1.5, False), (7, 7.0, True), (8, 8.0, True)]

    def test_drafted_positions_run_again_once_their_features_arrive(self) -> None:
        head, drafter = self.begun()
        drafted(drafter, [], 3)
        drafter.observe_token(7, torch.tensor([2.5]))
        drafter.observe_token(20, torch.tensor([3.5]))
        assert drafted(drafter, [], 2) == [21, 22]
        assert head.caches[-1][2:] == [(7, 2.5, False), (20, 3.5, False), (21, 21.0, True)]

    def test_drafts_continue_behind_pending_drafts(self) -> None:
        head, drafter = self.begun()
        assert drafted(drafter, [], 2) == [7, 8]
        assert drafted(drafter, [7, 8], 2) == [9, 10]
        assert [token for token, *_ in head.caches[-1]] == [5, 6, 7, 8, 9]

    def test_a_head_continues_behind_drafts_of_another_drafter(self) -> None:
        head, drafter = self.begun()
        drafted(drafter, [], 3)
        assert drafted(drafter, [7, 30, 31], 2) == [32, 33]
        assert head.caches[-1][2:] == [(7, 7.0, True), (30, 8.0, True), (31, 31.0, True), (32, 32.0, True)]

    def test_a_head_drafts_nothing_without_features(self) -> None:
        drafter = HeadDrafter(CountingHead())
        drafter.begin_text([3, 4, 5])
        drafter.observe_token(6)
        assert drafted(drafter, [], 3) == []

    def test_a_new_text_starts_with_an_empty_cache(self) -> None:
        head, drafter = self.begun()
        drafted(drafter, [], 3)
        drafter.begin_text([8, 9], None)
        drafter.observe_token(10, torch.tensor([4.5]))
        assert drafted(drafter, [], 1) == [11]
        assert head.caches[-1] == [(10, 4.5, False)]

    def test_draft_tokens_are_mapped_from_the_draft_vocabulary(self) -> None:
        head, drafter = self.begun()
        head.draft_vocabulary = torch.arange(100, 150)
        assert drafted(drafter, [], 1) == [107]

    def test_the_kind_of_a_guess_follows_the_confidence_of_the_head(self) -> None:
        _, drafter = self.begun()
        assert next(drafter.draft_tokens([])).kind == len(HeadDrafter.priors) - 1
        assert list(HeadDrafter.priors) == sorted(HeadDrafter.priors)


class TestCombined:
    def drafts(self, stats: DraftStats, text: list[int]) -> Iterator[Guess]:
        drafter = CombinedDrafter(CountingHead(), stats.acceptance)
        drafter.begin_text(text[:-1], torch.zeros(len(text) - 2, 1))
        drafter.observe_token(text[-1], torch.zeros(1))
        return drafter.draft_tokens([])

    def test_sure_copies_are_preferred_to_the_head(self) -> None:
        text = [*range(10, 30), 1, 2, *range(10, 28)]
        assert [token for token, _ in itertools.islice(self.drafts(DraftStats(CombinedDrafter.priors), text), 2)] == [
            28,
            29,
        ]

    def test_the_head_drafts_where_copies_are_unsure_or_absent(self) -> None:
        stats = DraftStats(CombinedDrafter.priors)
        assert next(self.drafts(stats, [1, 2, 3])).token == 4
        guess = next(self.drafts(stats, [1, 2, 30, 7, 1]))
        assert guess.token == 2 and guess.kind >= len(PromptLookup.priors)

    def test_copies_of_low_acceptance_are_not_drafted(self) -> None:
        stats = DraftStats(CombinedDrafter.priors)
        text = [*range(10, 30), 1, 2, *range(10, 28)]
        copied = next(self.drafts(stats, text))
        assert copied.kind < len(PromptLookup.priors)
        for _ in range(30):
            stats.compared(copied.kind, False)
        assert next(self.drafts(stats, text)).kind >= len(PromptLookup.priors)


class TestDraftStats:
    @staticmethod
    def prediction(positions: int) -> Prediction:
        return Prediction(latency_ms=80.0 + positions, slowest_hop_ms=5.0)

    def test_no_drafts_before_the_first_plain_step(self) -> None:
        stats = DraftStats([0.9])
        assert not stats.knows_steps
        stats.observe_latency(1, 100.0, 2.0, self.prediction)
        assert stats.knows_steps and stats.window(0, self.prediction) != NO_DRAFTS

    def test_acceptance_is_learned_by_kind(self) -> None:
        stats = DraftStats([0.5, 0.5])
        for _ in range(100):
            stats.compared(0, True, 0)
            stats.compared(1, False, 1)
        assert stats.acceptance([0]) > 0.95 and stats.acceptance([1]) < 0.05
        assert 0.45 < stats.acceptance([0, 1]) < 0.55
        stats.observe_latency(1, 100.0, 2.0, self.prediction)
        assert stats.window(0, self.prediction).length > 0
        assert stats.window(1, self.prediction) == NO_DRAFTS

    def test_long_windows_that_take_longer_than_predicted_are_no_longer_chosen(self) -> None:
        stats = DraftStats([0.7])
        stats.observe_latency(1, 100.0, 2.0, self.prediction)
        length = stats.window(0, self.prediction).length
        for _ in range(50):
            for positions in range(2, 17):
                stats.observe_latency(positions, 100.0 * positions, 2.0, self.prediction)
        assert length > 1 and stats.window(0, self.prediction).length <= 1

    def test_a_slow_client_sends_fewer_windows(self) -> None:
        quick, slow = DraftStats([0.95]), DraftStats([0.95])
        quick.observe_latency(1, 400.0, 2.0, lambda positions: Prediction(400.0, 2.0))
        slow.observe_latency(1, 400.0, 200.0, lambda positions: Prediction(400.0, 2.0))
        many = quick.window(0, lambda positions: Prediction(400.0, 2.0))
        few = slow.window(0, lambda positions: Prediction(400.0, 2.0))
        assert many.in_flight > few.in_flight

    def test_drafts_must_save_more_time_while_other_texts_wait(self) -> None:
        """When eight texts keep a hop busy, drafts that save less time than they cost at this hop are not sent."""

        def prediction(positions: int) -> Prediction:
            return Prediction(80.0 + 20.0 * positions, 20.0 * positions)

        stats = DraftStats([0.6])
        stats.observe_latency(1, 100.0, 2.0, prediction)
        assert stats.window(0, prediction) != NO_DRAFTS
        with ExitStack() as texts:
            for _ in range(8):
                texts.enter_context(stats.text())
            assert stats.window(0, prediction) == NO_DRAFTS
            idle = DraftStats([0.6])
            idle.observe_latency(1, 100.0, 2.0, self.prediction)
            assert idle.window(0, self.prediction) != NO_DRAFTS
        assert stats.window(0, prediction) != NO_DRAFTS

    def test_acceptance_is_counted_by_place_in_the_window(self) -> None:
        stats = DraftStats([0.5])
        stats.verified(Drafted(7, 0, 0, None), True)
        stats.verified(Drafted(8, 0, 1, 0), False)
        stats.verified(Drafted(9, 0, 0, None), True)
        assert stats.by_place == {0: [2, 2], 1: [1, 0]} and stats.accepted == 2

    def test_a_drafter_that_takes_longer_than_it_saves_is_seldom_used(self) -> None:
        stats = DraftStats([0.5])
        stats.observe_latency(1, 100.0, 2.0, self.prediction)
        stats._drafting_ms[0].add(3.0)
        for _ in range(100):  # One draft in three brings an additional token.
            for tokens in (2, 1, 1):
                assert stats.drafts_pay(self.prediction)
                stats.received(tokens, drafted=True)
        for _ in range(30):
            stats.received(1, drafted=True)
        assert not stats.drafts_pay(self.prediction)
        stats.received(1, drafted=False)
        stats.received(2, drafted=True)
        assert stats.drafts_pay(self.prediction)

    def test_a_drafter_that_takes_no_time_is_always_used(self) -> None:
        stats = DraftStats([0.5])
        stats.observe_latency(1, 100.0, 2.0, self.prediction)
        for _ in range(100):
            stats.received(1, drafted=True)
        assert stats.drafts_pay(self.prediction)

    def test_the_drafters_prefill_does_not_count_as_drafting_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = itertools.count()
        monkeypatch.setattr("splitnet.drafts.draft_stats.time.perf_counter", lambda: float(next(now)))
        stats = DraftStats([0.5])
        guesses = [Guess(1, 0), Guess(2, 0)]
        assert list(stats.timed(iter(guesses), catches_up=True)) == guesses
        assert [average.value for average in stats._drafting_ms] == [0.0, 1000.0]
        assert list(stats.timed(iter(guesses), catches_up=False)) == guesses
        assert [average.value for average in stats._drafting_ms] == [1000.0, 1000.0]
