"""The tables of docs/models.md, generated from the tests' data: `python -m tests.models_page docs/models.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill

from gguf import GGML_QUANT_SIZES

from splitnet.checkpoint.families import FAMILIES as FACTS
from splitnet.checkpoint.families import Family
from splitnet.checkpoint.gguf.file import BLOCK_TYPES
from splitnet.quant.grouped import held_bytes
from splitnet.quant.packed_tensor import CodeLayout, ScaleFormat
from tests.image_models import IMAGE_MODELS
from tests.swarm.test_catalogue import CATALOGUE, NOT_CUT
from tests.swarm.test_families import FAMILIES

BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"
SIDE = 4096
"""The number of outputs and of inputs of the weight whose bits per weight the page shows."""

IN_SAFETENSORS = {
    "FP8, 128 x 128 weights to a scale (DeepSeek, Qwen, MiniMax)": CodeLayout(
        8, 128, ScaleFormat.FLOAT32, table="e4m3"
    ),
    "FP8, an output or a tensor to a scale (compressed-tensors, fbgemm, ModelOpt)": CodeLayout(
        8, 0, ScaleFormat.FLOAT32, table="e4m3"
    ),
    "MXFP4 (gpt-oss)": CodeLayout(4, 32, ScaleFormat.E8M0, table="e2m1"),
    "AWQ, GPTQ, AutoRound: 4 bits, groups of 128": CodeLayout(4, 128, ScaleFormat.FLOAT16, ScaleFormat.CODES),
    "compressed-tensors: 4 bits, groups of 32 (Kimi K2 Thinking)": CodeLayout(4, 32, ScaleFormat.BFLOAT16, offset=8),
    "compressed-tensors: 8 bits, an output to a scale": CodeLayout(8, 0, ScaleFormat.BFLOAT16, offset=128),
    "bitsandbytes NF4, groups of 64": CodeLayout(4, 64, ScaleFormat.FLOAT32, table="nf4"),
    "MLX: 4 bits, groups of 64": CodeLayout(4, 64, ScaleFormat.BFLOAT16, ScaleFormat.BFLOAT16),
    "MLX: 8 bits, groups of 64": CodeLayout(8, 64, ScaleFormat.BFLOAT16, ScaleFormat.BFLOAT16),
}
"""Published formats of weights in safetensors files, with the most common layout of each."""


def with_tables(text: str) -> str:
    """A document with the current tables between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = [part if part.startswith(("|", "#")) else fill(part, 125) for part in sections()]
    return f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}"


def sections() -> Iterator[str]:
    """All tables, with their headings."""
    yield "## Models that people split over devices"
    yield (
        "The models of exo's cards (commit b5375f8). *Result*: `tests/swarm/test_catalogue.py` runs a small random "
        "checkpoint with the same family, names and layout of tensors over three unequal spans. *Equal*: the tokens "
        "equal those of plain transformers with the numbers that the codes stand for."
    )
    yield table(("models", "family", "published as", "result", "test"), _catalogue())
    yield "## Families"
    yield (
        "Each of these families generates the same tokens as plain transformers: alone, in a padded batch, with beams "
        "and with drafts (`tests/swarm/test_families.py`). *Together*: sequences share a pass. *States*: blocks keep "
        "more than keys and values ([how](decisions/0018-states.md)). *Short steps*: a decode step is one call of "
        "compiled code, or a few operations of torch where the code was not compiled for the CPU. splitnet tries other "
        "decoder-only families, and refuses them if their blocks cannot run separately."
    )
    yield table(("family", "together", "states", "short steps"), _families())
    yield (
        "Compiled steps are compared with the family's own code when blocks are loaded, and in "
        "`tests/unit/blocks/test_describe.py` for each of these families; experts must be held in codes. Compiled "
        "steps are for CPUs with AVX512 and VNNI ([how](decisions/0012-lean-steps.md))."
    )
    yield ", ".join(f"`{name}`" for name in sorted(FACTS) if FACTS[name].native_step) + "."
    yield (
        "splitnet runs the text model of a multimodal checkpoint if the text model belongs to a family above. Some "
        "text models exist in transformers only as a part of a multimodal model, and run as another family: "
        f"{', '.join(f'`{text}` as `{_family_of(text)}`' for text, family in FACTS.items() if family.text_as)}."
    )
    yield "These families are refused, as their blocks cannot be separated:"
    yield table(
        ("family", "why"),
        [(f"`{name}`", why) for name, why in sorted((name, one.refused) for name, one in FACTS.items()) if why],
    )
    yield "## Models that read images"
    yield (
        "These families give the same logits and tokens as whole models in transformers, with none, one and several "
        "images (`tests/swarm/test_images.py`; [how to use them](images.md)): "
        f"{', '.join(f'`{name}`' for name in sorted(IMAGE_MODELS))}. Others are tried, and refused if they hand their "
        "blocks anything that peers do not read."
    )
    yield "## Formats"
    yield f"Bits per weight in the files and in memory, for a matrix of {SIDE} x {SIDE} weights."
    yield table(("in safetensors", "in the file", "held"), _layouts())
    yield (
        "Checkpoints of MLX may have 2 to 8 bits or one of the modes `mxfp4`, `mxfp8` and `nvfp4`, also mixed between "
        "layers. Their family must be one in which mlx-lm changes at most the names of experts: "
        f"{', '.join(f'`{name}`' for name in sorted(FACTS) if FACTS[name].mlx)}. "
        "Checkpoints of AWQ must have the packing `gemm` "
        "(or `exllama`, which is the same in files), those of AutoRound `auto_round:auto_gptq` or "
        "`auto_round:auto_awq`. The error for other formats, such as Quark, HQQ and AQLM, names the format."
    )
    yield table(("in GGUF", "in the file", "held"), _gguf_types())


def _family_of(text: str) -> str:
    return {"qwen3_vl_moe_text": "qwen3_moe"}.get(text) or FACTS[text].text_as


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _catalogue() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for entry, (models, published) in CATALOGUE.items():
        store = published.store.__name__.replace("_", " ") if published.store else "bfloat16"
        family = published.stored_as or published.family
        rows.append((", ".join(models), f"`{family}`", store, "equal", f"`{entry}`"))
    rows += [(", ".join(models), f"`{family}`", "", f"refused: {why}", "") for models, family, why in NOT_CUT]
    return rows


def _families() -> list[tuple[str, ...]]:
    def mark(known: bool) -> str:
        return "yes" if known else ""

    def short(family: Family) -> str:
        return "compiled, of torch" if family.torch_step else "compiled" if family.native_step else ""

    known = [(name, FACTS.get(name, Family())) for name in sorted(FAMILIES)]
    return [(f"`{name}`", mark(family.packs), mark(family.states), short(family)) for name, family in known]


def _layouts() -> list[tuple[str, ...]]:
    return [(name, _bits(layout.nbytes(SIDE, SIDE)), _held(layout)) for name, layout in IN_SAFETENSORS.items()]


def _gguf_types() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for kind, block in BLOCK_TYPES.items():
        weights, size = GGML_QUANT_SIZES[kind]
        rows.append((kind.name, f"{8 * size / weights:.4g}", _held(block.layout)))
    return rows


def _held(layout: CodeLayout) -> str:
    return _bits(held_bytes(layout, SIDE, SIDE))


def _bits(nbytes: int) -> str:
    return f"{8 * nbytes / SIDE**2:.4g}"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
