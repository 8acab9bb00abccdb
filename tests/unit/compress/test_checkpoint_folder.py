"""Tests of `splitnet.compress.checkpoint_folder`: the written checkpoint, interruptions and refusals."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from filelock import FileLock
from transformers import AutoModelForCausalLM

from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.compress import blocks
from splitnet.compress.blocks import block_file, compress_blocks
from splitnet.compress.checkpoint_folder import compress_checkpoint
from splitnet.compress.published import read_block_file, rounded_in
from splitnet.compress.rounding import Compression
from splitnet.errors import SplitnetError, UnsupportedModel, WeightsError
from splitnet.quant.packed_tensor import pack_words, unpack_words
from tests.unit.mtp_checkpoints import LATENT
from tests.unit.random_models import random_checkpoint

IDS = torch.randint(0, 300, (1024,), generator=torch.Generator().manual_seed(0)).tolist()
MLA = LATENT | {"first_k_dense_replace": 1}
HOW = Compression(4, 32, (96,) * 10 + (64,))


def _compress(
    checkpoint: Checkpoint, folder: Path, how: Compression = HOW, progress: Callable[[int], None] = lambda _: None
) -> list[str]:
    run = partial(compress_blocks, checkpoint, 0, checkpoint.num_blocks, how=how, progress=progress)
    return compress_checkpoint(checkpoint, IDS, folder, how, run)


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [32, 45, 64])
def test_words_are_packed_as_compressed_tensors_packs_them(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, count), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert torch.equal(words, pack_to_int32((codes.int() - (1 << (bits - 1))).to(torch.int8), bits))
    assert torch.equal(unpack_words(words, bits, count), codes)


@pytest.mark.default_cases(family=("llama", "gemma2", "falcon_h1", "mixtral", "olmoe"))
@pytest.mark.parametrize(
    ("family", "bits", "options"),
    [
        ("llama", 4, {}),
        ("qwen3", 3, {}),
        ("gemma2", 2, {"sliding_window": 8}),
        ("phi3", 8, {"pad_token_id": 0}),
        ("falcon_h1", 4, {}),
        ("mixtral", 4, {}),
        ("qwen2_moe", 3, {}),
        ("qwen3_moe", 4, {}),
        ("glm4_moe", 4, {}),
        ("deepseek_v3", 4, MLA),
        ("stablelm", 3.5, {}),
        ("olmoe", 3.5, {}),
        ("qwen2", 2.5, {}),
        ("falcon_h1", 4.5, {}),
    ],
)
def test_transformers_reads_what_the_span_computes(family: str, bits: float, options: Any, tmp_path: Path) -> None:
    source = random_checkpoint(family, tmp_path / "floats", blocks=3, **options)
    checkpoint = Checkpoint.open(source)
    told: list[int] = []
    left = _compress(checkpoint, tmp_path / "few", Compression(bits, 32, HOW.lengths), told.append)
    assert not [name for name in left if not name.endswith("shared_expert.down_proj.weight")]
    assert told == [0, 1, 2]

    few = Checkpoint.open(tmp_path / "few")
    assert all(any(few.store.tensor_facts([t.name])[t.name].layout for t in block) for block in few.block_tensors)
    assert few.fingerprint != checkpoint.fingerprint
    settings = json.loads((tmp_path / "few" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert (len(settings) > 1) == (bits % 1 > 0)
    for block in range(3):
        used, weights = 0, 0
        for group in settings.values():
            for layer in (name for name in group["targets"] if f"layers.{block}." in name):
                size = math.prod(checkpoint.store.tensor_facts([f"{layer}.weight"])[f"{layer}.weight"].shape)
                used, weights = used + size * group["weights"]["num_bits"], weights + size
        assert bits - 0.5 < used / weights <= bits
    span = Span.load(few, 0, 3, dtype="float32", weights="float32")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "few", dtype=torch.float32).eval()
    whole: Any = AutoModelForCausalLM.from_pretrained(source).eval()
    for ours, theirs in zip(span.block_modules, model.model.layers, strict=True):
        for path, parameter in ours.named_parameters():
            if parameter.dim() == 3 and "experts" in path:  # transformers unpacks experts to bfloat16
                unpacked = theirs.get_parameter(path)
                assert torch.equal(parameter.bfloat16(), unpacked)
                unpacked.data = parameter.data
    seen: list[torch.Tensor] = []
    layers = model.model.layers
    layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    layers[-1].register_forward_hook(lambda *given: seen.append(given[2][0] if type(given[2]) is tuple else given[2]))
    with torch.inference_mode():
        exact, found = (one(torch.tensor([IDS[:50]])).logits for one in (whole, model))
        before, after = (states.flatten(0, -2) for states in seen)
        torch.testing.assert_close(span.sequences(before, [50]), after, rtol=1e-4, atol=1e-4)
    difference = float((exact - found).norm() / exact.norm())
    assert 0 < difference < {8: 0.02, 4: 0.5, 3: 0.6, 2: 1.0}[int(bits)]


def test_an_interrupted_compression_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(random_checkpoint("llama", tmp_path / "floats", blocks=3))
    _compress(checkpoint, tmp_path / "whole")

    writes = blocks.write_whole
    for before in range(1, 7):  # a file of states or of a block cannot be written
        left = [before]

        def fails(path: Path, write: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                path.with_suffix(".part").write_bytes(b"a part")
                raise OSError(28, "No space left on device")
            writes(path, write)

        folder = tmp_path / f"interrupted-{before}"
        with monkeypatch.context() as patched:
            patched.setattr(blocks, "write_whole", fails)
            with pytest.raises(OSError, match="No space"):
                _compress(checkpoint, folder)
        (folder / "states-00009.part").write_bytes(b"a part that no later run writes again")
        _compress(checkpoint, folder)
        assert _digests(folder) == _digests(tmp_path / "whole")


def test_tensors_with_other_bits_than_the_budget_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(random_checkpoint("llama", tmp_path / "floats", blocks=1))
    how = Compression(3.5, 32, HOW.lengths)
    _compress(checkpoint, tmp_path / "few", how)
    file = block_file(tmp_path / "few", 0)
    rounded = rounded_in(read_block_file(checkpoint, 0, file, how), how)
    assert {3} < {some.bits for some in rounded.values()}
    for bits in (3.01, 3, 4, 4.5):
        with pytest.raises(WeightsError, match="are not those of"):
            read_block_file(checkpoint, 0, file, Compression(bits, 32, HOW.lengths))


def test_matrices_that_groups_do_not_divide_are_told(tmp_path: Path) -> None:
    source = random_checkpoint("llama", tmp_path / "floats", blocks=2, intermediate_size=72)
    left = _compress(Checkpoint.open(source), tmp_path / "few")
    assert left == [f"model.layers.{block}.mlp.down_proj.weight" for block in range(2)]


def test_what_cannot_be_compressed_is_refused_by_name(tmp_path: Path) -> None:
    llama = Checkpoint.open(random_checkpoint("llama", tmp_path / "llama", blocks=2))
    _compress(llama, tmp_path / "few")
    with pytest.raises(UnsupportedModel, match="in few bits already"):
        _compress(Checkpoint.open(tmp_path / "few"), tmp_path / "fewer")
    with pytest.raises(SplitnetError, match="has something else"):
        _compress(llama, tmp_path / "few")
    assert not (tmp_path / "few" / "compression.lock").exists()
    with FileLock(tmp_path / "few" / "compression.lock"), pytest.raises(SplitnetError, match="another command writes"):
        _compress(llama, tmp_path / "few")
    (tmp_path / "file").touch()
    with pytest.raises(SplitnetError, match="cannot be made"):
        _compress(llama, tmp_path / "file")
    small = Checkpoint.open(random_checkpoint("llama", tmp_path / "small", blocks=2, vocab=256))
    with pytest.raises(SplitnetError, match="the model's own tokenizer"):
        _compress(small, tmp_path / "small-few")
    for family in ("gpt_oss", "llama4_text"):
        experts = Checkpoint.open(random_checkpoint(family, tmp_path / family, blocks=2))
        with pytest.raises(UnsupportedModel, match=r"experts .* cannot be compressed"):
            _compress(experts, tmp_path / f"{family}-few")
    narrow = Checkpoint.open(random_checkpoint("gpt2", tmp_path / "gpt2", blocks=2))
    with pytest.raises(UnsupportedModel, match="no linear layers in groups of 32"):
        _compress(narrow, tmp_path / "gpt2-few")
