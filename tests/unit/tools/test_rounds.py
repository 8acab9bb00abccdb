"""Rounds of joint tuning: arithmetic, and the coordinator's state machine with arbitrary owners."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from nacl.public import PrivateKey

from splitnet.errors import ProtocolError, SplitnetError
from splitnet.tools.tune import rounds as module
from splitnet.tools.tune.methods import Schedule, TrainingSettings
from splitnet.tools.tune.rounds import (
    DELTA,
    LEAST_LOST_S,
    LEAST_WAIT_S,
    LONGEST,
    LOST_S,
    MAX_NOISE,
    OUTLIES,
    OUTRANGES,
    OUTWEIGHS,
    Numbers,
    RoundRules,
    Rounds,
    averaged,
    budget,
    sendable,
    unmasked,
)
from splitnet.wire.messages import MAX_OWNERS, MAX_ROUNDS, RoundNumbers, WantGradient

PATIENT_S = 2 * LOST_S  # Longer than any round waits for silent owners.
SIZE = 5
SETTINGS = TrainingSettings(6, 0.1, warmup_steps=2, schedule=Schedule.COSINE, clip=0.5, weight_decay=0.1)


def numbers(seed: int, size: int = SIZE) -> Numbers:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def mean_of(gradients: list[Numbers], shares: list[float], rules: RoundRules, say: Any = lambda _: None) -> Numbers:
    return averaged(gradients, np.array(shares), rules, np.random.default_rng(0), say)


def keys(count: int) -> dict[bytes, bytes]:
    """Public and secret CURVE keys."""
    made = [PrivateKey.from_seed(bytes([number]) * 32) for number in range(count)]
    return {bytes(each.public_key): bytes(each) for each in made}


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"noise": 1.0}, "give --norm"),
        ({"masked": True, "owners": 3}, "give --norm"),
        ({"masked": True, "norm": 1.0, "owners": 5, "liars": 1}, "leave out --liars"),
        ({"masked": True, "norm": 1.0}, "give --owners 3"),
        ({"liars": 1}, "3 owners or more"),
        ({"norm": math.nan}, "--norm of 0 to"),
        ({"norm": math.inf}, "--norm of 0 to"),
        ({"norm": 1.0, "noise": 2 * MAX_NOISE}, "--noise of 0 to"),
    ],
)
def test_contradictory_rules_are_refused(rules: dict[str, Any], told: str) -> None:
    with pytest.raises(SplitnetError, match=told):
        RoundRules(**rules)


def test_an_average_is_weighted() -> None:
    gradients = [numbers(1), numbers(2), numbers(3)]
    found = mean_of(gradients, [0.5, 0.3, 0.2], RoundRules())
    assert np.allclose(found, 0.5 * gradients[0] + 0.3 * gradients[1] + 0.2 * gradients[2], atol=1e-6)
    some = mean_of(gradients[:2], [0.5, 0.3], RoundRules())
    assert np.allclose(some, (0.5 * gradients[0] + 0.3 * gradients[1]) / 0.8, atol=1e-6), "of those that were sent"


def test_gradients_that_are_too_long_or_not_finite_do_no_harm() -> None:
    honest = [numbers(seed) for seed in range(3)]
    told = list[str]()
    nonsense = [np.full(SIZE, value, np.float32) for value in (np.nan, np.inf)]
    found = mean_of([*honest, *nonsense], [0.2] * 5, RoundRules(), told.append)
    assert np.allclose(found, np.mean(honest, axis=0), atol=1e-6) and "2 gradients are not finite" in told[0]
    found = mean_of([honest[0], np.full(SIZE, LONGEST, np.float32)], [0.5] * 2, RoundRules(), told.append)
    assert np.array_equal(found, honest[0]) and "1 gradients are not finite" in told.pop(), "nor are its squares"
    assert not mean_of(nonsense, [0.5, 0.5], RoundRules(), told.append).any() and "no gradient is finite" in told.pop()

    length = float(np.linalg.norm(honest[0]))
    near = [each / np.linalg.norm(each) * length for each in honest]
    long = near[1] * (OUTLIES - 0.01)
    found = mean_of([*near, long], [0.25] * 4, RoundRules(), told.append)
    shortened = long / np.linalg.norm(long) * OUTRANGES * length
    assert np.allclose(found, np.mean([*near, shortened], axis=0), atol=1e-5) and "are longer" in told[1]
    assert np.linalg.norm(mean_of([long], [1.0], RoundRules(norm=0.5))) == pytest.approx(0.5)
    assert len(told) == 2
    mean_of([each / np.linalg.norm(each) for each in honest], [1 / 3] * 3, RoundRules(norm=1.0), told.append)
    assert len(told) == 2, "rounding is no reason to tell anything"


@pytest.mark.parametrize("factor", [-20, 20, 1e6, -(OUTLIES + 0.01)])
@pytest.mark.parametrize("norm", [0.0, 3.0])
def test_a_gradient_of_far_too_large_norm_is_left_out(factor: float, norm: float) -> None:
    honest, told = [each / np.linalg.norm(each) for each in map(numbers, range(4))], list[str]()
    found = mean_of([*honest, honest[2] * factor], [0.1, 0.2, 0.3, 0.2, 0.2], RoundRules(norm=norm), told.append)
    expected = sum(share * each for share, each in zip((0.1, 0.2, 0.3, 0.2), honest, strict=True)) / 0.8
    assert np.allclose(found, expected, atol=1e-6)
    assert told == ["1 gradients are not finite or far too long, and are left out"]


@pytest.mark.parametrize("seed", range(5))
def test_the_tolerated_liars_leave_the_average_among_honest_gradients(seed: int) -> None:
    rules = RoundRules(owners=10, liars=2)
    honest = [1 + 0.1 * numbers(each, 50) for each in range(8)]
    gradients = [*honest, *(-1.9 * each for each in honest[:2])]  # As long as the limit of norms allows.
    random = np.random.default_rng(seed)
    found = averaged(gradients, np.full(10, 0.1), rules, random)
    assert (found > np.min(honest, axis=0) - 1e-6).all() and (found < np.max(honest, axis=0) + 1e-6).all()


def test_an_update_is_clipped_and_has_noise() -> None:
    gradient = numbers(1, 4000)
    want = WantGradient(0, 1, 0.5, 2.0, 0.0, ())
    sent = np.frombuffer(sendable(gradient, want, "birds", b"", b""), "<f4")
    assert np.linalg.norm(sent) == pytest.approx(2.0, rel=1e-5)
    assert np.allclose(sent / np.linalg.norm(sent), gradient / np.linalg.norm(gradient), atol=1e-6)
    want = WantGradient(0, 1, 0.5, 2.0, 0.25, ())
    noisy = np.frombuffer(sendable(gradient, want, "birds", b"", b""), "<f4")
    assert np.std(noisy - sent) == pytest.approx(0.25, rel=0.1)


def test_masks_hide_each_update_and_cancel_in_the_sum() -> None:
    owners = keys(4)
    shares = [0.4, 0.3, 0.2, 0.1]
    gradients = [numbers(seed, 2000) / 50 for seed in range(4)]

    def sent(attempt: int, members: list[bytes]) -> list[bytes]:
        wants = [WantGradient(3, attempt, share, 1.0, 0.0, tuple(members)) for share in shares]
        masked = zip(gradients, wants, owners.items(), strict=True)
        return [sendable(gradient, want, "birds", *pair) for gradient, want, pair in masked]

    members = sorted(owners)
    first, again = sent(1, members), sent(2, members)
    expected = sum(share * gradient for share, gradient in zip(shares, gradients, strict=True))
    for each in (first, again):
        assert np.allclose(unmasked(each, 1.0), expected, atol=4 * 2.0**-24)
        assert all(abs(np.frombuffer(one, "<i4")).mean() > 2**28 for one in each), "masks fill all 32 bits"
        partial = unmasked(each[:3], 1.0)
        assert np.linalg.norm(partial) > 100, "of some owners nothing is seen"
    assert all(one != other for one, other in zip(first, again, strict=True))

    for few in (members[:2], [*members[:2], members[0]], members[1:]):
        want = WantGradient(3, 1, 0.4, 1.0, 0.0, tuple(few))
        with pytest.raises(ProtocolError, match="masks would hide nothing"):
            sendable(gradients[0], want, "birds", members[0], owners[members[0]])
    with pytest.raises(ProtocolError, match="no norm"):
        sendable(
            gradients[0], WantGradient(3, 1, 0.4, 0.0, 0.0, tuple(members)), "birds", members[0], owners[members[0]]
        )


def test_a_lie_in_a_masked_sum_has_at_most_the_norm_of_an_update() -> None:
    rounds = begun(RoundRules(owners=3, norm=0.5, masked=True))
    wants = joined(rounds, keys(3))
    for number, (key, want) in enumerate(wants.items()):
        payload = b"\x12\x34\x56\x78" * SIZE if number else bytes(4 * SIZE)
        rounds.take_gradient(key, RoundNumbers(want.number, want.attempt, payload))
    assert rounds.next_wants(1.0) == {} and rounds.number == 1
    assert np.linalg.norm(rounds.gradients[0]) == pytest.approx(0.5, rel=1e-5)


def test_masked_sums_carry_the_noise_of_all_owners() -> None:
    rules = RoundRules(owners=3, norm=2.0, noise=MAX_NOISE, masked=True)
    rounds, owners = begun(rules, 4000), keys(3)
    wants = joined(rounds, owners, 4000)
    assert all(want.share == pytest.approx(1 / 3) for want in wants.values()), "whatever examples they have"
    for key, want in wants.items():
        payload = sendable(numbers(1, 4000), want, "birds", key, owners[key])
        rounds.take_gradient(key, RoundNumbers(0, want.attempt, payload))
    rounds.next_wants(1.0)
    # The sum has more noise than promised, because two of three owners suffice for the promise.
    found = rounds.gradients[0] * 3
    assert np.std(found) == pytest.approx(MAX_NOISE * 2.0 * math.sqrt(3 / 2), rel=0.1)


@pytest.mark.parametrize(("liars", "owners", "group"), [(0, 5, 5), (1, 9, 3), (1, 3, 1)])
def test_the_budget_counts_the_noise_of_other_owners(liars: int, owners: int, group: int) -> None:
    rules = RoundRules(owners=owners, norm=0.5, noise=2.0, liars=liars)
    (want, *_) = joined(begun(rules), keys(owners)).values()
    of_others = want.noise * math.sqrt(max(1, group - 1))
    assert of_others == pytest.approx(rules.noise * rules.norm)


def test_the_privacy_budget_is_that_of_the_gaussian_mechanism() -> None:
    """Compared with the exact privacy profile (Balle and Wang, arXiv:1805.06530, theorem 8) of all releases
    together."""

    def normal(x: float) -> float:
        return (1 + math.erf(x / math.sqrt(2))) / 2

    def delta(epsilon: float, noise: float, releases: int) -> float:
        ratio = math.sqrt(releases) / noise
        beyond = normal(ratio / 2 - epsilon / ratio)
        return beyond - math.exp(epsilon) * normal(-ratio / 2 - epsilon / ratio)

    for noise, releases in ((1.0, 1), (2.0, 20), (8.0, 100)):
        epsilon = budget(noise, releases)
        assert delta(epsilon, noise, releases) <= DELTA
        assert delta(epsilon * 0.7, noise, releases) > DELTA, "it is not far above what is needed"
    assert budget(1.0, 20) > budget(1.0, 10) > budget(2.0, 10)


class Recorded(Rounds):
    """Keeps the mean of the gradients of each round."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.gradients = list[Numbers]()

    def _descend(self, gradient: Numbers) -> None:
        self.gradients.append(gradient.copy())
        super()._descend(gradient)


