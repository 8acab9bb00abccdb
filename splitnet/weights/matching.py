"""Which manifest is that of a model of which not all files are here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from splitnet.errors import ModelNotFound
from splitnet.model.tensor_store import TensorStore
from splitnet.net.endpoints import Endpoint
from splitnet.net.identity import PublicKey
from splitnet.net.swarm_directory import SwarmDirectory
from splitnet.weights.fetching import Asking, Report, fetch_manifest
from splitnet.weights.hashing import Progress, hash_ranges
from splitnet.weights.manifest import Manifest

log = logging.getLogger(__name__)

MAX_ASKED: Final = 8
"""Peers that are asked for the manifest of one model, one after the other."""
MAX_MODELS: Final = 8
"""Of one name that are asked about: names are what anybody claims, and who is silent takes seconds."""


def headers_differ(manifest: Manifest, store: TensorStore) -> str:
    """What in a manifest is other than in the config and the headers of files; empty: nothing."""
    places = store.places()
    here = {name: (place.stored, place.shape, place.nbytes) for name, place in places.items()}
    told = {one.name: (one.stored, one.shape, one.pieces.nbytes) for one in manifest.tensors}
    if here != told:
        return f"{len(here.items() ^ told.items())} tensors are others"
    if manifest.config != store.told_config():
        return "the config is another"
    return ""


def differs(manifest: Manifest, store: TensorStore, progress: Progress | None = None) -> str:
    """What in a manifest is other than in the files that are here, and in the headers of the others; empty: nothing."""
    if reason := headers_differ(manifest, store):
        return reason
    places = store.places()
    ranges: dict[str, list[tuple[int, int]]] = {}
    for place in places.values():
        if store.local_file(place.file) is not None:
            ranges.setdefault(place.file, []).append((place.offset, place.nbytes))
    digests = hash_ranges(store, {file: sorted(set(some)) for file, some in ranges.items()}, progress)
    for one in manifest.tensors:
        place = places[one.name]
        if place.file in digests and digests[place.file][place.offset, place.nbytes] != one.pieces.digests:
            return f"{one.name} has other weights"
    return ""


def names_of(model: str | Path) -> set[str]:
    """How peers may call a model that is given so."""
    path = Path(model)
    return {str(model), path.name, path.stem if path.suffix == ".gguf" else path.name}


def find_manifest(
    directory: SwarmDirectory,
    asking: Asking,
    model: str | Path,
    *,
    expected: str | None = None,
    allows: Callable[[PublicKey], bool] = lambda key: True,
    accept: Callable[[Manifest], str] = lambda manifest: "",
    report: Report = lambda stage, done, total: None,
) -> tuple[Manifest, str] | None:
    """The manifest of a model as its peers tell it, and the name of the model there.

    Args:
        directory: of the swarm.
        model: as the user calls it.
        expected: its fingerprint; None: that of the only model of this name.
        allows: tells which peers may be asked, by their keys.
        accept: says what is wrong with a manifest, if something is.

    Returns:
        None if no peer serves a model of this name.

    Raises:
        ModelNotFound: several models are called so, or no peer tells of the one.
    """
    report("ask peers", 0, 0)
    if expected is not None:
        called: Mapping[str, str] = {expected: str(model)}
    else:
        names = names_of(model)
        called = {fingerprint: name for fingerprint, name in directory.models().items() if name in names}
    if not called:
        return None
    if len(called) > MAX_MODELS:
        raise ModelNotFound(f"{len(called)} models of this swarm are called {model}: give --model-id")
    found: list[tuple[Manifest, str]] = []
    reasons: list[str] = []
    for fingerprint, name in called.items():
        records = [record for record in directory.peers(fingerprint) if allows(record.key)]
        if records and expected is not None:
            name = records[0].model_name
        manifest = _first(asking, fingerprint, [record.endpoint for record in records], accept, report, reasons)
        if manifest is not None:
            found.append((manifest, name))
    if len(found) > 1:
        ids = ", ".join(manifest.fingerprint for manifest, _ in found)
        raise ModelNotFound(
            f"{len(found)} models of this swarm are called {model}: give --model-id with the one that you mean ({ids})"
        )
    if not found:
        raise ModelNotFound(f"no peer tells what {model} is ({'; '.join(reasons) or 'none answers'})")
    return found[0]


def _first(
    asking: Asking,
    fingerprint: str,
    peers: Sequence[Endpoint],
    accept: Callable[[Manifest], str],
    report: Report,
    reasons: list[str],
) -> Manifest | None:
    for peer in peers[:MAX_ASKED]:
        try:
            manifest = fetch_manifest(asking, peer, fingerprint, report)
        except ModelNotFound as error:
            reasons.append(f"{peer.address}: {error}")
            continue
        reason = accept(manifest)  # the fingerprint covers no heads, so the next peer may tell better ones
        if not reason:
            return manifest
        reasons.append(f"{fingerprint[:12]} of {peer.address}: {reason}")
    return None
