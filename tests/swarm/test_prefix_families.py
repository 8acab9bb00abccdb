"""Stored prefixes with all families, adapters, drafts, batches and kinds of routes give the tokens of plain
transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peers.running_peer import RunningPeer
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.security.identity import Identity
from splitnet.session.inference import Session
from tests.swarm.adapters import CAUSAL, METHODS, wrapped
from tests.swarm.harness import SPANS, LocalSwarm, local_swarm, repairs, wait_until
from tests.unit.random_models import HYBRIDS, SPARSE, random_checkpoint

pytestmark = pytest.mark.swarm

PAGE = 16
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("splitnet", "peers") and hasattr(module, "PAGE"):
            monkeypatch.setattr(module, "PAGE", PAGE)


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (1, length), generator=torch.Generator().manual_seed(seed))


def texts(count: int, pages: int = 3, first: int = 100) -> list[torch.Tensor]:
    """Texts with the same first pages and different ends."""
    tools = text(pages * PAGE + 3, seed=first)
    return [torch.cat((tools, text(5 + index, seed=first + 1 + index)), dim=1) for index in range(count)]


def model_of(swarm: LocalSwarm, **options: Any) -> Any:
    return swarm.model(**options)


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **options})


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def recalled(model: Any, ids: torch.Tensor, expected: torch.Tensor, **options: Any) -> int:
    """Generates in a new session, and returns how many positions of the text the hops had stored."""
    with model.session() as cache:
        assert torch.equal(generate(model, ids, **options), expected)
        return cache.session.prefix_hit


def forget(peer: RunningPeer, *, every: int = 1) -> None:
    store = peer.service.sessions.prefixes
    assert store is not None
    store.forget_pages([held.page for index, held in enumerate(list(store._held.values())) if not index % every])


FAMILIES = {
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    **{family: {} for family in ("gpt2", "bloom", "gpt_oss", "mixtral")},
    **HYBRIDS,
    **SPARSE,
}


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_with_a_common_beginning_give_the_tokens_of_transformers(
    family: str, node: DhtDirectory, tmp_path: Path
) -> None:
    folder = random_checkpoint(family, tmp_path / "model", **FAMILIES[family])
    local, asks = plain(folder), texts(5)
    expected = [generate(local, ids) for ids in asks]
    with local_swarm(folder, SPANS, node=node) as swarm:
        model = model_of(swarm)
        assert recalled(model, asks[0], expected[0], speculate=None) == 0
        assert recalled(model, asks[1], expected[1], speculate=None) == 3 * PAGE
        forget(swarm.peers[1])
        assert recalled(model, asks[2], expected[2], speculate=None) == 3 * PAGE
        forget(swarm.peers[0], every=2)
        forget(swarm.peers[2], every=3)
        assert recalled(model, asks[3], expected[3], speculate=None) == 3 * PAGE
        # A rejected draft makes the hops rewind, to a position after the stored ones.
        assert recalled(model, asks[4], expected[4], speculate="prompt-lookup") == 3 * PAGE


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3_next", marks=pytest.mark.full)])
@pytest.mark.parametrize("damage", ["none", pytest.param("cut", marks=pytest.mark.full), "flipped"])
def test_restarted_peers_use_the_pages_on_their_disks(
    family: str, damage: str, node: DhtDirectory, tmp_path: Path
) -> None:
    folder = random_checkpoint(family, tmp_path / "model", seed=len(damage), **FAMILIES.get(family, {}))
    local, asks = plain(folder), texts(2)
    expected, disk = [generate(local, ids) for ids in asks], tmp_path / "pages"
    me = Identity.generate()
    for turn, (ids, tokens) in enumerate(zip(asks, expected, strict=True)):
        with local_swarm(folder, SPANS, node=node, prefix_folder=disk, prefix_disk=1 << 30) as swarm:
            known = recalled(model_of(swarm, identity=me), ids, tokens, speculate=None)
            stores = [peer.service.sessions.prefixes for peer in swarm.peers]
        files = list(disk.rglob("*.page"))
        assert len(files) >= 3 * len(SPANS)
        if not turn:
            for file in files if damage != "none" else []:
                data = bytearray(file.read_bytes())
                data[-1] ^= 1
                file.write_bytes(data[:-9] if damage == "cut" else data)
            continue
        assert known == (3 * PAGE if damage == "none" else 0)
        counts = [store.counts for store in stores if store is not None]
        assert [count.broken > 0 for count in counts] == [damage != "none"] * len(SPANS)
        assert [count.read for count in counts] == [3 if damage == "none" else 0] * len(SPANS)


@pytest.fixture(scope="module")
def running(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with local_swarm(folder, SPANS, node=node) as swarm:
        yield swarm


@pytest.fixture
def swarm(running: LocalSwarm) -> Iterator[LocalSwarm]:
    with running.newcomer() as visitor:
        yield visitor


def of_session(swarm: LocalSwarm, session: Session, index: int) -> RunningPeer:
    return next(peer for peer in swarm.peers if peer.identity.public.text == session.hops[index].name)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_hop_lost_after_a_use_of_stored_pages_is_replaced(
    index: int, own_folder: Path, own_local: Any, node: DhtDirectory
) -> None:
    """The hop before the lost hop also replays the positions that came from its own store."""
    one, two = texts(2, first=200 + 10 * index)
    expected = generate(own_local, two, max_new_tokens=12)
    with local_swarm(own_folder, [*SPANS, SPANS[index]], node=node) as swarm:
        model = model_of(swarm)
        recalled(model, one, generate(own_local, one), speculate=None)
        with model.session() as cache:
            first = generate(model, two, max_new_tokens=4, speculate=None)
            assert cache.session.prefix_hit == 3 * PAGE
            of_session(swarm, cache.session, index).close()
            assert torch.equal(generate(model, first, max_new_tokens=8, speculate=None), expected)
            assert len(repairs(cache.session)) == 1


def test_a_new_text_in_an_open_session_uses_stored_pages(swarm: LocalSwarm, local: Any) -> None:
    """This also works if the store of one hop lacks the text and the session's row at that hop holds another text."""
    model, asks, other = model_of(swarm), texts(3, first=300), text(5 * PAGE, seed=301)
    recalled(model, asks[0], generate(local, asks[0]), speculate=None)
    with model.session() as cache:
        for number, ids in enumerate((other, asks[1], other, asks[2])):
            if number == 3:
                forget(of_session(swarm, cache.session, 1))
            cache.reset()
            assert torch.equal(generate(model, ids, speculate=None), generate(local, ids))
            assert cache.session.prefix_hit == [0, 3 * PAGE, 4 * PAGE, 3 * PAGE][number]
        assert not repairs(cache.session)


