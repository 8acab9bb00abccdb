"""Work that waits for the device, and which of it runs next.

While one client's key alone is active, decode comes first, then prefill, then passes over whole sequences
(`scheduler/batching.py:next_pass`). When several are, keys share the device's time (`scheduler/fairness.py`).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from peers.sessions import MemoryAccount, PassWork, Purpose, Session, Work, is_quick
from scheduler.batching import DECODE_POSITIONS, MAX_PASSED_OVER, UNSENT_BYTES, BatchingDelay, next_pass
from scheduler.fairness import CHUNK_S, FairPasses
from scheduler.liveness import STUCK_S
from splitnet.errors import PeerBusy
from splitnet.wire.endpoints import Endpoint

MAX_SESSION_PASSES = 64
MAX_KEY_PASSES = 256  # passes over whole sequences, adapters and look-ups that may wait, of one session and of one key
LOOK_S = 0.02  # how often it is looked whether a way is free again for which all wait


@dataclass(eq=False)
class WorkQueue:
    """First steps of all sessions that have work, and passes over whole sequences. Thread-safe.

    A session is busy while its step is in a pass, so steps of one session never overtake each other.
    """

    pass_s: Callable[[int], float] = lambda positions: 0.0  # seconds that a pass of so many positions takes
    weight: Callable[[bytes], float] = lambda key: 1.0  # of a client's key: its share of the device
    step_bytes: int = 1 << 29  # for the steps that wait
    unsent: Callable[[Endpoint], int] = lambda endpoint: 0  # bytes that wait for the link to a next hop

    def __post_init__(self) -> None:
        self.memory = MemoryAccount(self.step_bytes, "no memory for waiting steps of", "send fewer at a time")
        self._fair = FairPasses[Work](self.pass_s, self.weight)
        self._shares = self._fair.shares
        self.delay = BatchingDelay()  # of the sessions, by id, that steps are waited for
        self._ready: OrderedDict[Session, None] = OrderedDict()
        # Of prompts that are ready: bytes that wait for the way, and since when they have not become fewer.
        self._ways: dict[Endpoint, tuple[int, float]] = {}
        self._changed = threading.Condition()
        self.closed = False  # nothing runs any more
        self._passes: OrderedDict[bytes, dict[PassWork, None]] = OrderedDict()  # by key
        self._next_pass_of: bytes | None = None
        self._idle_job: Callable[[], None] | None = None
        self._recalled: dict[Session, None] = {}  # whose rows can be begun before their steps come
        self.defers = False  # `put` leaves it to the caller to wake the engine, by `Engine.run_here`
        self._turns_without_pass = 0
        self.queued_positions = 0
        self.pass_positions = 0  # of passes that wait or run

    @property
    def has_work(self) -> bool:
        return bool(self._ready or self._passes)

    def put(self, work: Work) -> None:
        """Adds a step, in place of windows of drafts that it shows to be rejected. Raises PeerBusy without memory."""
        with self._changed:
            session = work.session
            while len(session.waiting) > self._begun(session) and _supersedes(work, session.waiting[-1]):
                self._drop(session.waiting.pop())
            if not session.waiting:
                self._ready.pop(session, None)
            self.memory.take(session, Purpose.STEPS, work.nbytes)
            self._shares.came(session.owner, time.monotonic())
            work.follows = bool(session.waiting)
            session.waiting.append(work)
            session.waiting_size += work.size
            self.queued_positions += work.total
            if len(session.waiting) == 1:
                self._ready[session] = None
                if not self.defers:
                    self._changed.notify()

    def wake(self) -> None:
        with self._changed:
            if self.has_work:
                self._changed.notify()

    def take_short(self, within_s: float) -> Work | None:
        """Takes the decode step that is all there is to do, if it is short and no other is expected to join it."""
        with self._changed:
            if len(self._ready) != 1 or self._passes or self.closed:
                return None
            session = next(iter(self._ready))
            work = session.waiting[0]
            if (
                work.remaining > DECODE_POSITIONS
                or self.pass_s(work.remaining) > within_s
                or self.delay.delay_s(1)
                or self._shares.contended(time.monotonic())
                or not is_quick(work)
            ):
                return None
            session.passed_over = 0
            del self._ready[session]
            return work

    def put_pass(self, work: PassWork) -> None:
        """Adds a pass. Raises PeerBusy, changing nothing, if too many of its session or key wait."""
        with self._changed:
            session = work.session
            of_key = self._passes.get(session.owner, {})
            for what, waiting, most in (
                ("session", len(session.passes), MAX_SESSION_PASSES),
                ("key", len(of_key), MAX_KEY_PASSES),
            ):
                if waiting >= most:
                    wait_s = self.pass_s(self.pass_positions)
                    raise PeerBusy(
                        f"{waiting} passes of this {what} wait already, the most that may: send more when those are "
                        f"answered, the last in about {wait_s:.0f} s"
                    )
            of_key[work] = None
            self._passes[session.owner] = of_key
            session.passes[work] = None
            session.waiting_passes += 1
            self.pass_positions += work.positions
            self._shares.came(session.owner, time.monotonic())
            self._changed.notify()

    def take_pass(self) -> PassWork | None:
        """The pass whose turn it is, or None; `release_pass` ends it."""
        with self._changed:
            self._turns_without_pass = 0
            if not self._passes or self.closed:
                return None
            owner, self._next_pass_of = self._next_pass_of, None
            if owner not in self._passes:
                owner = next(iter(self._passes))
            work = next(iter(self._passes[owner]))
            self._take_out(work)
            if owner in self._passes:
                self._passes.move_to_end(owner)
            return work

    def release_pass(self, work: PassWork) -> None:
        with self._changed:
            self._count_out(work)

    def discard_passes(self, session: Session) -> list[PassWork]:
        with self._changed:
            discarded = list(session.passes)
            for work in discarded:
                self._take_out(work)
                self._count_out(work)
            return discarded

    def put_idle_job(self, job: Callable[[], None]) -> None:
        """Leaves a job for the engine's thread when nothing else waits, in place of the one left before."""
        with self._changed:
            self._idle_job = job
            self._changed.notify()

    def take_idle_job(self) -> Callable[[], None] | None:
        """The job, if nothing else waits."""
        with self._changed:
            if self.has_work or self.closed:
                return None
            job, self._idle_job = self._idle_job, None
            return job

    @property
    def is_contended(self) -> bool:
        """Whether several keys are active."""
        with self._changed:
            return self._shares.contended(time.monotonic())

    def put_recalled(self, session: Session) -> None:
        """Pages were found for a session: its row can be filled while nothing else waits."""
        with self._changed:
            if session not in self._recalled:
                self._shares.came(session.owner, time.monotonic())
                self._recalled[session] = None
                self._changed.notify()

    def take_recalled(self) -> Session | None:
        """A session of `put_recalled`, if nothing else waits, until `release_recalled`."""
        with self._changed:
            return None if self.has_work or self.closed else next(iter(self._recalled), None)

    def release_recalled(self, session: Session) -> None:
        with self._changed:
            self._drop_recalled(session)

    def gather(self) -> None:
        """Waits for work, and then for steps that are expected, while they keep coming."""
        with self._changed:
            self._wait_for_work()
            ready = 0
            while len(self._ready) > ready and (delay_s := self.delay.delay_s(len(self._ready))):
                ready, until = len(self._ready), time.monotonic() + delay_s
                while len(self._ready) == ready and not self.closed and (left := until - time.monotonic()) > 0:
                    self._changed.wait(left)

    def take(self, max_positions: int) -> list[tuple[Work, int]]:
        """Waits for work and returns what runs in the next pass: steps with how many positions of each.

        Empty when the queue is closed, or it is the turn of `take_pass`, or of what runs if nothing waits. Of one key
        alone, passes over whole sequences come when no step is ready, or after `MAX_PASSED_OVER` turns.
        """
        with self._changed:
            self._wait_for_work()
            while self.has_work and not self.closed:
                ready = self._not_held()
                if not ready and not self._passes:
                    self._changed.wait(LOOK_S)
                    continue
                if not self._shares.contended(time.monotonic()):
                    if not ready or (self._passes and self._turns_without_pass >= MAX_PASSED_OVER):
                        return []
                    self._turns_without_pass += 1
                    return self._begin(self._next_pass(ready, max_positions))
                chosen = self._take_shared(ready, max_positions, [*(each.owner for each in ready), *self._passes])
                if chosen is not None:
                    return chosen
            return []

    def take_between(self, running: PassWork, max_positions: int, *, first: bool) -> list[tuple[Work, int]]:
        """Steps that run between two pieces of a pass; empty: it goes on. first: of the calls since the last piece."""
        owner = running.session.owner
        with self._changed:
            while not self.closed:
                ready = self._not_held()
                if not self._shares.contended(time.monotonic()):
                    return self._begin(self._next_pass(ready, max_positions)) if first and ready else []
                # Of its own key one pass of steps comes between two pieces.
                ready = [session for session in ready if first or session.owner != owner]
                keys = [*(session.owner for session in ready), owner]
                chosen = self._take_shared(ready, max_positions, keys, goes_on=owner, own_steps=first)
                if chosen is not None:
                    return chosen
            return []

    def release(self, work: Work) -> None:
        """Ends a pass of `work`: it goes on in a later pass, or makes room for the session's next step."""
        with self._changed:
            session = work.session
            if not work.remaining and session.waiting and session.waiting[0] is work:
                session.waiting.popleft()
                self._drop(work)
            if session.waiting:
                self._ready[session] = None
                self._changed.notify()

    def ran(self, chosen: Sequence[tuple[Work, int]], seconds: float) -> None:
        with self._changed:
            self._fair.ran(chosen, seconds, time.monotonic())

    def charge(self, session: Session, seconds: float) -> None:
        with self._changed:
            self._shares.charge(session.owner, seconds, time.monotonic(), bulk=True)

    def piece_positions(self, blocks: int) -> int | None:
        """Positions of a piece of a pass over whole sequences, which goes through one of so many blocks; None: any."""
        with self._changed:
            now = time.monotonic()
            if not self._shares.contended(now):
                return None
            return self._fair.positions_within(self._fair.chunk_s(now) * blocks)

    def discard_waiting(self, session: Session) -> None:
        """Forgets the steps of a session that no pass has begun: they will be sent again."""
        with self._changed:
            while len(session.waiting) > self._begun(session):
                self._drop(session.waiting.pop())
            if not session.waiting:
                self._ready.pop(session, None)

    def discard(self, session: Session) -> None:
        with self._changed:
            while session.waiting:
                self._drop(session.waiting.pop())
            self._ready.pop(session, None)
            self._drop_recalled(session)
            self.delay.left(session.id)
            self.memory.end(session)

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def _not_held(self) -> list[Session]:
        """Sessions that are ready, without those whose prompts wait for the way to their next hop."""
        now, ways = time.monotonic(), dict[Endpoint, tuple[int, float]]()
        ready: list[Session] = []
        for session in self._ready:
            following = session.next
            if following is not None and session.waiting[0].remaining > DECODE_POSITIONS:
                if following not in ways:
                    unsent = self.unsent(following)
                    before, since = self._ways.get(following, (0, now))
                    ways[following] = unsent, (since if unsent >= before > UNSENT_BYTES else now)
                unsent, since = ways[following]
                if unsent > UNSENT_BYTES and now - since < STUCK_S:
                    continue
            ready.append(session)
        self._ways = ways
        return ready

    def _take_shared(
        self,
        ready: Sequence[Session],
        max_positions: int,
        keys: Iterable[bytes],
        *,
        goes_on: bytes | None = None,
        own_steps: bool = True,
    ) -> list[tuple[Work, int]] | None:
        """The next pass when several keys are active; empty: a pass over whole sequences begins, or goes on.

        None: it has waited for a key that has had less; look again. keys: that have work. goes_on: the key whose pass
        over whole sequences runs, own_steps: whether steps of that key may come before it.
        """
        now = time.monotonic()
        ranked = self._shares.ranked(dict.fromkeys(keys))
        first = ranked[0]
        own = [session for session in ready if session.owner == first]
        is_pass = not own or (first == goes_on and not own_steps)
        if first in self._passes and goes_on is None and self._turns_without_pass >= MAX_PASSED_OVER:
            is_pass = True
        takes_s = CHUNK_S if is_pass else self.pass_s(own[0].waiting[0].remaining)
        waits = self._shares.awaited(first, min(takes_s, self._fair.chunk_s(now)), now)
        if waits is not None:
            key, left_s = waits
            self._changed.wait(left_s)
            self._shares.charge(key, time.monotonic() - now, now)
            return None
        self._shares.begin_rounds(first)
        if is_pass:
            self._next_pass_of = first
            return []
        self._turns_without_pass += 1
        if any(session.waiting[0].remaining > DECODE_POSITIONS for session in own):
            heads = [session.waiting[0] for session in ready]
            turn = [work.session for work in self._fair.prefill_turn(heads, first, now)]
            most = min(max_positions, self._fair.positions_within(self._fair.chunk_s(now)))
            return self._begin(self._next_pass(turn, most))
        return self._begin(
            self._fair.decode_pass([session.waiting[0] for session in ready], ranked, max_positions, now)
        )

    def _next_pass(self, ready: Iterable[Session], max_positions: int) -> dict[Work, int]:
        # Sessions that ran last stand at the end, so the first has waited longest.
        heads = [session.waiting[0] for session in ready]
        counts = next_pass(heads, heads[0].session.passed_over, max_positions)
        for work in heads:
            work.session.passed_over = 0 if work in counts else work.session.passed_over + 1
        return counts

    def _begin(self, counts: dict[Work, int]) -> list[tuple[Work, int]]:
        for work in counts:
            del self._ready[work.session]
        return list(counts.items())

    def _take_out(self, work: PassWork) -> None:
        session = work.session
        del session.passes[work]
        of_key = self._passes[session.owner]
        del of_key[work]
        if not of_key:
            del self._passes[session.owner]

    def _count_out(self, work: PassWork) -> None:
        work.session.waiting_passes -= 1
        self.pass_positions -= work.positions
        self._shares.left(work.session.owner, time.monotonic())

    def _wait_for_work(self) -> None:
        while not (self.has_work or self._idle_job or self._recalled or self.closed):
            self._changed.wait()

    def _begun(self, session: Session) -> int:
        """How many of the waiting steps a pass has begun: one or none."""
        return int(bool(session.waiting) and (session not in self._ready or session.waiting[0].done > 0))

    def _drop_recalled(self, session: Session) -> None:
        if session in self._recalled:
            del self._recalled[session]
            self._shares.left(session.owner, time.monotonic())

    def _drop(self, work: Work) -> None:
        work.session.waiting_size -= work.size
        self.queued_positions -= work.total
        self.memory.give_back(work.session, Purpose.STEPS, work.nbytes)
        self._shares.left(work.session.owner, time.monotonic())


def _supersedes(later: Work, earlier: Work) -> bool:
    """Whether a step takes back all that an earlier one would do: both are of one row, and it begins no later."""
    for step in (later.step, earlier.step):
        if len(step.parts) != 1 or step.forks is not None or step.replay_until:
            return False
    new, old = later.step.parts[0], earlier.step.parts[0]
    return new.row == old.row and new.start <= old.start and later.step.number > earlier.step.number
