"""Rounds of joint tuning: owners of examples train one adapter, and a coordinator averages their gradients.

A round is one step of the optimizer: every owner sends the gradient of a batch of its examples at the common
parameters, and the coordinator takes the step with the mean of the gradients, weighted by numbers of examples (FedSGD,
McMahan et al., arXiv:1602.05629, section 2). So the mean has no bias, for any trained parameters and any distribution
of labels. The module has no I/O and no clock: times are seconds by the caller's clock. Keys are CURVE keys, 32 bytes.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from nacl.bindings import crypto_box_beforenm
from nacl.utils import randombytes_deterministic

from splitnet.errors import ProtocolError, SplitnetError
from splitnet.tools.tune.methods import TrainingSettings
from splitnet.wire.messages import MAX_ATTEMPT, MAX_OWNERS, MAX_ROUNDS, RoundNumbers, WantGradient

LEAST_MASKED = 3  # Minimum number of owners for masks: each of two owners would learn the other owner's gradient
STRAGGLE = 2.0
LEAST_WAIT_S = 5.0
"""A round waits for stragglers until `STRAGGLE` times the time after which enough owners were ready, and at least
`LEAST_WAIT_S` seconds."""
LOST_S = 600.0
LOST_TIMES, LEAST_LOST_S = 10.0, 60.0
"""If fewer than half of the owners send their gradients, the missing owners count as gone after `LOST_TIMES` times the
duration of the last round, but not before `LEAST_LOST_S` seconds and not after `LOST_S` seconds."""
FORGIVEN = 2  # After an owner has missed this many rounds, later rounds do not wait for this owner
MAX_GRADIENTS_BYTES = 4 << 30  # Maximum bytes of gradients that the coordinator holds at the same time
OUTWEIGHS = 4  # The weight of an owner is at most this many times the median number of examples
# A gradient is reported as shortened if it keeps less than this share of its norm; smaller changes are rounding errors
SHORTENED = 0.999
# Multiples of the median norm: without a given norm, gradients with a norm above the first multiple are shortened;
# gradients with a norm above the second multiple are dropped
OUTRANGES, OUTLIES = 2, 5
LONGEST = 1e18  # Maximum norm of a gradient: the squares of larger values overflow float32
MAX_NORM, MAX_NOISE = 1e6, 16.0  # Maxima of --norm and --noise: sums with more noise may not fit into 32 bits
DELTA = 1e-5  # The delta of the privacy budget

Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class RoundRules:
    """The rules of a joint tuning.

    owners: number of owners that the first round needs; later rounds need half of this number. norm: maximum norm of a
    gradient, longer gradients are shortened; 0: twice the median. noise: standard deviation of the noise in the sum of
    gradients, as a multiple of `norm`. masked: owners add masks that cancel out, so that the coordinator sees only
    sums. liars: number of owners that may send arbitrary numbers: gradients are averaged in 2 * liars + 1 groups, and
    the median of the groups counts.
    """

    owners: int = 2
    norm: float = 0.0
    noise: float = 0.0
    masked: bool = False
    liars: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.norm <= MAX_NORM and 0 <= self.noise <= MAX_NOISE):
            raise SplitnetError(f"give a --norm of 0 to {MAX_NORM:g}, and a --noise of 0 to {MAX_NOISE:g}")
        if (self.noise or self.masked) and not self.norm:
            raise SplitnetError("noise and masks need a maximum norm of gradients: give --norm, such as 1")
        if self.masked and self.liars:
            raise SplitnetError("with --masked the coordinator sees no single gradient: leave out --liars")
        if self.masked and self.owners < LEAST_MASKED:
            raise SplitnetError(f"with so few owners, masks hide nothing: give --owners {LEAST_MASKED} or more")
        if self.owners < 2 * self.liars + 1:
            raise SplitnetError(f"{self.liars} liars need {2 * self.liars + 1} owners or more: raise --owners")

    @property
    def quorum(self) -> int:
        """Number of owners that every round after the first needs."""
        return max((self.owners + 1) // 2, LEAST_MASKED if self.masked else 2 * self.liars + 1)


@dataclass(slots=True)
class Owner:
    """The coordinator's state of one owner.

    tried: the owner has computed a gradient. delivered: the last requested gradient has arrived. failed: number of
    consecutive requested gradients that did not arrive. back_at: number of the round from which gradients of this owner
    are requested again. missed: number of consecutive rounds without a gradient of this owner.
    """

    examples: int
    ready: bool = False
    tried: bool = False
    delivered: bool = False
    failed: int = 0
    back_at: int = 0
    missed: int = 0
    share: float = 0.0  # the weight of the owner's gradient in the average
    gradient: bytes | None = None

    @property
    def is_awaited(self) -> bool:
        return self.tried and self.missed < FORGIVEN


@dataclass(eq=False)
class Rounds:
    """The coordinator's state.

    settings: settings from the owner that starts the rounds; None: this owner has not joined. number: how many of the
    `rounds` are finished. parameters: the trained numbers, float32 `[n]`; the owner that starts the rounds initializes
    them. moments: the moments of the optimizer, `[2, n]`. releases: number of sums with contributions of owners, which
    the privacy budget counts. told: messages for the user.
    """

    rules: RoundRules
    settings: TrainingSettings | None = None
    rounds: int = 0
    number: int = 0
    parameters: Numbers | None = None
    moments: Numbers | None = None
    releases: int = 0
    owners: dict[bytes, Owner] = field(default_factory=dict[bytes, Owner])
    told: list[str] = field(default_factory=list[str])
    members: tuple[bytes, ...] = ()  # owners whose gradients are requested; empty: owners still compute gradients
    _attempt: int = 0
    _began: float | None = None  # time at which this round, or the last attempt to collect gradients, began
    _enough_at: float | None = None
    _took_s: float = LOST_S  # duration of collecting the gradients of the last round

    @property
    def is_over(self) -> bool:
        return self.settings is not None and self.number >= self.rounds

    @property
    def ready(self) -> int:
        return sum(owner.ready for owner in self.owners.values())

    @property
    def present(self) -> int:
        """Number of owners that a round waits for."""
        return max(self._needed, sum(owner.is_awaited for owner in self.owners.values())) if self.owners else 0

    @property
    def _needed(self) -> int:
        return self.rules.quorum if self.number else max(self.rules.quorum, self.rules.owners)

    def accept_settings(self, settings: TrainingSettings) -> None:
        """Uses these settings, unless settings are known. Raises SplitnetError if the number of steps is too large."""
        if not 0 < settings.steps <= MAX_ROUNDS:
            raise SplitnetError(f"a joint tuning has at most {MAX_ROUNDS:,} steps: lower --steps")
        if self.settings is None:
            self.settings, self.rounds = settings, settings.steps

    def add_owner(self, key: bytes, examples: int, now: float) -> None:
        """Adds an owner.

        If all places are taken, an owner that has not delivered its last requested gradient loses its place; this owner
        joins again when it is ready with a gradient. Raises SplitnetError if all places belong to delivering owners.
        """
        if key not in self.owners and len(self.owners) >= MAX_OWNERS:
            works = {each for each, owner in self.owners.items() if owner.delivered and owner.missed < FORGIVEN}
            idle = [each for each in self.owners if each not in works and each not in self.members]
            if not idle:
                raise SplitnetError(f"{MAX_OWNERS} owners take part already: join again later")
            del self.owners[min(idle, key=lambda each: self.owners[each].ready)]
        owner = self.owners.setdefault(key, Owner(0))
        owner.examples, owner.ready, owner.gradient = max(1, examples), False, None
        owner.missed = 0 if owner.delivered else owner.missed
        self._began = now if self._began is None else self._began

    def tries(self, key: bytes) -> None:
        """Marks an owner that has computed a gradient, even for an earlier round, so that later rounds wait for it."""
        owner = self.owners[key]
        owner.missed, owner.tried = owner.missed if owner.tried else 0, True

    def offer(self, key: bytes, size: int) -> None:
        """Marks an owner as ready with a gradient; has no effect before the parameters are known.

        Raises SplitnetError if the gradient has another size, is too large, or delivering owners use all the memory.
        """
        if self.parameters is None:
            return
        most = MAX_GRADIENTS_BYTES // (4 * self.rules.owners)
        if size != self.parameters.size:
            raise SplitnetError(f"the round trains {self.parameters.size:,} numbers, this adapter {size:,}")
        if size > most:
            raise SplitnetError(f"{size:,} numbers of {self.rules.owners} owners are too many: train at most {most:,}")
        if sum(owner.delivered for each, owner in self.owners.items() if each != key) >= self._places:
            raise SplitnetError(f"the coordinator has memory for {self._places} owners of {size:,} numbers: join later")
        self.tries(key)
        self.owners[key].ready = True

    @property
    def _places(self) -> int:
        """Maximum number of gradients that the coordinator holds at the same time."""
        assert self.parameters is not None
        return MAX_GRADIENTS_BYTES // max(1, self.parameters.nbytes)

    def take_gradient(self, key: bytes, numbers: RoundNumbers) -> None:
        """Stores a requested gradient; drops any other gradient."""
        owner = self.owners.get(key)
        wanted = key in self.members and (self.number, self._attempt) == (numbers.number, numbers.attempt)
        size = self.parameters.nbytes if self.parameters is not None else 0
        if owner is not None and wanted and len(numbers.payload) == size:
            owner.gradient = bytes(numbers.payload)

    def next_wants(self, now: float) -> dict[bytes, WantGradient]:
        """The messages to send to owners at this time. Increases `number` when it averages the gradients of a round."""
        if self.is_over or self._began is None:
            return {}
        if self.members:
            return self._collect(now)
        ready = [key for key, owner in self.owners.items() if owner.ready]
        trusted = [key for key in ready if self.owners[key].back_at <= self.number]
        ready = trusted if len(trusted) >= self._needed else ready
        if len(ready) < self._needed:
            self._enough_at = None
            return {}
        waits = any(owner.is_awaited and not owner.ready for owner in self.owners.values())
        if waits and not self._is_late(now):
            return {}
        return self._want(sorted(ready, key=lambda key: not self.owners[key].delivered)[: self._places], now)

    def _is_late(self, now: float) -> bool:
        assert self._began is not None
        self._enough_at = now if self._enough_at is None else self._enough_at
        return now - self._began > max(LEAST_WAIT_S, STRAGGLE * (self._enough_at - self._began))

    def _want(self, keys: Sequence[bytes], now: float) -> dict[bytes, WantGradient]:
        rules = self.rules
        for key in keys:
            self.owners[key].gradient = None
        self.members = tuple(sorted(keys))
        # The number of an attempt is random, so that it never repeats, even after a restart of the coordinator, because
        # masks are derived from it.
        self._attempt, self._began, self._enough_at = 1 + secrets.randbelow(MAX_ATTEMPT), now, None
        self.releases += 1
        examples = [self.owners[key].examples for key in self.members]
        most = OUTWEIGHS * float(np.median(examples))
        weights = [1.0 if rules.noise else min(each, most) for each in examples]
        # The noise must suffice in every reported sum, even against an owner that subtracts its own noise. With liars,
        # the smallest reported sum is that of one group.
        others = len(weights) // (2 * rules.liars + 1) - 1
        spread = rules.noise * rules.norm / math.sqrt(max(1, others))
        masking = self.members if rules.masked else ()
        wants = dict[bytes, WantGradient]()
        for key, weight in zip(self.members, weights, strict=True):
            share = self.owners[key].share = weight / sum(weights)
            wants[key] = WantGradient(self.number, self._attempt, share, rules.norm, spread, masking)
        return wants

    def _collect(self, now: float) -> dict[bytes, WantGradient]:
        assert self._began is not None
        sent = [key for key in self.members if self.owners[key].gradient is not None]
        if len(sent) < len(self.members):
            # Only owners that delivered gradients before count, because anybody can make keys. If there are no such
            # owners, as in the first round, the required number of owners is expected.
            proven = {key for key in self.members if self.owners[key].delivered}
            expected = len(proven) or min(len(self.members), self.rules.owners)
            half = 2 * len(proven.intersection(sent) if proven else sent) >= expected
            lost_s = min(LOST_S, max(LEAST_LOST_S, LOST_TIMES * self._took_s))
            if not (self._is_late(now) if half else now - self._began > lost_s):
                return {}
            for key in set(self.members) - set(sent):
                owner = self.owners[key]
                owner.ready = owner.delivered = False
                owner.missed, owner.failed = owner.missed + 1, owner.failed + 1
                owner.back_at = self.number + 1 + 2**owner.failed
            self.told.append(f"{len(self.members) - len(sent)} owners did not send their gradients")
            enough = len(sent) >= self.rules.quorum
            # Without the missing owners, masks do not cancel out, and noise is missing.
            if not enough or self.rules.masked or self.rules.noise:
                self.members, self._began, self._enough_at = (), now, None
                return self._want(sent, now) if enough else {}
        self._average(sent)
        self._began, self._enough_at, self._took_s = now, None, now - self._began
        return {}

    def _average(self, keys: Sequence[bytes]) -> None:
        rules, owners = self.rules, [self.owners[key] for key in keys]
        gradients = [np.frombuffer(owner.gradient or b"", "<f4") for owner in owners]
        shares = np.array([owner.share for owner in owners])
        if rules.masked:  # shares add up to 1, so the sum is like one gradient
            gradients, shares = [unmasked([owner.gradient or b"" for owner in owners], rules.norm)], np.ones(1)
        self._descend(averaged(gradients, shares, rules, np.random.default_rng(), self.told.append))
        self.number += 1
        self.told.append(f"round {self.number} of {self.rounds}: {len(keys)} owners")
        for key, owner in self.owners.items():
            if key in keys:
                owner.delivered, owner.failed, owner.missed = True, 0, 0
            elif key not in self.members:
                owner.missed += 1
            owner.ready, owner.gradient = owner.ready and key not in keys, None
        self.members = ()

    def _descend(self, gradient: Numbers) -> None:
        """A step of AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2), with torch's defaults."""
        settings, before = self.settings, self.parameters
        assert settings is not None and before is not None
        norm, rate = float(np.linalg.norm(gradient)), settings.learning_rate_at(self.number)
        gradient = gradient * min(1.0, (settings.clip or math.inf) / max(norm, 1e-30))
        first, second = self.moments if self.moments is not None else np.zeros((2, before.size), np.float32)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        count = self.number + 1
        along = first / (1 - 0.9**count) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
        self.moments = np.stack([first, second]).astype(np.float32)
        self.parameters = (before * (1 - rate * settings.weight_decay) - rate * along).astype(np.float32)


