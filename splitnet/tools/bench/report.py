"""The measured figures, and the output of `splitnet bench`: a table, or a document for programs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from splitnet.cli.tables import table
from splitnet.errors import ContextTooLong, SplitnetError

if TYPE_CHECKING:
    from splitnet.session.inference import LinkUse


@dataclass(frozen=True, slots=True)
class Case:
    """Exact numbers of tokens to send and to generate."""

    tokens: int  # number of tokens of the prompt in a prefill, otherwise of each client's answer
    decodes: bool = False  # whether tokens after the first token are measured; otherwise the prompt is measured
    context: int = 0  # tokens in the KV cache before the measured answer
    clients: int = 1  # number of concurrent clients

    @property
    def name(self) -> str:
        return f"{'decode' if self.decodes else 'prefill'} {self.tokens}"

    @property
    def prompt(self) -> int:
        """Tokens of each client's prompt, at least 1."""
        return max(1, self.context) if self.decodes else self.tokens

    @property
    def new_tokens(self) -> int:
        """Tokens that each client generates. The prefill yields the first token, so the measurement begins after it."""
        return self.tokens + 1 if self.decodes else 1

    @property
    def positions(self) -> int:
        """Positions in each client's KV cache at the end; the model does not read the last token."""
        return self.prompt + self.new_tokens - 1


def cases_of(prefills: Sequence[int], decode: int, contexts: Sequence[int], clients: Sequence[int]) -> list[Case]:
    """All prompts, then answers of `decode` tokens for each context and number of clients.

    A length of 0 in `prefills`, or `decode` 0, leaves out the prompt or the answers.
    """
    cases = [Case(tokens) for tokens in prefills if tokens]
    if decode:
        cases += [Case(decode, True, context, count) for context in contexts for count in clients]
    return list(dict.fromkeys(cases))


def check_room(cases: Sequence[Case], max_positions: int | None) -> None:
    """Raises ContextTooLong, with the option to lower, if a case does not fit in the context (None: unbounded)."""
    for case in cases:
        if max_positions is None or case.positions <= max_positions:
            continue
        limit = f"more than the model's context of {max_positions:,}"
        if not case.decodes:
            raise ContextTooLong(f"a prompt of {case.tokens:,} tokens is {limit}: lower --prefill, or give 0 for none")
        raise ContextTooLong(
            f"{case.tokens:,} tokens after a context of {case.prompt:,} are {case.positions:,} positions, {limit}: "
            "lower --context or --decode"
        )


TOKENS_PER_S: Final = "tokens_per_s"
FIRST_TOKEN_MS: Final = "first_token_ms"
TOKEN_MS_P50: Final = "token_ms_p50"
TOKEN_MS_P95: Final = "token_ms_p95"
SENT_BYTES: Final = "sent_bytes_per_token"
RECEIVED_BYTES: Final = "received_bytes_per_token"
JOULES: Final = "joules_per_token"


@dataclass(frozen=True, slots=True)
class ReportedHop:
    """A peer of a route, with the blocks `[start, end)` that it ran."""

    start: int
    end: int
    peer: str
    address: str
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class ReportedRoute:
    """The peers of a client's route, and the links of the route, from the client back to the client."""

    hops: tuple[ReportedHop, ...]
    links: tuple[LinkUse, ...]


@dataclass(frozen=True, slots=True)
class MeasuredTraffic:
    """A client's traffic with peers during the measurement. Received bytes include only payloads."""

    sent_bytes: int
    received_bytes: int
    positions: int  # all positions that the model read: those of the prompt and of the generated tokens
    repairs: int
    route: ReportedRoute
    joules_per_token: float | None = None  # sum for a decoded token, as all hops report; None: a hop does not report


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Measurements of one client: seconds to its first token, and between tokens after all clients had one token."""

    first_token_s: float
    token_s: tuple[float, ...]
    traffic: MeasuredTraffic | None = None  # None for plain transformers

    @property
    def new_tokens(self) -> int:
        return 1 + len(self.token_s)


Round = tuple[TokenTimes, ...]  # the answers of all clients of a case in one round


@dataclass(frozen=True, slots=True)
class Spread:
    """The median and the range of a figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def figures_of(case: Case, seen: Round) -> dict[str, float]:
    """The figures of one round: tokens per second of all clients together, and ms and bytes of their tokens."""
    first_token_s = statistics.median(answer.first_token_s for answer in seen)
    figures = {FIRST_TOKEN_MS: first_token_s * 1000}
    if case.decodes:
        gaps = [gap for answer in seen for gap in answer.token_s]
        figures[TOKENS_PER_S] = len(gaps) / max(sum(answer.token_s) for answer in seen)
        figures[TOKEN_MS_P50], figures[TOKEN_MS_P95] = (1000 * np.quantile(gaps, (0.5, 0.95))).tolist()
    else:
        figures[TOKENS_PER_S] = case.tokens / first_token_s
    traffics = [answer.traffic for answer in seen if answer.traffic is not None]
    if traffics:
        tokens = case.tokens * len(traffics)
        figures[SENT_BYTES] = sum(traffic.sent_bytes for traffic in traffics) / tokens
        figures[RECEIVED_BYTES] = sum(traffic.received_bytes for traffic in traffics) / tokens
        joules = [traffic.joules_per_token for traffic in traffics if traffic.joules_per_token is not None]
        if case.decodes and len(joules) == len(traffics):
            figures[JOULES] = statistics.fmean(joules)
    return figures


