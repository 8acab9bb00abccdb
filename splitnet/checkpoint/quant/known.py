"""Which format a checkpoint's config says that its weights are quantized in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from splitnet.checkpoint.quant.bitsandbytes import Int8, Nf4
from splitnet.checkpoint.quant.compressed_tensors import CompressedTensors
from splitnet.checkpoint.quant.format import MALFORMED, QuantizedFormat
from splitnet.checkpoint.quant.gptq import Awq, Gptq, auto_round
from splitnet.checkpoint.quant.mlx import Mlx
from splitnet.checkpoint.quant.scaled_floats import FbgemmFP8, FineGrainedFP8, ModelOpt, Mxfp4
from splitnet.errors import UnsupportedModel

_KEYS = ("quantization_config", "compression_config", "quantization")
"""The last is MLX's."""
_FORMATS: Mapping[str, Callable[[Mapping[str, Any]], QuantizedFormat]] = {
    "auto-round": auto_round,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "compressed_tensors": CompressedTensors,
    "fbgemm_fp8": lambda settings: FbgemmFP8(),
    "fp8": FineGrainedFP8,
    "gptq": Gptq,
    "modelopt": ModelOpt,
    "mxfp4": lambda settings: Mxfp4(),
    "mxfp8": FineGrainedFP8,
}


def quantization_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How the weights of a checkpoint are quantized, as its config says it; None: they are plain numbers.

    Args:
        config: of the whole checkpoint, as in its file. Some multimodal ones say it of the text model in it.
    """
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    for place in (config, *nested):
        for key in _KEYS:
            if isinstance(place.get(key), Mapping) and place[key]:
                return place[key]
    return None


def quantized_format(settings: Mapping[str, Any], family: str) -> QuantizedFormat:
    """The format that settings describe.

    Args:
        family: of the text model.

    Raises:
        UnsupportedModel: it is not known, or an option of it is not.
    """
    method = str(settings.get("quant_method") or "").lower()
    if method == "bitsandbytes" or (not method and settings.get("load_in_4bit")):
        return Nf4() if settings.get("load_in_4bit") else Int8()
    if not method and {"bits", "group_size"} <= settings.keys():
        return Mlx(settings, family)
    if method in _FORMATS:
        try:
            return _FORMATS[method](settings)
        except MALFORMED as error:
            raise UnsupportedModel(
                f"the config does not say clearly how weights are quantized ({error!r}): download it again"
            ) from error
    by = repr(method) if method else "a method that the config does not name"
    raise UnsupportedModel(
        f"weights quantized by {by} are not known: take a checkpoint with plain weights, in GGUF, or quantized by one "
        f"of {', '.join(sorted(_FORMATS))}, bitsandbytes, MLX"
    )