class Reference:
    """The parameters that torch's AdamW computes from the same gradients."""

    def __init__(self, parameters: Numbers, settings: TrainingSettings) -> None:
        self.parameter = torch.nn.Parameter(torch.from_numpy(parameters.copy()))
        self._settings, self._done = settings, 0
        self._optimizer = torch.optim.AdamW(
            [self.parameter], settings.learning_rate, weight_decay=settings.weight_decay
        )

    def step(self, gradient: Numbers) -> None:
        self._optimizer.param_groups[0]["lr"] = self._settings.learning_rate_at(self._done)
        self.parameter.grad = torch.from_numpy(gradient.astype(np.float32))
        torch.nn.utils.clip_grad_norm_([self.parameter], self._settings.clip or math.inf)
        self._optimizer.step()
        self._done += 1

    @property
    def numbers(self) -> Numbers:
        return self.parameter.detach().numpy()


def begun(rules: RoundRules, size: int = SIZE, settings: TrainingSettings = SETTINGS) -> Recorded:
    rounds = Recorded(rules, parameters=numbers(99, size))
    rounds.accept_settings(settings)
    return rounds


def joined(rounds: Rounds, owners: Any, size: int = SIZE) -> dict[bytes, WantGradient]:
    """All owners become ready; returns what each is asked for."""
    for number, key in enumerate(owners):
        rounds.add_owner(key, 1 + number, 0.0)
        rounds.offer(key, size)
    wants = rounds.next_wants(0.0)
    assert wants.keys() == set(owners)
    return wants


