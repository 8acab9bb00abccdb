"""The options of a peer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peers.power import SYSFS
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.security.swarm_key import SwarmKey
from splitnet.transport.addresses import Reach

# Called with the stage of the start, bytes done and total bytes; repeatedly during a wait.
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SpanWish:
    """Blocks to serve, or the bytes of memory for blocks, or neither."""

    blocks: tuple[int, int] | None = None
    memory: int | None = None


ANY_SPAN = SpanWish()


@dataclass(frozen=True, kw_only=True)
class PeerOptions:
    wish: SpanWish = ANY_SPAN
    # Multiaddrs, or `tcp://HOST:PORT?key=...` of peers; empty: start a swarm, or join one on the local network.
    initial_peers: Sequence[str] = ()
    join_file: Path | None = None  # another peer writes the address to join to this file; the start waits for the file
    lan: bool = False  # announce the peer on the local network, and join the model's swarm there
    listen: str = "tcp://0.0.0.0:0"  # for activations; port 0: any free port
    dht_listen: Sequence[str] | None = None  # multiaddrs; None: the same host as `listen`, any port
    # Host name or address of this machine for others, with `:port` if that differs from the port of `listen`; None: the
    # peer finds the address.
    public_host: str | None = None
    device: str = "auto"  # name in torch; "auto": the best that works, see `splitnet.blocks.chosen_device`
    dtype: str | None = None  # of computations; None: the type that fits `weights`, else the checkpoint's
    weights: str | None = "auto"  # of linear layers, see `splitnet.quant.choose`; "auto": fast, precise; None: dtype
    kv: str = "auto"  # form of KV caches, see `splitnet.blocks.kv_form`; "auto": the type of computations
    vision: bool = False  # read images for clients, besides serving blocks
    kv_memory: int | None = None  # bytes for KV caches; None: a quarter of the free memory
    prefixes: bool = True  # store pages for later texts that begin alike, see `peers.prefixes`
    prefix_folder: Path | None = None  # of pages on disk; None: pages are in memory only
    prefix_disk: int | None = None  # bytes of pages on disk; None: see `peers.prefixes.PageFiles`
    training_memory: int | None = None  # bytes for clients that train; None: an eighth of the free memory
    authorized_keys: Path | None = None  # list of keys that may connect; None: any key
    speeds_file: Path | None = None  # keeps measured speeds for the next start; None: nowhere
    key_file: Path | None = None  # of the peer's key; None: a new key for this run
    identity: Identity | None = None  # the peer's key, in place of `key_file`
    swarm_key: SwarmKey | None = None  # of a closed swarm, which has no DHT; None: the swarm is open
    idle_s: float = 600.0  # a session ends after this long without a message
    watts: float | None = None  # power of the device while it computes; None: read from counters and sensors
    sysfs: Path = SYSFS  # where Linux has counters of energy
    reach: Reach = Reach.auto  # how others reach the peer; with a `public_host` other peers are not asked
    port_mapping: bool = True  # ask the router for a port if others do not reach the peer
    relay_port: int | None = None  # of the relay for others, 0 for any free port; None: no relay
    relay_rate: float | None = None  # bytes per second of the relay; None: see `RelayBounds`
    share_weights: bool | None = None  # send weights to others; None: only if the keys that may connect are known
    share_rate: float | None = None  # bytes per second of weights; None: `peers.weights.DEFAULT_RATE`
    # List of keys for which the peer compresses its blocks, in the folder `compress_folder`; None: for none.
    compress_for: Path | None = None
    compress_folder: Path = Path("compression")
    model_id: str | None = None  # fingerprint that the model must have; None: any
    # An invitation has named the model: the local files count only if a peer of the swarm or `model_id` names the same
    # model, and weights are sent to others only with `share_weights`.
    invited: bool = False
    # Models with more demand to which the peer may change: folders, files and hub ids; empty: any model of the swarm;
    # None: the peer stays with its model.
    any_model: Sequence[str] | None = None

    def shares_weights(self, authorized: AuthorizedKeys | None) -> bool:
        """Whether the peer sends weights to others; authorized: the present list in `authorized_keys`."""
        if self.share_weights is not None:
            return self.share_weights
        if self.invited or (self.any_model is not None and not self.any_model):  # others choose the model
            return False
        return self.swarm_key is not None or (authorized is not None and not authorized.lets_in_strangers)
