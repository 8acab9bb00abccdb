"""How many tokens of a text can be recovered from the activations between two blocks; prints Markdown.

    python -m benchmarks.privacy CHECKPOINT [--text FILE] [--tokens 512] [--searched 64] [--cuts 0 2 28] [--codec int8]

The attacker sees the activations before a block (the cut), like the peer that serves the block, and has the checkpoint,
like every peer. Four attacks:

- nearest embedding: the token whose input embedding is nearest to the activation, by angle and by distance;
- linear probe: a ridge regression from activations to embeddings, fitted on other texts; then the token whose embedding
  is nearest to the regression's output, by angle;
- search: position by position, the attacker computes the first blocks for candidates after the recovered text, and
  takes the candidate with the nearest activation. The attacker tries candidates in the order in which the model and
  the probe rank them, and stops at a candidate that is nearer than `NEAR`. The attacker knows the first token: every
  chat begins with the same token. Without this knowledge the first token would be hard to recover: it is an attention
  sink, and a few channels in which tokens hardly differ dominate its activation;
- logit lens: the attacker applies the final norm and the head to the activation, to predict the next token.

With a codec, the activations are encoded and decoded before the first block and at the cut; the attacker does not
account for the codec.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from splitnet.wire.codecs import CODECS, Codec

TEXT = Path(__file__).parent / "data" / "varied_text.txt"
CUTS = [0, 1, 2, 3, 5, 10, 20, 28, 29, 30]
NEAR = 0.05
"""Distance, relative to the activation, below which the search takes a candidate without trying the others."""
CHUNKS = (32, 96, 384, 1536)
"""The number of candidates in each batch that is tried; the last size repeats."""
PROBE_SEQUENCES, PROBE_LENGTH = 24, 512
"""Training data of the probe: this many sequences of other text, and half as many of random tokens."""


class FirstBlocks:
    """The embeddings and the blocks before a cut."""

    def __init__(self, checkpoint: str, cut: int) -> None:
        # Transformers rejects a model without blocks: for cut 0 the model has one block, which is not used.
        self._decoder: Any = AutoModel.from_pretrained(checkpoint, num_hidden_layers=max(cut, 1), dtype=torch.float32)
        self._decoder.eval().norm = torch.nn.Identity()
        self._cut = cut

    def candidates(self, tokens: torch.Tensor, position: int, cache: DynamicCache) -> torch.Tensor:
        """The activation of each of `tokens` at `position`, after the positions in the cache: `[tokens, hidden]`."""
        if not self._cut:
            return self._decoder.get_input_embeddings()(tokens)
        count = len(tokens)
        # All candidates are in one row: each attends to the earlier positions and itself, but not to other candidates.
        sees = torch.cat([torch.ones(count, position, dtype=torch.bool), torch.eye(count, dtype=torch.bool)], dim=1)
        output = self._decoder(
            input_ids=tokens[None],
            attention_mask=torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None],
            position_ids=torch.full((1, count), position),
            cache=cache,
            use_cache=True,
        )
        cache.crop(-count)
        return output.last_hidden_state[0]

    def extend(self, token: int, position: int, cache: DynamicCache) -> None:
        """Adds a token to the cache."""
        if self._cut:
            self._decoder(
                input_ids=torch.tensor([[token]]),
                position_ids=torch.tensor([[position]]),
                cache=cache,
                use_cache=True,
            )


@dataclass(frozen=True)
class Fitted:
    """Facts that the attacker learned at a cut from other texts."""

    mean: torch.Tensor
    scale: torch.Tensor
    """Mean and standard deviation of each channel, `[hidden]`."""
    weights: torch.Tensor
    """The weights of the linear probe, with the bias in the last row, `[hidden + 1, hidden]`."""

    def embedding_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The embeddings that the probe computes from activations, both `[seq, hidden]`."""
        return _with_one((rows - self.mean) / self.scale) @ self.weights


@dataclass(frozen=True)
class Search:
    """The result of a search."""

    recovered: float
    tried: list[int]
    """Candidates per position."""


