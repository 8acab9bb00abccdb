"""Pages that sessions have left: the right ones are found, or fewer, whatever happens to memory, disk and files."""

from __future__ import annotations

import errno
import math
import os
import stat
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from queue import Queue
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peers import prefixes
from peers.prefixes import NOWHERE, STATES, Page, PageFiles, PageNamespace, PrefixStore, page_name
from splitnet.wire.sent_log import digest
from tests.tiers import examples

OWNERS = (b"a" * 32, b"b" * 32, b"group c")
WEIGHTS = dict(zip(OWNERS, (1.0, 3.0, 0.01), strict=True))
DEPTH = 6  # pages of the longest text
SOON_S = 30.0


def label(text: int, index: int) -> bytes:
    """Texts 0 and 1 have their first two pages in common."""
    return digest(f"{text if index > 1 else text // 2 * 2} {index}".encode())


def made_page(name: bytes, positions: int = 8) -> Page:
    """One whose every part follows from its name."""
    numbers = torch.Generator().manual_seed(int.from_bytes(name[:7], "little"))
    tensors = {
        f"{block}.{kind}": torch.randn(1, 2, positions, 4, generator=numbers) for block in (3, 4) for kind in "kv"
    }
    tensors["inputs.keys"], tensors["inputs.values"] = torch.ones(1, 1, positions, 2), torch.ones(1, 1, positions, 0)
    if name[0] % 2:
        tensors[f"{STATES}3.conv.0"] = torch.randn(2, 3, generator=numbers).to(torch.bfloat16)
    return Page(name, tensors, name * 3, name[1] % 3)


def same(one: Page, other: Page) -> bool:
    alike = one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[key]) and tensor.dtype == other.tensors[key].dtype
        for key, tensor in one.tensors.items()
    )
    return alike and (one.name, one.output, one.rope_length) == (other.name, other.output, other.rope_length)


def looked_up(store: PrefixStore, space: PageNamespace, labels: list[bytes]) -> list[Page]:
    """Pages of a text, with which a row is begun."""
    found: Queue[list[Page]] = Queue()
    store.lookup_prefix(space, labels, found.put)
    pages = found.get(timeout=SOON_S)
    store.used(pages)
    return pages


def put_text(
    store: PrefixStore, space: PageNamespace, text: int = 0, depth: int = DEPTH, cost_ms: float = 1.0
) -> list[bytes]:
    names: list[bytes] = []
    for index in range(depth):
        store.put_page(space, label(text, index), made_page, cost_ms, names)
        names.append(page_name(space, label(text, index)))
    return names


