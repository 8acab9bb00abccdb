"""The version, the same as in pyproject.toml; separate from the public names, whose import is slow."""

__version__ = "0.2.0.dev0"
