"""Damaged or malicious checkpoints and adapters: each is refused in a sentence that names the file."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import re
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from splitnet import bounded
from splitnet.blocks.span import Span
from splitnet.checkpoint import chat_template
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.gguf.architectures import FAMILIES, _value_rows
from splitnet.checkpoint.gguf.config import _scaled_frequencies
from splitnet.checkpoint.gguf.file import GgufFile
from splitnet.checkpoint.gguf.gguf_store import GgufStore
from splitnet.errors import AdapterError, SplitnetError
from splitnet.hf.causal_lm import AutoTokenizer
from splitnet.hf.peft_adapters import load_adapter
from splitnet.limits import ALL_MATCHES_S, Patterns
from splitnet.quant.packed_tensor import PackedTensor
from splitnet.serve.failures import ApiError
from splitnet.serve.prompts import Prompts
from tests.tiers import examples
from tests.unit.quantized_checkpoints import quantized_pair, tensors_of, write_checkpoint
from tests.unit.random_models import random_checkpoint

SOON_S = 5.0
FOR_FILES = settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("models") / "tiny")


def use(path: Path) -> None:
    """All steps of a peer with a checkpoint before it serves."""
    checkpoint = Checkpoint.open(str(path))
    assert checkpoint.fingerprint and checkpoint.block_tensors and checkpoint.client_part_names_of is not None
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
    "10^7 experts": (in_config(num_experts=10**7), CONFIG),
    "more blocks than tensors": (in_config(num_hidden_layers=4096), CONFIG),
    "a base of 0": (in_config(rope_parameters={"rope_type": "default", "rope_theta": 0}), CONFIG),
    "a base of nothing": (in_config(rope_theta=float("nan")), CONFIG),
    "a shape of 10^5 sizes": (one_tensor(shape=[10**9] * 10**5), SHARD),
    "a name of 10^5 letters": (in_header(lambda header: {"a" * 10**5: header.popitem()[1]}), SHARD),
    "a name of 10^5 letters in the index": (
        in_index(lambda index: {"weight_map": {"a" * 10**5: "a.safetensors"}}),
        INDEX,
    ),
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
    begin = time.process_time()
    with pytest.raises(SplitnetError, match=named):
        use(tmp_path / "it")
    assert time.process_time() - begin < SOON_S


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
    # Type of the list and of its items.
    at = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    path.write_bytes(content[:at] + struct.pack("<Q", 2**60) + content[at + 8 :])
    begin = time.process_time()
    with pytest.raises(SplitnetError, match=r"it\.gguf"):
        use(path)
    assert time.process_time() - begin < SOON_S


def test_a_gguf_file_with_too_many_blocks_is_refused_soon(tmp_path: Path) -> None:
    begin = time.process_time()
    with pytest.raises(SplitnetError, match=r"it\.gguf.*4096"):
        use(gguf(tmp_path / "it.gguf", block_count=10**7))
    assert time.process_time() - begin < SOON_S


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


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation makes."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if type(made) is torch.Tensor and not made.is_meta:
            self.most = max(self.most, made.untyped_storage().nbytes())
        return made


def nf4(key: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist())) | {key: 3 * 10**7}
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        )
        part = f"{name}.absmax" if key == "blocksize" else f"{name}.nested_absmax"
        tensors[part] = tensors[part][:1].clone()

    return change


def fp8(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["quantization_config"]["weight_block_size"] = [3 * 10**7, 64]
    tensors |= {name: one[:1].clone() for name, one in tensors.items() if name.endswith("_scale_inv")}


@pytest.mark.parametrize(
    ("scheme", "change"), [("nf4", nf4("blocksize")), ("nf4-nested", nf4("nested_blocksize")), ("fp8", fp8)]
)
def test_repeated_scales_take_no_more_than_the_weight(
    scheme: str, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None], tmp_path: Path
) -> None:
    source = random_checkpoint("llama", tmp_path / "source", blocks=1, hidden=128)
    made, _ = quantized_pair(source, tmp_path, scheme)
    tensors, config = tensors_of(made), json.loads((made / "config.json").read_text())
    change(tensors, config)
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "it", made, tensors, config))
    name = "model.layers.0.self_attn.q_proj.weight"
    with Largest() as largest, checkpoint.store.load_tensors({name: name}, torch.float32) as read:
        weight = read[name][...]
        assert (weight.to_floats() if isinstance(weight, PackedTensor) else weight).shape == (128, 128)
    assert largest.most <= 16 * 128 * 128


@contextmanager
def few_objects() -> Iterator[None]:
    """Fails if Python allocates more than 4 MiB meanwhile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


