"""Pieces of weights from the hub, by ranges of bytes."""

from __future__ import annotations

from typing import Final

from huggingface_hub import hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from splitnet.checkpoint.store import TensorStore
from splitnet.checkpoint.transfer.hashing import forget_manifest
from splitnet.checkpoint.transfer.held import HeldPieces
from splitnet.checkpoint.transfer.manifest import Manifest
from splitnet.errors import ModelNotFound

TIMEOUT_S: Final = 30.0


class HubPieces:
    """Where the pieces of a manifest stand in the files of a repository. `read` may be called by several threads.

    Args:
        manifest: of the model.
        store: of the repository, whose headers say the same (see `splitnet.checkpoint.transfer.matching`).
        revision: of the repository.

    Attributes:
        at_once: requests at the same time.
    """

    at_once: Final = 16

    def __init__(self, manifest: Manifest, store: TensorStore, revision: str | None = None) -> None:
        self._store = store
        self._repository = store.source
        self._revision = revision
        self._pieces = HeldPieces(manifest, store)

    def differs(self) -> None:
        """Says that the repository has other weights than the manifest, which is not believed at the next start."""
        forget_manifest(self._store.commit)

    def read(self, name: bytes) -> bytes:
        """A piece, which the caller checks.

        Raises:
            ModelNotFound: the hub does not give it. Exceptions of the HTTP library: it does not answer.
        """
        file, offset, size = self._pieces.where(int(self._pieces.slots_of(name)[0]))
        if self._store.local_file(file) is not None:  # downloaded before
            with self._store.open_file(file) as opened:
                opened.seek(offset)
                return opened.read(size)
        url = hf_hub_url(self._repository, file, revision=self._revision)
        headers = {**build_hf_headers(), "Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as response:
            if response.is_error:
                response.read()  # which says why
            hf_raise_for_status(response)
            if response.status_code != 206:  # the whole file, of which nothing is read
                raise ModelNotFound(f"the hub does not give ranges of {file}")
            data = response.read()
        if len(data) != size:
            raise ModelNotFound(f"the hub does not give ranges of {file}")
        return data
