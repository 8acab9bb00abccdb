"""What the owner of a peer grants each client's key, and what it has used of that."""

from __future__ import annotations

from splitnet.errors import PeerBusy
from splitnet.net.identity import AuthorizedKeys
from splitnet.net.key_options import KeyOptions
from splitnet.token_bucket import MINUTE_S, TokenBucket

REVOKED = "the owner of this peer does not accept your key any more: use other peers"


class KeyPolicy:
    """Keys are CURVE keys.

    Args:
        authorized: whose keys are accepted, with their options; None: any, all alike.
    """

    def __init__(self, authorized: AuthorizedKeys | None = None) -> None:
        self._authorized = authorized or AuthorizedKeys.anyone()
        self._spent: dict[bytes, TokenBucket] = {}
        """By key."""

    def allows(self, key: bytes) -> bool:
        """Whether the key is accepted still."""
        return self._authorized.allows(key)

    def options_of(self, key: bytes) -> KeyOptions:
        """What the key gets; one that is not accepted any more, as long as it is still here, what strangers do."""
        return self._authorized.options_of(key)

    def weight(self, key: bytes) -> float:
        """In proportion to it keys share what several want."""
        return self._authorized.options_of(key).weight

    def check_training(self, key: bytes) -> None:
        """Raises PeerBusy if the owner of this peer does not let the key train."""
        if not self._granted(key).train:
            raise PeerBusy("the owner of this peer does not let your key train (train=no): train through other peers")

    def spend(self, key: bytes, positions: int, now: float) -> None:
        """Takes off positions that are to be computed; what is left comes back evenly over a minute.

        Raises:
            PeerBusy: those of the last minute are used up, or the key is not accepted any more.
        """
        per_minute = self._granted(key).tokens_per_minute
        if per_minute is None:
            return
        bucket = self._spent.get(key) or TokenBucket()
        if wait_s := bucket.wait_s(per_minute, now):
            raise PeerBusy(
                f"your key has used the {per_minute} tokens per minute that the owner of this peer grants it: "
                f"come back in {wait_s} s"
            )
        if positions:
            bucket.spend(positions, per_minute, now)
            self._spent[key] = bucket
        if len(self._spent) > 1024:
            self._spent = {other: used for other, used in self._spent.items() if now - used.at < MINUTE_S}

    def _granted(self, key: bytes) -> KeyOptions:
        if not self.allows(key):
            raise PeerBusy(REVOKED)
        return self.options_of(key)
