"""The version, as pyproject.toml has it; apart from the public names, whose import is slow."""

__version__ = "0.2.0.dev0"
