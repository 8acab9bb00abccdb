"""The prefix store: pages of keys and values that sessions leave for later sessions whose texts begin alike.

The name of a page is a digest of everything that the page depends on: the client's label, which covers the text up to
the end of the page (see `splitnet.wire.sent_log`), the client's digest of the hops before (`Open.context`), the blocks
and their weight format, and the key of the client. So a page that is found always fits, and no client finds pages of
another key.

Pages use the KV memory that no session has reserved. The least valuable page is evicted first, by its uses and the cost
to compute it again (GreedyDual-Size-Frequency; Cherkasova, HPL-98-69R1, 1998), from the key with the most bytes for its
weight. A thread writes to `PageFiles` the pages that were used again, and all pages when the peer ends. If the store
fails, only pages are lost.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from pathlib import Path
from shutil import disk_usage

import torch
from safetensors.torch import load, save
from torch import Tensor

from splitnet.limits import keep_latest
from splitnet.wire.sent_log import digest

log = logging.getLogger(__name__)

STATES = "states."  # prefix of the names of states: tensors after the last position of a page, not keys or values
READ_S = 2.0  # longest time that a session waits for pages from the disk
CLOSE_S = 5.0  # longest time that a closing peer waits for pages to be written
PACKED = 32  # number of packed pages that are kept, because other peers ask for a page in several parts
MOST_QUEUED = 256  # maximum number of pages that wait to be written
SHRINK = 1 / 16  # share of the limit that is freed in addition, so that searches for pages to evict are rare
FREE_DISK = 1 << 30  # bytes of the disk that pages always leave free
MOST_DISK = 8 << 30  # bytes of pages on disk by default
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Page:
    """The tensors of 32 positions at a hop (`SequenceCache.page`), states with names that begin with `STATES`, and the
    hop's encoded output for the positions, with their `Step.rope_length`."""

    name: bytes
    tensors: dict[str, Tensor]
    output: bytes = b""
    rope_length: int = 0

    @property
    def nbytes(self) -> int:
        return len(self.output) + sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def states(self) -> dict[str, Tensor]:
        return {name.removeprefix(STATES): tensor for name, tensor in self.tensors.items() if name.startswith(STATES)}

    @property
    def positions(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith(STATES)}


@dataclass(slots=True, eq=False)
class _HeldPage:
    page: Page
    owner: bytes
    cost_ms: float
    depth: int  # number of pages before this page in its text
    value: float  # not higher than the value of any page before it in the text
    secret: bool  # see `PageNamespace`
    uses: int = 1


@dataclass(slots=True)
class PageCounts:
    """Pages since the start of the peer. broken: a page that did not fit, or whose file was damaged or failed."""

    stored: int = 0
    found: int = 0
    read: int = 0
    written: int = 0
    evicted: int = 0
    broken: int = 0


@dataclass(frozen=True, slots=True)
class PageNamespace:
    """The pages that a session can find: of the same owner, with the same context. Empty `name`: no pages.

    secret: only the client of the session, and peers that the client tells, know the names of the pages.
    """

    name: bytes = b""
    owner: bytes = b""
    secret: bool = True


NOWHERE = PageNamespace()
MakePage = Callable[[bytes], Page]
UsePages = Callable[[list[Page]], None]


def page_name(space: PageNamespace, label: bytes) -> bytes:
    return digest(space.name, label)


def _checked(name: bytes, data: bytes) -> bytes:
    """Digest of a packed page."""
    return blake2b(data, digest_size=_DIGEST_BYTES, key=name).digest()


