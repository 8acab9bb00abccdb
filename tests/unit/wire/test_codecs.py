"""The codecs of boundary activations: exact sizes and bytes, bounded errors, no crash on bad input."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitnet.errors import CodecError
from splitnet.wire.codecs import CODECS, DEFAULT_INT8, Codec, codec_by_code, codec_by_name

INTEGER_BITS = {"int8": 8, "int8-block": 8, "int6": 6, "int4": 4}
LOSSY = [name for name in CODECS if name != "none"]

names = st.sampled_from(sorted(CODECS))
integer_names = st.sampled_from(sorted(INTEGER_BITS))
seeds = st.integers(0, 2**32 - 1)
hidden_sizes = st.integers(1, 200) | st.sampled_from([576, 1000, 4096])


def activations(positions: int, hidden: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Gaussian rows with a few massive channels, like those of real boundary activations."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(positions, hidden, generator=generator)
    rows[:, torch.randint(hidden, (2,), generator=generator)] *= 700
    return rows * scale


def pieces(codec: Codec, payload: bytes, hidden: int) -> list[bytes]:
    size = codec.bytes_per_position(hidden)
    return [payload[start : start + size] for start in range(0, len(payload), size)]


def test_a_codec_is_found_by_name_and_by_number() -> None:
    assert {codec_by_name(name) for name in CODECS} == {codec_by_code(codec.code) for codec in CODECS.values()}
    assert all(CODECS[name].name == name for name in CODECS)
    assert DEFAULT_INT8 in CODECS


def test_wire_numbers_are_stable() -> None:
    numbers = {name: codec.code for name, codec in CODECS.items()}
    assert numbers == {"none": 0, "fp16": 1, "bf16": 2, "int8": 3, "int8-block": 4, "int6": 5, "int4": 6}


def test_unknown_codecs_are_refused_with_the_known_ones() -> None:
    with pytest.raises(CodecError, match="'int7'; use one of none, fp16"):
        codec_by_name("int7")
    with pytest.raises(CodecError, match="number 255 is unknown"):
        codec_by_code(255)


def test_every_codec_has_its_rows_in_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "codecs.md").read_text(encoding="utf-8")
    for codec in CODECS.values():
        assert f"\n| `{codec.name}` | {codec.code} |" in page
        assert page.count(f"\n| {codec.name} | ") == 2
        assert f"\n| {codec.name} | {codec.bytes_per_position(576)} | " in page


@given(names, st.integers(0, 5), hidden_sizes, seeds, st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
def test_sizes_are_exact_for_every_shape(name: str, positions: int, hidden: int, seed: int, dtype: torch.dtype) -> None:
    codec = CODECS[name]
    payload = codec.encode(activations(positions, hidden, seed).to(dtype))
    assert len(payload) == positions * codec.bytes_per_position(hidden)
    decoded = codec.decode(payload, positions, hidden)
    assert decoded.shape == (positions, hidden)
    assert decoded.dtype == torch.float32
    assert decoded.is_contiguous()


@pytest.mark.parametrize(
    ("name", "size"), [("none", 2304), ("fp16", 1152), ("bf16", 1152), ("int8", 594), ("int4", 306)]
)
def test_bytes_per_position_of_smollm2(name: str, size: int) -> None:
    assert CODECS[name].bytes_per_position(576) == size


@given(names, st.integers(1, 7), hidden_sizes, seeds)
def test_a_position_gives_the_same_bytes_alone_and_among_others(
    name: str, positions: int, hidden: int, seed: int
) -> None:
    codec, rows = CODECS[name], activations(positions, hidden, seed)
    payload = codec.encode(rows)
    assert pieces(codec, payload, hidden) == [codec.encode(row[None]) for row in rows]
    together = codec.decode(payload, positions, hidden)
    alone = [codec.decode(piece, 1, hidden) for piece in pieces(codec, payload, hidden)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("positions", "hidden"), [(300, 576), (40, 4096), (3, 70000)])
def test_bytes_do_not_depend_on_chunks_or_threads(name: str, positions: int, hidden: int) -> None:
    codec, rows = CODECS[name], activations(positions, hidden, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        payload = codec.encode(rows)
        together = codec.decode(payload, positions, hidden)
    finally:
        torch.set_num_threads(threads)
    assert payload == b"".join(codec.encode(row[None]) for row in rows)
    alone = [codec.decode(piece, 1, hidden) for piece in pieces(codec, payload, hidden)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", CODECS)
def test_encoded_positions_can_be_cropped_and_joined(name: str) -> None:
    codec, rows = CODECS[name], activations(6, 576, seed=2)
    size = codec.bytes_per_position(576)
    first, second = codec.encode(rows[:4]), codec.encode(rows[3:])
    assert first[: 3 * size] + second == codec.encode(rows)
    assert torch.equal(codec.decode(memoryview(first)[size : 3 * size], 2, 576), codec.decode(first, 4, 576)[1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_none_keeps_every_bit(dtype: torch.dtype) -> None:
    rows = activations(3, 77, seed=3).to(dtype)
    rows[1, :3] = torch.tensor([float("inf"), float("-inf"), -0.0])
    decoded = CODECS["none"].decode(CODECS["none"].encode(rows), 3, 77)
    assert torch.equal(decoded.to(dtype).view(torch.uint8), rows.view(torch.uint8))


def test_none_keeps_nan() -> None:
    assert CODECS["none"].decode(CODECS["none"].encode(torch.full((1, 4), float("nan"))), 1, 4).isnan().all()


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_codecs_are_exact_for_their_own_type(name: str, dtype: torch.dtype) -> None:
    rows = activations(3, 77, seed=4).to(dtype)
    assert torch.equal(CODECS[name].decode(CODECS[name].encode(rows), 3, 77).to(dtype), rows)


def test_fp16_saturates() -> None:
    rows = torch.tensor([[1e5, -1e30, 65504.0, 1.0]])
    for values in (rows, rows.bfloat16()):
        decoded = CODECS["fp16"].decode(CODECS["fp16"].encode(values), 1, 4)
        assert decoded.tolist() == [[65504.0, -65504.0, 65504.0, 1.0]]


@given(integer_names, st.integers(1, 4), hidden_sizes, seeds, st.floats(-20, 20))
def test_integer_errors_are_bounded_by_the_block(
    name: str, positions: int, hidden: int, seed: int, exponent: float
) -> None:
    rows = activations(positions, hidden, seed, scale=10.0**exponent)
    decoded = CODECS[name].decode(CODECS[name].encode(rows), positions, hidden)
    padding = -hidden % 64
    exact = torch.nn.functional.pad(rows.double(), (0, padding)).reshape(-1, 64)
    error = torch.nn.functional.pad((decoded.double() - rows), (0, padding)).reshape(-1, 64).norm(dim=1)
    # The bound: half a step per value, with steps up to 1/64 too wide (bfloat16 scales), plus the grid of the rotation.
    rotated = exact if name == "int8-block" else exact @ torch.from_numpy(rotation())
    levels = 127 if name == "int8-block" else 2 ** (INTEGER_BITS[name] - 1)
    step = rotated.abs().amax(1) / levels * (1 + 2**-6)
    grid = exact.abs().amax(1) * 2.0**-17
    assert (error <= 8 * (step / 2 + grid)).all()


@pytest.mark.parametrize("name", INTEGER_BITS)
def test_zeros_stay_zeros(name: str) -> None:
    rows = torch.zeros(2, 576)
    rows[0, 100] = 5.0
    decoded = CODECS[name].decode(CODECS[name].encode(rows), 2, 576)
    assert not decoded[1].any()
    assert not decoded[0, :64].any()
    assert not decoded[0, 128:].any()
    assert decoded[0, 100] == pytest.approx(5.0, rel=0.1)


def test_rotation_protects_the_neighbours_of_a_massive_value() -> None:
    rows = torch.randn(1, 64, generator=torch.Generator().manual_seed(5))
    rows[0, 7] = 20_000.0
    errors = {}
    for name in ("int8", "int8-block"):
        decoded = CODECS[name].decode(CODECS[name].encode(rows), 1, 64)
        errors[name] = (decoded - rows).norm().item()
    assert errors["int8"] < errors["int8-block"] / 2


def rotation() -> np.ndarray:
    """The matrix of docs/codecs.md, computed independently: Sylvester's construction, signs from x0 x1 + x2 x3 + x4
    x5."""
    matrix = np.ones((1, 1))
    while len(matrix) < 64:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    bits = np.arange(64)[:, None] >> np.arange(6) & 1
    signs = 1 - 2 * ((bits[:, 0] * bits[:, 1] + bits[:, 2] * bits[:, 3] + bits[:, 4] * bits[:, 5]) % 2)
    return signs[:, None] * matrix / 8


def test_rotation_is_orthonormal_and_spreads_equal_values_evenly() -> None:
    assert np.array_equal(rotation() @ rotation().T, np.eye(64))
    assert np.array_equal(np.abs(np.ones(64) @ rotation()), np.ones(64))


@given(seeds, st.sampled_from([64, 576]))
def test_int8_agrees_bit_for_bit_with_its_definition(seed: int, hidden: int) -> None:
    """Compares with an implementation of docs/codecs.md in float64, in which no sum rounds."""
    row = activations(1, hidden, seed)
    blocks = row.double().numpy().reshape(-1, 64)
    peak = np.abs(blocks).max(axis=1, keepdims=True)
    grid = 2.0 ** (np.floor(np.log2(peak)) - 17)
    rotated = np.rint(blocks / grid) * grid @ rotation()
    least = (np.abs(rotated).max(axis=1, keepdims=True) / 128).astype(np.float32)
    scale_bits = (least.view(np.uint32) >> 16) + 1
    scale = (scale_bits << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    codes = np.floor(rotated / scale)
    payload = scale_bits.astype("<u2").tobytes() + codes.astype(np.int8).tobytes()
    assert CODECS["int8"].encode(row) == payload

    expected = ((codes + 0.5) @ rotation().T) * scale
    decoded = CODECS["int8"].decode(payload, 1, hidden).numpy().reshape(-1, 64)
    assert np.array_equal(decoded, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("none", "32a213b04281da24"),
        ("fp16", "3c12c32fbd03549b"),
        ("bf16", "dbcdb0cde374112c"),
        ("int8", "8588f44300859802"),
        ("int8-block", "2c6a4ef8fa12fb7d"),
        ("int6", "d89c15dbd8ddb4a4"),
        ("int4", "df6a153f940af0a8"),
    ],
)
def test_bytes_on_the_wire_are_stable(name: str, digest: str) -> None:
    """A failure means that old and new peers cannot decode each other's payloads: give the new format a new number."""
    rows = (torch.arange(3 * 100).reshape(3, 100) * 37 % 101 - 50.0) / 16
    rows[:, 9] *= 1000
    assert hashlib.sha256(CODECS[name].encode(rows)).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("positions", [1, 200])
