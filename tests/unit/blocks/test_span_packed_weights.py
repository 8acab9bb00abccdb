"""Weights in the codes of a checkpoint stay in codes, and give the results of the numbers that the codes encode."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from splitnet.blocks.adapters import AdapterTensors
from splitnet.blocks.backbone import QuantizedEmbedding, load_whole
from splitnet.blocks.block_sizes import block_bytes, block_sizes
from splitnet.blocks.client_part import client_part_of, load_client_part
from splitnet.blocks.head import QuantizedHead
from splitnet.blocks.model_sizes import ModelSizes
from splitnet.blocks.passes import SpanPasses
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.store import Progress, TensorFacts, TensorStore
from splitnet.checkpoint.transfer.weight_pieces import TensorLocation, WeightFolder
from splitnet.errors import ModelNotFound
from splitnet.quant.choose import choose_weights
from splitnet.quant.grouped import held_bytes
from splitnet.quant.linear import QuantizedLinear
from splitnet.quant.packed_tensor import CodeLayout, Codes, PackedTensor, ScaleFormat, StoredMatrix
from splitnet.tools.doctor.machine_checks import room_on_disk
from tests.unit.gguf_writing import write_gguf
from tests.unit.quantized_checkpoints import quantized_pair
from tests.unit.random_models import random_checkpoint

CPU = torch.device("cpu")
HIDDEN, VOCAB, BLOCKS = 64, 320, 3
LAYOUTS = {
    "4 bits": CodeLayout(4, 32, ScaleFormat.FLOAT16, ScaleFormat.CODES, offset=8),
    "8 bits": CodeLayout(8, 32, ScaleFormat.FLOAT16, offset=128),
}
TOLERANCE = 2e-3
"""Kernels round their inputs to 16 bits."""


class CodedStore:
    """A `TensorStore` of tensors in memory, some of them in codes."""

    name = "coded"

    def __init__(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        self._plain = Checkpoint.open(folder)
        self.source = str(folder)
        self.folder: WeightFolder | None = None
        self.tensors = dict(tensors)

    @cached_property
    def config(self) -> PreTrainedConfig:
        return self._plain.config

    @property
    def reads_images(self) -> bool:
        return False

    def with_towers(self) -> TensorStore:
        raise NotImplementedError

    @property
    def quantized(self) -> bool:
        return True

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def tensor_facts(self, names: Iterable[str]) -> dict[str, TensorFacts]:
        return {name: _facts(self.tensors[name]) for name in names}

    def find_file(self, file: str) -> Path | None:
        return None

    def load_tensors(
        self, names: Mapping[str, str], dtype: torch.dtype, progress: Progress | None = None
    ) -> AbstractContextManager[dict[str, Any]]:
        return nullcontext({given: _Lazy(self.tensors[name]) for given, name in names.items()})

    def told_config(self) -> str:
        return "{}"

    def tensor_locations(self) -> Mapping[str, TensorLocation]:
        return {}

    def file_heads(self) -> Mapping[str, int]:
        return {}

    def file_bytes(self, names: Iterable[str]) -> int:
        return 0

    @property
    def commit(self) -> str:
        return ""

    def local_file(self, file: str) -> Path | None:
        raise NotImplementedError

    def are_here(self, names: Iterable[str]) -> bool:
        return True

    def open_file(self, file: str) -> BinaryIO:
        raise NotImplementedError

    def tokenizer(self) -> Any:
        raise NotImplementedError

    def processor(self) -> Any:
        raise NotImplementedError

    def generation_config(self) -> GenerationConfig | None:
        return None


class _Lazy:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return self._tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._tensor.dtype

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor if isinstance(self._tensor, PackedTensor) else self._tensor.clone()


def _facts(tensor: torch.Tensor) -> TensorFacts:
    if not isinstance(tensor, PackedTensor):
        return TensorFacts(tuple(tensor.shape), tensor.dtype, None, tensor.nbytes)
    ((matrix,),) = tensor.experts
    nbytes = matrix.layout.nbytes(*matrix.shape)
    return TensorFacts(tuple(tensor.shape), tensor.dtype, matrix.layout, nbytes, tensor.transposed)


def coded(weight: torch.Tensor, layout: CodeLayout, *, transposed: bool = False) -> torch.Tensor:
    """A weight in codes, near the given values."""
    values = (weight.T if transposed else weight).contiguous()
    groups = values.view(len(values), -1, layout.group)
    low, high = groups.amin(-1), groups.amax(-1)
    most = 2**layout.bits - 1
    if layout.zero is ScaleFormat.CODES:
        scales = ((high - low) / most).half()
        zeros = (-low / scales.float()).round().clamp(0, most)
    else:
        scales = (2 * torch.maximum(-low, high) / most).half()
        zeros = torch.full_like(low, layout.offset)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, most).to(torch.uint8)
    stored_zeros = zeros.to(torch.uint8) if layout.zero is ScaleFormat.CODES else None
    made = Codes(codes.view(values.shape), scales, stored_zeros)
    matrix = StoredMatrix(layout, (values.shape[0], values.shape[1]), lambda: made)
    weight_in_codes = PackedTensor.of(matrix)
    return weight_in_codes.T if transposed else weight_in_codes


def in_codes(family: str, layout: CodeLayout, folder: Path, **overrides: Any) -> tuple[Checkpoint, Any]:
    """A random checkpoint with its matrices in codes, and transformers' model of the decoded numbers."""
    random_checkpoint(family, folder, blocks=BLOCKS, hidden=HIDDEN, vocab=VOCAB, **overrides)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    plain = Checkpoint.open(folder)
    transposed = {f"{path}.weight" for path, layer in model.named_modules() if isinstance(layer, Conv1D)}
    with plain.store.load_tensors({name: name for name in plain.store.tensor_names}, torch.float32) as tensors:
        read = {name: tensor[...] for name, tensor in tensors.items()}
    stored = {
        name: coded(tensor, layout, transposed=name in transposed or f"transformer.{name}" in transposed)
        if tensor.ndim == 2 and not {"gate", "wpe"} & set(name.split("."))
        else tensor
        for name, tensor in read.items()
    }
    numbers = {
        name: tensor.to_floats() if isinstance(tensor, PackedTensor) else tensor for name, tensor in stored.items()
    }
    exact = type(model).from_pretrained(None, config=model.config, state_dict=numbers, dtype=torch.float32)
    return Checkpoint(CodedStore(folder, stored), plain.config), exact.eval().requires_grad_(False)


