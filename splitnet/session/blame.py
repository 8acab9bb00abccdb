"""Decides who is at fault when a request fails: a hop, the hop before it, or the request itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scheduler.liveness import PingVerdict, Verdict
from splitnet.errors import (
    ContextTooLong,
    NotFinite,
    PeerBusy,
    PeerFailed,
    PeerLeaving,
    PeerLost,
    SessionLost,
    SplitnetError,
    WrongSwarm,
)
from splitnet.session.events import Cause
from splitnet.session.failover import PeerSilent, RouteHop
from splitnet.session.requests import PassRequest, Request, StepRequest
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Failure, FailureCode

_LACKS_STATE = (FailureCode.UNKNOWN_SESSION, FailureCode.OUT_OF_ORDER, FailureCode.STALE_EPOCH, FailureCode.TOO_LONG)
"""Codes that are believed once: the hop restarted, or still works on an older epoch."""
_MAY_BE_FEEDERS = (FailureCode.BAD_MESSAGE, FailureCode.OUT_OF_ORDER, FailureCode.TOO_LONG, FailureCode.NOT_FINITE)
"""Codes that the previous hop may have caused."""
_ERROR_OF_CODE: dict[int, type[SplitnetError]] = {
    FailureCode.BUSY: PeerBusy,
    FailureCode.WRONG_MODEL: WrongSwarm,
    FailureCode.TOO_LONG: ContextTooLong,
    FailureCode.UNKNOWN_SESSION: SessionLost,
    FailureCode.OUT_OF_ORDER: SessionLost,
    FailureCode.STALE_EPOCH: SessionLost,
    FailureCode.LEAVING: PeerLeaving,
}


class Replace(NamedTuple):
    """Hops must be replaced. lost: the error of each. cleared: names of banned peers that were not at fault."""

    lost: dict[Endpoint, SplitnetError]
    cleared: tuple[str, ...] = ()


class OpenAgain(NamedTuple):
    """The same hops must be opened again. wrong: hops whose caches must be computed again."""

    cause: Cause
    reason: str
    wrong: tuple[RouteHop, ...] = ()


class RequestsFault(NamedTuple):
    """No hop is at fault: the caller gets the error."""

    error: SplitnetError


Decision = Replace | OpenAgain | RequestsFault
Requests = Collection[Request[Any]]


@dataclass(slots=True)
class Faults:
    """Faults since the last answer, or since a time when nothing was under way.

    Attributes:
        hops: the route.
        attempts: routes that have failed.
        suspects: hops that may lose requests.
        strikes: by name of a peer, how often it had forgotten the session.
        complaints: by failure code, the names of the peers that answered with it; code 0: an unusable answer.
        refusing: by name of a hop, the names of peers that have refused what this hop sent on.
    """

    hops: Sequence[RouteHop] = ()
    attempts: int = 0
    suspects: list[Endpoint] = field(default_factory=list[Endpoint])
    strikes: dict[str, int] = field(default_factory=dict[str, int])
    complaints: dict[int, list[str]] = field(default_factory=dict[int, list[str]])
    refusing: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def request_failed(self, hop: RouteHop, code: int, error: SplitnetError, request: Request[Any] | None) -> Decision:
        """A hop has answered a request with a failure. request: None for a replay, or for an unknown request."""
        feeder = self._feeder(hop, request)
        if feeder is not None and code in _MAY_BE_FEEDERS:
            refusing = self.refusing.setdefault(feeder.name, [])
            if code not in _LACKS_STATE or hop.name not in refusing:
                refusing.append(hop.name)
            if len(refusing) == 2:  # if the next feeder is refused as well, the refusing hop is at fault
                self.complaints.setdefault(code, []).append(hop.name)
                text = f"two peers refuse the output of the peer at {feeder.endpoint.address}: {error}"
                return Replace({feeder.endpoint: PeerFailed(text)}, tuple(refusing))
        if code == FailureCode.BUSY:
            return Replace({hop.endpoint: error})
        if code in _LACKS_STATE:
            return self._state_lacks(hop, code, error)
        return self.blame(hop, code, error)

    def _state_lacks(self, hop: RouteHop, code: int, error: SplitnetError) -> Decision:
        """A hop, or its next one, lacks what a request needs. At first all hops are opened again; if that does
        not help, one is replaced."""
        strikes = self.strikes[hop.name] = self.strikes.get(hop.name, 0) + 1
        if strikes == 1:
            # With any other code the hop holds a wrong state.
            wrong = (hop,) if code != FailureCode.UNKNOWN_SESSION else ()
            return OpenAgain(Cause.SESSION_LOST, str(error), wrong)
        following = self.hops[self.hops.index(hop) + 1 :]
        may_be_next = code == FailureCode.UNKNOWN_SESSION and strikes == 2 and self._feeder(hop) is not None
        lost = following[0] if may_be_next and following else hop
        return Replace({lost.endpoint: PeerFailed(str(error))})

    def _feeder(self, hop: RouteHop, request: Request[Any] | None = None) -> RouteHop | None:
        """The hop that sends another hop the input of a request; None: the client sends the input."""
        hops, index = self.hops, self.hops.index(hop)
        if isinstance(request, PassRequest) and request.is_on_way_back:
            return hops[index + 1] if index + 1 < len(hops) and not hop.relayed else None
        before = hops[index - 1] if index else None
        return before if before is not None and not before.relayed else None

    def blame(self, hop: RouteHop, code: int, error: SplitnetError) -> Decision:
        """A hop has failed. If a second peer reports the same code, the request is at fault."""
        if code:
            complaints = self.complaints.setdefault(code, [])
            complaints.append(hop.name)
            if len(complaints) > 1:
                return self.believe(code, error)
        return Replace({hop.endpoint: error})

    def answered_nonsense(self, hop: RouteHop, error: Exception) -> Decision:
        """A hop has sent an answer that cannot be used."""
        return self.blame(hop, 0, PeerFailed(f"the peer at {hop.endpoint.address} answered nonsense: {error}"))

    def believe(self, code: int, error: SplitnetError) -> RequestsFault:
        """The request is at fault. code: the code of the failures that show it."""
        names = self.complaints.pop(code, [])
        if code == FailureCode.NOT_FINITE and len(set(names)) > 1:
            error = NotFinite(f"{error}; another peer reports the same")
        return RequestsFault(error)

    def judge(self, verdict: Verdict[Endpoint], filling: Sequence[RouteHop], under_way: Requests) -> Decision:
        """A round of pings has found a fault. filling: hops that compute their caches from a log."""
        endpoints, first = [hop.endpoint for hop in self.hops], [hop.endpoint for hop in filling]
        if verdict.finding is PingVerdict.SILENT:
            return Replace({each: PeerSilent(f"the peer at {each.address} does not answer") for each in verdict.hops})
        if verdict.finding is PingVerdict.FORGOTTEN:
            hop = self.hops[endpoints.index(verdict.hops[0])]
            error = SessionLost(f"the peer at {hop.endpoint.address} does not hold the session any more")
            return self.request_failed(hop, FailureCode.UNKNOWN_SESSION, error, None)
        if verdict.finding is PingVerdict.STUCK:
            self.suspects = self.suspects or endpoints
            return self._replace_likeliest([*verdict.hops, *first], "has worked for too long without any progress")
        if not self.suspects:
            # All hops live, and no hop holds the requests. When the hops are opened again, they find out whether they
            # reach each other.
            self.suspects = endpoints
            return OpenAgain(Cause.STALLED, "requests were lost between two hops that answer pings")
        # One of the suspects loses messages, or keeps them.
        steps = [each for each in under_way if isinstance(each, StepRequest) and each.result]
        missing = [tap for step in steps for tap in step.taps if tap not in step.tapped]
        owing = [next(hop.endpoint for hop in self.hops if hop.blocks[0] < tap <= hop.blocks[1]) for tap in missing]
        return self._replace_likeliest([*first, *owing, *verdict.hops], "loses the messages that are sent to it")

    def _replace_likeliest(self, likeliest: Sequence[Endpoint], what: str) -> Replace:
        where = next((each for each in likeliest if each in self.suspects), likeliest[0])
        self.suspects = [each for each in self.suspects if each != where] or [where]
        return Replace({where: PeerLost(f"the peer at {where.address} {what}")})


def error_of(failure: Failure, source: Endpoint) -> SplitnetError:
    """The exception of a peer's failure; `PeerFailed` for codes without a class of exceptions."""
    kind = _ERROR_OF_CODE.get(failure.code, PeerFailed)
    return kind(f"the peer at {source.address} answered: {failure.text}")
