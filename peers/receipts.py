"""Receipts of sessions, and what sessions have logged, for clients that audit this peer and its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from peers.peer_links import Outbox
from peers.served import ServedBlocks
from peers.sessions import HopSession
from splitnet.errors import ProtocolError
from splitnet.wire.endpoints import Connection
from splitnet.wire.messages import MAX_PAYLOAD_BYTES, AskReceipt, FetchedSent, FetchSent, Receipt
from splitnet.wire.receipts import DIGEST, RECORD, signed_bytes

Question = AskReceipt | FetchSent


@dataclass(eq=False)
class Receipts:
    """Signs what sessions have received and sent: a part of the service, whose lock the caller holds.

    sign: makes an Ed25519 signature with this peer's key, 64 bytes.
    """

    served: ServedBlocks
    outbox: Outbox
    sign: Callable[[bytes], bytes]

    def answer(self, source: Connection, session: HopSession, message: Question, now: float) -> None:
        """Answers a question of the session's client. Raises ProtocolError: the row is shorter, or was not logged;
        PeerBusy: there were too many questions."""
        session.count_resent(now, "what the session has received and sent was told")
        ids = session.id, session.epoch, message.number
        if isinstance(message, AskReceipt):
            records = session.digests.first(message.row, message.length)
            halves = (
                b"".join(records[at : at + DIGEST] for at in range(offset, len(records), RECORD))
                for offset in (0, DIGEST)
            )
            facts = message.row, message.length, session.codec.code, self.served.weights
            adapted = session.adapter is not None or session.reads_inputs
            receipt = Receipt(*ids, *facts, adapted, b"", b"".join(halves))
            said = signed_bytes(self.served.model, (session.start, session.end), receipt)
            self.outbox.send(source, replace(receipt, signature=self.sign(said)))
        elif message.length * session.log.bytes_per_position > MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"{message.length} positions do not fit into a message: ask for fewer")
        else:
            sent = session.log.first(message.row, message.length)
            self.outbox.send(source, FetchedSent(*ids, session.codec.code, sent))
