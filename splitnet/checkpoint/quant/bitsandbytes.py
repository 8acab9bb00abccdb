"""What bitsandbytes stores: NF4, and int8 with a scale for each output."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from splitnet.checkpoint.quant.format import (
    DESCRIPTION_BYTES,
    WEIGHT,
    Numbers,
    Part,
    QuantizedFormat,
    Suffix,
    misfit,
    number_in,
)
from splitnet.quant.stored import (
    TABLES,
    Codes,
    Kind,
    Layout,
    PackedTensor,
    StoredMatrix,
    signed_codes,
    spread,
    unpack_nibbles,
)


class Nf4(QuantizedFormat):
    """4 bits of the type `nf4`: codes of the whole weight, the first of two in the higher bits of a byte, in blocks.

    Source: transformers' `quantizer_bnb_4bit.py` for the names; bitsandbytes' `functional.py` (`QuantState.from_dict`,
    `dequantize_4bit`) for what they are. Maxima of blocks may be quantized themselves ("nested").
    """

    suffixes = (
        Suffix(".weight.absmax", ".weight", "maxima"),
        Suffix(".weight.quant_map", ".weight", "table"),
        Suffix(".weight.nested_absmax", ".weight", "nested maxima"),
        Suffix(".weight.nested_quant_map", ".weight", "nested table"),
        Suffix(".weight.quant_state.bitsandbytes__nf4", ".weight", "state"),
        Suffix(".weight.quant_state.bitsandbytes__fp4", ".weight", "state"),
    )
    needed = frozenset({WEIGHT, "maxima", "table", "state"})

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor | Numbers:
        """See `QuantizedFormat.tensor`."""
        weight, maxima = parts[WEIGHT], parts["maxima"]
        if parts["state"].nbytes > DESCRIPTION_BYTES:
            raise misfit(parts["state"], "is longer than a description of a weight")
        state = json.loads(bytes(parts["state"].read(...).tolist()))
        if state.get("quant_type") != "nf4":
            raise misfit(weight, f"is of the 4-bit type {state.get('quant_type')!r}, of which only 'nf4' is known")
        outputs, inputs = (number_in({"shape": size}, "shape") for size in state["shape"])
        block = number_in(state, "blocksize")
        count = outputs * inputs
        if 2 * weight.nbytes != count or maxima.shape != (-(-count // block),):
            raise misfit(weight, f"does not hold {outputs} x {inputs} codes of 4 bits in blocks of {block}")

        nested = {"nested maxima", "nested table"} & parts.keys()
        wide, offset = 0, 0.0
        if nested or maxima.dtype == torch.uint8:
            wide, offset = number_in(state, "nested_blocksize"), float(state["nested_offset"])
            many = -(-maxima.shape[0] // wide)
            shapes = [parts[role].shape for role in ("nested maxima", "nested table")]
            if maxima.dtype != torch.uint8 or shapes != [(many,), (256,)]:
                raise misfit(maxima, "does not fit what its own scales are made of ('nested')")

        def scales() -> torch.Tensor:
            stored = maxima.read(...)
            if not nested:
                return stored.float()
            values = parts["nested table"].read(...)[stored.long()]
            of_block = spread(parts["nested maxima"].read(...), wide, len(stored), dim=0)
            return values * of_block + offset

        def codes() -> torch.Tensor:
            table = parts["table"].read(...).float()
            if table.shape != (16,) or not torch.allclose(table, TABLES["nf4"], atol=1e-6):
                raise misfit(parts["table"], "is not the table of NF4")
            return unpack_nibbles(weight.read(...).flatten().view(torch.uint8), high_first=True)

        if inputs % block == 0:

            def read() -> Codes:
                return Codes(codes().view(outputs, inputs), scales().view(outputs, -1))

            return PackedTensor.of(
                StoredMatrix(Layout(4, block, Kind.FLOAT32, table="nf4"), (outputs, inputs), read), dtype
            )

        def numbers() -> torch.Tensor:
            of_each = spread(scales(), block, count, dim=0)
            return (TABLES["nf4"][codes().long()] * of_each).view(outputs, inputs)

        return Numbers((outputs, inputs), dtype, numbers, "its blocks go beyond an output")


class Int8(QuantizedFormat):
    """8 bits: int8 with the largest magnitude of each output (`SCB`), which 127 stands for.

    Source: transformers' `quantizer_bnb_8bit.py` for the names; bitsandbytes' `int8_vectorwise_dequant`.
    """

    suffixes = (Suffix(".SCB", ".weight", "maxima"), Suffix(".weight_format", ".weight", "order"))
    needed = frozenset({WEIGHT, "maxima"})

    def tensor(self, name: str, parts: Mapping[str, Part], dtype: torch.dtype) -> PackedTensor:
        """See `QuantizedFormat.tensor`."""
        weight, maxima = parts[WEIGHT], parts["maxima"]
        if weight.dtype != torch.int8 or len(weight.shape) != 2 or maxima.shape != weight.shape[:1]:
            raise misfit(weight, "is not int8 with a maximum for each output")
        outputs, inputs = weight.shape

        def read() -> Codes:
            if "order" in parts and int(parts["order"].read(...)):
                raise misfit(parts["order"], "says that rows are not one after the other")
            return Codes(signed_codes(weight.read(...), 8), maxima.read(...).float().view(outputs, 1) / 127)

        return PackedTensor.of(StoredMatrix(Layout(8, 0, Kind.FLOAT32, offset=128), (outputs, inputs), read), dtype)
