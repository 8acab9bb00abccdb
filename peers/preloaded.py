"""Imports the modules of a peer, for a process from which peers are forked."""

from splitnet.import_shims import claim_process, import_models

claim_process()
import_models(signals_raise=False)

import peers.running_peer  # noqa: E402, F401
