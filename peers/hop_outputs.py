"""What a hop does with the output of its blocks: sends it to the next hop or the client, and logs it for a replay."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peers.peer_links import Outbox
from peers.sessions import HopSession, PassWork, Taps, Work
from scheduler.batching import DECODE_POSITIONS
from splitnet.quant.device import to_host
from splitnet.wire.block_inputs import passed_on
from splitnet.wire.codecs import select_kept_positions
from splitnet.wire.endpoints import Connection, LinkState
from splitnet.wire.messages import Forward, Payload, Replay, Result, Step, Tapped, Timing
from splitnet.wire.receipts import records_of

if TYPE_CHECKING:
    import torch


def timing_of(work: Work | PassWork, outbox: Outbox) -> Timing:
    following = work.session.next
    rtt_ms = outbox.rtt_ms(following) if following is not None else 0.0
    return Timing(round(work.wait_ms * 1000), round(work.compute_ms * 1000), round(rtt_ms * 1000))


@dataclass(eq=False)
class HopOutputs:
    """What follows the last block of a session at this hop: selects, sends and logs the output of each pass.

    The engine and `Training` give it every output. At the tail it sends the client the positions that the client wants;
    elsewhere it sends all positions to the next hop, or to the client that relays them.
    """

    outbox: Outbox
    lock: threading.RLock  # of the service
    num_blocks: int  # of the model

    def wanted(self, work: Work, count: int, output: torch.Tensor) -> torch.Tensor:
        """The positions to send of a pass over the next `count` positions of a step; output: `[count, hidden]`."""
        return select_kept_positions(work.parts(count), output) if work.session.end == self.num_blocks else output

    def add_output(self, work: Work, values: torch.Tensor) -> None:
        """Takes in the wanted positions of one pass of a step, on the CPU. Raises CodecError: a value is not finite."""
        if len(values):
            work.outputs.append(work.session.codec.encode(values))

    def finish_step(self, work: Work) -> None:
        """Sends the output of a finished step, and logs it for a replay."""
        payload = work.outputs[0] if len(work.outputs) == 1 else b"".join(work.outputs)
        work.outputs = []
        with self.lock:
            session, step = work.session, work.step
            if session.closed:
                return
            # The output is sent first, because the next hop waits. In an older epoch it is only logged: the rows have
            # these
            # positions.
            if step.epoch == session.epoch:
                route = session.route_state
                route.last = max(route.last, 0 if step.replay_until else step.number)
                self._send_output(work, payload)
            is_tail = session.end == self.num_blocks
            digests = records_of(step.parts, step.activations, payload, step.rope_length, all_sent=not is_tail)
            session.digests.record_step(step.parts, step.forks, digests)
            if not is_tail:
                body, inputs = passed_on(step, payload, session.end)
                session.log.record_step(step.parts, step.forks, body, step.rope_length, step.labels, inputs)

    def add_taps(self, work: Work, taps: Taps, states: Mapping[int, torch.Tensor]) -> None:
        """Takes in the hidden states of one pass of a step, by boundary. Sends the client all hidden states of a
        finished step."""
        for boundary, values in states.items():
            work.tapped.setdefault(boundary, []).append(taps.codec.encode(to_host(values)))
        with self.lock:
            session, step = work.session, work.step
            if work.remaining or session.closed or step.epoch != session.epoch:
                return
            for boundary, parts in work.tapped.items():
                payload = parts[0] if len(parts) == 1 else b"".join(parts)
                ids = session.id, step.epoch, step.number
                self.outbox.send(session.reply_to, Tapped(*ids, boundary, taps.codec.code, payload))

    def finish_pass(self, work: PassWork, message: Forward, payload: Payload) -> None:
        """Sends the encoded output of a forward pass. The caller holds the lock."""
        session, route = work.session, work.session.route_state
        route.last = max(route.last, message.number)
        code, end = session.codec.code, session.end
        timings = (*message.timings, timing_of(work, self.outbox))
        if session.next is not None:
            route.sent_on = True
            body, inputs = passed_on(message, payload, end)
            onward = replace(message, codec=code, payload=body, boundary=end, timings=timings, inputs=inputs)
            self.outbox.send(session.next, onward)
        else:
            result = Result(session.id, message.epoch, message.number, end, code, timings, payload)
            self.outbox.send(session.reply_to, result)

    def replay_log(self, source: Connection, session: HopSession, message: Replay) -> None:
        """Sends the log of a session to its next hop; an empty log is a `Result` for `source`. The caller holds the
        lock."""
        assert session.next is not None
        steps, codec, route = list(session.log.replay(since=message.since)), session.log.codec, session.route_state
        if not steps:
            result = Result(session.id, session.epoch, message.number, message.until, session.codec.code, ())
            self.outbox.send(source, result)
        route.sent_on = True
        for index, (parts, payload, rope_length, labels, inputs) in enumerate(steps):
            number = message.number if index == len(steps) - 1 else 0
            # An empty list of forks drops rows of another text that the next hop may have.
            forks = None if index or message.since else ()
            again = session.id, session.epoch, number, parts, forks, message.until, codec, payload
            labels = labels if route.labelled else ()
            self.outbox.send(session.next, Step(*again, session.end, (), rope_length, labels, inputs))

    def are_under_way(self, session: HopSession) -> bool:
        """Whether messages to the next hop may still be on the link: no later ping was answered.

        A busy uplink delays prompts for minutes. These messages are not lost, and a repetition would delay them more.
        """
        following, route = session.next, session.route_state
        if following is None or self.outbox.link_state(following) is not LinkState.UP:
            return False
        if route.sent_on:
            route.sent_on, route.sent_before = False, self.outbox.probe(following)
        return self.outbox.answered(following) < route.sent_before

    def _send_output(self, work: Work, payload: Payload) -> None:
        session, step, route = work.session, work.step, work.session.route_state
        timing = timing_of(work, self.outbox)
        timings = (*step.timings, timing)
        if work.total <= DECODE_POSITIONS and not step.replay_until:
            route.timing = timing
        replayed = step.replay_until != 0 and session.end >= step.replay_until
        code = session.codec.code
        if session.next is not None and not replayed:
            route.sent_on = True
            kept = step.epoch, step.number, step.parts, step.forks, step.replay_until
            labels = step.labels if route.labelled else ()
            body, inputs = passed_on(step, payload, session.end)
            onward = Step(session.id, *kept, code, body, session.end, timings, step.rope_length, labels, inputs)
            self.outbox.send(session.next, onward)
        elif not replayed or step.number:  # only the last step of a replay is answered
            body = b"" if replayed else payload
            result = Result(session.id, step.epoch, step.number, session.end, code, timings, body)
            self.outbox.send(session.reply_to, result)