class PrefixStore:
    """Pages in memory and on disk. Thread-safe.

    facts: everything else that pages of this peer depend on. limit: the present bound of bytes in memory. weight: of an
    owner. files: None: no page is written.
    """

    def __init__(
        self,
        facts: str,
        limit: Callable[[], int],
        weight: Callable[[bytes], float] = lambda _: 1.0,
        files: PageFiles | None = None,
    ) -> None:
        self.counts = PageCounts()
        self.nbytes = 0  # of all pages in memory
        self._facts = facts.encode()
        self._limit = limit
        self._weight = weight
        self._files = files
        self._lock = threading.Lock()
        self._held: dict[bytes, _HeldPage] = {}
        self._bytes: dict[bytes, int] = {}  # by owner
        self._packed: dict[bytes, bytes] = {}  # the pages that other peers asked for last, by name
        self._floor = 0.0  # highest value of an evicted page
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], object] | None]] = queue.PriorityQueue()
        self._next_job = itertools.count().__next__
        self._queued: set[bytes] = set()  # names of pages that wait to be written
        self._thread = threading.Thread(target=self._run_jobs, name="splitnet-prefixes", daemon=True) if files else None
        if self._thread is not None:
            self._thread.start()

    @property
    def disk_bytes(self) -> int:
        return self._files.nbytes if self._files is not None else 0

    def __len__(self) -> int:
        return len(self._held)

    def namespace(
        self, owner: bytes, context: bytes, start: int, end: int, codec: int, *, secret: bool = True
    ) -> PageNamespace:
        """The namespace of pages of blocks `[start, end)`, with outputs in `codec`. owner: a key, or the name of a
        group of keys that share pages. secret: see `PageNamespace`."""
        hop = f"{start}:{end} {codec} {secret}".encode()
        return PageNamespace(digest(self._facts, owner, context, hop), owner, secret) if context else NOWHERE

    def packed(self, name: bytes) -> tuple[bytes, bool] | None:
        """A page with its digest, for `unpack`, and whether this call has packed it; None: the page is not in memory,
        or other clients could guess its name."""
        held, known = self._held.get(name), self._packed.get(name)
        if held is None or not held.secret:
            return None
        if known is not None:
            return known, False
        keep_latest(self._packed, name, pack(held.page), PACKED)
        return self._packed[name], True

    def has_page(self, space: PageNamespace, label: bytes) -> bool:
        """Whether a page is in memory."""
        return page_name(space, label) in self._held

    def put_page(
        self, space: PageNamespace, label: bytes, page: MakePage, cost_ms: float, before: Sequence[bytes] = ()
    ) -> None:
        """Stores a page that is missing, if there is room. page: makes the page. cost_ms: of its computation. before:
        names of the pages before it in its text; they are kept as long, because the page is useless without them."""
        name = page_name(space, label)
        if not space.name or name in self._held or self._limit() <= 0:
            return
        made = page(name)
        self.counts.stored += self._take_in(made, space, cost_ms, before, uses=1)

    def put_copied(self, space: PageNamespace, page: Page, before: Sequence[bytes]) -> bool:
        """Stores a page from another peer, if there is room; before: as in `put_page`. The page is not written to disk
        until a session has used it, because other peers could fill the disk."""
        return self._take_in(page, space, self._most_cost_ms(), before, uses=0)

    def _most_cost_ms(self) -> float:
        """The cost of a page whose computation was not timed here."""
        return max((each.cost_ms for each in list(self._held.values())), default=1.0)

    def lookup_prefix(self, space: PageNamespace, labels: Sequence[bytes], then: UsePages) -> None:
        """Finds the pages of a text, from its beginning to the first missing page, and calls `then` with them: at once,
        or from another thread if a page is on disk."""
        names = [page_name(space, label) for label in labels] if space.name else []
        pages, until = self._in_memory(names), time.monotonic() + READ_S
        following = names[len(pages) : len(pages) + 1]
        on_disk = self._files is not None and following and self._files.has_page(space.owner, following[0])
        if on_disk and self._jobs.qsize() < 2 * MOST_QUEUED:
            self._put_job(0, lambda: then(self._read_pages(space, names, pages, until)))
        else:
            self.counts.found += len(pages)
            then(pages)

    def used(self, pages: Sequence[Page]) -> None:
        """Has pages that a row has loaded written to disk: only now, because writing would slow down the load."""
        with self._lock:
            for page in pages:
                if (held := self._held.get(page.name)) is not None:
                    self._write_later(held)

    def forget_pages(self, pages: Sequence[Page]) -> None:
        """Drops pages that did not fit."""
        self.counts.broken += len(pages)
        with self._lock:
            for page in pages:
                self._drop_page(page.name)
        for page in pages if self._files is not None else ():
            self._put_job(1, lambda name=page.name: self._files and self._files.remove(name))

    def shrink(self) -> None:
        """Frees memory that sessions need."""
        with self._lock:
            self._make_room(0)

    def close(self) -> None:
        """Writes pages for up to `CLOSE_S`, the most valuable first, and ends the thread."""
        if self._thread is None:
            return
        with self._lock:
            used = [held for held in self._held.values() if held.uses]
            left = sorted(used, key=lambda held: (-held.value, held.depth))
        until = time.monotonic() + CLOSE_S
        for held in left:
            self._put_job(1, lambda held=held: time.monotonic() < until and self._write_page(held.page, held.owner))
        self._put_job(2, None)
        self._thread.join(2 * CLOSE_S)

    def _in_memory(self, names: Sequence[bytes]) -> list[Page]:
        """The first pages up to the first missing one. Each use raises their values, and no page is worth less than a
        page after it."""
        with self._lock:
            found: list[_HeldPage] = []
            for name in names:
                held = self._held.get(name)
                if held is None:
                    break
                found.append(held)
            value = 0.0
            for held in reversed(found):
                held.uses += 1
                value = held.value = max(value, held.value, self._floor + held.uses * held.cost_ms)
            return [held.page for held in found]

    def _read_pages(self, space: PageNamespace, names: Sequence[bytes], pages: list[Page], until: float) -> list[Page]:
        """Continues `pages` with pages on disk and in memory."""
        assert self._files is not None
        found = list(pages)
        for name in names[len(pages) :]:
            with self._lock:
                held = self._held.get(name)
            page = held.page if held is not None else None
            if page is None and time.monotonic() < until and self._files.has_page(space.owner, name):
                page = self._files.read_page(space.owner, name)
                self.counts.read += page is not None
                self.counts.broken += page is None
                if page is not None:
                    self._take_in(page, space, self._most_cost_ms(), names[: len(found)], uses=2)
            if page is None:
                break
            found.append(page)
        self.counts.found += len(found)
        return found

    def _take_in(self, page: Page, space: PageNamespace, cost_ms: float, before: Sequence[bytes], uses: int) -> bool:
        owner = space.owner
        with self._lock:
            if not page.nbytes or page.name in self._held:
                return False
            if not self._hold_page(before, owner, cost_ms) or not self._make_room(page.nbytes):
                return False
            if not self._hold_page(before, owner, cost_ms):
                return False
            self._held[page.name] = _HeldPage(
                page, owner, cost_ms, len(before), self._floor + cost_ms, space.secret, uses
            )
            self._bytes[owner] = self._bytes.get(owner, 0) + page.nbytes
            self.nbytes += page.nbytes
            return True

    def _hold_page(self, names: Sequence[bytes], owner: bytes, cost_ms: float) -> bool:
        """Raises the values of pages to that of a new page after them; False: a page is missing."""
        for name in names:
            held = self._held.get(name)
            if held is not None:
                held.value = max(held.value, self._floor + cost_ms)
            elif self._files is None or not self._files.has_page(owner, name):
                return False
        return True

    def _make_room(self, nbytes: int) -> bool:
        """Evicts pages until `nbytes` more are within the limit; False: the limit is lower than `nbytes`."""
        limit = max(0, self._limit())
        if nbytes > limit:
            return False
        if self.nbytes + nbytes <= limit:
            return True
        most = max(0, limit - nbytes - int(limit * SHRINK))
        # Heaps, because the owner may change after each page: sorting each time would take quadratic time.
        weights = {owner: self._weight(owner) for owner in self._bytes}
        owners = [(-held / weights[owner], index, owner) for index, (owner, held) in enumerate(self._bytes.items())]
        pages = {owner: list[tuple[float, int, bytes]]() for owner in weights}
        for name, held in self._held.items():
            pages[held.owner].append((held.value, -held.depth, name))
        for heap in (owners, *pages.values()):
            heapify(heap)
        while self.nbytes > most:
            _, index, owner = heappop(owners)
            own, others = pages[owner], self.nbytes - self._bytes[owner]
            while own:
                value, _, name = heappop(own)
                held = self._held[name]
                if held.uses > 1:
                    self._write_later(held)
                self._drop_page(name)
                self._floor = max(self._floor, value)
                self.counts.evicted += 1
                if self.nbytes <= most or (self.nbytes - others) / weights[owner] < others / 2:
                    break
            if own:
                heappush(owners, (-self._bytes[owner] / weights[owner], index, owner))
        return True

    def _drop_page(self, name: bytes) -> None:
        held = self._held.pop(name, None)
        if held is not None:
            self.nbytes -= held.page.nbytes
            self._bytes[held.owner] -= held.page.nbytes
            if not self._bytes[held.owner]:
                del self._bytes[held.owner]

    def _write_later(self, held: _HeldPage) -> None:
        if self._files is None or held.page.name in self._queued or len(self._queued) >= MOST_QUEUED:
            return
        if not self._files.has_page(held.owner, held.page.name):
            self._queued.add(held.page.name)
            self._put_job(1, lambda: self._write_page(held.page, held.owner))

    def _put_job(self, order: int, job: Callable[[], object] | None) -> None:
        """Has the thread do a job; None ends it. Jobs of a lower `order` come first: sessions wait for reads."""
        self._jobs.put((order, self._next_job(), job))

    def _write_page(self, page: Page, owner: bytes) -> None:
        assert self._files is not None
        self._queued.discard(page.name)
        if not self._files.has_page(owner, page.name):
            written = self._files.write_page(owner, page)
            self.counts.written += written
            self.counts.broken += not written

    def _run_jobs(self) -> None:
        while (job := self._jobs.get()[2]) is not None:
            try:
                job()
            except Exception:
                log.exception("the store of prefixes failed")


