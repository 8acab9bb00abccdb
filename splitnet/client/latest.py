"""What is costly to make of facts, and is asked for again and again with the same ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Latest(Generic[P, T]):
    """Calls a function, and remembers what it made of the facts of the last calls: equal ones are not made again.

    Facts must not be changed afterwards; they are compared, so they need not be hashable. Thread-safe.

    Args:
        make: the function.
        count: how many are remembered.
    """

    def __init__(self, make: Callable[P, T], count: int) -> None:
        self._make = make
        self._count = count
        self._made: tuple[tuple[object, T], ...] = ()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        facts = (args, kwargs)
        made = self._made  # replaced as a whole, so that other threads may do so meanwhile
        found = next((each for each in made if each[0] == facts), None)
        if found is None:
            found = facts, self._make(*args, **kwargs)
        if not made or found is not made[0]:
            self._made = (found, *(each for each in made if each is not found))[: self._count]
        return found[1]