# Called with the stage, and the numbers of finished and of all measurements in this stage.
Progress = Callable[[str, int, int], None]


class Arm(Protocol):
    """A method of running the model."""

    def run_case(self, case: Case) -> Round: ...


@dataclass(frozen=True)
class Measured:
    """A case with its rounds, by arm."""

    case: Case
    rounds: Mapping[str, Sequence[Round]]

    def figures(self, arm: str) -> list[dict[str, float]]:
        return [figures_of(self.case, seen) for seen in self.rounds[arm]]

    def spreads(self, arm: str) -> dict[str, Spread]:
        """The spread of each figure that all rounds have, over at least one round."""
        rounds = self.figures(arm)
        names = [name for name in rounds[0] if all(name in figures for figures in rounds)]
        return {name: Spread.of([figures[name] for figures in rounds]) for name in names}

    def ratio(self, arm: str, other: str) -> Spread:
        """Tokens per second of one arm divided by those of another arm, over the rounds."""
        pairs = zip(self.figures(arm), self.figures(other), strict=True)
        return Spread.of([figures[TOKENS_PER_S] / others[TOKENS_PER_S] for figures, others in pairs])


def turns(cases: Sequence[Case], arms: Sequence[str], rounds: int, warm_up: int) -> Iterator[tuple[int, Case, str]]:
    """Yields the round, case and arm of each measurement, in order; rounds below 1 do not count.

    The order of the arms alternates between rounds, so that no arm always comes first.
    """
    for number in range(1 - warm_up, rounds + 1):
        for case in cases:
            for arm in arms if number % 2 else reversed(arms):
                yield number, case, arm


def measure(
    arms: Mapping[str, Arm], cases: Sequence[Case], *, rounds: int, warm_up: int, progress: Progress
) -> list[Measured]:
    """Runs all cases with all arms. Raises SplitnetError if an arm fails, or returns another number of tokens."""
    seen: dict[tuple[Case, str], list[Round]] = {(case, arm): [] for case in cases for arm in arms}
    of_each_round = len(cases) * len(arms)
    for index, (number, case, arm) in enumerate(turns(cases, list(arms), rounds, warm_up)):
        stage = f"round {number} of {rounds}" if number > 0 else f"warm-up {number + warm_up} of {warm_up}"
        progress(stage, index % of_each_round, of_each_round)
        answers = arms[arm].run_case(case)
        wanted, given = case.new_tokens, [answer.new_tokens for answer in answers]
        if given != [wanted] * case.clients:
            raise SplitnetError(
                f"{arm}: an answer of {wanted} tokens ended after {min(given, default=0)}: remove what ends "
                "answers, such as stop_strings or max_time, from the model's generation_config.json"
            )
        if number > 0:
            seen[case, arm].append(answers)
    return [Measured(case, {arm: seen[case, arm] for arm in arms}) for case in cases]


SWARM, LOCAL = "swarm", "local"  # the two arms of the command
_FIRST_TOKEN = "first\ntoken ms"
_LOCAL_SPEED = f"{LOCAL}:\ntokens/s"
_RATIO = f"{SWARM} /\n{LOCAL}"