def test_no_round_begins_before_the_parameters_are_known() -> None:
    rounds = Rounds(RoundRules(owners=1))
    rounds.add_owner(b"one", 1, 0.0)
    rounds.accept_settings(SETTINGS)
    rounds.offer(b"one", SIZE)
    assert rounds.next_wants(PATIENT_S) == {} and not rounds.is_over
    rounds.parameters = np.ones(SIZE, np.float32)
    rounds.accept_settings(TrainingSettings(99, 1.0))
    assert (rounds.settings, rounds.rounds) == (SETTINGS, SETTINGS.steps), "what is known stays"
    rounds.offer(b"one", SIZE)
    assert rounds.next_wants(PATIENT_S).keys() == {b"one"}
    for wrong in (SIZE + 1, 2, 0):
        with pytest.raises(SplitnetError, match=r"trains 5 numbers"):
            rounds.offer(b"one", wrong)
    for steps in (0, MAX_ROUNDS + 1):
        with pytest.raises(SplitnetError, match="at most 1,048,576 steps: lower --steps"):
            Rounds(RoundRules()).accept_settings(TrainingSettings(steps, 1.0))


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("schedule", list(Schedule))
def test_rounds_are_steps_of_adamw_with_the_weighted_mean(schedule: Schedule, clip: float) -> None:
    settings = TrainingSettings(8, 0.05, warmup_steps=2, schedule=schedule, clip=clip, weight_decay=0.1)
    rounds = begun(RoundRules(), 50, settings)
    assert rounds.parameters is not None
    expected = Reference(rounds.parameters, settings)
    for number in range(settings.steps):
        assert not rounds.is_over
        gradients = {b"a": numbers(2 * number, 50), b"b": numbers(2 * number + 1, 50)}
        for key, examples in ((b"a", 3), (b"b", 1)):
            rounds.add_owner(key, examples, 0.0)
            rounds.offer(key, 50)
        for key, want in rounds.next_wants(0.0).items():
            rounds.take_gradient(key, RoundNumbers(number, want.attempt, gradients[key].tobytes()))
        assert rounds.next_wants(0.0) == {} and rounds.number == number + 1
        expected.step(0.75 * gradients[b"a"] + 0.25 * gradients[b"b"])
        assert np.allclose(rounds.parameters, expected.numbers, rtol=1e-5, atol=1e-6), number
    assert rounds.is_over


