"""Which peers serve the client's model, as the directory said last; also while it says nothing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from splitnet.errors import DirectoryError, NotAuthorized, ProtocolVersionError, WrongSwarm
from splitnet.net.endpoints import Endpoint, LinkState
from splitnet.net.identity import AuthorizedKeys, PublicKey
from splitnet.net.messages import PROTOCOL_VERSION
from splitnet.net.records import PeerRecord
from splitnet.net.swarm_directory import SwarmDirectory

log = logging.getLogger(__name__)

LOOK_S = 10.0
"""How often the directory is asked while the client is in use, or does not answer."""
SLOWER = 3
FEW_RECORDS = 32
"""In proportion it is asked less often for more records than this, down to a third: an answer may have megabytes."""
RECORDS_MAX_AGE_S = 20.0
"""Who asks for older ones waits until the directory has answered: some round trips, so long as a first token takes."""


class KnownPeers:
    """Thread-safe.

    Args:
        directory: where records come from.
        fingerprint: of the model.
        model_name: for errors.
        link_state: of the client's link to a peer.
        trusted: keys of the peers that count; None: any.
    """

    def __init__(
        self,
        directory: SwarmDirectory,
        fingerprint: str,
        model_name: str,
        link_state: Callable[[Endpoint], LinkState],
        trusted: AuthorizedKeys | None = None,
    ) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._model_name = model_name
        self._link_state = link_state
        self._trusted = trusted
        self._records: list[PeerRecord] = []
        self._asked_at = float("-inf")
        self._silent = False
        """The directory did not answer when it was asked last, though there are peers to go on with."""
        self._asking = threading.Lock()

    def look(self, *, fresh: bool = False) -> list[PeerRecord]:
        """Peers that serve this model and speak this protocol; read again after 20 to 40 s, or at once if `fresh`.

        While the directory does not answer, it is asked every 10 s. Meanwhile the last records count, until they
        expire; those of peers to which a link is up count longer.

        Raises:
            DirectoryError: the directory does not answer, and no peer is known.
            WrongSwarm: the swarm serves other weights only.
            ProtocolVersionError: all peers speak another protocol.
            NotAuthorized: there are peers, of which none is trusted.
        """
        if self._is_due(fresh):
            asked_at = self._asked_at
            # An answer that does not come takes seconds: of all threads only one waits for it.
            if self._asking.acquire(blocking=not self._silent):
                try:
                    if self._asked_at == asked_at:  # and no other thread has just asked
                        self._ask()
                finally:
                    self._asking.release()
        trusted = [record for record in self._records if self.trusts(record.key)]
        speaking = [record for record in trusted if record.protocol == PROTOCOL_VERSION]
        if not self._records:
            self._explain_none()
        elif not trusted:
            raise NotAuthorized(
                f"{len(self._records)} peers serve {self._model_name}, and none of them is one that you trust: add "
                "its key to your --trusted-peers file if you do"
            )
        elif not speaking:
            spoken = max(record.protocol for record in trusted)
            older = "this client" if spoken > PROTOCOL_VERSION else "the peers"
            raise ProtocolVersionError(
                f"the peers speak protocol {spoken}, this client speaks {PROTOCOL_VERSION}: upgrade {older}"
            )
        return speaking

    @property
    def look_s(self) -> float:
        """How often the directory is to be asked while the client is in use."""
        return LOOK_S * min(max(len(self._records) / FEW_RECORDS, 1.0), SLOWER)

    @property
    def is_old(self) -> bool:
        """Whether to ask again in the background, so that nobody has to wait for that before the next look."""
        return time.monotonic() - self._asked_at > min(LOOK_S, self.look_s - LOOK_S / 2)

    def find(self, key: PublicKey) -> PeerRecord | None:
        """The record of a peer, as it was read last."""
        return next((record for record in self._records if record.key == key), None)

    def trusts(self, key: PublicKey) -> bool:
        """Whether the peer with this key counts."""
        return self._trusted is None or self._trusted.allows(key.curve_raw)

    def _is_due(self, fresh: bool) -> bool:
        age_s = time.monotonic() - self._asked_at
        if not self._records or age_s > (LOOK_S if self._silent else RECORDS_MAX_AGE_S + self.look_s - LOOK_S):
            return True
        return fresh and not self._silent

    def _ask(self) -> None:
        try:
            self._records = self._directory.peers(self._fingerprint)
            self._silent = False
        except DirectoryError as error:
            self._records = [record for record in self._records if self._still_counts(record)]
            if not self._records:
                self._silent = False
                raise
            if not self._silent:
                log.warning("%s Until it does, the %d peers known so far are used.", error, len(self._records))
            self._silent = True
        finally:
            self._asked_at = time.monotonic()

    def _still_counts(self, record: PeerRecord) -> bool:
        if record.expires_at > time.time():
            return True
        return self._link_state(record.endpoint) is LinkState.UP

    def _explain_none(self) -> None:
        others = sorted({name for key, name in self._directory.models().items() if key != self._fingerprint})
        if others:
            raise WrongSwarm(
                f"this swarm serves other weights than your {self._model_name}: it has {', '.join(others)}. "
                "Use that model, or the address of a swarm of yours"
            )