def test_pages_of_a_batch_serve_each_of_its_rows(swarm: LocalSwarm, local: Any) -> None:
    model, asks = model_of(swarm), texts(2, first=400)
    batch = torch.cat((asks[0][:, :50], asks[1][:, :50]))
    assert torch.equal(generate(model, batch, speculate=None), generate(local, batch))
    for ids in asks:
        assert recalled(model, ids, generate(local, ids), speculate=None) == 3 * PAGE


@pytest.mark.default_cases(options=({"num_beams": 3},))
@pytest.mark.parametrize("options", [{"num_return_sequences": 2, "num_beams": 2}, {"num_beams": 3}], ids=str)
def test_beams_continue_a_text_from_stored_pages(options: dict[str, int], swarm: LocalSwarm, local: Any) -> None:
    model, asks = model_of(swarm), texts(2, first=500 + options["num_beams"])
    recalled(model, asks[0], generate(local, asks[0]), speculate=None)
    expected = generate(local, asks[1], **options)
    assert torch.equal(generate(model, asks[1], speculate=None, **options), expected)
    assert recalled(model, asks[1], generate(local, asks[1]), speculate=None) == 3 * PAGE


@pytest.mark.full
def test_drafts_of_a_model_and_of_the_text_continue_stored_pages(
    node: DhtDirectory, own_folder: Path, own_local: Any, tmp_path: Path
) -> None:
    draft = plain(random_checkpoint("llama", tmp_path / "draft", blocks=1, hidden=32, seed=5))
    with local_swarm(own_folder, SPANS, node=node) as swarm:
        for number, ids in enumerate(texts(4, first=600)):
            options = {"speculate": "prompt-lookup"} if number % 2 else {"assistant_model": draft}
            expected = generate(own_local, ids, max_new_tokens=10)
            known = recalled(model_of(swarm), ids, expected, max_new_tokens=10, **options)
            assert known == (3 * PAGE if number else 0)


def computed(swarm: LocalSwarm) -> int:
    """Positions that the peers' devices have computed for steps."""
    return sum(work.positions for peer in swarm.peers for work in peer.counters.work.values())


