"""How far honest computations of a span differ, and how far lies do, as an audit measures it; prints Markdown.

    python -m benchmarks.tolerance [CHECKPOINT] [--texts 4] [--codecs none bf16 int8] [--families llama ...]
                                  [--parts honest families lies]

CHECKPOINT is the demo model unless it is given. Every third of its blocks is a span, with the hidden states of real
texts. An auditor judges each computation by each window of `MIN_POSITIONS` positions, at half of that apart. Honest
computations: every claim of weights, on each path of kernels, in one pass, in steps of one position or of drafts, in
passes with other texts. Random models of `--families` have their honest computations judged as well.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.codec_quality import VARIED_TEXT
from splitnet.audit.comparison import MIN_POSITIONS, Verdict, coarse_type, judge
from splitnet.blocks.adapters import AdapterTensors
from splitnet.blocks.backbone import load_whole
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.demo import demo_checkpoint
from splitnet.errors import SplitnetError
from splitnet.quant import native
from splitnet.wire.codecs import CODECS
from tests.unit.random_models import random_checkpoint

POSITIONS = 32
FEW = 16  # positions of a step of the auditor
CLAIMS = ("float32", "float16/float32", "bfloat16/float32", "bfloat16", "int8/float32", "int8/bfloat16")
CLAIMS += ("int4/float32", "int4/bfloat16")
WAYS = {"one pass": POSITIONS, "steps": 1, "drafts": 5, "texts in one pass": 0}
CHEAPER = {"bfloat16": ("int8", "int4"), "int8": ("bfloat16", "int4"), "int4": ("bfloat16",)}
LIED_TO = ("bfloat16/float32", "bfloat16", "int8/float32", "int4/float32", "int4/bfloat16")


def weights_and_type(claim: str) -> tuple[str, str]:
    weights, _, computes = claim.partition("/")
    return weights, computes or weights


@dataclass
class Case:
    """Blocks of a model, and their inputs: `[texts, positions, hidden]`."""

    checkpoint: Checkpoint
    start: int
    end: int
    inputs: Tensor
    routed: bool = False
    known: dict[Any, Tensor] = field(default_factory=dict)

    def span(self, claim: str, start: int | None = None, end: int | None = None) -> Span:
        weights, computes = weights_and_type(claim)
        return Span.load(self.checkpoint, start or self.start, end or self.end, weights=weights, dtype=computes)

    def run(
        self, span: Span, count: int, adapter: AdapterTensors | None = None, inputs: Tensor | None = None
    ) -> Tensor:
        """The outputs by passes of `count` positions of each text; 0: of all texts in one pass."""
        given = self.inputs if inputs is None else inputs
        texts, positions, hidden = given.shape
        if adapter is not None:
            span.fit_adapter(adapter)
        if not count:
            parts = [RowChunk(span.new_row(), 0, positions, adapter) for _ in range(texts)]
            return span.forward(given.reshape(-1, hidden), parts).float().view(given.shape)
        outputs: list[Tensor] = []
        for text in given:
            row = span.new_row()
            for each in text.split(count):
                outputs.append(span.forward(each, [RowChunk(row, row.length, len(each), adapter)]).float())
        return torch.cat(outputs).view(given.shape)

    def audited(self, weights: str, path: str, adapter: AdapterTensors | None = None) -> Tensor:
        """What an auditor expects of these weights, computed on `path`."""
        key = (weights, path, id(adapter), FEW)
        if key not in self.known:
            native.use_path(path)
            self.known[key] = self.run(self.span(f"{weights}/float32"), FEW, adapter)
        return self.known[key]

    def coarse(self, claim: str, path: str, adapter: AdapterTensors | None = None) -> Tensor | None:
        key, computes = (claim, path, id(adapter)), coarse_type(claim)
        if computes is not None and key not in self.known:
            native.use_path(path)
            span = self.span(f"{weights_and_type(claim)[0]}/{str(computes).removeprefix('torch.')}")
            if adapter is not None:
                span.fit_adapter(adapter)
            self.known[key] = torch.stack([span.sequences(each, [len(each)], adapter).float() for each in self.inputs])
        return self.known.get(key)

    def verdicts(
        self,
        claim: str,
        path: str,
        outputs: Tensor,
        codecs: list[str],
        adapter: AdapterTensors | None = None,
        since: int = 0,
    ) -> Iterator[Verdict]:
        weights = weights_and_type(claim)[0]
        expected, coarse = self.audited(weights, path, adapter), self.coarse(claim, path, adapter)
        others = {name: self.audited(name, path, adapter) for name in CHEAPER.get(weights, ("int8", "int4"))}
        for text in range(len(outputs)):
            for codec in (each for each in CODECS.values() if each.name in codecs):
                sent = codec.decode(codec.encode(outputs[text]), *outputs[text].shape)
                for begin in range(since, POSITIONS - MIN_POSITIONS + 1, MIN_POSITIONS // 2):
                    place = slice(begin, begin + MIN_POSITIONS)
                    alternatives = {name: other[text, place] for name, other in others.items()}
                    rounded = None if coarse is None else coarse[text, place]
                    inputs = self.inputs[text, place]
                    yield judge(
                        inputs, sent[place], expected[text, place], rounded, alternatives, codec, routed=self.routed
                    )


def cases(checkpoint: Checkpoint, ids: Tensor, cuts: list[int], blocks: int) -> list[Case]:
    """`ids`: `[texts, positions]`."""
    model: Any = load_whole(checkpoint, torch.float32)
    kept: dict[int, list[Tensor]] = defaultdict(list)
    with torch.no_grad():
        for cut in cuts:

            def keep(_: Any, args: Any, named: Any, cut: int = cut) -> None:
                kept[cut].append((args[0] if args else named["hidden_states"])[0].float().clone())

            model.get_decoder().layers[cut].register_forward_pre_hook(keep, with_kwargs=True)
        for text in ids:
            model(text[None], use_cache=False)
    return [Case(checkpoint, cut, cut + blocks, torch.stack(kept[cut])) for cut in cuts]


def low_rank(case: Case, seed: int, rank: int = 8, share: float = 0.03) -> AdapterTensors:
    """A random adapter of the layers of attention, of 3 % of the norm of their weights."""
    torch.manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for index, block in enumerate(case.span("float32").block_modules.children(), case.start):
        for name, layer in block.named_modules():
            if isinstance(layer, torch.nn.Linear) and name.endswith(("q_proj", "v_proj", "o_proj", "down_proj")):
                outputs, inputs = layer.weight.shape
                tensors[f"{index}.{name}.lora_A"] = torch.randn(rank, inputs)
                tensors[f"{index}.{name}.lora_B"] = torch.randn(outputs, rank) * layer.weight.std() * share / rank**0.5
    return AdapterTensors(tensors)


def moved(checkpoint: Checkpoint, folder: Path, share: float) -> Checkpoint:
    """The model, each weight moved at random by a share of its matrix's standard deviation."""
    torch.manual_seed(1)
    model: Any = load_whole(checkpoint, torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight += share * weight.std() * torch.randn_like(weight) if weight.ndim == 2 else 0
    model.to(torch.bfloat16).save_pretrained(folder)
    return Checkpoint.open(folder)


def lies(
    case: Case, claim: str, others: Mapping[str, Checkpoint]
) -> Iterator[tuple[str, Tensor, AdapterTensors | None]]:
    """Name, outputs, and the adapter that the client has asked for."""
    weights, computes = weights_and_type(claim)
    for name in CHEAPER[weights]:
        yield f"{name} weights", case.run(case.span(f"{name}/{computes}"), POSITIONS), None
    honest_span = case.span(claim)
    honest, middle = case.run(honest_span, POSITIONS), (case.start + case.end) // 2
    before = case.run(case.span(claim, end=middle), POSITIONS)
    yield "dropped block", case.run(case.span(claim, middle + 1), POSITIONS, inputs=before), None
    for name, other in others.items():
        yield f"weights moved by {name}", case.run(replace(case, checkpoint=other).span(claim), POSITIONS), None
    first, second = low_rank(case, 1), low_rank(case, 2)
    yield "merged LoRA", case.run(honest_span, POSITIONS, first), None
    yield "another adapter", case.run(honest_span, POSITIONS, second), first
    torch.manual_seed(2)
    noise = torch.randn_like(honest) / honest.shape[-1] ** 0.5
    yield "noise of 5 %", honest + 0.05 * noise * honest.norm(dim=-1, keepdim=True), None
    yield "steering of 5 %", honest + 0.05 * noise[0, 0] * honest.norm(dim=-1).median(), None
    mixed = torch.cat((case.inputs.roll(1, 0)[:, :-MIN_POSITIONS], case.inputs[:, -MIN_POSITIONS:]), 1)
    yield "keys of another text", case.run(honest_span, POSITIONS, inputs=mixed), None
    yield "scaled by 1.05", 1.05 * honest, None
    swapped = honest.clone()
    swapped[:, [-1, -3]] = honest[:, [-3, -1]]
    yield "two positions swapped", swapped, None


def largest(verdicts: list[Verdict]) -> str:
    shares = [abs(share) for verdict in verdicts for share in verdict.shares.values()]
    named = sum(not verdict.honest for verdict in verdicts)
    figures = (max(each.distance for each in verdicts), max(each.worst for each in verdicts), max(shares, default=0))
    return f"{len(verdicts):,} | {named} | " + " | ".join(f"{each:.2f}" for each in figures)


def honest_table(found: Mapping[Any, list[Verdict]], first: str) -> None:
    print(f"\n| {first} | comparisons | alarms | distance | worst position | share |\n|---|---|---|---|---|---|")
    for name, verdicts in found.items():
        print(f"| {name} | {largest(verdicts)} |", flush=True)


def judge_honest(
    all_cases: list[Case], codecs: list[str], paths: list[str], found: dict[str, dict[str, list[Verdict]]]
) -> None:
    for case in all_cases:
        for claim in CLAIMS:
            for path in paths:
                native.use_path(path)
                with suppress(SplitnetError):  # a family that cannot hold weights so
                    span = case.span(claim)
                    for way, count in WAYS.items():
                        outputs = case.run(span, count)
                        for auditor in (paths[0], "plain"):
                            verdicts = list(case.verdicts(claim, auditor, outputs, codecs))
                            found["claim"][claim] += verdicts
                            found["auditor, peer"][f"{auditor}, {path}"] += verdicts
                            found["computed by"][way] += verdicts
                    native.use_path(path)
        case.known.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--codecs", nargs="+", default=["none", "bf16", "int8"])
    parser.add_argument("--families", nargs="*", default=["llama", "qwen3", "gemma2", "mixtral"])
    parser.add_argument("--parts", nargs="+", default=["honest", "families", "lies"])
    parser.add_argument("--paths", nargs="+", default=[*native.paths_here()])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        checkpoint = Checkpoint.open(arguments.checkpoint or demo_checkpoint())
        ids = checkpoint.tokenizer()(VARIED_TEXT.read_text(), return_tensors="pt").input_ids[0]
        texts = ids[: len(ids) // POSITIONS * POSITIONS].view(-1, POSITIONS)[: arguments.texts]
        third = checkpoint.num_blocks // 3
        real = cases(checkpoint, texts, [0, third, 2 * third], third)
        found: dict[str, dict[str, list[Verdict]]] = defaultdict(lambda: defaultdict(list))
        if "honest" in arguments.parts:
            judge_honest(real, arguments.codecs, arguments.paths, found)
            for first, rows in found.items():
                honest_table(rows, first)
        by_family: dict[str, list[Verdict]] = {}
        for family in arguments.families if "families" in arguments.parts else ():
            found.clear()
            small = Checkpoint.open(random_checkpoint(family, Path(folder, family), hidden=128))
            [case] = cases(small, torch.randint(300, (8, POSITIONS)), [2], 3)
            case.routed = any(hasattr(module, "top_k") for module in case.span("float32").block_modules.modules())
            judge_honest([case], arguments.codecs, arguments.paths, found)
            by_family[family] = [each for verdicts in found["claim"].values() for each in verdicts]
        honest_table(by_family, "random model")
        if "lies" not in arguments.parts:
            return
        print("\n| lie | " + " | ".join(LIED_TO) + " |\n|---" + "|---" * len(LIED_TO) + "|")
        lied: dict[str, dict[str, list[Verdict]]] = defaultdict(lambda: defaultdict(list))
        others = {f"{each} %": moved(checkpoint, Path(folder, f"moved{each}"), each / 100) for each in (1, 3)}
        native.use_path(arguments.paths[0])
        for case in real:
            for claim in LIED_TO:
                for name, outputs, adapter in lies(case, claim, others):
                    last = POSITIONS - MIN_POSITIONS
                    lied[name][claim] += case.verdicts(
                        claim, arguments.paths[0], outputs, arguments.codecs, adapter, last
                    )
                case.known.clear()
        for name, rows in lied.items():
            print(f"| {name} | " + " | ".join(_caught(rows[claim]) for claim in LIED_TO) + " |", flush=True)


def _caught(verdicts: list[Verdict]) -> str:
    """Named of all, and the least margin."""
    named = sum(not verdict.honest for verdict in verdicts)
    return f"{named} of {len(verdicts)}, {min(v.margin for v in verdicts):.1f}" if verdicts else ""


if __name__ == "__main__":
    main()
