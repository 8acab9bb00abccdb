"""A client learns from peers what its model is, where not all of it is on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from splitnet.errors import ModelNotFound
from splitnet.model.checkpoint import Checkpoint
from splitnet.net.identity import AuthorizedKeys, Identity, PublicKey
from splitnet.net.joining import join
from splitnet.net.links import Links
from splitnet.net.swarm_key import OPEN, SwarmKey
from splitnet.weights.fetching import Asking, Report
from splitnet.weights.manifest import Manifest
from splitnet.weights.matching import differs, find_manifest


def learn_manifest(
    checkpoint: Checkpoint,
    addresses: Sequence[str],
    identity: Identity,
    *,
    swarm_key: SwarmKey | None = None,
    trusted: AuthorizedKeys | None = None,
    expected: str | None = None,
    report: Report = lambda stage, done, total: None,
) -> None:
    """Finds the manifest of a model in a swarm. All that is here of the model fits it.

    Args:
        addresses: of the swarm.
        trusted: keys of the peers that may be asked; None: any.
        expected: the fingerprint of the model; None: that of the only one which has its name and fits.

    Raises:
        ModelNotFound: no peer gives one that fits, or several do.
        DirectoryError: the swarm does not answer.
    """
    swarm = swarm_key or OPEN
    links = Links(identity)

    def allows(key: PublicKey) -> bool:
        return trusted is None or trusted.allows(key.curve_raw)

    def why_not(manifest: Manifest, heads: Sequence[bytes]) -> str:
        return differs(manifest, checkpoint.store, lambda done, total: report("check the weights", done, total))

    try:
        with join(addresses, lambda: links, swarm=swarm) as directory, Asking(identity, swarm) as asking:
            found = find_manifest(
                directory,
                asking,
                checkpoint.name,
                expected=expected,
                joined=addresses,
                allows=allows,
                accept=why_not,
                report=report,
            )
    finally:
        links.close()
    if found is None:
        raise ModelNotFound(
            f"not all of {checkpoint.name} is on this machine, and no peer of this swarm tells what it is: join a "
            "swarm that serves it, or download all of it"
        )
    checkpoint.adopt(found[0])
