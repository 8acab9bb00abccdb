"""Small checkpoints in published quantized formats, each with a float32 checkpoint of the same numbers.

The numbers of a weight come from the library that defines the format if this library runs on this machine, otherwise
from the integers that the writer packed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Writer = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]
"""Converts the name and value of a weight to its tensors in the files, and the float32 numbers that these represent."""


@dataclass(frozen=True)
class Scheme:
    """A format with its options.

    Attributes:
        settings: the `quantization_config`.
        only: a text that occurs in the names of all quantized weights.
    """

    settings: Mapping[str, Any]
    write: Writer
    only: str = ".layers."


def quantized_pair(source: Path, folder: Path, name: str) -> tuple[Path, Path]:
    """Writes a checkpoint quantized by the scheme of this name, and a plain float32 checkpoint of the same numbers."""
    scheme = SCHEMES[name]
    tensors = tensors_of(source)
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        if scheme.only in key and value.ndim >= 2 and "router" not in key and "norm" not in key and "bias" not in key:
            parts, plain[key] = scheme.write(key, value.float())
            stored |= parts
        else:
            stored[key] = plain[key] = value
    config = json.loads((source / "config.json").read_text())
    quantized = write_checkpoint(
        folder / "quantized", source, stored, config | {"quantization_config": scheme.settings}
    )
    return quantized, write_checkpoint(folder / "plain", source, plain, config)


def write_checkpoint(
    folder: Path, source: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> Path:
    """A folder with these tensors in one file, this config, and all other files of `source`."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith("index.json"):
            shutil.copy(file, folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _fp8(high: int, wide: int, *, scales: torch.dtype = torch.float32, suffix: str = "_scale_inv") -> Writer:
    """Float8 with a scale per block of `high` x `wide` weights; 0: the height or width of the whole matrix."""

    def write(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        outputs, inputs = weight.shape[-2:]
        tall, broad = high or outputs, wide or inputs
        blocks = weight.unflatten(-1, (-1, broad)).unflatten(-3, (-1, tall))
        scale = blocks.abs().amax((-3, -1)) / FP8_MAX
        if scales == torch.uint8:
            exponents = scale.log2().ceil()
            stored, scale = (exponents + 127).to(torch.uint8), exponents.exp2()
        else:
            stored = scale.to(scales)
            scale = stored.float()
        codes = (blocks / scale[..., :, None, :, None]).to(FP8).view(weight.shape)
        plain = Fp8Dequantize(None)._dequantize_one(codes, stored, torch.float32)
        if not high and not wide:
            stored = stored.reshape(weight.shape[:-2])
        tensors = {name: codes, name + suffix: stored}
        if not high and not wide:
            tensors[name.replace("weight", "activation_scale")] = torch.tensor(0.5)
        return tensors, plain

    return write


def _fbgemm(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = weight.abs().amax(-1, keepdim=True) / FP8_MAX
    codes = (weight / scale).to(FP8)
    return {name: codes, name + "_scale": scale}, codes.float() * scale


def _mxfp4(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    experts, inputs, outputs = weight.shape
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
    plain = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {name + "_blocks": blocks, name + "_scales": scales}, plain


def _compressed(format: str, scales: torch.dtype = torch.float32, **options: Any) -> Scheme:
    arguments = QuantizationArgs(**options)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor: Any = BaseCompressor.get_value_from_registry(format)

    def write(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        outputs, inputs = weight.shape
        tall, broad = {
            "tensor": (outputs, inputs),
            "channel": (1, inputs),
            "group": (1, arguments.group_size or 0),
            "tensor_group": (1, arguments.group_size or 0),
            "block": tuple(arguments.block_structure or (0, 0)),
        }[str(arguments.strategy)]
        blocks = weight.unflatten(1, (-1, broad)).unflatten(0, (-1, tall))
        integers = arguments.type == "int"
        most = 2 ** (arguments.num_bits - 1) - 1 if integers else {4: 6.0, 8: FP8_MAX}[arguments.num_bits]
        scale = blocks.abs().amax((1, 3)) / most
        given = {"weight": weight, "weight_scale": scale.to(scales)}
        if arguments.strategy == "tensor":
            given["weight_scale"] = given["weight_scale"].reshape(1)
        if not arguments.symmetric:
            given["weight_zero_point"] = torch.randint(-3, 4, scale.shape, dtype=torch.int8)
        if format == "nvfp4-pack-quantized":
            given["weight_global_scale"] = torch.tensor([FP8_MAX / float(scale.max())])
            given["weight_scale"] = (scale * given["weight_global_scale"]).to(FP8).float()
        elif format.startswith("mxfp"):
            exponents = scale.log2().ceil()
            given["weight_scale"] = exponents.exp2()
        packed = compressor.compress(given, scheme)
        plain = compressor.decompress(dict(packed), scheme)["weight"].float()
        parts = {name.replace("weight", key): tensor for key, tensor in packed.items()}
        return parts | {name.replace("weight", "input_scale"): torch.tensor(1.0)}, plain

    group = {"targets": ["Linear"], "weights": json.loads(arguments.model_dump_json())}
    settings = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}
    return Scheme(settings | {"ignore": ["lm_head"], "quantization_status": "compressed"}, write)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes `[rows, columns]` into int32 words `[rows, words]`: a row is one long number, its first code in the
    lowest bits."""
    rows: list[list[int]] = []
    for row in codes.tolist():
        number = sum(code << (bits * at) for at, code in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([(number >> (32 * at)) & 0xFFFFFFFF for at in range(words)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def _gptq(bits: int, *, symmetric: bool = False, permuted: bool = False, less: int = 1, group: int = 32) -> Writer:
    def write(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        outputs, inputs = weight.shape
        groups = inputs // group
        codes = torch.randint(0, 2**bits, (inputs, outputs))
        zeros = torch.randint(0, 2**bits, (groups, outputs))
        if symmetric:
            zeros = torch.full_like(zeros, 2 ** (bits - 1))
        scales = torch.rand(groups, outputs).half() / 2**bits
        index = torch.arange(inputs) // group
        if permuted:
            index = index[torch.randperm(inputs)]
        stem = name.removesuffix("weight")
        stored = {
            stem + "qweight": pack_words(codes.T, bits).T,
            stem + "qzeros": pack_words((zeros - less) % 2**bits, bits),
            stem + "scales": scales,
            stem + "g_idx": index.int(),
        }
        return stored, ((codes - zeros[index]) * scales.float()[index]).T

    return write


def _awq(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    outputs, inputs = weight.shape
    codes = torch.randint(0, 16, (inputs, outputs))
    zeros = torch.randint(0, 16, (inputs // 32, outputs))
    scales = torch.rand(inputs // 32, outputs).half() / 16

    def pack(values: torch.Tensor) -> torch.Tensor:
        return pack_words(values.view(len(values), -1, 8)[:, :, list(AWQ_ORDER)].flatten(1), 4)

    stem = name.removesuffix("weight")
    stored = {stem + "qweight": pack(codes), stem + "qzeros": pack(zeros), stem + "scales": scales}
    spread = torch.arange(inputs) // 32
    return stored, ((codes - zeros[spread]) * scales.float()[spread]).T


def mlx(bits: int, group: int, mode: str = "affine") -> Writer:
    """MLX: codes in words of uint32. Except in mode "affine", codes are numbers in a float format, and scales are
    bytes."""

    def write(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        codes = torch.randint(0, 2**bits, weight.shape)
        groups = (*weight.shape[:-1], weight.shape[-1] // group)
        stem = name.removesuffix("weight")
        words = torch.stack([pack_words(one, bits) for one in codes.view(-1, *weight.shape[-2:])])
        stored = {name: words.view(*weight.shape[:-1], -1).view(torch.uint32)}
        if mode == "affine":
            scales, biases = (torch.rand(groups).bfloat16() / 2**bits, torch.randn(groups).bfloat16() / 8)
            stored |= {stem + "scales": scales, stem + "biases": biases}
            spread = [one.float().repeat_interleave(group, -1) for one in (scales, biases)]
            return stored, codes * spread[0] + spread[1]
        values = E2M1 if bits == 4 else torch.arange(256, dtype=torch.uint8).view(FP8).float().nan_to_num(0)
        if bits == 8:
            codes = torch.where(codes & 127 == 127, 0, codes)  # NaN
            words = torch.stack([pack_words(one, bits) for one in codes.view(-1, *weight.shape[-2:])])
            stored = {name: words.view(*weight.shape[:-1], -1).view(torch.uint32)}
        if mode == "nvfp4":
            scales = (torch.rand(groups) / 16).to(FP8)
            stored[stem + "scales"] = scales.view(torch.uint8)
            numbers = scales.float()
        else:
            exponents = torch.randint(115, 119, groups)
            stored[stem + "scales"] = exponents.to(torch.uint8)
            numbers = torch.exp2(exponents.float() - 127)
        return stored, values[codes] * numbers.repeat_interleave(group, -1)

    return write


def mlx_settings(bits: int, group: int, mode: str = "affine") -> dict[str, Any]:
    """The settings of MLX in a config."""
    return {"group_size": group, "bits": bits, "mode": mode}


def _mlx(*format: Any) -> Scheme:
    return Scheme(mlx_settings(*format), mlx(*format))


def _nf4(*, nested: bool = False) -> Writer:
    # Dettmers et al., "QLoRA", appendix E.
    table = torch.tensor(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
            *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
            *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
            *(0.7229568362236023, 1.0),
        ]
    )

    def write(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        codes = torch.randint(0, 16, (weight.numel(),), dtype=torch.uint8)
        blocks = weight.numel() // 64
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        maxima = torch.rand(blocks) / 8
        stored: dict[str, torch.Tensor] = {name + ".absmax": maxima}
        if nested:
            steps = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
            nested_table, nested_maxima = torch.linspace(-1, 1, 256), torch.rand(-(-blocks // 256)) / 16
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.07}
            maxima = nested_table[steps.long()] * nested_maxima[torch.arange(blocks) // 256] + 0.07
            stored = {
                name + ".absmax": steps,
                name + ".nested_absmax": nested_maxima,
                name + ".nested_quant_map": nested_table.clone(),
            }
        described = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        stored |= {
            name: ((codes[0::2] << 4) | codes[1::2]).unsqueeze(1),
            name + ".quant_map": table.clone(),
            name + ".quant_state.bitsandbytes__nf4": described,
        }
        return stored, (table[codes.long()] * maxima.repeat_interleave(64)).view(weight.shape)

    return write


def _int8(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    maxima = weight.abs().amax(1)
    codes = (weight / maxima[:, None] * 127).round().to(torch.int8)
    stem = name.removesuffix("weight")
    stored = {name: codes, stem + "SCB": maxima, stem + "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, codes.float() * (maxima[:, None] / 127)


def _modelopt_nvfp4(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    outputs, inputs = weight.shape
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    scales = (torch.rand(outputs, inputs // 16) * 10).to(FP8)
    stem = name.removesuffix("weight")
    stored = {
        name: codes[:, 0::2] | (codes[:, 1::2] << 4),
        stem + "weight_scale": scales,
        stem + "weight_scale_2": torch.tensor(0.01),
        stem + "input_scale": torch.tensor(1.0),
    }
    return stored, E2M1[codes.long()] * (scales.float() * 0.01).repeat_interleave(16, 1)


_AUTO_ROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "autoround_version": "0.5",
    "packing_format": "auto_round:auto_gptq",
}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
SCHEMES: dict[str, Scheme] = {
    "fp8": Scheme({"quant_method": "fp8", "weight_block_size": [32, 64]}, _fp8(32, 64)),
    "fp8-bfloat16": Scheme({"quant_method": "fp8", "weight_block_size": [32, 64]}, _fp8(32, 64, scales=torch.bfloat16)),
    "fp8-tensor": Scheme({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, _fp8(0, 0)),
    "fp8-weight_scale": Scheme({"quant_method": "fp8"}, _fp8(0, 0, suffix="_scale")),
    "mxfp8": Scheme(
        {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, _fp8(1, 32, scales=torch.uint8)
    ),
    "fbgemm_fp8": Scheme({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, _fbgemm),
    "mxfp4": Scheme({"quant_method": "mxfp4"}, _mxfp4, only="experts."),
    "int4-group": _compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
    "int4-zeros": _compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
    "int4-channel": _compressed("pack-quantized", num_bits=4, strategy="channel"),
    "int8-channel-bfloat16": _compressed("pack-quantized", torch.bfloat16, num_bits=8, strategy="channel"),
    "int3-group": _compressed("pack-quantized", num_bits=3, strategy="group", group_size=64),
    "int-quantized": _compressed("int-quantized", num_bits=8, strategy="channel"),
    "int-quantized-zeros": _compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False),
    "float-quantized": _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "float-quantized-tensor": _compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "float-quantized-block": _compressed(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 64]
    ),
    "naive-quantized": _compressed("naive-quantized", num_bits=8, type="float", strategy="channel"),
    "nvfp4": _compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    "mxfp4-compressed": _compressed(
        "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    ),
    "mxfp8-compressed": _compressed(
        "mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    ),
    "gptq": Scheme(_GPTQ, _gptq(4)),
    "gptq-symmetric": Scheme(_GPTQ | {"sym": True}, _gptq(4, symmetric=True)),
    "gptq-v2": Scheme(_GPTQ | {"checkpoint_format": "gptq_v2"}, _gptq(4, less=0)),
    "gptq-3-bits": Scheme(_GPTQ | {"bits": 3}, _gptq(3)),
    "gptq-8-bits": Scheme(_GPTQ | {"bits": 8, "sym": True}, _gptq(8, symmetric=True)),
    "gptq-desc_act": Scheme(_GPTQ | {"desc_act": True, "sym": True}, _gptq(4, symmetric=True, permuted=True)),
    "awq": Scheme({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, _awq),
    "awq-exllama": Scheme({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "exllama"}, _awq),
    "auto-round": Scheme(_AUTO_ROUND, _gptq(4, symmetric=True)),
    "auto-round-awq": Scheme(_AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, _awq),
    "auto-round-mixed": Scheme(
        _AUTO_ROUND | {"extra_config": {"model.layers.0.self_attn.q_proj": {"sym": False}}}, _gptq(4)
    ),
    "mlx-2": _mlx(2, 32),
    "mlx-3": _mlx(3, 64),
    "mlx-4": _mlx(4, 64),
    "mlx-5": _mlx(5, 32),
    "mlx-6": _mlx(6, 64),
    "mlx-8": _mlx(8, 64),
    "mlx-mxfp4": _mlx(4, 32, "mxfp4"),
    "mlx-nvfp4": _mlx(4, 16, "nvfp4"),
    "mlx-mxfp8": _mlx(8, 32, "mxfp8"),
    "nf4": Scheme({"quant_method": "bitsandbytes", "load_in_4bit": True}, _nf4()),
    "nf4-nested": Scheme({"quant_method": "bitsandbytes", "load_in_4bit": True}, _nf4(nested=True)),
    "int8-bitsandbytes": Scheme({"quant_method": "bitsandbytes", "load_in_8bit": True}, _int8),
    "modelopt-nvfp4": Scheme({"quant_method": "modelopt", "quant_algo": "NVFP4"}, _modelopt_nvfp4),
}
"""The schemes by name."""