def test_a_malformed_update_does_not_replace_a_gradient() -> None:
    rounds = begun(RoundRules())
    wants = joined(rounds, (b"a", b"b"))
    right = {key: numbers(seed) for seed, key in enumerate(wants)}
    for key, want in wants.items():
        rounds.take_gradient(key, RoundNumbers(0, want.attempt, right[key].tobytes()))
        for number, attempt, payload in (
            (0, want.attempt, b""), (0, want.attempt, bytes(4 * SIZE + 4)),
            (1, want.attempt, bytes(4 * SIZE)), (0, want.attempt ^ 1, bytes(4 * SIZE)),
        ):  # fmt: skip
            rounds.take_gradient(key, RoundNumbers(number, attempt, payload))
        rounds.take_gradient(b"stranger", RoundNumbers(0, want.attempt, bytes(4 * SIZE)))
    assert rounds.next_wants(0.0) == {} and rounds.number == 1
    assert np.allclose(rounds.gradients[0], sum(wants[key].share * each for key, each in right.items()), atol=1e-6)


def test_the_weight_of_claimed_examples_is_bounded() -> None:
    rounds = begun(RoundRules(owners=3))
    for key, count in ((b"a", 10), (b"b", 10), (b"liar", 1 << 31)):
        rounds.add_owner(key, count, 0.0)
        rounds.offer(key, SIZE)
    wants = rounds.next_wants(0.0)
    assert wants[b"liar"].share == pytest.approx(OUTWEIGHS / (OUTWEIGHS + 2))