@pytest.mark.filterwarnings("error")
def test_not_finite_activations_are_refused(name: str, bad: float, positions: int) -> None:
    rows = activations(positions, 576, seed=6)
    rows[-1, 300] = bad
    with pytest.raises(CodecError, match="inf, NaN or values too large"):
        CODECS[name].encode(rows)


@pytest.mark.parametrize("name", INTEGER_BITS)
@pytest.mark.filterwarnings("error")
def test_extreme_magnitudes_are_refused_or_survive(name: str) -> None:
    with pytest.raises(CodecError):
        CODECS[name].encode(torch.full((1, 64), 3e38))
    for value in (1.2e30, 1e-29, 1e-40):
        rows = torch.full((1, 64), value)
        decoded = CODECS[name].decode(CODECS[name].encode(rows), 1, 64)
        assert decoded.isfinite().all()
        assert torch.allclose(decoded, rows, rtol=0.1, atol=1e-30)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    "rows", [torch.zeros(4), torch.zeros(1, 2, 4), torch.zeros(2, 0), torch.zeros(2, 4, dtype=torch.int32)]
)
def test_only_matrices_of_floats_are_encoded(name: str, rows: torch.Tensor) -> None:
    with pytest.raises(CodecError, match="must be floats"):
        CODECS[name].encode(rows)


