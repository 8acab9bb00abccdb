"""Imports what daemons and clients need, once for all that are forked; see `slowed.py`."""

from splitnet.cli import main  # noqa: F401
from splitnet.import_shims import claim_process, import_models

claim_process()
import_models()

import transformers  # noqa: E402, F401