@pytest.mark.full
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_each_adapter_has_its_own_pages(method: str, node: DhtDirectory, own_folder: Path, own_local: Any) -> None:
    asks = texts(3, first=700)
    with local_swarm(own_folder, SPANS, node=node) as swarm:
        assert recalled(model_of(swarm), asks[0], generate(own_local, asks[0]), speculate=None) == 0
        for seed in (1, 2):
            stored, plainly = (
                wrapped(model_of(swarm, prefixes=prefixes), METHODS[method]("llama", CAUSAL), seed)
                for prefixes in ("own", "off")
            )
            for number, ids in enumerate(asks[1:]):
                expected = generate(plainly, ids, speculate=None)
                before = computed(swarm)
                assert torch.equal(generate(stored, ids, speculate=None), expected)
                # The steps of the last answer may not be counted yet.
                assert (computed(swarm) - before < len(SPANS) * ids.shape[1]) == (number > 0)


@pytest.mark.full
def test_local_blocks_are_combined_with_pages_of_peers(swarm: LocalSwarm, local: Any) -> None:
    for blocks in ("0:2", "4:6", "2:4"):
        model, asks = model_of(swarm, local_blocks=blocks), texts(3, first=900 + int(blocks[0]))
        for ids in asks:
            assert torch.equal(generate(model, ids, speculate=None), generate(local, ids))


def test_a_route_may_include_peers_without_a_store(node: DhtDirectory, own_folder: Path, own_local: Any) -> None:
    with local_swarm(own_folder, SPANS[:1], node=node) as swarm:
        swarm.add(*SPANS[1], prefixes=False)
        swarm.add(*SPANS[2])
        model = model_of(swarm)
        for number, ids in enumerate(texts(3, first=1000)):
            known = recalled(model, ids, generate(own_local, ids), speculate=None)
            assert known == (3 * PAGE if number else 0)


def test_pages_at_the_beginning_of_a_row_are_written_to_disk(
    node: DhtDirectory, own_folder: Path, own_local: Any, tmp_path: Path
) -> None:
    with local_swarm(own_folder, SPANS, node=node, prefix_folder=tmp_path, prefix_disk=1 << 30) as swarm:
        model, stores = model_of(swarm), [peer.service.sessions.prefixes for peer in swarm.peers]
        for ids in texts(2, first=1200):
            recalled(model, ids, generate(own_local, ids), speculate=None)
        wait_until(lambda: all(store and store.counts.written == 3 for store in stores))


def test_stored_pages_are_used_by_hops_relayed_through_the_client(
    node: DhtDirectory, own_folder: Path, own_local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peers.next_hop import HopConnector

    monkeypatch.setattr(HopConnector, "_set_next", lambda hops, session, following: following is None)
    asks = texts(3, first=1100)
    with local_swarm(own_folder, SPANS, node=node) as swarm:
        model = model_of(swarm)
        for number, ids in enumerate(asks):
            if number == 2:
                forget(swarm.peers[1])
            with model.session() as cache:
                assert torch.equal(generate(model, ids, speculate=None), generate(own_local, ids))
                assert cache.session.prefix_hit == (3 * PAGE if number else 0)
                assert [hop.relayed for hop in cache.session.hops] == [True, True, False]


@pytest.mark.parametrize(
    ("groups", "scopes", "finds"),
    [
        (("team", "team"), ("shared", "shared"), True),
        pytest.param(("team", "team"), ("shared", "own"), False, marks=pytest.mark.full),
        pytest.param(("team", "others"), ("shared", "shared"), False, marks=pytest.mark.full),
        pytest.param(("team", None), ("shared", "shared"), False, marks=pytest.mark.full),
        (("others", None), ("shared", "shared"), False),
    ],
)
def test_keys_share_pages_only_if_the_owner_and_both_clients_allow_it(
    groups: tuple[str | None, ...],
    scopes: tuple[Any, ...],
    finds: bool,
    node: DhtDirectory,
    own_folder: Path,
    own_local: Any,
    tmp_path: Path,
) -> None:
    keys = [Identity.generate() for _ in groups]
    lines = [f"{key.public.text}{f' share={group}' if group else ''}" for key, group in zip(keys, groups, strict=True)]
    peers = [Identity.generate() for _ in SPANS]
    listed = tmp_path / "keys"
    listed.write_text("\n".join([*lines, "anyone"]) + "\n")
    asks = texts(2, first=1200)
    assert len(peers) == len(SPANS)
    with local_swarm(own_folder, SPANS, node=node, authorized_keys=listed) as swarm:
        known = [
            recalled(model_of(swarm, identity=key, prefixes=scope), ids, generate(own_local, ids), speculate=None)
            for key, scope, ids in zip(keys, scopes, asks, strict=True)
        ]
        assert known == [0, 3 * PAGE if finds else 0]