@dataclass(frozen=True)
class Report:
    """All measurements: all cases with the same arms, `SWARM`, `LOCAL` or both.

    The settings of the command and the environment (versions, platform, threads and kernels) are parts of the document.
    """

    model: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    measured: Sequence[Measured]

    @property
    def arms(self) -> list[str]:
        return list(self.measured[0].rounds)

    def routes(self) -> Counter[ReportedRoute]:
        """Distinct routes, and the number of answers through each."""
        return Counter(traffic.route for traffic in self._traffics())

    def document(self) -> dict[str, Any]:
        """The document for JSON: all rounds, medians and ranges; routes are named by their index."""
        routes = list(self.routes())
        return {
            "model": self.model,
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "routes": [asdict(route) for route in routes],
            "tests": [self._test(measured, routes) for measured in self.measured],
        }

    def table(self) -> str:
        """A row per case; if both arms were measured, the first columns are the swarm's."""
        first = self.arms[0]
        cases = [measured.case for measured in self.measured]
        rows: list[list[str]] = []
        columns = ["context"] * any(case.context for case in cases)
        columns += ["clients"] * any(case.clients > 1 for case in cases)
        columns += ["tokens/s", _FIRST_TOKEN, "ms/token", "p95"]
        columns += ["J/token"] * any(JOULES in measured.spreads(first) for measured in self.measured)
        columns += [_LOCAL_SPEED, _RATIO] * (len(self.arms) > 1)
        for measured in self.measured:
            case, spreads = measured.case, measured.spreads(first)
            cells = {
                "context": f"{case.context:,}" if case.decodes else "",
                "clients": str(case.clients) if case.decodes else "",
                "tokens/s": with_range(spreads[TOKENS_PER_S]),
                _FIRST_TOKEN: number(spreads[FIRST_TOKEN_MS].median) if not case.decodes else "",
                "ms/token": number(spreads[TOKEN_MS_P50].median) if case.decodes else "",
                "p95": number(spreads[TOKEN_MS_P95].median) if case.decodes else "",
                "J/token": number(spreads[JOULES].median) if JOULES in spreads else "?" * case.decodes,
            }
            if len(self.arms) > 1:
                cells[_LOCAL_SPEED] = with_range(measured.spreads(LOCAL)[TOKENS_PER_S])
                cells[_RATIO] = f"{measured.ratio(SWARM, LOCAL).median:.2f}"
            rows.append([case.name, *(cells[column] for column in columns)])
        return table(["test", *columns], rows, columns, title=self._title())

    def sentence(self) -> str:
        local = f"plain transformers in this process, with {counted(self.environment['threads'], 'thread')}"
        routes = self.routes()
        if not routes:
            return f"By {local}."
        route, answers = routes.most_common(1)[0]
        others = ""
        if len(routes) > 1:
            others = f" ({answers} of {routes.total()} answers; {counted(len(routes) - 1, 'other route')})"
        repairs = sum(traffic.repairs for traffic in self._traffics())
        repaired = f" {counted(repairs, 'time')} a route was repaired or left for a better one." if repairs else ""
        beside = f"; {LOCAL}: {local}" if LOCAL in self.arms else ""
        peers = counted(len(route.hops), "peer")
        kernels = f" The client's kernels: {self.environment['kernels'] or 'torch'}."
        return f"Through {peers}, with bytes per decoded token: {drawn(route)}{others}{beside}.{repaired}{kernels}"

    def _title(self) -> str:
        rounds = len(self.measured[0].rounds[self.arms[0]])
        over = f"{rounds} rounds: medians (lowest-highest)" if rounds > 1 else "one round"
        return f"{self.model}, {over}"

    def _traffics(self) -> list[MeasuredTraffic]:
        rounds = [seen for measured in self.measured for of_arm in measured.rounds.values() for seen in of_arm]
        return [answer.traffic for seen in rounds for answer in seen if answer.traffic is not None]

    def _test(self, measured: Measured, routes: Sequence[ReportedRoute]) -> dict[str, Any]:
        case = measured.case
        test: dict[str, Any] = {
            "test": "decode" if case.decodes else "prefill",
            "tokens": case.tokens,
            "context": case.context,
            "prompt_tokens": case.prompt,
            "clients": case.clients,
        }
        for arm, rounds in measured.rounds.items():
            test[arm] = {name: asdict(spread) for name, spread in measured.spreads(arm).items()}
            test[arm]["rounds"] = [
                {**figures, "answers": [_answer(answer, routes) for answer in seen]}
                for figures, seen in zip(measured.figures(arm), rounds, strict=True)
            ]
        if len(self.arms) > 1:
            test["swarm_to_local"] = asdict(measured.ratio(SWARM, LOCAL))
        return test


def drawn(route: ReportedRoute) -> str:
    """A route as text, with codec and bytes of a decoded token on each link."""
    text = "client"
    for link in route.links:
        carried = ", via client" * link.sender.endswith(" via client")
        text += f" -[{link.codec}, {link.bytes_per_token:,}{carried}]-> {link.receiver}"
    return text


def counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def number(value: float) -> str:
    """The text of a number, with fewer decimal places for larger numbers."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def with_range(spread: Spread) -> str:
    """The text of a median and its range. The range is left out if its ends are equal, as after one round."""
    if spread.low == spread.high:
        return number(spread.median)
    return f"{number(spread.median)} ({number(spread.low)}-{number(spread.high)})"


def _answer(answer: TokenTimes, routes: Sequence[ReportedRoute]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "new_tokens": answer.new_tokens,
        "first_token_ms": answer.first_token_s * 1000,
        "token_ms": [round(seconds * 1000, 3) for seconds in answer.token_s],
    }
    traffic = answer.traffic
    if traffic is not None:
        values |= asdict(traffic) | {"route": routes.index(traffic.route)}
    return values
