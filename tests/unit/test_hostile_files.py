"""Checkpoints and adapters that are damaged, or made to do harm: each is refused in a sentence that names the file."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from splitnet.cli.generation import with_adapter
from splitnet.client.tokenizers import AutoTokenizer
from splitnet.errors import AdapterError, SplitnetError
from splitnet.model.checkpoint import Checkpoint
from splitnet.model.span import Span
from tests.unit.random_models import random_checkpoint

SOON_S = 5.0
FOR_FILES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("models") / "tiny")


def use(path: Path) -> None:
    """All that a peer does with a checkpoint before it serves."""
    checkpoint = Checkpoint.open(str(path))
    assert checkpoint.fingerprint and checkpoint.block_tensors and checkpoint.shell_names is not None
    Span.load(checkpoint, 0, min(2, checkpoint.num_blocks))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-0*.safetensors"))


def in_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        path.write_text(json.dumps(change(index) or index))

    return apply


def in_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = first_shard(folder)
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        written = json.dumps(change(header) or header).encode()
        path.write_bytes(struct.pack("<Q", len(written)) + written + data[8 + size :])

    return apply


def in_config(**values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def one_tensor(**values: Any) -> Callable[[Path], None]:
    def change(header: dict[str, Any]) -> None:
        header[next(name for name in header if name != "__metadata__")].update(values)

    return in_header(change)


def all_shards(name: str) -> Callable[[Path], None]:
    return in_index(lambda index: {"weight_map": dict.fromkeys(index["weight_map"], name)})


def outside(folder: Path) -> None:
    moved = first_shard(folder)
    shutil.move(moved, folder.parent / "outside.safetensors")

    def change(index: dict[str, Any]) -> None:
        for name, shard in index["weight_map"].items():
            if shard == moved.name:
                index["weight_map"][name] = "../outside.safetensors"

    in_index(change)(folder)


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content

    def apply(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return apply


INDEX, SHARD, CONFIG = "model.safetensors.index.json", r"model-0\S*.safetensors", "config"
HARMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard outside": (outside, INDEX),
    "a shard of the system": (all_shards("/etc/passwd"), INDEX),
    "a device": (all_shards("/dev/zero"), INDEX),
    "a shard with an end": (all_shards("model\0.safetensors"), INDEX),
    "a list for a map": (in_index(lambda _: {"weight_map": [1, 2]}), INDEX),
    "a number for a shard": (in_index(lambda index: {"weight_map": dict.fromkeys(index["weight_map"], 7)}), INDEX),
    "a deep index": (text(INDEX, '{"weight_map":' * 100_000), INDEX),
    "a header of 2^62 bytes": (lambda folder: text(first_shard(folder).name, struct.pack("<Q", 2**62))(folder), SHARD),
    "a negative offset": (one_tensor(data_offsets=[-100, 100]), SHARD),
    "offsets beyond the file": (one_tensor(data_offsets=[0, 2**50]), SHARD),
    "offsets that are none": (one_tensor(data_offsets=[0.5, None]), SHARD),
    "a huge shape": (one_tensor(shape=[2**40, 2**40]), SHARD),
    "a negative shape": (one_tensor(shape=[-1, 4]), SHARD),
    "a type that is none": (one_tensor(dtype=7), SHARD),
    "another shard": (one_tensor(shard="x"), SHARD),
    "a list for a header": (in_header(lambda _: [1, 2]), SHARD),
    "10^7 layers": (in_config(num_hidden_layers=10**7), CONFIG),
    "10^9 layers in a part": (in_config(text_config={"num_hidden_layers": 10**9}), CONFIG),
    "0 heads": (in_config(num_attention_heads=0), ""),
    "heads that do not divide": (in_config(num_key_value_heads=3), ""),
    "2^40 values per position": (in_config(hidden_size=2**40), ""),
    "a type from elsewhere": (in_config(dtype="os.system"), CONFIG),
    "an activation from elsewhere": (in_config(hidden_act="__import__"), ""),
    "attention from elsewhere": (in_config(attn_implementation="someone/kernel"), CONFIG),
    "a deep config": (text("config.json", '{"a":' * 100_000), CONFIG),
    "a list for a config": (text("config.json", "[]"), CONFIG),
    "no config": (text("config.json", b"\xff\xfe"), CONFIG),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_checkpoint_made_to_do_harm_is_refused(harm: str, folder: Path, tmp_path: Path) -> None:
    change, named = HARMS[harm]
    shutil.copytree(folder, tmp_path / "it")
    change(tmp_path / "it")
    begin = time.monotonic()
    with pytest.raises(SplitnetError, match=named):
        use(tmp_path / "it")
    assert time.monotonic() - begin < SOON_S


@FOR_FILES
@given(name=st.sampled_from(["config.json", INDEX, "shard"]), data=st.data())
def test_a_damaged_checkpoint_is_refused_or_read(name: str, data: st.DataObject, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "it"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    path = first_shard(target) if name == "shard" else target / name
    path.write_bytes(damaged(path.read_bytes(), data))
    try:
        use(target)
    except SplitnetError as error:
        assert str(error)


def damaged(content: bytes, data: st.DataObject, within: int = 2000) -> bytes:
    """Cut, or with some bytes changed near the beginning, where headers are."""
    if data.draw(st.booleans()):
        return content[: data.draw(st.integers(0, len(content) - 1))]
    changed = bytearray(content)
    for at, value in data.draw(
        st.lists(st.tuples(st.integers(0, min(len(content), within) - 1), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        changed[at] = value
    return bytes(changed)


def gguf(path: Path, block_count: int = 1) -> Path:
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(block_count)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", torch.zeros(3, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_with_a_vocabulary_without_end_is_refused_soon(tmp_path: Path) -> None:
    path = gguf(tmp_path / "it.gguf")
    content = path.read_bytes()
    at = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8  # kinds of the list and its items
    path.write_bytes(content[:at] + struct.pack("<Q", 2**60) + content[at + 8 :])
    begin = time.monotonic()
    with pytest.raises(SplitnetError, match=r"it\.gguf"):
        use(path)
    assert time.monotonic() - begin < SOON_S


def test_a_gguf_file_with_too_many_blocks_is_refused_soon(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(SplitnetError, match=r"it\.gguf.*4096"):
        use(gguf(tmp_path / "it.gguf", block_count=10**7))
    assert time.monotonic() - begin < SOON_S


def test_a_gguf_file_whose_strings_are_no_text_is_refused(tmp_path: Path) -> None:
    path = gguf(tmp_path / "it.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"\x80lama"))
    with pytest.raises(SplitnetError, match=r"it\.gguf"):
        use(path)


@FOR_FILES
@given(data=st.data())
def test_a_damaged_gguf_file_is_refused(data: st.DataObject, tmp_path: Path) -> None:
    path = gguf(tmp_path / "it.gguf")
    path.write_bytes(damaged(path.read_bytes(), data))
    with pytest.raises(SplitnetError):  # it lacks nearly all tensors
        use(path)


class Touch:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("config", "name", "content"),
    [
        ("[]", "adapter_model.safetensors", b""),
        ("{", "adapter_model.safetensors", b""),
        ('{"peft_type": "NONE"}', "adapter_model.safetensors", b""),
        (json.dumps(ADAPTER), "adapter_model.safetensors", b""),
        (json.dumps(ADAPTER), "adapter_model.safetensors", struct.pack("<Q", 2**62) + b"{}"),
        (json.dumps(ADAPTER), "adapter_model.bin", None),
    ],
)
def test_a_damaged_adapter_is_refused_and_none_is_unpickled(
    config: str, name: str, content: bytes | None, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / name).write_bytes(pickle.dumps({"a": Touch(tmp_path / "ran")}) if content is None else content)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(AdapterError, match=str(tmp_path)):
        with_adapter(model, tmp_path)
    assert not (tmp_path / "ran").exists()


CODE = """
from pathlib import Path
(Path(__file__).parent / "ran").touch()
raise SystemExit
"""


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoTokenizer"])
def test_code_of_a_checkpoint_neither_runs_nor_is_offered(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(str(text)) or "y")
    target = tmp_path / "it"
    shutil.copytree(folder, target)
    (target / "code.py").write_text(CODE)
    if kind == "AutoConfig":
        in_config(model_type="ours", auto_map={kind: "code.Ours", "AutoModelForCausalLM": "code.Ours"})(target)
        with pytest.raises(SplitnetError):
            use(target)
    else:
        settings = {"tokenizer_class": "Ours", "auto_map": {kind: ["code.Ours", None]}}
        (target / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(SplitnetError):
            Checkpoint.open(target).tokenizer()
        with pytest.raises((OSError, ValueError)):
            AutoTokenizer.from_pretrained(target)
    assert not asked
    assert not list(tmp_path.rglob("ran"))
