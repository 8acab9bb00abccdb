"""Where the output of a step goes: to the next hop, or to the client."""

from __future__ import annotations

from peers.outbox import Outbox, timing_of
from peers.session import Session, Work
from scheduler.packing import DECODE_POSITIONS
from splitnet.net.endpoints import Connection, LinkState
from splitnet.net.messages import Payload, Replay, Result, Step


class StepOutput:
    """Sends outputs on, and those of the past once more. A part of the service: it is called under the service's lock.

    Args:
        outbox: where messages go.
        num_blocks: of the model.
    """

    def __init__(self, outbox: Outbox, num_blocks: int) -> None:
        self._outbox = outbox
        self._num_blocks = num_blocks

    def send(self, work: Work, payload: Payload, result_payload: Payload) -> None:
        """Sends on what the engine has computed, and logs it.

        Args:
            work: the finished step.
            payload: the output of all positions, encoded with the session's codec; empty at the tail.
            result_payload: what the client asked to have back, encoded.
        """
        session, step = work.session, work.step
        if session.closed:
            return
        # Sent first, since the next hop waits for it. Logged also in an older epoch: the log follows the rows.
        if step.epoch == session.epoch:
            session.last = max(session.last, 0 if step.replay_until else step.number)
            self._send(work, payload, result_payload)
        if session.end != self._num_blocks:
            session.log.record(step.parts, step.forks, payload, step.reach)

    def replay(self, session: Session, source: Connection, message: Replay) -> None:
        """Sends the next hop all outputs that its rows were made of, or tells the `source` of the request of none."""
        assert session.next is not None
        steps = list(session.log.replay())
        if not steps:
            code = session.codec.code
            self._outbox.send(source, Result(session.id, session.epoch, message.number, message.until, code, ()))
        codec, end = session.log.codec, session.end
        session.sent_on = True
        for index, (parts, payload, reach) in enumerate(steps):
            number = message.number if index == len(steps) - 1 else 0
            self._outbox.send(
                session.next,
                Step(session.id, session.epoch, number, parts, None, message.until, codec, payload, end, (), reach),
            )

    def is_under_way(self, session: Session) -> bool:
        """Whether what was sent to the next hop may still be on its way: no ping that went after it has come back.

        A way up that many use holds prompts up for minutes. They are not lost, and to send them again would be worse.
        """
        following = session.next
        if following is None or self._outbox.state(following) is not LinkState.UP:
            return False
        if session.sent_on:
            session.sent_on, session.sent_before = False, self._outbox.probe(following)
        return self._outbox.answered(following) < session.sent_before

    def _send(self, work: Work, payload: Payload, result_payload: Payload) -> None:
        session, step = work.session, work.step
        timing = timing_of(work, self._outbox)
        timings = (*step.timings, timing)
        if work.total <= DECODE_POSITIONS and not step.replay_until:
            session.timing = timing
        replayed = step.replay_until != 0 and session.end >= step.replay_until
        if session.next is not None and not replayed:
            session.sent_on = True
            self._outbox.send(
                session.next,
                Step(
                    session.id,
                    step.epoch,
                    step.number,
                    step.parts,
                    step.forks,
                    step.replay_until,
                    session.codec.code,
                    payload,
                    session.end,
                    timings,
                    step.reach,
                ),
            )
        elif not replayed or step.number:  # of a replay only the last step is answered
            at_tail = session.end == self._num_blocks
            body = b"" if replayed else (result_payload if at_tail else payload)
            self._outbox.send(
                session.reply_to,
                Result(session.id, step.epoch, step.number, session.end, session.codec.code, timings, body),
            )