class Stores(RuleBasedStateMachine):
    """A store, its folder and what may happen to them."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.limit = 0
        self.known: set[bytes] = set()  # names that were ever put
        self.bound = 0  # what the store may hold now

    @initialize(limit=st.integers(0, 60_000), disk=st.sampled_from([None, 0, 20_000, 1 << 30]))
    def begin(self, limit: int, disk: int | None) -> None:
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory())) / "pages"
        self.disk, self.limit = disk, limit
        self._start()

    def _start(self) -> None:
        files = PageFiles(self.folder, self.disk) if self.disk is not None else None
        self.store = PrefixStore("facts", lambda: self.limit, WEIGHTS.__getitem__, files)
        self.bound = max(self.bound, self.limit)

    def _space(self, owner: int, context: int) -> PageNamespace:
        return self.store.namespace(OWNERS[owner], b"context %d" % context, 0, 2, 0)

    @rule(owner=st.integers(0, 2), context=st.integers(0, 1), text=st.integers(0, 3), cost=st.floats(0, 100))
    def put(self, owner: int, context: int, text: int, cost: float) -> None:
        self.known |= set(put_text(self.store, self._space(owner, context), text, cost_ms=cost))
        self.bound = self.limit

    @rule(owner=st.integers(0, 2), context=st.integers(0, 1), text=st.integers(0, 3), depth=st.integers(0, DEPTH))
    def recall(self, owner: int, context: int, text: int, depth: int) -> None:
        space = self._space(owner, context)
        labels = [label(text, index) for index in range(depth)]
        pages = looked_up(self.store, space, labels)
        assert len(pages) <= depth
        for page, each in zip(pages, labels, strict=False):
            assert page.name == page_name(space, each) and page.name in self.known
            assert same(page, made_page(page.name))

    @rule(limit=st.integers(0, 60_000))
    def reserve(self, limit: int) -> None:
        """Sessions take memory, or give some back."""
        self.limit = limit
        if limit < self.bound:
            self.store.shrink()
            self.bound = limit

    @rule(owner=st.integers(0, 2), text=st.integers(0, 3))
    def forget(self, owner: int, text: int) -> None:
        space = self._space(owner, 0)
        pages = looked_up(self.store, space, [label(text, index) for index in range(DEPTH)])
        self.store.forget_pages(pages)
        assert not any(page.name in self.store._held for page in pages)

    @precondition(lambda self: self.disk)
    @rule(at=st.integers(0, 100), how=st.deferred(lambda: st.sampled_from(DAMAGES)))
    def damage(self, at: int, how: str) -> None:
        files = sorted(self.folder.glob("*/*.page"))
        if not files:
            return
        file = files[at % len(files)]
        if file.is_file() and files[(at + 1) % len(files)].is_file() and file.stat().st_size > 60:
            damage(file, files[(at + 1) % len(files)], how)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.bound = 0
        self._start()

    @invariant()
    def is_bounded(self) -> None:
        if hasattr(self, "store"):
            held = self.store._held.values()
            assert self.store.nbytes == sum(each.page.nbytes for each in held)
            assert self.store._bytes.keys() == {each.owner for each in held}
            assert self.store.nbytes <= max(self.bound, self.limit)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        self.stack.close()


TestStores = Stores.TestCase
TestStores.settings = settings(deadline=None, max_examples=examples(50), stateful_step_count=20)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrefixStore]:
    made = PrefixStore("facts", lambda: 1 << 30, files=PageFiles(tmp_path / "pages", 1 << 30))
    yield made
    made.close()


def in_memory(limit: int = 1 << 30) -> PrefixStore:
    return PrefixStore("facts", lambda: limit, WEIGHTS.__getitem__)


def test_what_a_page_depends_on_is_in_its_name() -> None:
    store = in_memory()
    changes: list[tuple[Any, ...]] = [
        (OWNERS[0], b"context", 0, 2, 0),
        (OWNERS[1], b"context", 0, 2, 0),
        (OWNERS[0], b"other", 0, 2, 0),
        (OWNERS[0], b"context", 1, 2, 0),
        (OWNERS[0], b"context", 0, 3, 0),
        (OWNERS[0], b"context", 0, 2, 1),
    ]
    spaces = [store.namespace(*change) for change in changes]
    spaces.append(PrefixStore("other facts", lambda: 1).namespace(*changes[0]))
    assert len({page_name(space, label(0, 0)) for space in spaces}) == len(spaces)
    put_text(store, spaces[0])
    labels = [label(0, index) for index in range(DEPTH)]
    assert [len(looked_up(store, space, labels)) for space in spaces] == [DEPTH] + [0] * (len(spaces) - 1)


def test_without_a_context_nothing_is_stored() -> None:
    store = in_memory()
    assert store.namespace(OWNERS[0], b"", 0, 2, 0) == NOWHERE
    put_text(store, NOWHERE)
    assert not len(store) and not looked_up(store, NOWHERE, [label(0, 0)])


@settings(max_examples=examples(100))
@given(
    texts=st.lists(st.tuples(st.integers(0, 7), st.integers(1, DEPTH), st.floats(0.1, 50)), min_size=1, max_size=20),
    limits=st.lists(st.integers(0, 12_000), min_size=1, max_size=4),
)
def test_no_page_stays_without_those_before_it(texts: list[tuple[int, int, float]], limits: list[int]) -> None:
    limit = limits[0]
    store = PrefixStore("facts", lambda: limit)
    space = store.namespace(OWNERS[0], b"context", 0, 2, 0)
    for turn, (text, depth, cost) in enumerate(texts):
        limit = limits[turn % len(limits)]
        put_text(store, space, text, depth, cost)
        looked_up(store, space, [label(text, index) for index in range(depth)])
        store.shrink()
        for each in range(8):
            there = [store.has_page(space, label(each, index)) for index in range(DEPTH)]
            assert there == sorted(there, reverse=True)


def test_what_is_used_and_took_long_stays() -> None:
    size = made_page(bytes(16)).nbytes + 32
    store = in_memory(20 * size)
    space = store.namespace(OWNERS[0], b"context", 0, 2, 0)
    put_text(store, space, 2, cost_ms=100.0)
    put_text(store, space, 4, cost_ms=1.0)
    looked_up(store, space, [label(4, index) for index in range(DEPTH)])
    for text in range(6, 14, 2):
        put_text(store, space, text, cost_ms=1.0)
    left = {text: sum(store.has_page(space, label(text, index)) for index in range(DEPTH)) for text in range(2, 14, 2)}
    assert left[2] == DEPTH and left[4] >= left[6] and sum(left.values()) >= 18


def test_each_owner_has_a_share_by_its_weight() -> None:
    """What one puts does not drive out what is within the share of another."""
    size = max(made_page(bytes((first, *bytes(15)))).nbytes for first in (0, 1))
    store = in_memory(16 * size)
    mine, other = (store.namespace(owner, b"context", 0, 2, 0) for owner in OWNERS[:2])
    put_text(store, other, 0, cost_ms=0.1)
    for text in range(2, 30, 2):
        put_text(store, mine, text, cost_ms=100.0)
    assert [store.has_page(other, label(0, index)) for index in range(DEPTH)] == [True] * DEPTH
    assert store._bytes[OWNERS[0]] <= store._limit() - store._bytes[OWNERS[1]]


class Sorted(PrefixStore):
    """A store that sorts all pages of an owner for each turn of that owner: what the order of evictions means."""

    def _make_room(self, nbytes: int) -> bool:
        limit = max(0, self._limit())
        if nbytes > limit or self.nbytes + nbytes <= limit:
            return nbytes <= limit
        most = max(0, limit - nbytes - int(limit * prefixes.SHRINK))
        while self._held and self.nbytes > most:
            owner = max(self._bytes, key=lambda each: self._bytes[each] / self._weight(each))
            others = sum(held for each, held in self._bytes.items() if each != owner)
            own = sorted((held.value, -held.depth, name) for name, held in self._held.items() if held.owner == owner)
            for value, _, name in own:
                self._drop_page(name)
                self._floor = max(self._floor, value)
                left = self._bytes.get(owner, 0)
                if left + others <= most or left / self._weight(owner) < others / 2:
                    break
        return True


def recording(kind: type[PrefixStore], limit: Callable[[], int]) -> tuple[PrefixStore, list[bytes]]:
    """A store, and the names of the pages that it drops, in their order."""
    store, dropped = kind("facts", limit, WEIGHTS.__getitem__), list[bytes]()
    drop = store._drop_page
    store._drop_page = lambda name: (dropped.append(name), drop(name))[1]
    return store, dropped


@given(st.integers(0, 1 << 32))
@settings(deadline=None, max_examples=examples(50))
def test_pages_are_evicted_in_the_order_of_sorting_them_each_time(seed: int) -> None:
    random, now = Random(seed), [40_000]
    stores = [recording(kind, lambda: now[0]) for kind in (PrefixStore, Sorted)]
    for _ in range(60):
        what = random.choices(["put", "recall", "shrink"], (6, 3, 1))[0]
        owner, text, depth = random.randrange(3), random.randrange(12), random.randint(1, DEPTH)
        cost_ms, now[0] = random.choice([0.5, 1.0, 4.0]), random.randrange(60_000) if what == "shrink" else now[0]
        for store, _ in stores:
            space = store.namespace(OWNERS[owner], b"context", 0, 2, 0)
            if what == "put":
                put_text(store, space, text, depth, cost_ms)
            elif what == "recall":
                looked_up(store, space, [label(text, index) for index in range(depth)])
            else:
                store.shrink()
        (one, dropped), (other, expected) = stores
        assert dropped == expected and one._floor == other._floor
        assert one._bytes == other._bytes and one.nbytes == other.nbytes == sum(other._bytes.values())
    assert stores[1][1]


class CountedCost(float):
    """A cost that counts comparisons, also of the values that are computed from the cost."""

    compared = 0

    def __radd__(self, other: float) -> CountedCost:
        return CountedCost(other + float(self))

    def __lt__(self, other: float) -> bool:
        CountedCost.compared += 1
        return float(self) < float(other)


@pytest.mark.parametrize("owners", [1, 4, 64, 2048])
def test_the_work_of_evictions_grows_as_the_pages_do(owners: int) -> None:
    pages, weighed = 2048, Counter[bytes]()

    def weight(owner: bytes) -> float:
        weighed[owner] += 1
        return 1.0

    tensors = {"0.k": torch.zeros(16)}
    store = PrefixStore("facts", lambda: pages * 64, weight)
    spaces = [store.namespace(index.to_bytes(32, "big"), b"context", 0, 1, 0) for index in range(owners)]

    def put(index: int) -> None:
        cost_ms = CountedCost(index * 7919 % pages)  # in no order
        store.put_page(spaces[index % owners], index.to_bytes(16, "big"), lambda name: Page(name, tensors), cost_ms)

    for index in range(pages):
        put(index)
    assert len(store) == pages and not weighed
    CountedCost.compared = 0
    put(pages)
    evicted = pages * prefixes.SHRINK + 1
    assert store.counts.evicted == evicted
    # A heap of n takes 2 n comparisons, and one with an item less 2 log n of them.
    assert CountedCost.compared <= 2 * pages + evicted * 2 * math.log2(pages)
    assert weighed.total() <= owners


def test_a_store_without_memory_takes_nothing_in() -> None:
    store = in_memory(0)
    space = store.namespace(OWNERS[0], b"context", 0, 2, 0)
    store.put_page(space, label(0, 0), lambda _: pytest.fail("it was made for nothing"), 1.0)
    assert not len(store)


def test_a_restarted_store_goes_on_from_its_files(store: PrefixStore, tmp_path: Path) -> None:
    space = store.namespace(OWNERS[0], b"context", 0, 2, 0)
    put_text(store, space)
    store.close()
    later = PrefixStore("facts", lambda: 1 << 30, files=PageFiles(tmp_path / "pages", 1 << 30))
    try:
        labels = [label(0, index) for index in range(DEPTH)]
        pages = looked_up(later, space, labels)
        assert len(pages) == DEPTH and all(same(page, made_page(page.name)) for page in pages)
        assert later.counts.read == later.counts.found == DEPTH and len(later) == DEPTH
        assert not looked_up(later, later.namespace(OWNERS[1], b"context", 0, 2, 0), labels)
    finally:
        later.close()


def damage(file: Path, other: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    match how:
        case "cut":
            file.write_bytes(data[: len(data) // 2])
        case "flipped digest" | "flipped head" | "flipped end":
            data[{"flipped digest": 3, "flipped head": 60, "flipped end": -1}[how]] ^= 1
            file.write_bytes(data)
        case "empty":
            file.write_bytes(b"")
        case "deleted":
            file.unlink()
        case "another page":
            file.write_bytes(other.read_bytes())
        case "folder":
            file.unlink()
            file.mkdir()
        case _:
            raise ValueError(how)


DAMAGES = ["cut", "flipped digest", "flipped head", "flipped end", "empty", "deleted", "another page", "folder"]


@pytest.mark.parametrize("how", DAMAGES)
def test_what_is_damaged_is_not_used_and_written_again(how: str, store: PrefixStore) -> None:
    space = store.namespace(OWNERS[0], b"context", 0, 2, 0)
    on_disk(store, space)
    names = [page_name(space, label(0, index)) for index in range(DEPTH)]
    assert store._files is not None
    files = [store._files._file(OWNERS[0], name) for name in names]
    damage(files[2], files[3], how)
    labels = [label(0, index) for index in range(DEPTH)]
    assert [page.name for page in looked_up(store, space, labels)] == names[:2]
    assert store.counts.broken == 1
    put_text(store, space)
    assert len(looked_up(store, space, labels)) == DEPTH
    assert all(same(page, made_page(page.name)) for page in looked_up(store, space, labels))


def test_others_cannot_read_the_folder(store: PrefixStore, tmp_path: Path) -> None:
    put_text(store, store.namespace(OWNERS[0], b"context", 0, 2, 0))
    store.close()
    folders = [tmp_path / "pages", *(each for each in (tmp_path / "pages").iterdir())]
    assert len(folders) == 2 and {stat.S_IMODE(each.stat().st_mode) for each in folders} == {0o700}


def test_names_in_the_folder_tell_no_key(store: PrefixStore, tmp_path: Path) -> None:
    put_text(store, store.namespace(OWNERS[0], b"context", 0, 2, 0))
    store.close()
    names = [str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")]
    assert names and not any(OWNERS[0].hex() in name or label(0, 0).hex() in name for name in names)


def test_two_stores_share_a_folder_and_its_limit(tmp_path: Path) -> None:
    size = max(len(f) for f in [_bytes_of(tmp_path, made_page(bytes((1, *bytes(15)))))])
    limit = 40 * size
    files = [PageFiles(tmp_path / "pages", limit) for _ in range(2)]
    for index in range(60):
        name = digest(str(index).encode())
        assert files[index % 2].write_page(OWNERS[0], made_page(name))
    held = sum(file.stat().st_size for file in (tmp_path / "pages").rglob("*.page"))
    assert held <= limit * (1 + prefixes.SHRINK)
    gone = next(file for file in (tmp_path / "pages").rglob("*.page"))
    gone.unlink()
    assert files[0].read_page(OWNERS[0], bytes.fromhex(gone.stem)) is None


def _bytes_of(folder: Path, page: Page) -> bytes:
    files = PageFiles(folder / "one", 1 << 30)
    assert files.write_page(OWNERS[0], page)
    return next((folder / "one").rglob("*.page")).read_bytes()


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    pages = [made_page(bytes((2, index, *bytes(14)))) for index in range(6)]
    size = len(_bytes_of(tmp_path, pages[0]))
    files = PageFiles(tmp_path / "pages", 5 * size + size // 2)
    for at, page in enumerate(pages[:5]):
        assert files.write_page(OWNERS[0], page)
        os.utime(files._file(OWNERS[0], page.name), (at, at))
    assert files.read_page(OWNERS[0], pages[0].name) is not None
    assert files.write_page(OWNERS[0], pages[5])
    assert [files.has_page(OWNERS[0], page.name) for page in pages] == [True, False, True, True, True, True]


def test_a_disk_that_others_fill_is_not_looked_through_for_each_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [made_page(digest(str(index).encode())) for index in range(96)]
    size = max(len(_bytes_of(tmp_path, page)) for page in pages)
    files = PageFiles(tmp_path / "pages", 64 * size * 2)
    room = 64 * size  # less than the limit
    looks, look = [0], PageFiles._list_pages

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=prefixes.FREE_DISK + room - files.nbytes)

    def counted(self: PageFiles) -> None:
        looks[0] += 1
        look(self)

    monkeypatch.setattr(prefixes, "disk_usage", usage)
    monkeypatch.setattr(PageFiles, "_list_pages", counted)
    for index, page in enumerate(pages):
        assert files.write_page(OWNERS[index % 3], page)
        assert files.nbytes <= room
    # A look belongs to each 4 pages that are written, and one to the 8 or more that go at once.
    assert looks[0] <= 96 / 4 + 32 / 8 + 1


def test_no_empty_folders_of_keys_stay(tmp_path: Path) -> None:
    pages = [made_page(digest(str(index).encode())) for index in range(40)]
    size = max(len(_bytes_of(tmp_path, page)) for page in pages)
    folder = tmp_path / "pages"
    (folder / "left by a peer that was killed").mkdir(parents=True)
    files = PageFiles(folder, 4 * size)
    assert not list(folder.iterdir())
    for index, page in enumerate(pages):
        assert files.write_page(b"%32d" % index, page)
        assert all(list(each.iterdir()) for each in folder.iterdir())
    assert len(list(folder.iterdir())) <= 4
    files.remove(pages[-1].name)
    assert not files._file(b"%32d" % 39, pages[-1].name).parent.exists()


@pytest.mark.parametrize("fault", ["full", "reserve", "error", "not a folder", "no folder"])
def test_a_disk_that_takes_nothing_costs_pages_alone(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pages"
    if fault == "not a folder":
        folder.write_text("a file")
    files = PageFiles(folder, 1 << 30)

    def fail(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if fault == "full":
        monkeypatch.setattr(Path, "write_bytes", fail)
    elif fault == "reserve":
        monkeypatch.setattr(prefixes, "disk_usage", lambda _: type("Usage", (), {"free": prefixes.FREE_DISK})())
    elif fault == "error":
        monkeypatch.setattr(prefixes, "disk_usage", fail)
    elif fault == "no folder":
        folder.rmdir()
    store = PrefixStore("facts", lambda: 1 << 30, files=files)
    space = store.namespace(OWNERS[0], b"context", 0, 2, 0)
    put_text(store, space)
    labels = [label(0, index) for index in range(DEPTH)]
    for _ in range(2):
        assert len(looked_up(store, space, labels)) == DEPTH
    store.close()
    assert not store.counts.written and store.counts.broken
    assert not list(tmp_path.rglob("*.page"))


def test_files_that_were_not_written_to_their_end_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "pages" / "owner"
    folder.mkdir(parents=True)
    (folder / "old.123").write_bytes(b"half")
    os.utime(folder / "old.123", (1, 1))
    (folder / "new.456").write_bytes(b"somebody writes it now")
    PageFiles(tmp_path / "pages", 1 << 20)
    assert [file.name for file in folder.iterdir()] == ["new.456"]


def test_pages_are_written_once_a_row_was_begun_with_them(store: PrefixStore) -> None:
    space, found = store.namespace(OWNERS[0], b"context", 0, 2, 0), Queue[list[Page]]()
    put_text(store, space)
    store.lookup_prefix(space, [label(0, index) for index in range(DEPTH)], found.put)
    pages = found.get(timeout=SOON_S)
    assert not store._queued
    with store._lock:
        store._drop_page(pages[-1].name)  # one is not there any more
    store.used(pages)
    while store.counts.written < DEPTH - 1:
        threading.Event().wait(0.01)


class Stuck:
    """A disk that reads nothing until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.reads = threading.Event(), 0
        read = PageFiles.read_page

        def slow(files: PageFiles, owner: bytes, name: bytes) -> Page | None:
            self.reads += 1
            assert self.go.wait(SOON_S)
            return read(files, owner, name)

        monkeypatch.setattr(PageFiles, "read_page", slow)


