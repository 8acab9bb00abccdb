"""Compression of a model by the peers of a swarm."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from peers import compression
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.transfer.fetching import PeerQuestions
from splitnet.compress import over_peers
from splitnet.compress.blocks import compress_blocks
from splitnet.compress.checkpoint_folder import compress_checkpoint
from splitnet.compress.job import error_of
from splitnet.compress.over_peers import compress_over_peers
from splitnet.compress.rounding import Compression, sequence_lengths
from splitnet.errors import CoverageError
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.wire.messages import (
    MAX_PART_BYTES,
    AskCompression,
    CompressionState,
    CompressionWish,
    Failure,
    Message,
)
from tests.swarm.harness import LocalSwarm, local_swarm, wait_until
from tests.unit.random_models import random_checkpoint

IDS = torch.randint(0, 300, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
HOW = Compression(4, 32, sequence_lengths(len(IDS), 96))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("model") / "floats", blocks=6)


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def _options(tmp_path: Path, *keys: str) -> dict[str, Any]:
    clients = tmp_path / "clients"
    clients.write_text("\n".join(keys), encoding="utf-8")
    return {"compress_for": clients, "compress_folder": tmp_path / "jobs"}


def _compress(
    swarm: LocalSwarm,
    model: Path,
    folder: Path,
    progress: Callable[[int], None] = lambda _: None,
    how: Compression = HOW,
) -> None:
    checkpoint = Checkpoint.open(model)
    with PeerQuestions(swarm.client.identity) as asking:
        find = partial(swarm.client.peers, fresh=True)
        run = partial(compress_over_peers, checkpoint, asking, find, how=how, progress=progress)
        compress_checkpoint(checkpoint, IDS, folder, how, run)


def _alone(model: Path, folder: Path, how: Compression = HOW) -> dict[str, str]:
    """The digests of the files that one process writes."""
    checkpoint = Checkpoint.open(model)
    compress_checkpoint(checkpoint, IDS, folder, how, partial(compress_blocks, checkpoint, 0, 6, how=how))
    return _digests(folder)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return _alone(model, tmp_path_factory.mktemp("alone"))


def test_three_peers_write_the_bytes_of_one_process(model: Path, alone: dict[str, str], tmp_path: Path) -> None:
    told: list[int] = []
    with local_swarm(model, [(0, 2), (2, 4), (4, 6)], **_options(tmp_path, "anyone")) as swarm:
        _compress(swarm, model, tmp_path / "few", told.append)
    assert told == [0, 1, 2, 2, 3, 4, 4, 5, 6]
    assert _digests(tmp_path / "few") == alone
    opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "few")
    with local_swarm(tmp_path / "few", [(0, 3), (3, 6)], dtype="float32") as swarm, torch.inference_mode():
        ids = torch.tensor([IDS[:40]])
        torch.testing.assert_close(swarm.model()(ids).logits, opened(ids).logits, rtol=1e-3, atol=1e-3)


def test_peers_distribute_bits_as_one_process_does(model: Path, tmp_path: Path) -> None:
    how = replace(HOW, bits=3.5)
    with local_swarm(model, [(0, 3), (3, 6)], **_options(tmp_path, "anyone")) as swarm:
        _compress(swarm, model, tmp_path / "few", how=how)
    assert _digests(tmp_path / "few") == _alone(model, tmp_path / "alone", how)


def test_a_peer_that_does_not_go_on_is_left(
    model: Path, alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, stuck = compression._Job._begin, list[Any]()

    def begins(job: Any) -> None:
        if not stuck:
            stuck.append(job)
        if job is not stuck[0]:
            begin(job)

    monkeypatch.setattr(compression._Job, "_begin", begins)
    monkeypatch.setattr(over_peers._PeerJob, "_most_seconds", lambda *_: 1e9 if left else 0.0)
    left: list[str] = []
    monkeypatch.setattr(over_peers.log, "warning", lambda _, *told: left.append(str(told[-1])))
    options = _options(tmp_path, "anyone")
    with local_swarm(model, [(0, 6)], **options) as swarm:
        swarm.add(0, 6, **options | {"compress_folder": tmp_path / "other"})
        _compress(swarm, model, tmp_path / "few")
    assert len(left) == 1 and "has not compressed block 0" in left[0]
    assert _digests(tmp_path / "few") == alone


@pytest.mark.default_cases(at=(3,))
@pytest.mark.parametrize("at", [2, 3])
def test_another_peer_continues_with_the_same_bytes(
    model: Path, alone: dict[str, str], tmp_path: Path, at: int
) -> None:
    options = _options(tmp_path, "anyone")
    with local_swarm(model, [(0, 2), (2, 6)], **options) as swarm:

        def kill(block: int) -> None:
            if block == at and len(swarm.peers) == 2:
                swarm.peers[1].close()
                swarm.add(2, 6, **options | {"compress_folder": tmp_path / "other"})

        _compress(swarm, model, tmp_path / "few", kill)
        assert len(swarm.peers) == 3
    assert _digests(tmp_path / "few") == alone


def test_a_restarted_peer_with_the_same_key_continues(
    model: Path, alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(over_peers, "LOOK_S", 0.1)
    options = _options(tmp_path, "anyone")
    with local_swarm(model, [(0, 2)], **options) as swarm:
        own = {**options, "identity": Identity.generate()}
        swarm.add(2, 6, **own)

        def restart(block: int) -> None:
            if block == 3 and len(swarm.peers) == 2:
                swarm.peers[1].close()
                swarm.add(2, 6, **own)

        _compress(swarm, model, tmp_path / "few", restart)
        assert len(swarm.peers) == 3
    assert _digests(tmp_path / "few") == alone


@pytest.mark.full
def test_the_same_command_continues_after_the_client_has_ended(
    model: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    class Ended(BaseException):
        pass

    def end(block: int) -> None:
        if block == ends[0]:
            del ends[0]
            raise Ended

    with local_swarm(model, [(0, 3), (3, 6)], **_options(tmp_path, "anyone")) as swarm:
        ends = [0, 1, 4, 7]
        for _ in range(3):
            with pytest.raises(Ended):
                _compress(swarm, model, tmp_path / "few", end)
        _compress(swarm, model, tmp_path / "few", end)
    assert _digests(tmp_path / "few") == alone


def test_a_peer_refuses_by_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over_peers, "WAIT_S", 0.0)
    options = _options(tmp_path, str(Identity.generate().public))
    with local_swarm(model, [(0, 6)], **options) as swarm:
        with pytest.raises(CoverageError, match="its owner must list the client with --compress-for"):
            _compress(swarm, model, tmp_path / "few")
        options["compress_for"].write_text(str(swarm.client.identity.public), encoding="utf-8")
        wait_until(lambda: _answers(swarm))
        with monkeypatch.context() as patched:
            patched.setattr(compression.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
            with pytest.raises(CoverageError, match=r"need \d+ MiB of disk"):
                _compress(swarm, model, tmp_path / "few")
        with monkeypatch.context() as patched:
            patched.setattr(compression, "free_memory", lambda _: 1000)
            with pytest.raises(CoverageError, match=r"needs \d+ MiB of memory"):
                _compress(swarm, model, tmp_path / "few")
        assert not list((tmp_path / "jobs").glob("*/*"))


def _other_codes(wish: CompressionWish, part: bytes) -> bytes:
    if wish != CompressionWish.BLOCK:
        return part
    tensors = safetensors.torch.load(part)
    for name, tensor in tensors.items():
        if name.endswith("down_proj.weight_packed"):
            tensors[name] = tensor.flip(0)
    return safetensors.torch.save(tensors, {"format": "pt"})


def _other_norm(wish: CompressionWish, part: bytes) -> bytes:
    if wish != CompressionWish.BLOCK:
        return part
    tensors = safetensors.torch.load(part)
    tensors = {name: tensor * 2 if "layernorm" in name else tensor for name, tensor in tensors.items()}
    return safetensors.torch.save(tensors, {"format": "pt"})


def _coded(name: str) -> Callable[[CompressionWish, bytes], bytes]:
    """A lie: codes of a tensor that stays as it is."""

    def lie(wish: CompressionWish, part: bytes) -> bytes:
        if wish != CompressionWish.BLOCK:
            return part
        tensors = safetensors.torch.load(part)
        block = next(iter(tensors)).split(".")[2]
        layer = f"model.layers.{block}.{name}"
        shape = tensors.pop(f"{layer}.weight").shape
        tensors[f"{layer}.weight_packed"] = torch.zeros(shape[0], shape[1] * int(HOW.bits) // 32, dtype=torch.int32)
        tensors[f"{layer}.weight_scale"] = torch.ones(shape[0], shape[1] // HOW.group, dtype=torch.bfloat16)
        tensors[f"{layer}.weight_shape"] = torch.tensor(shape)
        return safetensors.torch.save(tensors, {"format": "pt"})

    return lie


def _more_tensors(wish: CompressionWish, part: bytes) -> bytes:
    if wish != CompressionWish.BLOCK:
        return part
    return safetensors.torch.save(safetensors.torch.load(part) | {"lm_head.weight": torch.zeros(2)}, {"format": "pt"})


def _other_states(wish: CompressionWish, part: bytes) -> bytes:
    return part[:2] * (len(part) // 2) if wish == CompressionWish.STATES else part


def _nan_states(wish: CompressionWish, part: bytes) -> bytes:
    return part[:-2] + b"\xff\xff" if wish == CompressionWish.STATES else part


def _short(wish: CompressionWish, part: bytes) -> bytes:
    return part[:-1]


@pytest.mark.default_cases(lie=(_other_codes, _other_states))
@pytest.mark.parametrize(
    ("lie", "text"),
    [
        (_other_codes, "times the error of weights that are rounded to nearest"),
        (_other_norm, "are not those of"),
        (_more_tensors, "are not those of"),
        (_other_states, "not the outputs of the compressed blocks"),
        (_nan_states, "inf or NaN"),
        (_short, "file of another size"),
    ],
)
def test_lies_of_a_peer_are_found(
    model: Path, alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: Any, text: str
) -> None:
    monkeypatch.setattr(over_peers, "WAIT_S", 0.0)
    honest = compression._Job.read_part

    def lying(job: Any, message: AskCompression) -> tuple[int, bytes]:
        total, part = honest(job, message)
        assert total == len(part)
        changed = lie(CompressionWish(message.wish), part)
        return total if lie is _short else len(changed), changed

    with local_swarm(model, [(0, 6)], **_options(tmp_path, "anyone")) as swarm:
        with monkeypatch.context() as patched:
            patched.setattr(compression._Job, "read_part", lying)
            with pytest.raises(CoverageError, match=text):
                _compress(swarm, model, tmp_path / "few")
        _compress(swarm, model, tmp_path / "few")
    assert _digests(tmp_path / "few") == alone


def test_codes_of_a_router_are_a_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over_peers, "WAIT_S", 0.0)
    model = random_checkpoint("mixtral", tmp_path / "floats", blocks=1)
    honest, lie = compression._Job.read_part, _coded("block_sparse_moe.gate")

    def lying(job: Any, message: AskCompression) -> tuple[int, bytes]:
        changed = lie(CompressionWish(message.wish), honest(job, message)[1])
        return len(changed), changed

    monkeypatch.setattr(compression._Job, "read_part", lying)
    options = _options(tmp_path, "anyone")
    with local_swarm(model, [(0, 1)], **options) as swarm, pytest.raises(CoverageError, match="are not those of"):
        _compress(swarm, model, tmp_path / "few")


def test_a_program_that_cannot_write_its_error_has_failed(tmp_path: Path) -> None:
    (tmp_path / "error").write_bytes(b"")  # as a full disk leaves it
    assert "memory or disk was short" in error_of(tmp_path)


def test_one_client_at_a_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_swarm(model, [(0, 6)], **_options(tmp_path, "anyone")) as swarm:
        first, second = (Asker(swarm) for _ in range(2))
        with first, second:
            assert first.ask().received == 0
            assert "for another client" in second.failure(states=bytes(32))
            monkeypatch.setattr(compression, "SILENCE_S", 0.0)
            assert second.ask(states=bytes(32)).received == 0
            assert first.ask(payload=b"some").received == 4


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"model": "ab" * 32}, "another model"),
        ({"start": 1, "end": 7}, "serves blocks 0:6"),
        ({"start": 3, "end": 3}, "serves blocks 0:6"),
        ({"group": 24}, "in groups of"),
        ({"bits": 1.9}, "2 to 8 bits"),
        ({"length": 15}, "sequences of 16"),
        ({"length": 32, "positions": 31}, "sequences of 16"),
        ({"length": 257}, "sequences of at most 256 positions"),
        ({"positions": (1 << 20) + 1}, "at most 1048576 positions"),
        ({"wish": CompressionWish.BLOCK, "block": 2}, "not compressed yet"),
        ({"wish": CompressionWish.STATES}, "not compressed yet"),
        ({"wish": 9}, "does not know this wish"),
        ({"payload": bytes(MAX_PART_BYTES + 1)}, "part is too large"),
        ({"positions": 16, "length": 16, "payload": bytes(2048)}, "do not have their digest"),
    ],
)
def test_hostile_requests_are_refused(fields: dict[str, Any], text: str, asker: Asker) -> None:
    assert re.search(text, asker.failure(**fields))
    assert asker.ask(states=b"n" * 32).received == 0
    assert len(list(asker.jobs.iterdir())) == 2  # the folder and the lock of one job


def test_parts_at_other_places_change_nothing(asker: Asker) -> None:
    states = b"p" * 32
    assert asker.ask(states=states, payload=b"abcd").received == 4
    assert asker.ask(states=states, payload=b"abcd").received == 4
    assert asker.ask(states=states, payload=b"e", offset=1 << 30).received == 4
    assert asker.ask(states=states, payload=bytes(MAX_PART_BYTES), offset=4).received == 4


@pytest.mark.full
def test_states_with_nan_end_the_job_with_an_error(asker: Asker) -> None:
    states = torch.full((96, asker.hidden), torch.nan, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    state = asker.ask(positions=96, length=96, states=hashlib.sha256(states).digest(), payload=states)
    until = time.monotonic() + 60
    while not state.error:
        assert time.monotonic() < until
        state = asker.ask(positions=96, length=96, states=hashlib.sha256(states).digest())
        threading.Event().wait(0.1)
    assert "inf or NaN" in state.error and state.done == 0


class Asker:
    """A client that asks the first peer of a swarm."""

    def __init__(self, swarm: LocalSwarm) -> None:
        self._record = swarm.peers[0].record()
        self.hidden = swarm.peers[0].checkpoint.hidden_size
        self.jobs: Path = swarm.peers[0]._options.compress_folder
        self._asking = PeerQuestions(Identity.generate())

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self._asking.__exit__()

    def _answer(self, **fields: Any) -> Message | None:
        usual = AskCompression(0, CompressionWish.COMPRESS, self._record.model, 0, 6, 4, 32, 4096, 64, b"x" * 32, 0, 0)
        return self._asking.answer_of(self._record.endpoint, lambda n: replace(usual, number=n, **fields), 30.0)

    def ask(self, **fields: Any) -> CompressionState:
        answer = self._answer(**fields)
        assert isinstance(answer, CompressionState), answer
        return answer

    def failure(self, **fields: Any) -> str:
        answer = self._answer(**fields)
        assert isinstance(answer, Failure), answer
        return answer.text


@pytest.fixture(scope="module")
def asker(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    folder = tmp_path_factory.mktemp("asked")
    with local_swarm(model, [(0, 6)], **_options(folder, "anyone")) as swarm, Asker(swarm) as asking:
        yield asking


def _answers(swarm: LocalSwarm) -> bool:
    """Whether the list of clients has been read again."""
    listed = AuthorizedKeys(swarm.peers[0]._options.compress_for)
    clients: Any = swarm.peers[0]._compression._clients
    return listed.allows(swarm.client.identity.public.curve_raw) and clients.allows(
        swarm.client.identity.public.curve_raw
    )
