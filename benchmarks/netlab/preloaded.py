"""Imports what daemons and clients need, once for all that are forked; see `slowed.py`."""

from splitnet.cli import main  # noqa: F401
from splitnet.light_imports import claim_process, import_models

claim_process()
import_models()

import transformers  # noqa: E402, F401

import peers.daemon  # noqa: E402
import peers.metrics  # noqa: E402
import peers.metrics_server  # noqa: E402, F401
import splitnet.client.causal_lm  # noqa: E402
import splitnet.net.directory  # noqa: E402
import splitnet.net.swarm_directory  # noqa: E402, F401
