"""How a peer serves: what a user may choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peers.power import SYSFS
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.security.swarm_key import SwarmKey
from splitnet.transport.addresses import Reach

Report = Callable[[str, int, int], None]  # stage of a start, bytes done, and bytes in all; repeated while it waits


@dataclass(frozen=True)
class SpanWish:
    """Exact blocks, or memory in bytes for them, or neither."""

    blocks: tuple[int, int] | None = None
    memory: int | None = None


ANY_SPAN = SpanWish()


@dataclass(frozen=True, kw_only=True)
class PeerOptions:
    """How a peer serves.

    Attributes:
        wish: which blocks, or how much memory for them.
        initial_peers: addresses of a swarm to join, multiaddrs or `tcp://HOST:PORT?key=...` of peers; empty starts a
            new one, or joins one on the local network.
        join_file: where a peer that starts at the same time writes the address to join with; it is waited for.
        lan: be found on the local network, and join the swarm of the model there.
        listen: `tcp://host:port` for activations, port 0 for any.
        dht_listen: multiaddrs for the DHT; None: the same host as `listen`, any port.
        public_host: host name (looked up at the start) or address that others reach this machine by, with `:port` if
            they reach it by another port than it listens on; None: found out.
        device: as torch names it; "auto": the best that works, see `splitnet.blocks.device`.
        dtype: what blocks compute in; None: what goes with `weights`, else as the checkpoint stores them.
        weights: what those of linear layers are held as, see `splitnet.quant.choose`; "auto": what decodes fast and is
            nearly exact; None: as `dtype`.
        kv_memory: bytes for KV caches; None: a quarter of the free memory.
        training_memory: bytes to keep for clients that train; None: an eighth of the free memory.
        authorized_keys: file with the keys that may connect; None: anyone.
        speeds_file: where measured speeds are kept for the next start; None: nowhere.
        key_file: file of the peer's own key; None: a new key that lives as long as the peer.
        identity: that key itself, in the place of a file.
        swarm_key: of a closed swarm, which has no DHT; None: the swarm is open.
        idle_s: seconds until an idle session is dropped.
        watts: what the device draws while it computes; None: it is read where that is possible.
        sysfs: where Linux shows counters of energy.
        reach: how others are to reach it; a `public_host` is believed, so that none are asked.
        port_mapping: ask the router for a port, if others do not reach it.
        relay_port: where it helps others to be reached, 0 for any; None: it does not.
        relay_rate: bytes per second that it passes on; None: as `RelayBounds` has it.
        share_weights: whether it gives weights to others; None: where the keys that may connect are known.
        share_rate: bytes per second of that; None: as `peers.weights.DEFAULT_RATE` says.
        model_id: the fingerprint that the model must have; None: any.
        invited: others have named the model: it counts if a peer of the swarm tells the same as what is here, or
            `model_id` does, and what is here is given to nobody unless `share_weights` says so.
    """

    wish: SpanWish = ANY_SPAN
    initial_peers: Sequence[str] = ()
    join_file: Path | None = None
    lan: bool = False
    listen: str = "tcp://0.0.0.0:0"
    dht_listen: Sequence[str] | None = None
    public_host: str | None = None
    device: str = "auto"
    dtype: str | None = None
    weights: str | None = "auto"
    kv_memory: int | None = None
    training_memory: int | None = None
    authorized_keys: Path | None = None
    speeds_file: Path | None = None
    key_file: Path | None = None
    identity: Identity | None = None
    swarm_key: SwarmKey | None = None
    idle_s: float = 600.0
    watts: float | None = None
    sysfs: Path = SYSFS
    reach: Reach = Reach.auto
    port_mapping: bool = True
    relay_port: int | None = None
    relay_rate: float | None = None
    share_weights: bool | None = None
    share_rate: float | None = None
    model_id: str | None = None
    invited: bool = False

    def shares_weights(self, authorized: AuthorizedKeys | None) -> bool:
        """Whether it gives weights to others; `authorized`: the list in `authorized_keys` as it is now."""
        if self.share_weights is not None:
            return self.share_weights
        if self.invited:
            return False
        return self.swarm_key is not None or (authorized is not None and not authorized.lets_in_strangers)
