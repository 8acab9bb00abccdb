"""The rounds of a benchmark: arms take turns, so that what else the machines do meets all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from splitnet.bench.cases import Case
from splitnet.bench.figures import Round, Spread, figures_of, ratio_of, spreads_of
from splitnet.errors import SplitnetError

Progress = Callable[[str, int, int], None]
"""Is told the stage, and how many of how many measurements of it are done."""


class Arm(Protocol):
    """A way to run the model."""

    def run(self, case: Case) -> Round:
        """Runs a case once, with exactly its tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Turn:
    """One measurement; those of rounds before the first do not count."""

    round: int
    case: Case
    arm: str


@dataclass(frozen=True)
class Measured:
    """A case with its rounds, by arm."""

    case: Case
    rounds: Mapping[str, Sequence[Round]]

    def figures(self, arm: str) -> list[dict[str, float]]:
        """Of each round."""
        return [figures_of(self.case, seen) for seen in self.rounds[arm]]

    def spreads(self, arm: str) -> dict[str, Spread]:
        """Each figure over the rounds."""
        return spreads_of(self.figures(arm))

    def ratio(self, arm: str, other: str) -> Spread:
        """Tokens per second of one arm as a part of another's, round by round."""
        return ratio_of(self.figures(arm), self.figures(other))


def turns(cases: Sequence[Case], arms: Sequence[str], rounds: int, warm_up: int) -> Iterator[Turn]:
    """All measurements in order. Arms change places with every round, so that none always comes first."""
    for number in range(1 - warm_up, rounds + 1):
        for case in cases:
            for arm in arms if number % 2 else reversed(arms):
                yield Turn(number, case, arm)


def measure(
    arms: Mapping[str, Arm], cases: Sequence[Case], *, rounds: int, warm_up: int, progress: Progress
) -> list[Measured]:
    """Runs all cases with all arms.

    Raises:
        SplitnetError: an arm failed, or did not give exactly the tokens that it was asked for.
    """
    seen: dict[tuple[Case, str], list[Round]] = {(case, arm): [] for case in cases for arm in arms}
    of_each_round = len(cases) * len(arms)
    for index, turn in enumerate(turns(cases, list(arms), rounds, warm_up)):
        stage = f"round {turn.round} of {rounds}" if turn.round > 0 else f"warm-up {turn.round + warm_up} of {warm_up}"
        progress(stage, index % of_each_round, of_each_round)
        answers = arms[turn.arm].run(turn.case)
        _check_exact(turn, answers)
        if turn.round > 0:
            seen[turn.case, turn.arm].append(answers)
    return [Measured(case, {arm: seen[case, arm] for arm in arms}) for case in cases]


def _check_exact(turn: Turn, answers: Round) -> None:
    wanted = turn.case.new_tokens
    given = [answer.new_tokens for answer in answers]
    if given != [wanted] * turn.case.clients:
        raise SplitnetError(
            f"{turn.arm}: an answer of {wanted} tokens ended after {min(given, default=0)}: remove what ends answers, "
            "such as stop_strings or max_time, from the model's generation_config.json"
        )