FAMILIES = ["llama", "gpt2", "mixtral", "qwen3_moe", "phi3"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[str, str], tuple[Checkpoint, Any]] = {}

    def make(family: str, layout: str = "4 bits") -> tuple[Checkpoint, Any]:
        if (family, layout) not in made:
            made[family, layout] = in_codes(family, LAYOUTS[layout], tmp_path_factory.mktemp(family) / "model")
        return made[family, layout]

    return make


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((actual - expected).norm() / expected.norm()) < TOLERANCE


def held_layers(span: Span) -> set[str]:
    return {
        path.rpartition(".")[-1] for path, layer in span._backbone.named_modules() if isinstance(layer, QuantizedLinear)
    }


def run(span: Span, hidden: torch.Tensor) -> torch.Tensor:
    return span.forward(hidden, [RowChunk(span.new_row(), 0, len(hidden))])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_split_model_in_codes_equals_that_of_its_numbers(family: str, layout: str, checkpoints: Any) -> None:
    checkpoint, exact = checkpoints(family, layout)
    spans = [Span.load(checkpoint, 0, 1), Span.load(checkpoint, 1, BLOCKS)]
    assert all(span.weights.kind == "stored" and span.dtype == torch.float32 for span in spans)
    assert "o_proj" in held_layers(spans[1]) or "c_proj" in held_layers(spans[1])

    class Blocks(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            row = hidden[0]
            for span in spans:
                row = run(span, row)
            return row[None]

    client_part: Any = load_client_part(checkpoint, Blocks())
    ids = torch.arange(1, 15)[None]
    assert close(client_part(ids, use_cache=False).logits, exact(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_span_takes_the_predicted_bytes(family: str, checkpoints: Any) -> None:
    checkpoint, _ = checkpoints(family)
    chosen = choose_weights(None, None, torch.float32, CPU)
    foretold = block_sizes(checkpoint, chosen, range(BLOCKS))
    span = Span.load(checkpoint, 0, BLOCKS)
    # Without frequencies of a rotary embedding.
    assert abs(span.weight_bytes - sum(size.held for size in foretold)) < 1024
    assert all(size.coded and not size.converted for size in foretold)
    assert block_bytes(checkpoint, None) == max(size.held for size in foretold)
    if family == "llama":
        assert foretold[0].held < 0.2 * foretold[0].plain
    sizes = sizes_of(checkpoint)
    assert sizes.block_bytes == foretold[0].held
    if family == "llama":
        assert sizes.held_as == "codes of 5.0 bits"
    assert sizes.saved_bytes == foretold[0].plain - foretold[0].held
    assert sizes.file_bytes == sum(
        one.nbytes for one in checkpoint.store.tensor_facts(checkpoint.store.tensor_names).values()
    )


def sizes_of(checkpoint: Checkpoint) -> ModelSizes:
    chosen = choose_weights(None, None, torch.float32, CPU)
    return ModelSizes.of_config("coded", checkpoint.config, chosen).in_codes_of(checkpoint, chosen)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_gradients_and_low_rank_additions_are_those_of_the_numbers(family: str, checkpoints: Any) -> None:
    checkpoint, _ = checkpoints(family, "8 bits")
    path = "attn.c_attn" if family == "gpt2" else "self_attn.q_proj"
    spans = [Span.load(checkpoint, 0, 2), Span.load(checkpoint, 0, 2, weights="float32")]
    assert held_layers(spans[0]) and not held_layers(spans[1])
    assert [span.weights.kind for span in spans] == ["stored", "float32"]
    outputs = HIDDEN * 3 if family == "gpt2" else HIDDEN
    torch.manual_seed(0)
    low, high = torch.randn(4, HIDDEN) / 8, torch.randn(outputs, 4)
    adapter = AdapterTensors({f"1.{path}.lora_A": low, f"1.{path}.lora_B": high})
    hidden, gradient = torch.randn(2, 9, HIDDEN)
    found: list[list[torch.Tensor]] = []
    for span in spans:
        span.fit_adapter(adapter)
        passes = SpanPasses(span)
        output = passes.forward(hidden, (4, 5), adapter, 0, 2)
        by_input, by_adapter = passes.backward(hidden, (4, 5), gradient, adapter, 0, 2)
        found.append([output, by_input, *by_adapter.values()])
    assert all(close(actual, expected) for actual, expected in zip(*found, strict=True))


def test_weights_are_converted_to_another_requested_format(checkpoints: Any) -> None:
    checkpoint, _ = checkpoints("llama", "8 bits")
    hidden = torch.randn(5, HIDDEN)
    exact = run(Span.load(checkpoint, 0, 1, weights="float32"), hidden)
    for kind, loss in (("bfloat16", 0.02), ("int8", 0.02), ("int4", 0.2)):
        span = Span.load(checkpoint, 0, 1, weights=kind)
        assert span.weights.kind == kind and bool(held_layers(span)) == (kind != "bfloat16")
        assert float((run(span, hidden).float() - exact).norm() / exact.norm()) < loss
        assert abs(span.weight_bytes - block_bytes(checkpoint, None, kind)) < 1024
    for kind in (None, "auto"):
        assert Span.load(checkpoint, 0, 1, weights=kind, dtype="bfloat16").weights.kind == "stored"
        span = Span.load(checkpoint, 0, 1, weights=kind)
        assert (span.weights.kind, span.weight_bytes) == ("stored", Span.load(checkpoint, 0, 1).weight_bytes)


def test_weights_that_fit_no_requested_format_keep_their_codes(tmp_path: Path) -> None:
    layout = CodeLayout(8, 16, ScaleFormat.FLOAT16, offset=128)
    # layers with 48 inputs, which are not groups of 32
    checkpoint, _ = in_codes("llama", layout, tmp_path / "model", intermediate_size=48)
    span = Span.load(checkpoint, 0, 1, weights="int4")
    (size,) = block_sizes(checkpoint, choose_weights("int4", None, torch.float32, CPU), range(1))
    assert size.coded and size.converted
    assert abs(span.weight_bytes - size.held) < 1024


def test_numbers_and_codes_of_one_block_are_both_kept(checkpoints: Any) -> None:
    whole, _ = checkpoints("llama")
    tensors = {
        name: tensor.to_floats() if isinstance(tensor, PackedTensor) and "mlp" in name else tensor
        for name, tensor in whole.store.tensors.items()
    }
    checkpoint = Checkpoint(CodedStore(Path(whole.source), tensors), whole.config)
    span = Span.load(checkpoint, 0, 1)
    assert held_layers(span) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert abs(span.weight_bytes - block_bytes(checkpoint, None)) < 1024
    assert torch.allclose(
        run(span, torch.ones(3, HIDDEN)), run(Span.load(whole, 0, 1), torch.ones(3, HIDDEN)), atol=0.1
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@torch.no_grad()
def test_embeddings_and_head_stay_in_their_codes(family: str, checkpoints: Any) -> None:
    checkpoint, exact = checkpoints(family)
    client_part: Any = load_client_part(checkpoint, nn.Identity())
    embedding, head = client_part.get_input_embeddings(), client_part.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedHead)
    tied = family != "llama"
    assert (embedding.held is head.held) == tied
    ids = torch.tensor([[1, 0, VOCAB - 1, 1]])
    assert torch.allclose(embedding(ids), exact.get_input_embeddings()(ids), atol=1e-6)
    assert torch.equal(embedding.weight + 0, exact.get_input_embeddings().weight)
    hidden = torch.randn(1, 3, HIDDEN)
    assert close(head(hidden), exact.get_output_embeddings()(hidden))
    if head.held.has_fast_kernel:
        assert torch.equal(head(hidden), torch.cat([head(row[None]) for row in hidden[0]])[None])
    assert (client_part.device, client_part.dtype) == (CPU, torch.float32)
    taken = sum({id(tensor): tensor.nbytes for tensor in (*client_part.parameters(), *client_part.buffers())}.values())
    sizes = sizes_of(checkpoint)
    assert abs(taken - sizes.client_part_bytes) < 1024
    assert sizes.head_bytes == held_bytes(LAYOUTS["4 bits"], VOCAB, HIDDEN)
    if family == "llama":
        assert sizes.client_part_bytes < 0.2 * 4 * 2 * VOCAB * HIDDEN
        assert client_part_of(client_part).compute_everything


@torch.no_grad()
def test_gradients_flow_through_a_head_in_codes(checkpoints: Any) -> None:
    checkpoint, exact = checkpoints("llama")
    head: Any = load_client_part(checkpoint, nn.Identity()).get_output_embeddings()
    with torch.enable_grad():
        hidden = torch.randn(1, 3, HIDDEN, requires_grad=True)
        head(hidden).square().sum().backward()
        again = hidden.detach().requires_grad_()
        exact.lm_head(again).square().sum().backward()
    assert hidden.grad is not None and again.grad is not None
    assert close(hidden.grad, again.grad)


@torch.no_grad()
def test_a_requested_format_converts_the_head_and_not_embeddings(checkpoints: Any) -> None:
    checkpoint, exact = checkpoints("gemma3_text")
    hidden = torch.randn(2, HIDDEN)
    expected = exact.lm_head(hidden)
    for kind, loss in (("int8", 0.02), ("float32", 1e-5)):
        client_part: Any = load_client_part(checkpoint, nn.Identity(), dtype="float32", weights=kind)
        assert isinstance(client_part.get_input_embeddings(), QuantizedEmbedding)
        assert not isinstance(client_part.lm_head, QuantizedHead) or kind == "int8"
        assert float((client_part.lm_head(hidden) - expected).norm() / expected.norm()) < loss


@pytest.mark.parametrize("scheme", ["fp8", "awq", "gptq", "int4-group", "nf4"])
def test_sizes_of_quantized_files_equal_those_that_a_peer_loads(scheme: str, tmp_path: Path) -> None:
    source = random_checkpoint("llama", tmp_path / "source", blocks=2, hidden=128)
    folder, _ = quantized_pair(source, tmp_path, scheme)
    checkpoint = Checkpoint.open(folder)
    span = Span.load(checkpoint, 0, 2)
    assert span.weights.kind == "stored"
    sizes = ModelSizes.of(folder)
    assert abs(span.weight_bytes - 2 * sizes.block_bytes) < 1024
    assert sizes.block_bytes == block_bytes(checkpoint, None)
    assert sizes.client_part_bytes == checkpoint.bytes_of(checkpoint.client_part_names_of, None)
    alone = tmp_path / "config"
    alone.mkdir()
    shutil.copy(folder / "config.json", alone)
    with pytest.raises(ModelNotFound):  # the bytes of its weights are in the headers of its files
        ModelSizes.of(alone)


@pytest.mark.default_cases(family=("llama", "phi3", "gemma3_text"))
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe", "gemma3_text"])
@torch.no_grad()
def test_a_gguf_file_is_held_in_the_bytes_that_it_has(family: str, tmp_path: Path) -> None:
    source = random_checkpoint(family, tmp_path / "source", blocks=2, hidden=64, vocab=VOCAB)
    path = write_gguf(source, tmp_path / "model.gguf", GGMLQuantizationType.Q8_0)
    checkpoint = Checkpoint.open(path)
    span, exact = Span.load(checkpoint, 0, 2), Span.load(checkpoint, 0, 2, weights="float32")
    hidden = torch.randn(5, 64)
    assert close(run(span, hidden), run(exact, hidden))
    facts = checkpoint.store.tensor_facts(checkpoint.store.tensor_names)
    in_file = sum(facts[tensor.name].nbytes for block in checkpoint.block_tensors for tensor in block)
    if family != "qwen3_moe":
        assert span.weight_bytes < 1.1 * in_file + 1024
    sizes = ModelSizes.of(path)
    assert abs(span.weight_bytes - 2 * sizes.block_bytes) < 1024
    assert "nothing is downloaded" in room_on_disk(str(path), sizes).text
    client_part: Any = load_client_part(checkpoint, nn.Identity())
    assert isinstance(client_part.get_input_embeddings(), QuantizedEmbedding) and isinstance(
        client_part.lm_head, QuantizedHead
    )
    taken = sum({id(tensor): tensor.nbytes for tensor in (*client_part.parameters(), *client_part.buffers())}.values())
    assert abs(taken - sizes.client_part_bytes) < 1024


def test_a_plain_checkpoint_stays_plain(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(random_checkpoint("llama", tmp_path, blocks=1))
    span = Span.load(checkpoint, 0, 1)
    assert span.weights.kind == "float32" and not held_layers(span)
    assert ModelSizes.of(tmp_path).held_as == "float32"


@pytest.mark.parametrize("kind", ["gguf", "plain"])
def test_models_loaded_in_inference_mode_are_used_outside_it(kind: str, tmp_path: Path) -> None:
    path = random_checkpoint("qwen3_moe", tmp_path / "it", blocks=2, hidden=HIDDEN)
    if kind == "gguf":
        path = write_gguf(path, tmp_path / "it.gguf", GGMLQuantizationType.Q4_0)
    hidden, ids = torch.randn(5, HIDDEN), torch.arange(1, 9)[None]
    expected = Span.load(Checkpoint.open(path), 0, 2)
    with torch.inference_mode():
        span, client_part = (
            Span.load(Checkpoint.open(path), 0, 2),
            load_client_part(Checkpoint.open(path), nn.Identity()),
        )
        whole = load_whole(Checkpoint.open(path), "auto")
    found, wanted = (each.forward(hidden, [RowChunk(each.new_row(), 0, 5)]) for each in (span, expected))
    torch.testing.assert_close(found, wanted)
    for model in (client_part, whole):
        given = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=given, use_cache=False).logits.sum().backward()
        assert given.grad is not None and bool(given.grad.any())