@pytest.mark.parametrize("name", CODECS)
def test_views_and_gradients_are_encoded_alike_and_the_input_is_unchanged(name: str) -> None:
    codec, rows = CODECS[name], activations(5, 576, seed=7)
    before = rows.clone()
    payload = codec.encode(rows)
    assert codec.encode(rows.t().contiguous().t()) == payload
    assert codec.encode(rows.clone().requires_grad_()) == payload
    assert torch.equal(rows, before)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.filterwarnings("error")
def test_decoded_tensors_own_their_memory(name: str) -> None:
    codec = CODECS[name]
    payload = codec.encode(activations(2, 100, seed=8))
    first = codec.decode(payload, 2, 100)
    again = first.clone()
    first += 1
    assert torch.equal(codec.decode(payload, 2, 100), again)
    assert first.untyped_storage().nbytes() == 2 * 100 * 4


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    ("positions", "hidden"), [(3, 576), (1, 576), (2, 640), (2**62, 576), (-2, 576), (2, 0), (2, -1), (0, 2**62)]
)
def test_payloads_of_another_size_are_refused(name: str, positions: int, hidden: int) -> None:
    payload = CODECS[name].encode(activations(2, 576, seed=9))
    with pytest.raises(CodecError):
        CODECS[name].decode(payload, positions, hidden)


@given(names, st.integers(1, 3), st.integers(1, 130), st.data())
def test_no_payload_crashes_the_decoder(name: str, positions: int, hidden: int, data: st.DataObject) -> None:
    codec = CODECS[name]
    size = positions * codec.bytes_per_position(hidden)
    payload = data.draw(st.binary(min_size=size, max_size=size))
    try:
        decoded = codec.decode(memoryview(payload), positions, hidden)
    except CodecError:
        assert name in INTEGER_BITS
    else:
        assert decoded.shape == (positions, hidden)
        assert name not in INTEGER_BITS or decoded.isfinite().all()