def test_an_owner_may_join_again_while_its_update_is_awaited() -> None:
    """The former process of the owner still sends, either nothing or an update of the right size."""
    for payload in (b"", np.ones(SIZE, np.float32).tobytes()):
        rounds = begun(RoundRules(owners=3, liars=1))
        wants = joined(rounds, (b"a", b"b", b"c"))
        rounds.add_owner(b"c", 1, 0.0)
        for key, want in wants.items():
            sent = payload if key == b"c" else np.ones(SIZE, np.float32).tobytes()
            rounds.take_gradient(key, RoundNumbers(0, want.attempt, sent))
        assert rounds.next_wants(PATIENT_S) == {} and rounds.number == (1 if payload else 0)
        assert all(np.isfinite(each).all() for each in rounds.gradients) and len(rounds.gradients) == rounds.number
        assert rounds.parameters is not None and np.isfinite(rounds.parameters).all()


def played(rounds: Rounds, honest: Sequence[bytes], silent: Sequence[bytes], until: int) -> list[float]:
    """The seconds of each round. Honest owners answer at once; silent owners only repeat that they are ready."""
    now, began, took = 0.0, 0.0, list[float]()
    for key in (*honest, *silent):
        rounds.add_owner(key, 10, now)
    while rounds.number < until:
        for key in (*honest, *silent):
            if not rounds.owners[key].ready and key not in rounds.members:
                rounds.offer(key, SIZE)
        number = rounds.number
        for key, want in rounds.next_wants(now).items():
            if key in honest:
                rounds.take_gradient(key, RoundNumbers(want.number, want.attempt, numbers(1).tobytes()))
        if rounds.number > number:
            took.append(now - began)
            began = now
        now += 0.25
    return took


@pytest.mark.parametrize(
    "rules", [RoundRules(), RoundRules(owners=3, norm=1.0, masked=True), RoundRules(owners=3, norm=1.0, noise=1.0)]
)
def test_silent_owners_delay_few_rounds_by_seconds(rules: RoundRules) -> None:
    settings = replace(SETTINGS, steps=16)
    honest = [bytes([number]) * 32 for number in range(rules.owners)]
    silent = [bytes([100 + number]) * 32 for number in range(rules.owners + 1)]
    if rules.masked or rules.noise:
        silent = silent[:1]
    took = played(begun(rules, settings=settings), honest, silent, 16)
    late = [seconds for seconds in took if seconds >= LEAST_WAIT_S]
    assert len(late) <= 4, "rounds 1, 4, 9 and 18: after each failure an owner is left out of twice as many rounds"
    assert max(took) < 2 * LEAST_WAIT_S


def test_an_owner_silent_after_a_delivery_delays_a_round_by_its_measured_pace() -> None:
    rounds = begun(RoundRules(), settings=replace(SETTINGS, steps=9))
    honest, gone = [b"a", b"b"], [b"x", b"y", b"z"]
    played(rounds, [*honest, *gone], [], 1)
    rounds._began = 0.0
    took = played(rounds, honest, gone, 4)
    assert LEAST_LOST_S < took[0] < LEAST_LOST_S + 2 and max(took[1:]) < 2 * LEAST_WAIT_S


def test_keys_that_only_join_do_not_displace_delivering_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_GRADIENTS_BYTES", 2 * 4 * SIZE)
    rounds = begun(RoundRules())
    played(rounds, [b"a", b"b"], [], 1)
    for number in range(2 * MAX_OWNERS):
        rounds.add_owner(number.to_bytes(32), 1, 1.0)
    assert len(rounds.owners) == MAX_OWNERS and rounds.present == 2
    for key in (b"a", b"b"):
        rounds.offer(key, SIZE)
    with pytest.raises(SplitnetError, match="has memory for 2 owners of 5 numbers: join later"):
        rounds.offer((2 * MAX_OWNERS - 1).to_bytes(32), SIZE)
    assert rounds.next_wants(1.0).keys() == {b"a", b"b"}, "they wait for none of the others"


def test_a_new_owner_replaces_one_without_deliveries() -> None:
    rounds = begun(RoundRules(owners=1))
    owners = [number.to_bytes(32) for number in range(MAX_OWNERS)]
    played(rounds, owners[:-1], [], 1)
    for newcomer in (b"one", b"two"):
        rounds.add_owner(newcomer, 1, 1.0)
    assert rounds.owners.keys() == {*owners[:-1], b"two"}
    played(rounds, [*owners[:-1], b"two"], [], 2)
    with pytest.raises(SplitnetError, match="256 owners take part already: join again later"):
        rounds.add_owner(b"three", 1, 1.0)