def averaged(
    gradients: Sequence[Numbers],
    shares: Numbers,
    rules: RoundRules,
    random: np.random.Generator,
    say: Any = lambda _: None,
) -> Numbers:
    """The weighted mean of gradients, float32 `[n]` each; with `rules.liars`, the element-wise median of the means of
    random groups. Gradients that are not finite or far too long are left out, and long gradients are shortened.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.array([float(np.linalg.norm(gradient.astype(np.float64))) for gradient in gradients])
    finite = norms < LONGEST
    if not finite.any():
        say("no gradient is finite")
        return np.zeros_like(gradients[0])
    sound = finite & (norms <= OUTLIES * float(np.median(norms[finite])))
    if not sound.all():
        say(f"{int((~sound).sum())} gradients are not finite or far too long, and are left out")
    bound = rules.norm * (1 + rules.noise * math.sqrt(gradients[0].size)) or OUTRANGES * float(np.median(norms[sound]))
    factors = np.minimum(1.0, bound / np.maximum(norms, 1e-30))
    if shortened := int((factors[sound] < SHORTENED).sum()):
        say(f"{shortened} gradients are longer than {bound:.3g}, and are shortened")
    order = random.permutation(np.flatnonzero(sound))
    means = list[Numbers]()
    for group in np.array_split(order, min(len(order), 2 * rules.liars + 1)):
        mean = np.zeros(gradients[0].size, np.float64)
        for place in group:
            mean += gradients[place] * (factors[place] * shares[place] / shares[group].sum())
        means.append(mean)
    return np.median(means, axis=0).astype(np.float32) if len(means) > 1 else means[0].astype(np.float32)


def sendable(gradient: Numbers, want: WantGradient, name: str, own: bytes, secret: bytes) -> bytes:
    """The message of an owner: its gradient, float32 `[n]`, shortened, with noise, and with masks if requested.

    Masks are those of Bonawitz et al., "Practical Secure Aggregation", CCS 2017, section 4: in each pair of owners, one
    owner adds and the other owner subtracts numbers that are derived from the shared secret of both. Masks are not
    recovered: if an owner is lost, the other owners send their gradients again with new masks.

    own, secret: the owner's public and secret CURVE keys, 32 bytes each. Raises ProtocolError if masks would hide
    nothing, because too few other owners take part.
    """
    if want.norm:
        gradient = gradient * min(1.0, want.norm / max(float(np.linalg.norm(gradient)), 1e-30))
    if want.noise:
        gradient = gradient + np.random.default_rng().normal(0, want.noise, gradient.size)
    if not want.members:
        return gradient.astype("<f4").tobytes()
    members = set(want.members)
    if own not in members or len(members) < LEAST_MASKED or len(members) < len(want.members) or not want.norm:
        raise ProtocolError("the coordinator names too few owners, or no norm: masks would hide nothing")
    total = np.rint(gradient.astype(np.float64) * want.share * _scale(want.norm)).astype(np.int64).astype(np.uint32)
    about = repr((name, want.number, want.attempt, sorted(members))).encode()
    for other in members - {own}:
        seed = blake2b(about, key=crypto_box_beforenm(other, secret), digest_size=32).digest()
        mask = np.frombuffer(randombytes_deterministic(4 * gradient.size, seed), "<u4")
        total = total + mask if own < other else total - mask
    return total.astype("<u4").tobytes()


def unmasked(gradients: Sequence[bytes], norm: float) -> Numbers:
    """The sum of the masked gradients of all members, float32 `[n]`."""
    total = np.zeros(len(gradients[0]) // 4, np.uint32)
    for gradient in gradients:
        total = total + np.frombuffer(gradient, "<u4")
    return (total.astype(np.int32) / _scale(norm)).astype(np.float32)


def _scale(norm: float) -> float:
    # Leaves room for noise in 32 bits: shares add up to 1, so the norm of a sum of gradients is at most `norm`.
    return 2**24 / norm


def budget(noise: float, releases: int) -> float:
    """The epsilon of all averages so far, at delta `DELTA`.

    Epsilon bounds how well somebody who knows the averages and the gradients of one other owner can find out whether an
    owner sent gradients or zeros, for any examples of this owner. By the Gaussian mechanism (Bun and Steinke,
    arXiv:1605.02065, propositions 1.3 and 1.6): each sum has noise whose standard deviation is `noise` times the
    maximum norm of a gradient.
    """
    rho = releases / (2 * noise**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / DELTA))
