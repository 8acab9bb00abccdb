"""The models of a server by name: loaded when a request names them, closed when unused."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from anyio import to_thread

from splitnet.errors import SplitnetError
from splitnet.serve.failures import ApiError, api_error_of
from splitnet.serve.request_gate import REQUEST_CALLBACKS
from splitnet.serve.responses import ServedModel

log = logging.getLogger(__name__)

KEPT_MODELS = 4  # Number of models that stay loaded besides the first model
WAIT_S = 30.0  # How long a request waits while `keep` other models are in use, before the request is refused
REFRESH_S = 10.0  # Minimum time between two searches for models


@dataclass(frozen=True)
class LoadableModel:
    """A model that can be served. `load` may take long, and raises SplitnetError."""

    names: Sequence[str]
    load: Callable[[], ServedModel]


@dataclass(eq=False)
class Gateway:
    """Finds the model of a request.

    `served` is loaded at the start and stays loaded. Requests use at most `keep` models of `offers` and `search` at a
    time. A new model is loaded before an unused model is closed, so no model is closed if loading fails.
    created: the creation time of the models in listings, in seconds since 1970.
    """

    served: ServedModel
    offers: Sequence[LoadableModel] = ()
    search: Callable[[], Sequence[LoadableModel]] | None = None  # may take long; raises SplitnetError
    keep: int = KEPT_MODELS
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._found: Sequence[LoadableModel] = ()
        self._searched_at = float("-inf")
        self._searching: asyncio.Task[None] | None = None
        # Models by the first name in their `LoadableModel`, the least recently used model first.
        self._loaded: dict[str, ServedModel] = {}
        self._uses: Counter[str] = Counter()  # number of unanswered requests, by the same names
        self._loads: dict[str, asyncio.Task[None]] = {}  # running loads, by the same names
        self._freed = asyncio.Event()

    @property
    def loaded(self) -> list[ServedModel]:
        return [self.served, *self._loaded.values()]

    @property
    def model_names(self) -> list[str]:
        """Names of models that requests may give."""
        return list(dict.fromkeys([*self.served.model_names, *(name for offer in self._all for name in offer.names)]))

    @property
    def _all(self) -> list[LoadableModel]:
        return [*self.offers, *self._found]

    def check_name(self, name: str) -> None:
        """Raises ApiError if no model has this name."""
        if name not in self.model_names:
            use = " or ".join(map(repr, self.model_names))
            raise ApiError(404, f"this server has no model {name!r}: use {use}", param="model", code="model_not_found")

    async def refresh(self) -> None:
        """Searches for models, at most every `REFRESH_S` seconds; concurrent calls wait for the same search."""
        searches = self._searching is not None and not self._searching.done()
        if self.search is not None and not searches and time.monotonic() - self._searched_at >= REFRESH_S:
            self._searched_at = time.monotonic()
            self._searching = asyncio.create_task(self._search(self.search))
        if self._searching is not None:
            await asyncio.shield(self._searching)

    async def _search(self, search: Callable[[], Sequence[LoadableModel]]) -> None:
        try:
            self._found = await to_thread.run_sync(search)
        except SplitnetError:  # for example, the directory does not answer
            return
        except Exception:
            log.exception("models of the swarm could not be looked for")

    async def find_model(self, name: str | None) -> ServedModel:
        """Loads the model with this name (None: the first model), which stays loaded until the request is answered.

        Raises ApiError if no model has this name, the model cannot be loaded, or too many other models are in use.
        """
        if name is None or name in self.served.model_names:
            return self.served
        if name not in self.model_names:
            await self.refresh()
        self.check_name(name)
        offer = next(offer for offer in self._all if name in offer.names)
        key = offer.names[0]
        try:
            async with asyncio.timeout(WAIT_S):
                while key not in self._loaded and not self._uses[key] and len(+self._uses) >= self.keep:
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            busy = f"{self.keep} other models are in use for {WAIT_S:g} s: try again later, or raise --keep-models"
            raise ApiError(429, busy, code="overloaded") from None
        self._uses[key] += 1
        REQUEST_CALLBACKS.get().callback(self._leave_model, key)
        if key not in self._loaded:
            if key not in self._loads:
                self._loads[key] = asyncio.create_task(self._load(key, offer))
            await asyncio.shield(self._loads[key])
        self._loaded[key] = served = self._loaded.pop(key)
        return served

    async def _load(self, key: str, offer: LoadableModel) -> None:
        try:
            self._loaded[key] = await to_thread.run_sync(offer.load)
        except SplitnetError as error:
            status = api_error_of(error).status
            raise ApiError(max(status, 502), f"{key!r} cannot be served: {error}", param="model") from None
        finally:
            del self._loads[key]
        self._make_room()

    def _leave_model(self, key: str) -> None:
        """Notes that a request for this model is answered."""
        self._uses[key] -= 1
        self._freed.set()
        self._make_room()

    def _make_room(self) -> None:
        """Closes models that no request uses, least recently used first, while more than `keep` are loaded."""
        idle = [key for key in self._loaded if not self._uses[key]]
        for key in idle[: max(0, len(self._loaded) - self.keep)]:
            asyncio.get_running_loop().run_in_executor(None, self._loaded.pop(key).close)

    def drain(self) -> None:
        """Ends streams that have no end of their own, see `Generations.draining`."""
        for served in self.loaded:
            served.generations.draining = True

    def end_requests(self) -> None:
        """Ends all requests; returns at once."""
        for served in self.loaded:
            served.generations.end_requests()

    def close(self) -> None:
        for served in self.loaded:
            served.close()
