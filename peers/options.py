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
    wish: SpanWish = ANY_SPAN
    # Multiaddrs, or `tcp://HOST:PORT?key=...` of peers; empty: starts a swarm, or joins one on the local network.
    initial_peers: Sequence[str] = ()
    join_file: Path | None = None  # a peer that starts at the same time writes the address to join with; is waited for
    lan: bool = False  # be found on the local network, and join the swarm of the model there
    listen: str = "tcp://0.0.0.0:0"  # for activations; port 0: any
    dht_listen: Sequence[str] | None = None  # multiaddrs; None: the same host as `listen`, any port
    # Host name or address that others reach this machine by, with `:port` if it listens on another; None: found out.
    public_host: str | None = None
    device: str = "auto"  # as torch names it; "auto": the best that works, see `splitnet.blocks.device`
    dtype: str | None = None  # that blocks compute in; None: as goes with `weights`, else as the checkpoint stores them
    weights: str | None = "auto"  # of linear layers, see `splitnet.quant.choose`; "auto": fast, precise; None: dtype
    kv: str = "auto"  # what KV caches are held as, see `splitnet.blocks.kv_form`; "auto": as blocks compute
    kv_memory: int | None = None  # bytes for KV caches; None: a quarter of the free memory
    prefixes: bool = True  # store keys and values of texts for later ones that begin alike, see `peers.prefixes`
    prefix_folder: Path | None = None  # also on disk; None: in memory alone
    prefix_disk: int | None = None  # bytes there; None: see `peers.prefixes.PageFiles`
    training_memory: int | None = None  # bytes to keep for clients that train; None: an eighth of the free memory
    authorized_keys: Path | None = None  # the keys that may connect; None: any
    speeds_file: Path | None = None  # keeps measured speeds for the next start; None: nowhere
    key_file: Path | None = None  # of the peer's own key; None: a new key that lives as long as the peer
    identity: Identity | None = None  # that key itself, in place of a file
    swarm_key: SwarmKey | None = None  # of a closed swarm, which has no DHT; None: the swarm is open
    idle_s: float = 600.0  # until an idle session is dropped
    watts: float | None = None  # drawn by the device while it computes; None: read where that is possible
    sysfs: Path = SYSFS  # where Linux shows counters of energy
    reach: Reach = Reach.auto  # how others are to reach it; a `public_host` is believed, so that none are asked
    port_mapping: bool = True  # ask the router for a port, if others do not reach it
    relay_port: int | None = None  # where it relays for others, 0 for any; None: it does not
    relay_rate: float | None = None  # bytes per second that it relays; None: as `RelayBounds` has it
    share_weights: bool | None = None  # with others; None: where the keys that may connect are known
    share_rate: float | None = None  # bytes per second of that; None: `peers.weights.DEFAULT_RATE`
    model_id: str | None = None  # fingerprint that the model must have; None: any
    # Others have named the model: it counts if a peer of the swarm tells the same as the local files, or `model_id`
    # does, and local files are given to others only if `share_weights` says so.
    invited: bool = False
    # Models that the peer may leave its own for, when they are wanted more: folders, files and hub ids; empty: any of
    # the swarm; None: it stays with its model.
    any_model: Sequence[str] | None = None

    def shares_weights(self, authorized: AuthorizedKeys | None) -> bool:
        """Whether it gives weights to others; `authorized`: the list in `authorized_keys` as it is now."""
        if self.share_weights is not None:
            return self.share_weights
        if self.invited or (self.any_model is not None and not self.any_model):  # others name what it serves
            return False
        return self.swarm_key is not None or (authorized is not None and not authorized.lets_in_strangers)