def test_a_round_waits_for_a_newcomer_from_its_first_gradient_on() -> None:
    rounds = begun(RoundRules())
    played(rounds, [b"a", b"b"], [], 1)
    rounds.add_owner(b"late", 1, 0.0)
    for waits in (False, True):
        for key in (b"a", b"b"):
            rounds.offer(key, SIZE)
        assert rounds.present == 2 + waits
        wants = rounds.next_wants(1.0)
        assert (wants == {}) is waits
        for key, want in wants.items():
            rounds.take_gradient(key, RoundNumbers(want.number, want.attempt, numbers(1).tobytes()))
        rounds.next_wants(1.0)
        rounds.tries(b"late")


class Coordination(RuleBasedStateMachine):
    """Owners join, become ready, send, vanish and lie in any order, while the coordinator's state machine takes its
    steps."""

    @initialize(
        owners=st.integers(1, 5),
        kind=st.sampled_from(["plain", "liars", "noise", "masked"]),
        clip=st.sampled_from([0.0, 0.5]),
    )
    def start(self, owners: int, kind: str, clip: float) -> None:
        owners = max(owners, 3 if kind in ("liars", "masked") else 1)
        more: dict[str, Any] = {"liars": 1} if kind == "liars" else {}
        more |= {"noise": {"norm": 1.0, "noise": 0.5}, "masked": {"norm": 1.0, "masked": True}}.get(kind, {})
        self.terms = RoundRules(owners=owners, **more)
        self.settings = replace(SETTINGS, clip=clip)
        self.rounds = begun(self.terms, settings=self.settings)
        assert self.rounds.parameters is not None
        self.reference = Reference(self.rounds.parameters, self.settings)
        self.keys = keys(7)
        self.at = 0.0
        self.number = self.releases = 0
        self.asked: dict[bytes, WantGradient] = {}
        """The owners' wants in the current attempt."""
        self.sent: dict[bytes, Numbers] = {}
        """The gradients of the current attempt, from honest owners and liars."""
        self.shares: dict[bytes, float] = {}

    @rule(owner=st.integers(0, 6), examples=st.sampled_from([0, 1, 10, 1000, 1 << 31]))
    def join(self, owner: int, examples: int) -> None:
        key = list(self.keys)[owner]
        self.rounds.add_owner(key, examples, self.at)
        self.sent.pop(key, None)

    @rule(owner=st.integers(0, 6), size=st.sampled_from([SIZE, SIZE, SIZE, 0, 4]))
    def ready(self, owner: int, size: int) -> None:
        key = list(self.keys)[owner]
        if key not in self.rounds.owners:
            return
        if size == SIZE:
            self.rounds.offer(key, size)
            return
        with pytest.raises(SplitnetError):
            self.rounds.offer(key, size)

    @rule(
        owner=st.integers(0, 6),
        value=st.sampled_from([0.01, 0.01, -0.02, 0.2, 1e10, 1e30, math.nan, math.inf]),
        wrong=st.sampled_from([None, None, None, "number", "attempt", "size", "empty"]),
    )
    def send(self, owner: int, value: float, wrong: str | None) -> None:
        key = list(self.keys)[owner]
        gradient = np.full(SIZE, value, np.float32)
        want = self.asked.get(key) or WantGradient(self.rounds.number, 1, 1.0, 0.0, 0.0, ())
        payload = gradient.tobytes()
        if want.members and math.isfinite(value):
            payload = sendable(gradient, want, "birds", key, self.keys[key])
        message = RoundNumbers(
            want.number + (wrong == "number"),
            want.attempt + (wrong == "attempt"),
            b"" if wrong == "empty" else payload + bytes(4) * (wrong == "size"),
        )
        self.rounds.take_gradient(key, message)
        if wrong is None and key in self.rounds.members:
            self.sent[key] = gradient

    @rule(seconds=st.sampled_from([0.0, 1.0, 30.0, LOST_S + 1]))
    def step(self, seconds: float) -> None:
        self.at += seconds
        before, moments = self.rounds.parameters, self.rounds.moments
        assert before is not None
        kept = before.copy()
        sent = dict(self.sent)
        members = [key for key in self.rounds.members if key in sent]
        wants = self.rounds.next_wants(self.at)
        if wants:
            self.check_wants(wants)
        assert self.rounds.number in (self.number, self.number + 1)
        assert len(self.rounds.gradients) == self.rounds.number
        if self.rounds.number > self.number:
            assert not wants and not self.rounds.members
            assert len(members) >= self.terms.quorum
            found = self.rounds.gradients[-1]
            self.check_average(found, [(sent[key], self.shares[key]) for key in members])
            self.reference.step(found)
            assert self.rounds.parameters is not None
            assert np.allclose(self.rounds.parameters, self.reference.numbers, rtol=1e-4, atol=1e-5)
        else:
            assert self.rounds.parameters is before and self.rounds.moments is moments, "nothing has changed"
        assert np.array_equal(before, kept), "what is being sent or saved stays as it is"
        if not self.rounds.members:
            self.asked, self.sent = {}, {}
        self.number = self.rounds.number

    def check_wants(self, wants: dict[bytes, WantGradient]) -> None:
        assert set(self.rounds.members) == wants.keys() and len(wants) >= self.terms.quorum
        assert len({(want.number, want.attempt) for want in wants.values()}) == 1
        assert not {want.attempt for want in wants.values()} & {want.attempt for want in self.asked.values()}
        shares = [want.share for want in wants.values()]
        assert sum(shares) == pytest.approx(1)
        median = float(np.median([max(1, self.rounds.owners[key].examples) for key in wants]))
        counts = {key: want.share / min(shares) for key, want in wants.items()}
        least = min(min(max(1, self.rounds.owners[key].examples), OUTWEIGHS * median) for key in wants)
        if not self.terms.noise:
            assert all(count * least <= OUTWEIGHS * median * (1 + 1e-9) for count in counts.values())
        self.releases += 1
        assert self.rounds.releases == self.releases
        self.asked, self.sent = dict(wants), {}
        self.shares = {key: want.share for key, want in wants.items()}

    def check_average(self, found: Numbers, sent: list[tuple[Numbers, float]]) -> None:
        """The average depends on gradients of this attempt alone."""
        assert np.isfinite(found).all()
        norms = [float(np.linalg.norm(gradient.astype(float))) for gradient, _ in sent]
        finite = [norm for norm in norms if norm < LONGEST]
        most = OUTLIES * float(np.median(finite)) if finite else 0.0
        sound = [(each, norm) for each, norm in zip(sent, norms, strict=True) if norm <= most]
        values = [float(gradient[0]) for (gradient, _), _ in sound]
        if self.terms.masked:
            assert np.linalg.norm(found) <= self.terms.norm * (1 + 1e-5)
        elif not sound:
            assert not found.any()
        elif not self.terms.noise:
            near = 1e-6 * max(1.0, *map(abs, values), 1.0)
            assert min(values) - near <= found[0] <= max(values) + near
            if not self.terms.liars:
                bound = OUTRANGES * float(np.median([norm for _, norm in sound]))
                parts = [(gradient * min(1.0, bound / norm), share) for (gradient, share), norm in sound]
                expected = sum(part * share for part, share in parts) / sum(share for _, share in parts)
                assert np.allclose(found, expected, atol=1e-6)

    @precondition(lambda self: not self.rounds.is_over)
    @rule(rounds=st.integers(1, 3))
    def owners_that_live_finish_rounds(self, rounds: int) -> None:
        """In any state, enough live owners finish a round as time passes."""
        live = list(self.keys)[: max(self.terms.owners, self.terms.quorum)]
        for _ in range(rounds):
            number, steps = self.rounds.number, 0
            while self.rounds.number == number and not self.rounds.is_over:
                for owner, key in enumerate(self.keys):
                    if key in live:
                        if key not in self.rounds.owners:
                            self.join(owner, 10)
                        self.ready(owner, SIZE)
                        if key in self.asked and key not in self.sent:
                            self.send(owner, 0.01, None)
                self.step(LOST_S + 1)
                steps += 1
                assert steps <= 8, "a round hangs"

    @invariant()
    def parameters_are_numbers(self) -> None:
        assert self.rounds.parameters is not None and np.isfinite(self.rounds.parameters).all()
        assert self.rounds.moments is None or np.isfinite(self.rounds.moments).all()


TestCoordination = Coordination.TestCase