EXPERTS = 10**5


def test_huge_numbers_of_experts_take_no_memory_before_use(tmp_path: Path) -> None:
    folder = random_checkpoint("llama", tmp_path / "it", blocks=1)
    in_config(quantization_config={"quant_method": "mxfp4"})(folder)
    name = "model.layers.0.mlp.up"
    tensors = tensors_of(folder) | {
        f"{name}_blocks": torch.zeros(EXPERTS, 1, 1, 16, dtype=torch.uint8),
        f"{name}_scales": torch.zeros(EXPERTS, 1, 1, dtype=torch.uint8),
    }
    checkpoint = Checkpoint.open(
        write_checkpoint(tmp_path / "all", folder, tensors, json.loads((folder / "config.json").read_text()))
    )
    with few_objects():
        assert checkpoint.store.tensor_facts([name])[name].shape == (EXPERTS, 32, 1)
        with checkpoint.store.load_tensors({name: name}, torch.float32) as read:
            lazy = read[name][...]
    assert [len(matrices) for matrices in lazy[EXPERTS - 1 :].experts] == [1]
    with pytest.raises(SplitnetError, match=r"layers\.0\.mlp\.up"):
        Span.load(checkpoint, 0, 1)


def test_huge_numbers_of_experts_in_a_gguf_file_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "it.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    rows = np.zeros((EXPERTS, 2, 18), np.uint8)
    for name in ("gate", "up"):
        writer.add_tensor(f"blk.0.ffn_{name}_exps.weight", rows, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = list(GgufFile(path).tensors.values())
    with few_objects():
        gates, ups = (tensor.tensor() for tensor in tensors)
        both: Any = torch.cat([gates, ups], dim=1)
        some: Any = both[:, 1:3].transpose(1, 2)
        assert both.shape == (EXPERTS, 4, 32)
    assert [matrix.shape for matrix in some.experts[EXPERTS - 1]] == [(1, 32), (1, 32)]
    assert some[-1].to_floats().shape == (32, 2)


@pytest.mark.parametrize(
    ("family", "key"), [("gptj", "n_positions"), ("codegen", "n_positions"), ("deepseek_v3", "head_dim")]
)
def test_a_table_without_end_is_refused(family: str, key: str, tmp_path: Path) -> None:
    folder = random_checkpoint(family, tmp_path / "it", blocks=1)
    in_config(**{key: 10**7})(folder)
    with Largest() as largest, pytest.raises(SplitnetError, match="tables"):
        use(folder)
    assert largest.most <= 8 << 20


def test_sizes_beyond_those_of_the_tensors_take_no_memory(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "it")
    in_config(intermediate_size=2**20)(tmp_path / "it")
    with Largest() as largest, pytest.raises(SplitnetError, match=r"the config says that .* correct its config"):
        use(tmp_path / "it")
    assert largest.most <= 8 << 20


def test_a_tower_of_very_many_blocks_is_refused_before_it_is_built(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "it")
    in_config(model_type="qwen3_vl", text_config={}, vision_config={"depth": 10**7})(tmp_path / "it")
    begin = time.process_time()
    with pytest.raises(SplitnetError, match=r"config\.json says depth: 10000000, and at most 4096"):
        use(tmp_path / "it")
    assert time.process_time() - begin < SOON_S


def test_heads_without_number_in_a_gguf_file_are_an_error() -> None:
    family: Any = FAMILIES["qwen3next"]
    (change,) = (one for one in family.changes if one.name.endswith("in_proj_qkvz.weight"))
    config = SimpleNamespace(linear_num_key_heads=1, linear_num_value_heads=10**7, linear_key_head_dim=8)
    config.linear_value_head_dim = 8
    with Largest() as largest, pytest.raises(RuntimeError):
        change.make(config, torch.zeros(32, 8), torch.zeros(16, 8))
        _value_rows("linear_value_head_dim")(config, torch.zeros(32, 8))
    assert largest.most <= 1 << 20


def test_heads_that_are_turned_without_end_are_an_error() -> None:
    with Largest() as largest, pytest.raises(ValueError, match="8 frequencies"):
        _scaled_frequencies(torch.full((8,), 2.0), 10_000.0, 10**7)
    assert largest.most <= 1 << 20


NAMES = ["model.layers.0.self_attn.q_proj", "layers.12.mlp.experts.3.down_proj", "lm_head", "a/b-c", ""]


@pytest.mark.parametrize(
    "pattern",
    [
        *(".*self_attn.*", r".*\.mlp\.(gate|up|down)_proj$", r"^(?!.*experts).*layers\.\d+\..*proj$", "lm_head", ".*"),
        *(r"model\.layers\.[0-9]+\..*", r"(?:model\.)?layers\.(0|1[0-5])\.mlp\.experts\.\d+\.(down|up)_proj", "a/b-c?"),
        *(r"\bmodel\.layers\.[\d]{1,2}\.[\w.]+proj\b", r"layers\.\d{2}\..*"),
    ],
)
def test_patterns_of_names_match_as_those_of_python(pattern: str) -> None:
    assert [Patterns("it").match(pattern, name) for name in NAMES] == [bool(re.match(pattern, name)) for name in NAMES]


@pytest.mark.parametrize(("took_s", "left"), [(2e-5, 1.0), (0.03, 0.42)])
def test_only_matches_that_take_long_use_up_the_time_for_all(
    took_s: float, left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models with a thousand experts in a hundred blocks have a million short names."""
    ticks = itertools.count()
    clock = SimpleNamespace(thread_time=lambda: took_s * next(ticks), monotonic=lambda: took_s * next(ticks))
    monkeypatch.setattr("splitnet.limits.time", clock)
    patterns = Patterns("it")
    assert all(patterns.match("lm_head", "lm_head") for _ in range(200))
    assert patterns._left / ALL_MATCHES_S == pytest.approx(left, abs=1e-6)


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"(?:\w|\w\w|\.)+!", "(?:(?:a{99}){99}){99}", r"(a)\1", "(", "(?R)", "a" * 10**5, "(?e)(?:abc){e<=9}"),
        *("a{999}", "a{99}{99}", "(?:" * 300 + "#"),
    ],
)
def test_a_pattern_that_may_run_without_end_is_refused(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitnet.limits.MATCH_S", 0.05)
    made, _ = quantized_pair(random_checkpoint("llama", tmp_path / "source", blocks=1), tmp_path, "int4-group")
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    groups = {"a": group | {"targets": [f"re:{pattern}"]}, "b": group}
    in_config(quantization_config=config | {"config_groups": groups})(made)
    with pytest.raises(SplitnetError, match="pattern"):
        use(made)


TOKENIZER, ITS_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
BESIDE: dict[str, tuple[str, Any]] = {
    "no tokenizer": (TOKENIZER, {"model": None}),
    "merges of nothing": (TOKENIZER, {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}}),
    "a wrong expression": (TOKENIZER, {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}}),
    "a token beyond": (TOKENIZER, {"added_tokens": [{"id": -1}]}),
    "a list": (ITS_CONFIG, []),
    "a class that is a number": (ITS_CONFIG, {"tokenizer_class": 7}),
    "a template of nothing": (ITS_CONFIG, {"chat_template": [{"a": 1}]}),
    "a token that is a number": (ITS_CONFIG, {"added_tokens_decoder": {"5": 1}}),
    "itself": (ITS_CONFIG, {"self": 1}),
    "a deep one": (ITS_CONFIG, '{"a":' * 100_000),
    "a list of defaults": (GENERATION, []),
    "no text": (GENERATION, "x"),
    "deep defaults": (GENERATION, '{"a":' * 100_000),
    "a length below 0": (GENERATION, {"max_new_tokens": -5}),
    "defaults of themselves": (GENERATION, {"self": 1}),
}


@pytest.mark.parametrize("harm", BESIDE)
def test_files_beside_the_weights_are_read_or_refused_by_name(harm: str, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "it"
    shutil.copytree(folder, target)
    Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(str(target / TOKENIZER))
    (target / ITS_CONFIG).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert Checkpoint.open(target).tokenizer() is not None
    name, content = BESIDE[harm]
    if isinstance(content, dict):
        content = json.loads((target / name).read_text()) | content
    (target / name).write_text(content if isinstance(content, str) else json.dumps(content))
    checkpoint = Checkpoint.open(target)
    with pytest.raises(SplitnetError, match=GENERATION if name == GENERATION else "tokenizer"):
        checkpoint.generation_config() if name == GENERATION else checkpoint.tokenizer()


def test_a_vocabulary_at_which_rust_panics_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "it.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_types([1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_tensor("token_embd.weight", torch.zeros(3, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SplitnetError, match="tokenizer"):
        GgufStore(path).tokenizer()


class Touch:
    """An object whose code runs when it is unpickled."""

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
        load_adapter(model, tmp_path)
    assert not (tmp_path / "ran").exists()


ENDLESS = r"(([a-z._0-9]+)+)+!"
PROMPT = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 1, "token_dim": 64}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rank_pattern": {ENDLESS: 2}}, "is not a pattern of names"),
        ({"alpha_pattern": {ENDLESS: 2}}, "is not a pattern of names"),
        ({"modules_to_save": [ENDLESS]}, "is not a name"),
        ({"target_modules": ENDLESS, "exclude_modules": ENDLESS, "use_dora": True}, "use_dora"),
        ({"r": 10**9}, "rank 1000000000"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank 1000000000"),
        ({"init_lora_weights": "pissa_niter_1000000000"}, "pissa"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config"),
        ({"layer_replication": [[0, 2]] * 3000}, "layer_replication"),
        ({"trainable_token_indices": [0] * 100_000}, "100000 tokens"),
        ({"lora_alpha": math.nan}, "NaN"),
        ({"a_field_of_later": True}, "a_field_of_later"),
        (PROMPT | {"num_virtual_tokens": 10**9}, "1000000000 x 64"),
        (PROMPT | {"peft_type": "PREFIX_TUNING", "num_layers": 10**9}, "1 x 128000000000"),
        (PROMPT | {"peft_type": "XLORA"}, "XLORA"),
    ],
)
def test_an_adapter_made_to_do_harm_is_refused_soon(
    config: dict[str, Any], named: str, folder: Path, tmp_path: Path
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if "peft_type" in config:
        save_file({"prompt_embeddings": torch.zeros(1, 64)}, tmp_path / "adapter_model.safetensors")
    else:
        get_peft_model(copy.deepcopy(model), LoraConfig(**ADAPTER)).save_pretrained(str(tmp_path))
        config = ADAPTER | config
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    began = time.process_time()
    with pytest.raises(AdapterError, match=named):
        load_adapter(model, tmp_path)
    assert time.process_time() - began < SOON_S


def test_an_adapter_with_patterns_equals_that_of_peft(folder: Path, tmp_path: Path) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)",
        rank_pattern={r"layers\.[01]\.self_attn.*": 2, "q_proj": 6},
        alpha_pattern={r"^model.*down_proj": 3, "q_proj": 5},
        init_lora_weights=False,
    )
    get_peft_model(copy.deepcopy(plain), config).save_pretrained(str(tmp_path))
    saved = tmp_path / "adapter_config.json"
    empty = {"loftq_config": None, "target_parameters": [], "use_dora": None, "qalora_group_size": 32}
    # Other programs write disabled options like this.
    saved.write_text(json.dumps(json.loads(saved.read_text()) | empty))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path)).eval()(ids).logits
        found = load_adapter(copy.deepcopy(plain), tmp_path)(ids).logits
        assert torch.equal(found, expected) and not torch.equal(found, plain(ids).logits)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    last = max(tensors)
    for changed in (
        {name: each for name, each in tensors.items() if name != last},
        tensors | {"other": torch.zeros(1)},
    ):
        save_file(changed, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match="take an adapter for this model"):
            load_adapter(copy.deepcopy(plain), tmp_path)


def with_template(template: str) -> Any:
    return SimpleNamespace(get_chat_template=lambda tools: template, special_tokens_map={"bos_token": "<s>"})


SAID = [{"role": "user", "content": "Grüße \U0001f600", "name": None}, {"role": "assistant", "content": "ab"}]


def test_a_chat_template_renders_as_in_transformers() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content | upper }}{{ m.name is defined }}{% endfor %}"
        "{{ tools | tojson }}{{ flag }}{% if add_generation_prompt %}>{% endif %}{% generation %}{% endgeneration %}"
    )
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    made = chat_template.render(with_template(template), SAID, answer=True, tools=tools, variables={"flag": [1, None]})
    assert made == (
        "<s>user:GRÜSSE \U0001f600Falseassistant:ABFalse"
        '[{"type": "function", "function": {"name": "f", "parameters": {}}}][1, None]>'
    )
    with pytest.raises(TemplateError, match=r"^no roles$"):
        chat_template.render(with_template("{{ raise_exception('no roles') }}"), SAID, answer=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 1500000000 }}",
        "{{ '%1500000000d' % 1 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        pytest.param(
            "{% macro f(n) %}{{ f(n - 1) + f(n - 1) if n else '' }}{% endmacro %}{{ f(60) }}", marks=pytest.mark.full
        ),
        "{{ 'a' * 2000000 }}",
    ],
)
def test_a_chat_template_without_end_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory, time and output are bounded; the next template is rendered as usual."""
    assert chat_template.render(with_template("ok"), SAID, answer=True) == "ok"
    monkeypatch.setattr(bounded, "ANSWER_S", 1.0)
    monkeypatch.setattr(bounded, "MOST_BYTES", 1 << 20)
    before = psutil.Process().memory_info().rss
    with pytest.raises(TemplateError, match="it takes more than"):
        chat_template.render(with_template(template), SAID, answer=True)
    assert psutil.Process().memory_info().rss - before < 256 << 20
    monkeypatch.undo()
    assert chat_template.render(with_template("ok"), SAID, answer=True) == "ok"


def test_a_process_for_templates_that_was_ended_meanwhile_is_begun_again() -> None:
    assert chat_template.render(with_template("ok"), SAID, answer=True) == "ok"
    running = chat_template._process._running
    assert running is not None
    running.kill()
    running.wait()
    assert chat_template.render(with_template("ok"), SAID, answer=True) == "ok"


def test_a_chat_template_is_not_computed_here_to_know_its_variables() -> None:
    tokenizer = with_template("{{ 'a' * 150000000 }}{{ mine }}")
    tokenizer.apply_chat_template = lambda messages: None
    tokenizer.chat_template = "there is one"
    prompts: Any = SimpleNamespace(_tokenizer=tokenizer)
    prompts.variables = partial(Prompts.variables, prompts)
    tracemalloc.start()
    try:
        Prompts._check_variables(prompts, {"variables": {"mine": 1}}, None)
        with pytest.raises(ApiError, match="no place for 'other'"):
            Prompts._check_variables(prompts, {"variables": {"other": 1}}, None)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


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
