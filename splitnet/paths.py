"""Where files of this package are kept for later, and what others are told of paths."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of the demo model, of weights and of what was measured. `SPLITNET_CACHE` names another."""
    override = os.environ.get("SPLITNET_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("splitnet"))


def public_name(source: str) -> str:
    """What is written into files of a checkpoint's hub id or path: no path of a file that only this package knows."""
    path = Path(source)
    return path.name.removesuffix(".gguf") if cache_folder() in path.parents else source