def pack(page: Page) -> bytes:
    """The digest of a page, and the page in the safetensors format."""
    output = torch.frombuffer(bytearray(page.output), dtype=torch.uint8) if page.output else torch.empty(0).byte()
    data = save({**page.tensors, "output": output, "reach": torch.tensor(page.rope_length)})
    return _checked(page.name, data) + data


def unpack(name: bytes, data: bytes | bytearray) -> Page:
    """The page in `data`. Raises ValueError: the page is damaged; also raises errors of safetensors."""
    body = bytes(data[_DIGEST_BYTES:])
    if _checked(name, body) != data[:_DIGEST_BYTES]:
        raise ValueError("its digest is wrong")
    tensors = load(body)
    output, reach = tensors.pop("output"), tensors.pop("reach")
    return Page(name, tensors, output.numpy().tobytes(), int(reach))


@dataclass
class PageFiles:
    """Pages in a folder that only its owner can read: a file for each page, replaced atomically, with a digest that is
    checked on reading. All peers of a machine share the folder and its limit. The page that was used longest ago, of
    the key with most bytes, is removed first.

    limit: bytes; None: a tenth of the free disk, at most `MOST_DISK`.
    """

    folder: Path
    limit: int | None = None
    nbytes: int = 0
    _unseen: float = 0.0  # bytes written since the folder was listed; other peers write to it, too
    _sizes: dict[Path, int] = field(default_factory=dict[Path, int])
    _told_at: float = -1e9

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.chmod(0o700)
            if self.limit is None:
                self.limit = min(MOST_DISK, disk_usage(self.folder).free // 10)
            self._list_pages()
        except OSError as error:
            self._report_error(error)
            self.limit = 0

    def has_page(self, owner: bytes, name: bytes) -> bool:
        return self._file(owner, name) in self._sizes

    def read_page(self, owner: bytes, name: bytes) -> Page | None:
        """A page; None: its file is missing, or was damaged and is removed."""
        file = self._file(owner, name)
        try:
            page = unpack(name, file.read_bytes())
            with suppress(OSError):
                os.utime(file)
            return page
        except Exception as error:  # a damaged file may cause any error
            if not isinstance(error, FileNotFoundError):  # another peer may have removed it
                self._report_error(error)
            self._remove(file)
            return None

    def write_page(self, owner: bytes, page: Page) -> bool:
        """Writes a page; False: that failed, or there is no room."""
        data = pack(page)
        file = self._file(owner, page.name)
        partial = file.with_suffix(f".{os.getpid()}")
        try:
            if not self._make_room(len(data)):
                return False
            file.parent.mkdir(exist_ok=True, mode=0o700)
            partial.write_bytes(data)
            partial.replace(file)
        except OSError as error:
            self._report_error(error)
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            return False
        self._sizes[file] = len(data)
        self.nbytes += self._sizes[file]
        self._unseen += self._sizes[file]
        return True

    def remove(self, name: bytes) -> None:
        """Removes the files of a page."""
        for file in [file for file in self._sizes if file.stem == name.hex()]:
            self._remove(file)

    def _file(self, owner: bytes, name: bytes) -> Path:
        return self.folder / digest(owner).hex() / f"{name.hex()}.page"

    def _list_pages(self) -> None:
        """Lists the pages in the folder; removes partial files and empty folders."""
        self._sizes, self._unseen = {}, 0.0
        for file in self.folder.glob("*/*"):
            with suppress(OSError):
                if file.suffix == ".page":
                    self._sizes[file] = file.stat().st_size
                elif time.time() - file.stat().st_mtime > 60:
                    file.unlink()
        for folder in list(self.folder.iterdir()):
            with suppress(OSError):  # the folder has pages
                folder.rmdir()
        self.nbytes = sum(self._sizes.values())

    def _make_room(self, nbytes: int) -> bool:
        limit = self.limit or 0
        if nbytes > limit:
            return False
        if self._unseen + nbytes > limit * SHRINK / 2:
            self._list_pages()
        if self.nbytes + nbytes > limit or disk_usage(self.folder).free < nbytes + FREE_DISK:
            self._list_pages()
            used, held = dict[Path, list[tuple[float, Path]]](), Counter[Path]()
            for file, size in self._sizes.items():
                with suppress(OSError):
                    used.setdefault(file.parent, []).append((file.stat().st_mtime, file))
                    held[file.parent] += size
            for files in used.values():
                files.sort(reverse=True)  # the page that was used longest ago is the last
            folders = [(-size, index, folder) for index, (folder, size) in enumerate(held.items())]
            heapify(folders)
            free = nbytes + FREE_DISK + limit * SHRINK
            while folders and (self.nbytes + nbytes > limit * (1 - SHRINK) or disk_usage(self.folder).free < free):
                size, index, folder = heappop(folders)
                _, file = used[folder].pop()
                if used[folder]:
                    heappush(folders, (size + self._sizes[file], index, folder))
                self._remove(file)
        return self.nbytes + nbytes <= limit and disk_usage(self.folder).free >= nbytes + FREE_DISK

    def _remove(self, file: Path) -> None:
        self.nbytes -= self._sizes.pop(file, 0)
        with suppress(OSError):
            file.unlink(missing_ok=True)
            file.parent.rmdir()  # fails while the folder has pages

    def _report_error(self, error: Exception) -> None:
        if time.monotonic() > self._told_at + 60:
            self._told_at = time.monotonic()
            log.warning("a stored prefix in %s cannot be used: %s", self.folder, error)
