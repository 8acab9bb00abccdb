"""Imports the modules of daemons and clients, once for all forked processes; see `slowed.py`."""

from splitnet.cli import main  # noqa: F401
from splitnet.import_shims import claim_process, import_models

claim_process()
import_models()

import transformers  # noqa: E402, F401