def on_disk(store: PrefixStore, space: PageNamespace) -> None:
    put_text(store, space)
    looked_up(store, space, [label(0, index) for index in range(DEPTH)])
    while store.counts.written < DEPTH:
        threading.Event().wait(0.01)
    with store._lock:
        for name in list(store._held):
            store._drop_page(name)


def test_a_slow_disk_holds_up_nothing_but_what_waits_for_it(
    store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that wait behind others longer than a session does, none is read; and not all wait."""
    mine, other = (store.namespace(owner, b"context", 0, 2, 0) for owner in OWNERS[:2])
    on_disk(store, mine)
    put_text(store, other)
    disk, found = Stuck(monkeypatch), Queue[list[Page]]()
    labels = [label(0, index) for index in range(DEPTH)]
    asked = 10 * prefixes.MOST_QUEUED
    for _ in range(asked):
        store.lookup_prefix(mine, labels, found.put)
    assert asked - found.qsize() <= 2 * prefixes.MOST_QUEUED + 1
    assert len(looked_up(store, other, labels)) == DEPTH, "it is in memory"
    while not disk.reads:
        threading.Event().wait(0.01)
    monkeypatch.setattr(prefixes.time, "monotonic", lambda: float("inf"))
    disk.go.set()
    pages = [found.get(timeout=SOON_S) for _ in range(asked)]
    assert disk.reads == 1 and all(len(each) <= 1 for each in pages)


def test_reads_go_before_writes(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = (store.namespace(owner, b"context", 0, 2, 0) for owner in OWNERS[:2])
    on_disk(store, mine)
    disk, order = Stuck(monkeypatch), Queue[str]()
    write = PageFiles.write_page
    monkeypatch.setattr(PageFiles, "write_page", lambda *args: (order.put("write"), write(*args))[1])
    labels = [label(0, index) for index in range(DEPTH)]
    store.lookup_prefix(mine, labels, lambda _: order.put("read"))
    put_text(store, other)
    assert len(looked_up(store, other, labels)) == DEPTH  # used again, so they are to be written
    store.lookup_prefix(mine, labels[:3], lambda _: order.put("read"))
    disk.go.set()
    assert [order.get(timeout=SOON_S) for _ in range(3)] == ["read", "read", "write"]


def test_the_end_does_not_wait_for_a_disk_that_hangs(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    space = store.namespace(OWNERS[0], b"context", 0, 2, 0)
    on_disk(store, space)
    disk = Stuck(monkeypatch)
    store.lookup_prefix(space, [label(0, 0)], lambda _: None)
    waited: list[float | None] = []
    monkeypatch.setattr(threading.Thread, "join", lambda _, timeout=None: waited.append(timeout))
    store.close()
    monkeypatch.undo()
    disk.go.set()
    assert waited == [2 * prefixes.CLOSE_S]


def test_the_first_pages_of_a_text_are_written_first(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those behind them are of no use without."""
    monkeypatch.setattr(prefixes, "MOST_QUEUED", 3)
    space = store.namespace(OWNERS[0], b"context", 0, 2, 0)
    names = put_text(store, space)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_put_job", lambda order, job: None)
        looked_up(store, space, [label(0, index) for index in range(DEPTH)])
    assert store._queued == set(names[:3])
    store._queued.clear()


def test_pages_that_did_not_fit_are_forgotten_on_disk_too(store: PrefixStore, tmp_path: Path) -> None:
    space = store.namespace(OWNERS[0], b"context", 0, 2, 0)
    put_text(store, space)
    labels = [label(0, index) for index in range(DEPTH)]
    pages = looked_up(store, space, labels)
    store.forget_pages(pages)
    store.close()
    assert not recalled_after(store, space, labels) and not list(tmp_path.rglob("*.page"))
    assert store.counts.broken == DEPTH


def recalled_after(store: PrefixStore, space: PageNamespace, labels: list[bytes]) -> list[Page]:
    """Of a store that has ended."""
    found: list[list[Page]] = []
    store.lookup_prefix(space, labels, found.append)
    return found[0]


def test_a_job_that_fails_ends_nothing(store: PrefixStore, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("of no kind that is known")

    store._put_job(0, fail)
    space = store.namespace(OWNERS[0], b"context", 0, 2, 0)
    on_disk(store, space)
    assert len(looked_up(store, space, [label(0, 0)])) == 1
    assert "of no kind that is known" in caplog.text


def test_threads_that_put_recall_and_shrink_at_once_leave_it_whole() -> None:
    limits = [4_000, 30_000, 9_000]
    state = {"limit": limits[0]}
    store = PrefixStore("facts", lambda: state["limit"], WEIGHTS.__getitem__)
    spaces = [store.namespace(owner, b"context", 0, 2, 0) for owner in OWNERS]
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(60):
                space, text = spaces[(seed + turn) % 3], (seed * turn) % 8
                put_text(store, space, text, cost_ms=float(turn % 7))
                state["limit"] = limits[turn % 3]
                store.shrink()
                for page in looked_up(store, space, [label(text, index) for index in range(DEPTH)]):
                    assert same(page, made_page(page.name))
        except BaseException as error:
            errors.append(error)

    threads: list[threading.Thread] = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    run: Callable[[threading.Thread], None]
    for run in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            run(thread)
    assert not errors
    assert store.nbytes == sum(each.page.nbytes for each in store._held.values())