class Attacker:
    """An attacker with the whole checkpoint and some texts."""

    def __init__(self, checkpoint: str, tokenizer: Any) -> None:
        self._checkpoint = checkpoint
        self.model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.embeddings: torch.Tensor = self.model.get_input_embeddings().weight.detach()
        # 16 characters per token are enough: tokens are far shorter.
        text = "\n".join(pydoc_data.topics.topics.values())[: 16 * PROBE_SEQUENCES * PROBE_LENGTH]
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        self._texts = list(ids[: PROBE_SEQUENCES * PROBE_LENGTH].split(PROBE_LENGTH))
        generator = torch.Generator().manual_seed(0)
        for _ in range(PROBE_SEQUENCES // 2):
            self._texts.append(torch.randint(len(tokenizer), (PROBE_LENGTH,), generator=generator))

    @property
    def blocks(self) -> Any:
        return self.model.get_decoder().layers

    def activations(self, embeds: torch.Tensor, cuts: Sequence[int]) -> dict[int, torch.Tensor]:
        """The activations before each cut of a text, `[seq, hidden]`, from its embeddings."""
        before = {0: embeds}

        def keep(cut: int) -> Callable[..., None]:
            def hook(_module: object, _inputs: object, output: Any) -> None:
                before[cut] = (output[0] if isinstance(output, tuple) else output)[0]

            return hook

        handles = [self.blocks[cut - 1].register_forward_hook(keep(cut)) for cut in cuts if cut]
        self.model.get_decoder()(inputs_embeds=embeds[None], use_cache=False)
        for handle in handles:
            handle.remove()
        return before

    def fit(self, cuts: Sequence[int]) -> dict[int, Fitted]:
        """Fits the probes of all cuts."""
        found = [self.activations(self.embeddings[ids], cuts) for ids in self._texts]
        wanted = normalize(self.embeddings[torch.cat([ids[1:] for ids in self._texts])], dim=1)
        # The first position is an attention sink with an unusual activation.
        return {cut: _fit(torch.cat([each[cut][1:] for each in found]), wanted) for cut in cuts}

    def search(self, seen: torch.Tensor, cut: int, fitted: Fitted, truth: Sequence[int]) -> Search:
        """Recovers a text from its activations `seen`, `[seq, hidden]`, by trying tokens.

        Args:
            truth: the tokens of the text. The search takes only the first one; the others serve to count right tokens.
        """
        first = FirstBlocks(self._checkpoint, cut)
        own, language = DynamicCache(), DynamicCache()
        expected = _similarity(fitted.embedding_of(seen), self.embeddings).argsort(dim=1, descending=True)
        right, tried, last = 0, [], truth[0]
        for position, row in enumerate(seen[1:], start=1):
            first.extend(last, position - 1, own)
            answer = self.model(torch.tensor([[last]]), cache=language, use_cache=True)
            likely = answer.logits[0, -1].argsort(descending=True)
            nearest, count = torch.inf, 0
            for tokens in _chunks(_interleaved(likely, expected[position])):
                found = first.candidates(tokens, position, own)
                distances = ((found - row) / fitted.scale).norm(dim=1) / (row / fitted.scale).norm()
                count += len(tokens)
                if distances.min() < nearest:
                    nearest, last = distances.min().item(), int(tokens[distances.argmin()])
                if nearest < NEAR:
                    break
            right += last == truth[position]
            tried.append(count)
        return Search(right / len(tried), tried)

    def next_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """The tokens that the head predicts from `rows`."""
        return self.model.get_output_embeddings()(self.model.get_decoder().norm(rows)).argmax(-1)


def _fit(rows: torch.Tensor, wanted: torch.Tensor) -> Fitted:
    mean, scale = rows.mean(0), rows.std(0)
    inputs = _with_one((rows - mean) / scale).double()
    gram = inputs.T @ inputs + 1e-3 * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    return Fitted(mean, scale, torch.linalg.solve(gram, inputs.T @ wanted.double()).float())


def _with_one(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)


def _similarity(rows: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Cosines, `[rows, vocabulary]`."""
    return normalize(rows, dim=1) @ normalize(embeddings, dim=1).T


def _interleaved(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """All tokens, ordered by the better of their ranks in two orders."""
    rank = torch.empty_like(one)
    rank[one] = torch.arange(len(one))
    rank_of_other = torch.empty_like(other)
    rank_of_other[other] = torch.arange(len(other))
    return torch.minimum(rank, rank_of_other).argsort(stable=True)


def _chunks(tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    start, sizes = 0, list(CHUNKS)
    while start < len(tokens):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        yield tokens[start : start + size]
        start += size


def _share(found: torch.Tensor, right: torch.Tensor) -> float:
    return (found == right).float().mean().item()


def print_row(ids: torch.Tensor, searched: int, cut: int, codec: Codec, attacker: Attacker, fitted: Fitted) -> None:
    """Prints the results of all attacks on one text at one cut."""

    def carried(rows: torch.Tensor) -> torch.Tensor:
        return codec.decode(codec.encode(rows), *rows.shape)

    embeds = carried(attacker.embeddings[ids])
    seen = carried(attacker.activations(embeds, [cut])[cut]) if cut else embeds
    by_angle = _share(_similarity(seen, attacker.embeddings).argmax(1), ids)
    by_distance = _share(torch.cdist(seen, attacker.embeddings).argmin(1), ids)
    probed = _share(_similarity(fitted.embedding_of(seen), attacker.embeddings).argmax(1), ids)
    told = _share(attacker.next_tokens(seen), attacker.model(ids[None], use_cache=False).logits[0].argmax(-1))
    search = attacker.search(seen[:searched], cut, fitted, ids[:searched].tolist())
    tried = f"{statistics.median(search.tried):,.0f} ({max(search.tried):,})"
    print(
        f"| {cut} | {codec.name} | {by_angle:.1%} | {by_distance:.1%} | {probed:.1%} | {search.recovered:.1%} "
        f"| {tried} | {told:.1%} |",
        flush=True,
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hugging Face id of a model with the structure of Llama")
    parser.add_argument("--text", type=Path, default=TEXT, help="the file with the text")
    parser.add_argument("--tokens", type=int, default=512, help="use this many tokens of the text")
    parser.add_argument("--searched", type=int, default=64, help="search for this many of them; a search is slow")
    parser.add_argument("--cuts", type=int, nargs="+", default=CUTS, help="activations are seen before these blocks")
    parser.add_argument("--codec", action="append", choices=list(CODECS), help="may be repeated (default: none, int8)")
    arguments = parser.parse_args()

    logging.set_verbosity_error()  # hides warnings about blocks that a cut leaves out
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    text = arguments.text.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0, : arguments.tokens]
    attacker = Attacker(arguments.checkpoint, tokenizer)
    blocks = len(attacker.blocks)
    if not all(0 <= cut <= blocks for cut in arguments.cuts):
        parser.error(f"cuts must lie between 0 and {blocks}")
    searched = min(arguments.searched, len(ids))
    print(f"{blocks} blocks; {len(ids)} tokens of {arguments.text.name}, of which {searched} were searched.\n")
    print(
        "| seen before block | codec | nearest embedding, angle | distance | linear probe | search "
        "| tokens tried per position, median (maximum) | next token by logit lens |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for cut, fitted in attacker.fit(arguments.cuts).items():
        for name in arguments.codec or ["none", "int8"]:
            print_row(ids, searched, cut, CODECS[name], attacker, fitted)


if __name__ == "__main__":
    main()
