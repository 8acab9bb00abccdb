"""What needs packages that `pip install splitnet` does not bring: they come with its extras, see pyproject.toml."""

from __future__ import annotations

from importlib.util import find_spec

from splitnet.errors import SplitnetError

MODULES = {
    "plot": ("matplotlib",),
    "serve": ("fastapi", "llguidance", "uvicorn"),
    "tune": ("peft",),
}
"""What each extra is for."""


def has(extra: str) -> bool:
    """Whether the packages of an extra are installed."""
    return all(find_spec(module) is not None for module in MODULES[extra])


def require(extra: str, what: str) -> None:
    """Refuses `what` if the packages of an extra are not installed.

    Raises:
        SplitnetError: they are not; it names the command that installs them.
    """
    if not has(extra):
        raise SplitnetError(f"{what} needs packages that are not installed: run `pip install 'splitnet[{extra}]'`")
