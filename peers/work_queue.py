"""Steps that wait for the device, and which of them run together next."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from peers.memory_account import MemoryAccount, Purpose
from peers.session import PassWork, Session, Work
from scheduler.packing import PATIENCE, next_pass
from splitnet.gathering import Gathering


class WorkQueue:
    """First steps of all sessions that have work, in turns.

    A session is busy while its step is in a pass, so steps of one session never overtake each other.

    Args:
        memory: for the steps that wait; None: 256 MiB.
    """

    def __init__(self, memory: MemoryAccount | None = None) -> None:
        self.memory = memory or MemoryAccount(1 << 28, "no memory for waiting steps of", "send fewer at a time")
        self._ready: OrderedDict[Session, None] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._passes: deque[PassWork] = deque()
        self._idle_job: Callable[[], None] | None = None
        self._turns_without_pass = 0
        self.queued_positions = 0
        self.pass_positions = 0
        """Of passes that wait or run."""

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def has_work(self) -> bool:
        """Whether a step or a pass waits for the device."""
        return bool(self._ready or self._passes)

    def put(self, work: Work) -> None:
        """Adds a step. Windows of drafts that it begins before were rejected by the client, and need not run.

        Raises:
            PeerBusy: there is no memory for it.
        """
        with self._changed:
            session = work.session
            while len(session.waiting) > self._begun(session) and _supersedes(work, session.waiting[-1]):
                self._drop_last(session)
            if not session.waiting:
                self._ready.pop(session, None)
            self.memory.take(session, Purpose.STEPS, work.nbytes)
            session.waiting.append(work)
            session.waiting_size += work.size
            self.queued_positions += work.total
            if len(session.waiting) == 1:
                self._ready[session] = None
                self._changed.notify()

    def put_pass(self, work: PassWork) -> None:
        """Adds a pass over whole sequences, which runs when no step is ready."""
        with self._changed:
            self._passes.append(work)
            work.session.waiting_passes += 1
            self.pass_positions += work.positions
            self._changed.notify()

    def take_pass(self) -> PassWork | None:
        """The pass that has waited longest, if any; `release_pass` ends it."""
        with self._changed:
            self._turns_without_pass = 0
            return self._passes.popleft() if self._passes and not self._closed else None

    def release_pass(self, work: PassWork) -> None:
        with self._changed:
            self._count_out(work)

    def discard_passes(self, session: Session) -> list[PassWork]:
        """Forgets the passes of a session that wait, and returns them."""
        with self._changed:
            discarded = [work for work in self._passes if work.session is session]
            for work in discarded:
                self._passes.remove(work)
                self._count_out(work)
            return discarded

    def put_idle_job(self, job: Callable[[], None]) -> None:
        """Leaves something to do on the engine's thread when nothing else waits; replaces what was left before."""
        with self._changed:
            self._idle_job = job
            self._changed.notify()

    def take_idle_job(self) -> Callable[[], None] | None:
        """What was left for when nothing else waits, if nothing does."""
        with self._changed:
            if self.has_work or self._closed:
                return None
            job, self._idle_job = self._idle_job, None
            return job

    def gather(self, gathering: Gathering) -> None:
        """Waits for work, and then for what is about to come, as long as it keeps coming."""
        with self._changed:
            self._wait_for_work()
            ready = 0
            while len(self._ready) > ready and (patience_s := gathering.patience_s(len(self._ready))):
                ready, until = len(self._ready), time.monotonic() + patience_s
                while len(self._ready) == ready and not self._closed and (left := until - time.monotonic()) > 0:
                    self._changed.wait(left)

    def take(self, max_positions: int, *, wait: bool = True) -> list[tuple[Work, int]]:
        """Waits for work and returns what runs in the next pass: steps with how many positions of each.

        Which they are, `scheduler/packing.py:next_pass` says. Empty when the queue is closed, or it is the turn of
        `take_pass`, which comes when no step is ready, or after `PATIENCE` turns, or of `take_idle_job`. With `wait`
        false, empty if nothing is ready.
        """
        with self._changed:
            if wait:
                self._wait_for_work()
            pass_is_due = wait and self._passes and self._turns_without_pass >= PATIENCE
            if self._closed or not self._ready or pass_is_due:
                return []
            self._turns_without_pass += 1
            # Who ran last stands at the end, so the first has waited longest.
            heads = [session.waiting[0] for session in self._ready]
            counts = next_pass(heads, heads[0].session.passed_over, max_positions)
            for work in heads:
                work.session.passed_over = 0 if work in counts else work.session.passed_over + 1
            for work in counts:
                del self._ready[work.session]
            return list(counts.items())

    def release(self, work: Work) -> None:
        """Ends a pass of `work`: it goes on in a later pass, or makes room for the session's next step."""
        with self._changed:
            session = work.session
            if not work.remaining and session.waiting and session.waiting[0] is work:
                session.waiting.popleft()
                self._count_out_step(work)
            if session.waiting:
                self._ready[session] = None
                self._changed.notify()

    def discard_waiting(self, session: Session) -> None:
        """Forgets the steps of a session that no pass has begun: they will be sent again."""
        with self._changed:
            while len(session.waiting) > self._begun(session):
                self._drop_last(session)
            if not session.waiting:
                self._ready.pop(session, None)

    def discard(self, session: Session) -> None:
        """Forgets the steps of a session that has ended."""
        with self._changed:
            self.queued_positions -= sum(work.total for work in session.waiting)
            session.waiting.clear()
            session.waiting_size = 0
            self._ready.pop(session, None)
            self.memory.end(session)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _count_out(self, work: PassWork) -> None:
        work.session.waiting_passes -= 1
        self.pass_positions -= work.positions

    def _wait_for_work(self) -> None:
        while not self.has_work and self._idle_job is None and not self._closed:
            self._changed.wait()

    def _begun(self, session: Session) -> int:
        """How many of the waiting steps a pass has begun: the first, or none."""
        return int(bool(session.waiting) and (session not in self._ready or session.waiting[0].done > 0))

    def _drop_last(self, session: Session) -> None:
        self._count_out_step(session.waiting.pop())

    def _count_out_step(self, work: Work) -> None:
        work.session.waiting_size -= work.size
        self.queued_positions -= work.total
        self.memory.give_back(work.session, Purpose.STEPS, work.nbytes)


def _supersedes(later: Work, earlier: Work) -> bool:
    """Whether a step takes back all that one before it would do: both are of one row, and it begins no later."""
    for step in (later.step, earlier.step):
        if len(step.parts) != 1 or step.forks is not None or step.replay_until:
            return False
    new, old = later.step.parts[0], earlier.step.parts[0]
    return new.row == old.row and new.start <= old.start and later.step.number > earlier.step.number
